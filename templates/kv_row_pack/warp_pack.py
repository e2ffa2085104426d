"""Latent rows into a cache of 656-byte rows (FORMAT fp8) or 1152-byte rows (bf16).

    fp8    512 e4m3 | 4 float32 scales, one per 128 columns | 64 bf16     scale = 2^ceil(log2(max(amax / 448, 1e-4)))
    bf16   512 bf16 | 64 bf16

A warp moves a token: lane l has columns 16 l .. 16 l + 15 of the latent row, so that 8 lanes share a scale. Negative
slots are skipped. Two tokens with one slot: either of them.
"""

# --- constants: replaced when rendered ---
FORMAT = "fp8"
WARPS = 4
# --- end of constants ---

import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import BFloat16, Float32, Int64, Uint8, Uint32, const_expr

from common.fp8_rows import E4M3_MAX, lanes_amax, load_words, quantise, store_words, unpack

LATENT, ROPE, TILE = 512, 64, 128
RATIO_FLOOR = 1e-4  # of amax / 448, where the indexer has one of amax
ROW = LATENT + 4 * (LATENT // TILE) + 2 * ROPE if FORMAT == "fp8" else 2 * (LATENT + ROPE)
TAIL = ROW - 2 * ROPE  # where the rotated columns begin

assert FORMAT in ("fp8", "bf16")


class KvRowPack:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(self, kv_c: cute.Tensor, k_pe: cute.Tensor, cache: cute.Tensor, slots: cute.Tensor, stream):
        self.kernel(kv_c, k_pe, cache, slots).launch(
            grid=[cute.ceil_div(slots.shape[0], WARPS), 1, 1], block=[32 * WARPS, 1, 1], stream=stream, use_pdl=True
        )

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(self, mC: cute.Tensor, mPe: cute.Tensor, mCache: cute.Tensor, mSlots: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = tid % 32
        t = block * WARPS + tid // 32
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if t < mSlots.shape[0]:
            slot = Int64(mSlots[t])
            src = mC.iterator + (Int64(t) * mC.stride[0] + 16 * lane)
            words = [*load_words(src, 4), *load_words(src + 8, 4)]
            tail = load_words(mPe.iterator + (Int64(t) * mPe.stride[0] + 8 * (lane % 8)), 4)
            if slot >= 0:
                page = slot // mCache.shape[1]
                offset = slot - page * mCache.shape[1]
                row = mCache.iterator + (page * mCache.stride[0] + offset * ROW)
                if const_expr(FORMAT == "fp8"):
                    rX = cute.make_rmem_tensor((16,), Float32)
                    unpack(rX, 0, words)
                    ratio = cute.arch.fmax(lanes_amax(rX, 8) / Float32(E4M3_MAX), Float32(RATIO_FLOOR))
                    codes, scale = quantise(rX, ratio, True)
                    store_words(row + 16 * lane, *codes)
                    if lane % 8 == 0:
                        cute.arch.inline_ptx(
                            "st.global.b32 [{$r0}], {$r1};",
                            read_only_args=[(row + (LATENT + lane // 2)).to_llvm_ptr(), scale.bitcast(Uint32)],
                        )
                else:
                    store_words(row + 32 * lane, *words[:4])
                    store_words(row + (32 * lane + 16), *words[4:])
                if lane < 8:
                    store_words(row + (TAIL + 16 * lane), *tail)


def fake_args():
    """Stand-ins with the promises of the op: rows of inputs 16-byte aligned, rows of the cache contiguous in a page."""

    def stride():
        return cute.sym_int64(divisibility=8)

    rows = cute.sym_int()
    pool = (cute.sym_int(), cute.sym_int(), 1, ROW)
    return (
        rt.make_fake_tensor(BFloat16, (rows, LATENT), (stride(), 1), assumed_align=16),
        rt.make_fake_tensor(BFloat16, (rows, ROPE), (stride(), 1), assumed_align=16),
        rt.make_fake_tensor(Uint8, pool, (cute.sym_int64(divisibility=16), ROW, cute.sym_int64(), 1), assumed_align=16),
        rt.make_fake_tensor(Int64, (cute.sym_int(),), (1,), assumed_align=8),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return KvRowPack(), fake_args()
