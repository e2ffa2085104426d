"""Rows of 128 from two parts, quantised to FP8; any arch from sm_80 on.

    v = [pe (pe_dim columns) | nope (128 - pe_dim)]       bf16, of row (token, head)
    scale = max(amax |v|, 1e-4) / 448, with pow2_f32 the power of two above;  fp8 = e4m3(v / scale)

Sixteen lanes hold a row, 8 columns each, loaded as two pieces of 4 columns, each of which is of one part: pe_dim and
strides are multiples of 4. A block takes 16 rows.

Cannot: rows of other than 128 columns.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
SCALE = "pow2_f32"
# --- end of constants ---

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import BFloat16, Float8E4M3FN, Float32, Int64, const_expr

from common.fp8_rows import lanes_amax, largest, load_words, quantise, store_words

DIM, LANES, ROWS = 128, 16, 16
CVT = int(ARCH[3:].rstrip("a")) >= 89  # has the conversion to e4m3
PDL = int(ARCH[3:].rstrip("a")) >= 90

assert SCALE in ("raw_f32", "pow2_f32")


class CatQuantFp8:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(self, pe: cute.Tensor, nope: cute.Tensor, fp8: cute.Tensor, scale: cute.Tensor, stream):
        self.kernel(pe, nope, fp8, scale).launch(
            grid=[cute.ceil_div(fp8.shape[0], ROWS), 1, 1], block=[LANES * ROWS, 1, 1], stream=stream, use_pdl=PDL
        )

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(self, mPe: cute.Tensor, mNope: cute.Tensor, m8: cute.Tensor, mScale: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = tid % LANES
        row = block * ROWS + tid // LANES
        read = cutlass.min(row, m8.shape[0] - 1)  # a row behind the last one is read and not stored
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        t = read // mPe.shape[1]
        h = read - t * mPe.shape[1]
        pe = mPe.iterator + (Int64(t) * mPe.stride[0] + Int64(h) * mPe.stride[1])
        nope = mNope.iterator + (Int64(t) * mNope.stride[0] + Int64(h) * mNope.stride[1])
        words = []
        for p in cutlass.range_constexpr(2):
            column = 8 * lane + 4 * p
            src = pe + column if column < mPe.shape[2] else nope + (column - mPe.shape[2])
            words += load_words(src, 2)
        top = largest(words)
        amax, _ = lanes_amax(top, top, LANES)
        codes, scale = quantise(words, amax, SCALE == "pow2_f32", CVT)
        if row < m8.shape[0]:
            store_words(m8.iterator + (Int64(row) * DIM + 8 * lane), *codes)
            if lane == 0:
                mScale[row, 0] = scale


def fake_args():
    """Stand-ins with the promises of the op: last strides 1, others multiples of 4; all sizes dynamic."""

    def stride():
        return cute.sym_int64(divisibility=4)

    T, H, M = cute.sym_int(), cute.sym_int(), cute.sym_int()
    parts = [
        rt.make_fake_tensor(BFloat16, (T, H, cute.sym_int(divisibility=4)), (stride(), stride(), 1), assumed_align=8)
        for _ in range(2)
    ]
    return (
        *parts,
        rt.make_fake_tensor(Float8E4M3FN, (M, DIM), (DIM, 1), assumed_align=16),
        rt.make_fake_tensor(Float32, (M, 1), (1, 1), assumed_align=4),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return CatQuantFp8(), fake_args()
