"""DSA indexer logits of decode for sm_90a: K from the pages of the indexer cache.

    out[r * NEXT_N + d, j] = k_scale[j] * sum_h max(q[r, d, h] . k[j], 0) * weights[r * NEXT_N + d, h]
    for j below lens[r] (the length of the last query of request r), and on to the end of that page

Tiling and pipeline: common/mqa_logits.py. A tile is one request with its NEXT_N queries, a block one page of 64 tokens,
a stage GROUPS pages. CTAs take equal shares of all pages; table entries behind a request's length are not read.

A page of the cache has 64 rows of 128 e4m3, then 64 float32 scales; pages may be any multiple of 16 bytes apart.

Cannot: another page size or width; more than two queries a request (flatten them); heads other than 32 and 64.
"""

# --- constants: replaced when rendered ---
HEADS = 64
NEXT_N = 1
GROUPS = 4
STAGES = 6
# --- end of constants ---

import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import Float8E4M3FN, Float32, Int32, Uint8

from common.mqa_logits import DIM, PAGE, MqaLogits
from common.sm90 import EVICT_FIRST

TOKEN_BYTES = DIM + 4


class Fp8PagedMqaLogits(MqaLogits):
    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        cache: cute.Tensor,
        weights: cute.Tensor,
        lens: cute.Tensor,
        table: cute.Tensor,
        out: cute.Tensor,
        ctas: Int32,
        stream,
    ):
        rows = cute.make_tensor(q.iterator, cute.make_layout((q.shape[0] * NEXT_N * HEADS, DIM), stride=(DIM, 1)))
        pages, step = cache.shape[0], cache.stride[0]
        k = cute.make_tensor(
            cute.recast_ptr(cache.iterator, dtype=Float8E4M3FN),
            cute.make_layout((PAGE, DIM, pages), stride=(DIM, 1, cute.assume(step, divby=16))),
        )
        scale = cute.make_tensor(
            cute.recast_ptr(cache.iterator + PAGE * DIM, dtype=Float32).align(16),
            cute.make_layout((PAGE, pages), stride=(1, cute.assume(step // 4, divby=4))),
        )
        self.launch(rows, k, scale, weights, lens, table, out, ctas, stream)


def fake_args():
    """Stand-ins with the promises of the op: q contiguous, pages 16-byte aligned; all sizes dynamic."""

    def any_int():
        return cute.sym_int()

    B, M = any_int(), any_int()
    page = (cute.sym_int64(divisibility=16), TOKEN_BYTES, cute.sym_int64(), 1)
    return (
        rt.make_fake_tensor(Float8E4M3FN, (B, NEXT_N, HEADS, DIM), (NEXT_N * HEADS * DIM, HEADS * DIM, DIM, 1),
                            assumed_align=16),
        rt.make_fake_tensor(Uint8, (any_int(), PAGE, 1, TOKEN_BYTES), page, assumed_align=16),
        rt.make_fake_tensor(Float32, (M, HEADS), (cute.sym_int64(divisibility=4), 1), assumed_align=16),
        rt.make_fake_tensor(Int32, (B,), (cute.sym_int64(),), assumed_align=4),
        rt.make_fake_tensor(Int32, (B, any_int()), (cute.sym_int64(), 1), assumed_align=4),
        rt.make_fake_tensor(Float32, (M, any_int()), (cute.sym_int64(), 1), assumed_align=4),
        Int32(1),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return (
        Fp8PagedMqaLogits(HEADS, NEXT_N, GROUPS, STAGES, 2, paged=True, ordered=False, hint=EVICT_FIRST),
        fake_args(),
    )
