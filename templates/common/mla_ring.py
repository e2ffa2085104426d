"""Views and layouts for kernels that read the paged cache through a ring of shared-memory slots.

A block is 64 tokens, a tile 64 tokens x 64 columns, a slot `slot_tiles` tiles. In a slot the 8-token groups of all
tiles lie together, so a page of 16 or 32 tokens is a contiguous piece of it and one TMA box:

    slot = [tokens 0-7: tile 0 | tile 1 | tile 2] [tokens 8-15: tile 0 | tile 1 | tile 2] ... [tokens 56-63: ...]
            `------------ page of 16 tokens: one box (64 columns, 8 rows, 3 tiles, 2 groups) ------------'
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from common.sm90 import row_strides, smem_atom


def ring_layout(dtype, slot_tiles, slots):
    """(64 tokens, 64 * slot_tiles columns, slots), swizzled; 8-token groups outermost within a slot."""
    return cute.tile_to_shape(smem_atom(dtype), (64, 64 * slot_tiles, slots), order=(1, 0, 2))


def ring_boxes(slot_tiles, boxes, slots):
    """The ring as the TMA sees it: (row in group, group in box, column, tile, box, slot)."""
    group = 512 * slot_tiles
    stride = (64, group, 1, 512, group * (8 // boxes), group * 8)
    return cute.make_layout((8, 8 // boxes, 64, slot_tiles, boxes, slots), stride=stride)


def ring_box(dtype, slot_tiles, boxes):
    """Shared-memory layout of one TMA box."""
    outer = cute.select(ring_boxes(slot_tiles, boxes, 1), mode=[0, 1, 2, 3])
    return cute.make_composed_layout(smem_atom(dtype).inner, 0, outer)


@cute.jit
def grouped_pages(kv: cute.Tensor, page_size: cutlass.Constexpr, tiles: cutlass.Constexpr):
    """(pages, page_size, 64 * tiles) as (row in group, group, column, tile, page)."""
    row = kv.stride[1]
    page = kv.stride[0] if kv.shape[0] > 1 else Int64(64)  # the stride of a mode of size 1 may be anything
    pages = cutlass.max(kv.shape[0], 1)
    shape, stride = (8, page_size // 8, 64, tiles, pages), (row, 8 * row, 1, 64, page)
    return cute.make_tensor(kv.iterator, cute.make_layout(shape, stride=stride))


@cute.jit
def packed_rows(x: cute.Tensor, offset: Int32, n: cutlass.Constexpr):
    """(B, s_q, H, columns) from column `offset` on as (s_q * H rows, 64 columns, n tiles, B)."""
    row, request = row_strides(x)
    return cute.make_tensor(
        x.iterator + cute.assume(offset, divby=16),
        cute.make_layout((x.shape[1] * x.shape[2], 64, n, x.shape[0]), stride=(row, 1, 64, request)),
    )


@cute.jit
def page_of_box(table: cute.Tensor, req, j, last, lane, outside, page_size: cutlass.Constexpr):
    """Page of block j of a request whose last page is number `last` (-1: none): with pages smaller than a block, of its
    box lane % (64 / page_size). Behind the last page it is that one; without pages it is `outside`."""
    page = outside
    if last >= 0:
        if const_expr(page_size > 64):
            page = table[req, cutlass.min(j // (page_size // 64), last)]
        else:
            boxes = 64 // page_size
            page = table[req, cutlass.min(j * boxes + lane % boxes, last)]
    return page
