"""Where the pieces of a request of paged MLA decode lie, for kernels whose combine is a kernel of its own.

Two splits. The one of mla_split.py gives every part one contiguous share of the blocks. The batch-invariant one cuts
every request into pieces of a constant number of blocks, whatever else is in the batch: piece i of request r is number
(pieces of the requests before r) + i of all pieces, and a part takes a contiguous range of these numbers. So which CTA
computes a piece changes with the batch, and what it computes does not.

`lane` is the lane of a whole, converged warp; every lane gets the answer.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from common.mla_split import choose, n_blocks
from common.warp import lanes_sum, warp_inclusive_sum


@cute.jit
def n_pieces(seqlen, piece_blocks: cutlass.Constexpr):
    """Pieces of a request under the batch-invariant split; one of length 0 has one."""
    return (n_blocks(seqlen) + (piece_blocks - 1)) // piece_blocks


@cute.jit
def pieces_before(seqlens: cute.Tensor, end: Int32, piece_blocks: cutlass.Constexpr, lane: Int32):
    """Pieces of the requests 0 .. end - 1."""
    total = Int32(0)
    for i in cutlass.range(lane, end, 32, unroll=4):
        total = total + n_pieces(seqlens[i], piece_blocks)
    return lanes_sum(total, 32)


@cute.jit
def locate_piece(seqlens: cute.Tensor, B: Int32, x: Int32, piece_blocks: cutlass.Constexpr, lane: Int32):
    """(request, piece in it) of piece number x."""
    base = Int32(0)
    r = Int32(0)
    start = Int32(0)  # pieces before r
    for i0 in cutlass.range(0, B, 32, unroll=1):
        i = i0 + lane
        incl = n_pieces(seqlens[i], piece_blocks) if i < B else Int32(0)
        incl = warp_inclusive_sum(incl, lane) + base
        n = cute.arch.popc(cute.arch.vote_ballot_sync(i < B and incl <= x))
        last = cute.arch.shuffle_sync(incl, offset=cutlass.max(n - 1, 0))
        start = last if n > 0 else start
        r = r + n
        base = cute.arch.shuffle_sync(incl, offset=31)
    return r, x - start


@cute.jit
def slots_of(
    seqlens: cute.Tensor,
    B: Int32,
    req: Int32,
    parts: Int32,
    fixed: Int32,
    least: Int32,
    bias: Int32,
    s: Int32,
    k: Int32,
    lane: Int32,
):
    """(p0, n) of a request under the split of mla_split.py: its pieces lie in the slots 2 p0 + 1, 2 (p0 + 1),
    2 (p0 + 2), ...; with n < 2 it has no slot."""
    aligned, share, piece, _ = choose(seqlens, B, parts, fixed, least, bias, s, k, lane)
    blocks = n_blocks(seqlens[req])
    p0 = req * s
    n = Int32(1)
    if aligned:
        if s > 0:
            n = (blocks + piece - 1) // piece
    else:
        before = Int32(0)
        for i in cutlass.range(lane, req, 32, unroll=4):
            before = before + n_blocks(seqlens[i]) + fixed
        first = lanes_sum(before, 32) + fixed  # where its first block lies on the line
        p0 = first // share
        n = (first + blocks - 1) // share - p0 + 1
    return p0, n
