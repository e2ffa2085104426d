"""Host side of the decode work split: launch arguments and workspace size, from shapes only.

No length is known here, so a launch captured in a CUDA graph stays right for all later lengths. What depends on the
lengths is decided on the device (templates/common/mla_split.py): these numbers are the parameters of that decision.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .tune import tuned

BLOCK_TOKENS = 64  # the unit of work, whatever the page size
MAX_PARTS = 160  # what one combine row can sum up
SWAP_ROWS = 16  # most query rows (s_q * heads) of the kernel with swapped operands
TILE_ROWS = 64  # query rows of a CTA of the seesaw kernel
COMBINE_WARPS = 8
SLICE = 128  # columns that one warp of the combine loads at a time


class Launch(NamedTuple):
    """Launch arguments of an mla_decode kernel, in the order of its signature (after `workspace` and the scalars).

    parts           CTAs per row tile that share the KV blocks; also the number of workspace slots / 2
    fixed           cost of starting a request, in blocks (even split)
    least           fewest blocks of a piece
    bias            how much slower, in blocks, an aligned split may be and still be taken
    warps_per_row   combine: warps that share one row over its parts (1, 2, 4, 8)
    slices          combine: 128-column slices that one warp handles (1, 2, 4)
    rows_per_warp   combine: rows that one warp does one after the other
    """

    parts: int
    fixed: int
    least: int
    bias: int
    warps_per_row: int
    slices: int
    rows_per_warp: int


@tuned
@lru_cache(maxsize=4096)
def launch_args(rows: int, batch: int, sms: int, latent: int = 512) -> Launch:
    """Launch arguments for `batch` requests of `rows` = s_q * heads query rows on a GPU with `sms` multiprocessors.

    Measured on an H200 with latent 512; latent 256 takes the same numbers.
    """
    if rows < 1 or batch < 1 or sms < 1:
        raise ValueError(f"rows, batch and sms must be at least 1, got {rows}, {batch}, {sms}")
    if latent not in (256, 512):
        raise ValueError(f"latent must be 256 or 512, got {latent}")
    swap = rows <= SWAP_ROWS
    tiles = 1 if swap else _ceil_div(rows, TILE_ROWS)
    parts = min(max(1, sms // tiles), MAX_PARTS)
    if batch >= parts:
        # Hardly any request is split: one warp per row and few blocks, so that the combine is over at once.
        return Launch(parts, 4, 6, 8, 1, latent // SLICE, 2)
    if swap and batch <= 2:
        # SMs left free let the combine become resident early: 0.3 us lost in the decode, 2 us gained in all.
        parts = max(1, parts * 8 // 11)
    warps, slices = _combine_shape(rows, batch, parts // batch, sms, latent)
    return Launch(parts, 1, 1 if swap else 2, 3, warps, slices, 1)


def combine_blocks(rows: int, batch: int, launch: Launch, latent: int = 512) -> int:
    """Thread blocks of the combine."""
    rows_per_block = COMBINE_WARPS // launch.warps_per_row * launch.rows_per_warp
    return _ceil_div(rows, rows_per_block) * (latent // SLICE // launch.slices) * min(batch, launch.parts)


def workspace_floats(parts: int, rows: int, latent: int) -> int:
    """fp32 elements of the workspace: partial outputs (2 * parts, rows, latent), then their log-sum-exps."""
    return 2 * parts * rows * (latent + 1)


def _combine_shape(rows: int, batch: int, pieces: int, sms: int, latent: int) -> tuple[int, int]:
    """(warps_per_row, slices): the widest whose grid still fits in one wave (4 blocks per SM) and whose warps all have
    a part to read; a second wave costs 2 to 4 us."""
    whole = latent // SLICE
    shapes = [(8, s) for s in (1, 2, 4) if s <= whole] + [(w, whole) for w in (4, 2, 1)]
    for warps, slices in shapes:
        if warps <= pieces and _ceil_div(rows * warps, COMBINE_WARPS) * (whole // slices) * batch <= 4 * sms:
            return warps, slices
    return 1, whole


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
