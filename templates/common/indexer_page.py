"""The planar page of the indexer cache: 64 rows of 128 e4m3, then 64 float32 scales. Pages may be further apart."""

import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import Int64, Uint8

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


def fake_cache():
    """[pages, 64, 1, 132] uint8, whose shape says sizes only."""
    stride = (cute.sym_int64(divisibility=16), TOKEN_BYTES, cute.sym_int64(), 1)
    return rt.make_fake_tensor(Uint8, (cute.sym_int(), PAGE, 1, TOKEN_BYTES), stride, assumed_align=16)
