"""Which token a query row of cached_mla is, found on the device: rows are grouped in tiles of `tile` tokens.

Tiles of one token (decode): tile k is sequence first + k, with its one token. Longer ones (context): sequence i has the
tiles from start[i] // tile + i on, where start is its first token. This bound leaves room for every sequence whatever
the lengths and gaps between them, so no prefix sum is needed; tiles that stay free have no token. A tile that is not
full has its tokens at the end: a row in front of them then sees fewer keys than they, and none that does not exist.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

# bits of the flags: token k is row k of the inputs; q_pe is copied into tiles; the rows see what was cached before this
# call, and nothing else
GENERATE, COPY_PE, PREFIX = 1, 2, 4


@cute.jit
def locate(row, tile0, tile, first, sequences, tokens, flags, mSeqLen: cute.Tensor, mStart: cute.Tensor):
    """(token or -1, sequence, index in its sequence, tokens of the tile, index of the tile's first one)"""
    k = tile0 + row // tile
    u = row % tile
    token, index, count, begin = Int32(-1), Int32(0), Int32(0), Int32(0)
    sequence = first + cutlass.min(k, sequences - 1)
    if tile == 1:
        if k < sequences:
            count = Int32(1)
            token = k
            if (flags & GENERATE) == 0:
                token = mStart[sequence]
                count = cutlass.min(mSeqLen[sequence], 1)
    else:
        low, high = Int32(0), sequences - 1  # the last sequence whose tiles begin at or before k
        while low < high:
            middle = (low + high + 1) // 2
            if mStart[first + middle] // tile + middle <= k:
                low = middle
            else:
                high = middle - 1
        sequence = first + low
        start = mStart[sequence]
        nth = k - (start // tile + low)
        if nth >= 0:
            begin = nth * tile
            count = cutlass.max(cutlass.min(mSeqLen[sequence] - begin, tile), 0)
            index = begin + u - (tile - count)
            token = start + index
    if u < tile - count or token >= tokens:
        token = Int32(-1)
    return token, sequence, index, count, begin


@cute.jit
def last_sequence(token, sequences, mStart: cute.Tensor):
    """The last one that begins at or before the token, or the first one."""
    low, high = Int32(0), sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if mStart[middle] <= token:
            low = middle
        else:
            high = middle - 1
    return low


@cute.jit
def token_row(mX: cute.Tensor, token):
    """Where the values of a token begin in [batch, s, ...], one of batch and s being 1."""
    step = mX.stride[1] if mX.shape[1] > 1 else mX.stride[0]
    return mX.iterator + Int64(token) * step


@cute.jit
def has_slot(slot, position0, mCache: cute.Tensor):
    """Whether a sequence is one: skipped otherwise."""
    return slot >= 0 and slot < mCache.shape[0] and position0 >= 0


@cute.jit
def cache_row(slot, position, mCache: cute.Tensor):
    """Where a row of the slot cache begins; 64-bit."""
    return mCache.iterator + (Int64(slot) * mCache.stride[0] + Int64(position) * mCache.stride[1])
