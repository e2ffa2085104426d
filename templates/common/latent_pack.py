"""A latent row into a cache that sparse attention reads, by a warp: lane l has columns 16 l .. 16 l + 15 of the 512, so
that 8 lanes share a scale, and lanes 0 .. 7 have 8 each of the 64 rotated ones behind them.

    fp8    512 e4m3 | 4 float32 scales, one per 128 columns | 64 bf16     scale = 2^ceil(log2(max(amax / 448, 1e-4)))
    bf16   512 bf16 | 64 bf16
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int64, Uint32, const_expr

from common.fp8_rows import high_half, lanes_amax, largest, load_words, low_half, pack, quantise, store_words

LATENT, ROPE, TILE = 512, 64, 128
LEAST_ROW_SCALE = 114  # 1e-4, the floor of amax / 448 where the indexer has one of amax
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
def store_latent_row(mCache, slot, latent, rope, lane, kind: cutlass.Constexpr, native: cutlass.Constexpr):
    """Nothing where the slot is negative. native: the arch converts to e4m3."""
    row = row_address(mCache, slot)
    when = slot >= 0
    if const_expr(kind == "fp8"):
        top = largest(latent)
        amax, _ = lanes_amax(top, top, TILE // 16)
        codes, scale = quantise(latent, amax, True, native, LEAST_ROW_SCALE)
        store_words(row + 16 * lane, *codes, when=when)
        store_words(row + (LATENT + lane // 2), scale.bitcast(Uint32), when=when and lane % 8 == 0)
    else:
        store_words(row + 32 * lane, *latent[:4], when=when)
        store_words(row + (32 * lane + 16), *latent[4:], when=when)
    store_words(row + (ROW_BYTES[kind] - 2 * ROPE + 16 * lane), *rope, when=when and lane < 8)


@cute.jit
def turned(words, rCos, rSin):
    """`words`, 4 pairs of bf16 (2 i, 2 i + 1), turned by 4 angles in float32 and rounded once."""
    found = []
    for j in cutlass.range_constexpr(4):
        a, b = low_half(words[j]), high_half(words[j])
        found.append(pack(a * rCos[j] - b * rSin[j], b * rCos[j] + a * rSin[j]))
    return found
