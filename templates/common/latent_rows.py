"""One warp copies a row of 16-bit values, eight of them (16 bytes) a lane and step, or rounds it to e4m3."""

import cutlass
import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float16, Float32, Int32, const_expr

from common.e4m3 import store_e4m3
from common.warp_mma import e4m3x2_to_f16x2

PIECE = 8  # values of a lane's load
WARP_PIECE = 32 * PIECE


def row_steps(width):
    return -(-width // WARP_PIECE)


def row_registers(width, dtype):
    """Room for a lane's part of a row."""
    return cute.make_rmem_tensor((PIECE, row_steps(width)), dtype)


def piece_at(pointer, count=PIECE):
    return cute.make_tensor(pointer, cute.make_layout(count))


@cute.jit
def load_row(source, rRow, lane, width: cutlass.Constexpr):
    for i in cutlass.range_constexpr(row_steps(width)):
        at = i * WARP_PIECE + lane * PIECE
        if const_expr((i + 1) * WARP_PIECE <= width):
            cute.autovec_copy(piece_at((source + at).align(16)), rRow[None, i])
        else:
            if at < width:
                cute.autovec_copy(piece_at((source + at).align(16)), rRow[None, i])


@cute.jit
def store_row(rRow, target, lane, width: cutlass.Constexpr, align: cutlass.Constexpr):
    for i in cutlass.range_constexpr(row_steps(width)):
        at = i * WARP_PIECE + lane * PIECE
        if const_expr((i + 1) * WARP_PIECE <= width):
            cute.autovec_copy(rRow[None, i], piece_at((target + at).align(align)))
        else:
            if at < width:
                cute.autovec_copy(rRow[None, i], piece_at((target + at).align(align)))


@cute.jit
def quantised(rRow, scale, width: cutlass.Constexpr, native: cutlass.Constexpr):
    """rRow / scale as e4m3, rounded once and saturated. native: the arch has the conversions (sm_89 and newer)."""
    inverse = cute.arch.rcp_approx(scale)
    rQ = row_registers(width, Float8E4M3FN)
    for i in cutlass.range_constexpr(row_steps(width)):
        rY = cute.make_rmem_tensor((PIECE,), Float32)
        for j in cutlass.range_constexpr(PIECE):
            x = rRow[j, i].to(Float32)
            y = x * inverse
            refined = cute.math.fma(cute.math.fma(-y, scale, x), inverse, y)  # one Newton step; NaN for infinities
            rY[j] = y if cute.math.absf(y) > 1024.0 else refined  # saturated in any case
        store_e4m3(rY, rQ[None, i], native)
    return rQ


@cute.jit
def dequantise(rQ, rRow, scale, width: cutlass.Constexpr, native: cutlass.Constexpr):
    """rRow <- rQ * scale: the row as a reader of the cache sees it."""
    for i in cutlass.range_constexpr(row_steps(width)):
        rWords = cute.recast_tensor(rQ[None, i], Int32)
        rHalves = cute.make_rmem_tensor((PIECE // 2,), Int32)
        for w in cutlass.range_constexpr(PIECE // 2):
            rHalves[w] = e4m3x2_to_f16x2(rWords[w // 2], w % 2 == 1, native)
        rX = cute.recast_tensor(rHalves, Float16)
        for j in cutlass.range_constexpr(PIECE):
            rRow[j, i] = (rX[j].to(Float32) * scale).to(rRow.element_type)


@cute.jit
def store_cached(rLatent, rPe, target, lane, latent: cutlass.Constexpr, rope: cutlass.Constexpr, mScale,
                 e4m3: cutlass.Constexpr, native: cutlass.Constexpr, read_back: cutlass.Constexpr):
    """[rLatent | rPe] into a row of the cache at `target`. read_back: they become what the cache has."""
    for rRow, at, width in ((rLatent, 0, latent), (rPe, latent, rope)):
        if const_expr(e4m3):
            rQ = quantised(rRow, mScale[0], width, native)
            store_row(rQ, target + at, lane, width, PIECE)
            if const_expr(read_back):
                dequantise(rQ, rRow, mScale[0], width, native)
        else:
            store_row(rRow, target + at, lane, width, 2 * PIECE)
