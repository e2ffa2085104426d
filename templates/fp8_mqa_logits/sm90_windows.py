"""DSA indexer logits of prefill for sm_90a: ragged windows over gathered rows of K.

    out[i, j] = k_scale[j] * sum_h max(q[i, h] . k[j], 0) * weights[i, h]      for j in [ks[i], ke[i])

Tiling and pipeline: common/mqa_logits.py. A CTA takes an equal share of all blocks of 64 * GROUPS rows of K, over tiles
of TOKENS queries; the window of a tile is the union over its queries, rounded out to whole blocks.

STORE says which cells are written:

    tiles       whole blocks: cells of a block outside of a row's window hold what they hold (finite for finite K)
    clean       every column: -inf outside of the windows
    compressed  cells inside of the windows alone, cell j of row i at column j - ks[i]

Windows beyond the last row of K end there; ke <= ks is an empty window.

Cannot: heads other than 32 and 64; rows of other than 128 columns; logits of another type.
"""

# --- constants: replaced when rendered ---
HEADS = 64
STORE = "tiles"
TOKENS = 4
GROUPS = 2
STAGES = 8
# --- end of constants ---

import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import Float8E4M3FN, Float32, Int32

from common.mqa_logits import MqaLogits


class Fp8MqaLogits(MqaLogits):
    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        k_scale: cute.Tensor,
        weights: cute.Tensor,
        ks: cute.Tensor,
        ke: cute.Tensor,
        out: cute.Tensor,
        ctas: Int32,
        stream,
    ):
        rows = cute.make_tensor(q.iterator, cute.make_layout((q.shape[0] * HEADS, 128), stride=(128, 1)))
        self.launch(rows, k, k_scale, weights, ks, ke, out, ctas, stream)


def fake_args():
    """Stand-ins with the promises of the op: q, k and k_scale contiguous, 16-byte aligned; all sizes dynamic."""

    def any_int():
        return cute.sym_int()

    M, N = any_int(), any_int()
    window = rt.make_fake_tensor(Int32, (M,), (1,), assumed_align=4)
    return (
        rt.make_fake_tensor(Float8E4M3FN, (M, HEADS, 128), (HEADS * 128, 128, 1), assumed_align=16),
        rt.make_fake_tensor(Float8E4M3FN, (N, 128), (128, 1), assumed_align=16),
        rt.make_fake_tensor(Float32, (N,), (1,), assumed_align=16),
        rt.make_fake_tensor(Float32, (M, HEADS), (cute.sym_int64(divisibility=4), 1), assumed_align=16),
        window,
        window,
        rt.make_fake_tensor(Float32, (M, any_int()), (cute.sym_int64(), 1), assumed_align=4),
        Int32(1),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return Fp8MqaLogits(HEADS, TOKENS, GROUPS, STAGES, 2, paged=False, ordered=True, store=STORE), fake_args()
