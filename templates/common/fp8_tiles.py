"""Tiles of e4m3 in shared memory for wgmma: 128-byte rows that TMA fills, and the MMA that reads them.

Rows are swizzled over 128 bytes, 128 columns of e4m3 (common.sm90 has 64 columns, whatever the type): half as many
boxes of TMA, and no bank conflicts of wgmma.
"""

import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import Float8E4M3FN, Float32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup


def atom(dtype):
    """8 rows of 128 bytes."""
    return warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, dtype)


def box(rows, cols, dtype=Float8E4M3FN):
    """Swizzled (rows, cols) layout of what one TMA instruction moves."""
    return cute.tile_to_shape(atom(dtype), (rows, cols), order=(0, 1))


def ring(rows, stages, dtype=Float8E4M3FN, cols=128):
    """Swizzled (rows, cols, stages) layout."""
    return cute.tile_to_shape(atom(dtype), (rows, cols, stages), order=(0, 1, 2))


def tiled_mma(n):
    """64 x n wgmma of one warpgroup, both operands K-major in shared memory."""
    major = OperandMajorMode.K
    return hh.make_trivial_tiled_mma(
        Float8E4M3FN, Float8E4M3FN, major, major, Float32, (1, 1, 1), (64, n), warpgroup.OperandSource.SMEM
    )
