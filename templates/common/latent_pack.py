"""A latent row into a cache that sparse attention reads, by a warp: lane l has columns 16 l .. 16 l + 15 of the 512, so
that 8 lanes share a scale, and lanes 0 .. 7 have 8 each of the 64 rotated ones behind them.

    fp8    512 e4m3 | 4 float32 scales, one per 128 columns | 64 bf16     scale = 2^ceil(log2(max(amax / 448, 1e-4)))
    bf16   512 bf16 | 64 bf16
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int64, Uint32, const_expr

from common.e4m3 import E4M3_MAX
from common.fp8_rows import lanes_amax, load_words, quantise, store_words, unpack

LATENT, ROPE, TILE = 512, 64, 128
RATIO_FLOOR = 1e-4  # of amax / 448, where the indexer has one of amax
ROW_BYTES = {"fp8": LATENT + 4 * (LATENT // TILE) + 2 * ROPE, "bf16": 2 * (LATENT + ROPE)}


@cute.jit
def load_latent(mC, t, lane):
    """This lane's columns of row t, two a word."""
    source = mC.iterator + (Int64(t) * mC.stride[0] + 16 * lane)
    return [*load_words(source, 4), *load_words(source + 8, 4)]


@cute.jit
def load_rope(mPe, t, lane):
    """The rotated columns of this lane, of every eight lanes the same."""
    return load_words(mPe.iterator + (Int64(t) * mPe.stride[0] + 8 * (lane % 8)), 4)


@cute.jit
def row_address(mCache, slot):
    """Where the row of a slot is, in a pool [pages, page_size, 1, bytes] of contiguous pages."""
    page = slot // mCache.shape[1]
    offset = slot - page * mCache.shape[1]
    return mCache.iterator + (page * mCache.stride[0] + offset * mCache.shape[3])


@cute.jit
def store_latent_row(row, latent, rope, lane, kind: cutlass.Constexpr, native: cutlass.Constexpr):
    """native: the arch converts to e4m3."""
    if const_expr(kind == "fp8"):
        rX = cute.make_rmem_tensor((16,), Float32)
        unpack(rX, 0, latent)
        ratio = cute.arch.fmax(lanes_amax(rX, 8) / Float32(E4M3_MAX), Float32(RATIO_FLOOR))
        codes, scale = quantise(rX, ratio, True, native)
        store_words(row + 16 * lane, *codes)
        if lane % 8 == 0:
            cute.arch.inline_ptx(
                "st.global.b32 [{$r0}], {$r1};",
                read_only_args=[(row + (LATENT + lane // 2)).to_llvm_ptr(), scale.bitcast(Uint32)],
            )
    else:
        store_words(row + 32 * lane, *latent[:4])
        store_words(row + (32 * lane + 16), *latent[4:])
    if lane < 8:
        store_words(row + (ROW_BYTES[kind] - 2 * ROPE + 16 * lane), *rope)


@cute.jit
def turned(words, rCos, rSin):
    """`words`, 4 pairs of bf16 (2 i, 2 i + 1), turned by 4 angles in float32 and rounded once."""
    rOut = cute.make_rmem_tensor((8,), BFloat16)
    for j in cutlass.range_constexpr(4):
        a = (words[j] << 16).bitcast(Float32)
        b = (words[j] & Uint32(0xFFFF0000)).bitcast(Float32)
        rOut[2 * j] = BFloat16(a * rCos[j] - b * rSin[j])
        rOut[2 * j + 1] = BFloat16(b * rCos[j] + a * rSin[j])
    rWords = cute.recast_tensor(rOut, Uint32)
    return [rWords[j] for j in range(4)]
