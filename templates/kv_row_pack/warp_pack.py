"""Latent rows into a cache of 656-byte rows (ROW fp8) or 1152-byte rows (bf16); any arch from sm_80 on.

A warp moves a token. Formats and lanes: templates/common/latent_pack.py. Negative slots are skipped. Two tokens with
one slot: either of them.

From sm_90 on it is launched with PDL, waits for the kernel before it, and lets the one behind it start at once.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
ROW = "fp8"
WARPS = 4
# --- end of constants ---

import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import BFloat16, Int64, Uint8, const_expr

from common.latent_pack import LATENT, ROPE, ROW_BYTES, load_latent, load_rope, store_latent_row

CVT = int(ARCH[3:].rstrip("a")) >= 89  # has the conversion to e4m3
PDL = int(ARCH[3:].rstrip("a")) >= 90
BYTES = ROW_BYTES[ROW]


class KvRowPack:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(self, kv_c: cute.Tensor, k_pe: cute.Tensor, cache: cute.Tensor, slots: cute.Tensor, stream):
        self.kernel(kv_c, k_pe, cache, slots).launch(
            grid=[cute.ceil_div(slots.shape[0], WARPS), 1, 1], block=[32 * WARPS, 1, 1], stream=stream, use_pdl=PDL
        )

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(self, mC: cute.Tensor, mPe: cute.Tensor, mCache: cute.Tensor, mSlots: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = tid % 32
        t = block * WARPS + tid // 32
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        if t < mSlots.shape[0]:
            slot = Int64(mSlots[t])
            latent = load_latent(mC, t, lane)
            rope = load_rope(mPe, t, lane)
            store_latent_row(mCache, slot, latent, rope, lane, ROW, CVT)


def fake_args():
    """Stand-ins with the promises of the op: rows of inputs 16-byte aligned, rows of the cache contiguous in a page."""

    def stride(divisor=8):
        return cute.sym_int64(divisibility=divisor)

    rows = cute.sym_int()
    pool = (cute.sym_int(), cute.sym_int(), 1, BYTES)
    return (
        rt.make_fake_tensor(BFloat16, (rows, LATENT), (stride(), 1), assumed_align=16),
        rt.make_fake_tensor(BFloat16, (rows, ROPE), (stride(), 1), assumed_align=16),
        rt.make_fake_tensor(Uint8, pool, (stride(16), BYTES, stride(), 1), assumed_align=16),
        rt.make_fake_tensor(Int64, (cute.sym_int(),), (1,), assumed_align=8),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return KvRowPack(), fake_args()
