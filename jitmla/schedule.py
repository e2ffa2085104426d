"""Host side of the decode work split: launch arguments and workspace size, from shapes only.

No length is known here, so a launch captured in a CUDA graph stays right for all later lengths. What depends on the
lengths is decided on the device (templates/common/mla_split.py): these numbers are the parameters of that decision.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .tune import tuned

BLOCK_TOKENS = 64  # the unit of work, whatever the page size
MAX_PARTS = 160  # of one request: what a warp of the combine has weights for
MAX_ROWS = 512  # query rows (s_q * heads) of a request
PAGES = (64, 128, 32, 16)  # the best first
MAX_PAGE = 128
WHOLE = 1 << 20  # a bias that makes every split aligned
INVARIANT_TOKENS = 2048  # of a piece of the batch-invariant split (PIECE_BLOCKS of the portable template)
TILE_ROWS = 64  # query rows of a CTA of sm90_trio, the most there are


class Launch(NamedTuple):
    """The last launch arguments of an mla_decode kernel, in the order of its signature.

    parts   CTAs per row tile that share the KV blocks; also the number of workspace slots / 2. All CTAs must run at the
            same time, because those that share a request wait for each other: parts * row tiles <= multiprocessors
    fixed   cost of starting a request, in blocks (even split)
    least   fewest blocks of a piece
    bias    how much slower, in blocks, an aligned split may be and still be taken
    """

    parts: int
    fixed: int
    least: int
    bias: int


@tuned
@lru_cache(maxsize=4096)
def launch_args(rows: int, batch: int, sms: int, latent: int = 512, tile_rows: int = 0) -> Launch:
    """Launch arguments for `batch` requests of `rows` = s_q * heads query rows on a GPU with `sms` multiprocessors.
    tile_rows: query rows of a CTA of the kernel; 0: of the usual one.

    Measured on an H200 with latent 512; latent 256 takes the same numbers.
    """
    if rows < 1 or batch < 1 or sms < 1:
        raise ValueError(f"rows, batch and sms must be at least 1, got {rows}, {batch}, {sms}")
    if latent not in (256, 512):
        raise ValueError(f"latent must be 256 or 512, got {latent}")
    tiles = row_tiles(rows, tile_rows)
    parts = min(max(1, sms // tiles), MAX_PARTS)
    if batch >= parts:  # hardly any request is split
        return Launch(parts, 4, 6, 8)
    if tiles > 1:
        return Launch(parts, 1, 1 if tile_rows else 2, 3)
    # One row tile: limited by memory bandwidth, which a few CTAs less do not lower. Whole pieces instead:
    if batch <= 2:
        return Launch(max(batch, parts * 8 // 11), 1, 1, 3)  # more parts cost more to combine than they gain
    idle = parts % batch
    return Launch(parts - idle if idle * 20 <= parts else parts, 2, 1, 3)


def gather_launch(rows: int, batch: int, sms: int, tile_rows: int) -> Launch:
    """Launch arguments of the portable kernel: its CTAs have `tile_rows` query rows and do not wait for each other."""
    parts = max(1, sms // _ceil_div(rows, tile_rows))
    return Launch(parts, 4, 6, 8) if batch >= parts else Launch(parts, 2, 2, 3)


def invariant_slots(batch: int, max_tokens: int) -> int:
    """Pieces that requests of at most `max_tokens` tokens can have under the batch-invariant split."""
    return batch * max(1, _ceil_div(max_tokens, INVARIANT_TOKENS))


def row_tiles(rows: int, tile_rows: int = 0) -> int:
    """CTAs that share a part, each with tile_rows of the query rows; 0: with those of the usual kernel."""
    return _ceil_div(rows, tile_rows or TILE_ROWS)


def unusual_tile(rows: int, tile_rows: int) -> int:
    """tile_rows, or 0 where it gives as many row tiles as the usual kernel has."""
    return 0 if row_tiles(rows, tile_rows) == row_tiles(rows) else tile_rows


class Share(NamedTuple):
    """What a part has to do. blocks: of all its requests or pieces. requests: that it starts. pieces: of a request.
    even: whether its pieces are of an even split. busy: parts that have anything to do."""

    blocks: float
    requests: int
    pieces: int
    even: bool
    busy: int


def equal_share(launch: Launch, batch: int, tokens: int) -> Share:
    """The share of a part when all requests have `tokens` tokens: the decision of templates/common/mla_split.py."""
    blocks = max(1, _ceil_div(tokens, BLOCK_TOKENS))
    parts, fixed, least, bias = launch
    share = max(_ceil_div(batch * (blocks + fixed), parts), least)
    if parts < batch:
        requests = _ceil_div(batch, parts)
        if requests * (blocks + fixed) <= share + bias:
            return Share(requests * blocks, requests, 1, False, _ceil_div(batch, requests))
        return Share(share - fixed * batch / parts, requests, 2, True, parts)
    piece = max(_ceil_div(blocks, parts // batch), least)
    piece += piece % 2 if piece > 1 else 0
    if piece + fixed <= share + bias:
        pieces = _ceil_div(blocks, piece)
        return Share(min(piece, blocks), 1, pieces, False, batch * pieces)
    return Share(share - fixed * batch / parts, 1, 2, True, parts)


def workspace_floats(parts: int, rows: int, latent: int, slots: int = 0) -> int:
    """fp32 elements of the workspace: partial outputs (slots, rows, latent), then their log-sum-exps. slots: 2 * parts,
    unless given."""
    return (slots or 2 * parts) * rows * (latent + 1)


def semaphore_count(parts: int, rows: int, tile_rows: int = 0) -> int:
    """int32 counters of a launch: zero before it, and again after it. Launches that overlap need their own."""
    return parts * row_tiles(rows, tile_rows)


def context_tile(heads: int, sequences: int, tokens: int) -> int:
    """Tokens of a tile in which the new tokens of cached_mla's prefill sequences go through mla_decode: a power of two,
    no more rows than that takes, and no more tokens than a sequence has on average."""
    return min(most_tile(heads), max(2, 1 << (_ceil_div(tokens, sequences) - 1).bit_length()))


def most_tile(heads: int) -> int:
    """The largest such tile, which is the only one over prefixes."""
    return 1 << (MAX_ROWS // heads).bit_length() - 1


def context_tiles(tokens: int, sequences: int, tile: int) -> int:
    """Most tiles that sequences within `tokens` places can have, see templates/common/cached_rows.py."""
    return tokens // tile + sequences


def slot_page(length: int, slot_stride: int, stride: int) -> int:
    """Page size under which a slot of `length` tokens is a whole number of pages: the best one of those that have
    kernels of their own, else the largest; slots are slot_stride, tokens stride elements apart."""
    most = range(min(length, MAX_PAGE), 0, -1)
    return next(p for p in (*PAGES, *most) if length % p == 0 and slot_stride % (p * stride) == 0)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=4096)
def sparse_launch_args(tokens: int, heads: int, sms: int, whole: bool = False) -> Launch:
    """Launch arguments of sparse_mla for `tokens` query tokens, which mla_split takes for requests. whole: no token is
    split, so that a GPU with more multiprocessors than tokens has some idle. Measured on an H200."""
    if tokens < 1 or heads < 1 or sms < 1:
        raise ValueError(f"tokens, heads and sms must be at least 1, got {tokens}, {heads}, {sms}")
    parts = min(max(1, sms // row_tiles(heads)), MAX_PARTS)
    if whole:
        return Launch(min(parts, tokens), 4, 6, WHOLE)
    if tokens >= parts:  # hardly any token is split
        return Launch(parts, 4, 6, 8)
    return Launch(parts, 1, 1 if tokens <= 2 else 2, 3)


@lru_cache(maxsize=4096)
def divisor(d: int) -> tuple[int, int]:
    """(magic, shift) with x // d == (x * magic >> 32) >> shift for 0 <= x < 2^31, as two int32; magic 0 for d = 1.

    The error of magic, below d, times x stays below 2^(31 + bits), where 2^bits is the power of two at or above d."""
    if not 1 <= d < 2**31:
        raise ValueError(f"d must be from 1 to 2^31 - 1, got {d}")
    bits = (d - 1).bit_length()
    magic = _ceil_div(1 << (31 + bits), d)
    return (magic - (1 << 32) if magic >= 1 << 31 else magic, bits - 1) if d > 1 else (0, 0)
