"""The planar page of the indexer cache: 64 rows of 128 e4m3, then 64 float32 scales. Pages may be further apart."""

import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import Int32, Int64, Uint8

from common.fp8_rows import store_words

PAGE, DIM, SCALE_BYTES = 64, 128, 4
TOKEN_BYTES = DIM + SCALE_BYTES


@cute.jit
def code_address(mCache, page, offset):
    """Where the 128 codes of a token are."""
    return mCache.iterator + (Int64(page) * mCache.stride[0] + offset * DIM)


@cute.jit
def scale_address(mCache, page, offset):
    """Where its scale is."""
    return mCache.iterator + (Int64(page) * mCache.stride[0] + (PAGE * DIM + offset * SCALE_BYTES))


@cute.jit
def store_key(mCache, slot, codes, scale, lane):
    """16 bytes of the token's codes, of lane `lane` of eight, and by the first one the bits of its scale; nothing where
    the slot is negative."""
    page = slot >> 6
    offset = Int32(slot) & (PAGE - 1)
    store_words(code_address(mCache, page, offset) + 16 * lane, *codes, when=slot >= 0)
    store_words(scale_address(mCache, page, offset), scale, when=slot >= 0 and lane == 0)


def fake_cache():
    """[pages, 64, 1, 132] uint8, whose shape says sizes only."""
    stride = (cute.sym_int64(divisibility=16), TOKEN_BYTES, cute.sym_int64(), 1)
    return rt.make_fake_tensor(Uint8, (cute.sym_int(), PAGE, 1, TOKEN_BYTES), stride, assumed_align=16)
