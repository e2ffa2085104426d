"""Writes new latent rows into a paged cache: a warp a row; any arch from sm_80 on.

    kv_cache[slot // page_size, slot % page_size] = [latent[t] | k_pe[t]]          slot = slots[t]

The row is copied where the cache has the type of the values; in an e4m3 cache it is divided by a scale (float32, not
rounded before the conversion) and saturated. A slot that is negative or behind the cache writes nothing. All loads of
a row are issued before the first store. Offsets into the cache are 64-bit.

From sm_90 on it is launched with PDL, waits for the kernel before it, and lets the one behind it start at once.

    block: ROWS warps, token t0 + w each             lane l: pieces l, l + 32, .. of 8 values of the row's two parts
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
DTYPE = "bf16"
E4M3_CACHE = False
SLOTS = "i64"
LATENT = 512
ROPE = 64
ROWS = 4
# --- end of constants ---

import cutlass.cute as cute
import cutlass.cute.runtime as rt
from common.latent_rows import load_row, row_registers, store_cached
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32, Int32, Int64, const_expr

VALUE = BFloat16 if DTYPE == "bf16" else Float16
CACHE = Float8E4M3FN if E4M3_CACHE else VALUE
SLOT = Int32 if SLOTS == "i32" else Int64
PDL = int(ARCH[3:].rstrip("a")) >= 90
CVT = int(ARCH[3:].rstrip("a")) >= 89  # has the conversion to e4m3
STORE_BYTES = 8 if E4M3_CACHE else 16

assert SLOTS in ("i32", "i64") and LATENT % 8 == 0 and ROPE % 8 == 0


class AppendLatent:
    @cute.jit
    def __call__(self, latent: cute.Tensor, k_pe: cute.Tensor, kv_cache: cute.Tensor, slots: cute.Tensor,
                 scale: cute.Tensor, stream):
        self.kernel(latent, k_pe, kv_cache, slots, scale).launch(
            grid=[cute.ceil_div(latent.shape[0], ROWS), 1, 1], block=[32 * ROWS, 1, 1], stream=stream, use_pdl=PDL)

    @cute.kernel
    def kernel(self, mLatent: cute.Tensor, mPe: cute.Tensor, mCache: cute.Tensor, mSlots: cute.Tensor,
               mScale: cute.Tensor):
        block, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        lane = tid % 32
        t = block * ROWS + cute.arch.make_warp_uniform(tid // 32)
        if t < mLatent.shape[0]:
            slot = Int64(mSlots[t])
            page_size = mCache.shape[1]
            if slot >= 0 and slot < Int64(mCache.shape[0]) * page_size:
                rLatent = row_registers(LATENT, VALUE)
                load_row(mLatent.iterator + Int64(t) * mLatent.stride[0], rLatent, lane, LATENT)
                where = Int32(slot)  # the op refuses caches of 2^31 rows
                target = mCache.iterator + (Int64(where // page_size) * mCache.stride[0]
                                            + Int64(where % page_size) * mCache.stride[1])
                rPe = row_registers(ROPE, VALUE)
                load_row(mPe.iterator + Int64(t) * mPe.stride[0], rPe, lane, ROPE)
                store_cached(rLatent, rPe, target, lane, LATENT, ROPE, mScale, E4M3_CACHE, CVT, False)


def fake_args():
    """Stand-ins with the promises of the op: last stride 1, other strides multiples of 16 bytes, all dynamic."""
    n = cute.sym_int
    tokens = n()

    def stride(divisor=8):
        return cute.sym_int64(divisibility=divisor)

    return (
        rt.make_fake_tensor(VALUE, (tokens, LATENT), (stride(), 1), assumed_align=16),
        rt.make_fake_tensor(VALUE, (tokens, ROPE), (stride(), 1), assumed_align=16),
        rt.make_fake_tensor(CACHE, (n(), n(), LATENT + ROPE), (stride(), stride(), 1), assumed_align=STORE_BYTES),
        rt.make_fake_tensor(SLOT, (tokens,), (1,), assumed_align=SLOT.width // 8),
        rt.make_fake_tensor(Float32, (1,), (1,), assumed_align=4),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return AppendLatent(), fake_args()
