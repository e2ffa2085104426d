"""Tiles of e4m3 in shared memory for wgmma: the ring that TMA fills, and the MMA that reads it."""

import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import Float8E4M3FN, Float32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from common.sm90 import smem_atom


def ring(rows, stages, dtype=Float8E4M3FN, cols=128):
    """Swizzled (rows, cols, stages) layout."""
    return cute.tile_to_shape(smem_atom(dtype), (rows, cols, stages), order=(0, 1, 2))


def tiled_mma(n):
    """64 x n wgmma of one warpgroup, both operands K-major in shared memory."""
    major = OperandMajorMode.K
    return hh.make_trivial_tiled_mma(
        Float8E4M3FN, Float8E4M3FN, major, major, Float32, (1, 1, 1), (64, n), warpgroup.OperandSource.SMEM
    )
