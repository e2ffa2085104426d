"""One warp copies a row of 16-bit values, eight of them (16 bytes) a lane and step."""

import cutlass
import cutlass.cute as cute
from cutlass import const_expr

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
