"""Merge of two partial attention results over disjoint sets of keys, on any GPU.

    m = max(lse_a, lse_b), w_x = exp(lse_x - m)
    out = (w_a out_a + w_b out_b) / (w_a + w_b), lse = m + ln(w_a + w_b)      natural logarithm, float32

A state without keys has lse = -inf (or +inf, as others write it) and weight 0; its out is not looked at. Two of them
give out = 0 and lse = -inf. out may be out_a and lse may be lse_a.

Tiling: 8 columns a thread, V_DIM / 8 threads a row (token, head), 256 threads a block. All threads of a row read its
logarithms before one of them writes the new one.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
DTYPE = "bf16"
ACC_DTYPE = "fp32"
V_DIM = 128
# --- end of constants ---

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import BFloat16, Float16, Float32, Int64

TYPES = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32}
A, B = TYPES[ACC_DTYPE], TYPES[DTYPE]  # of out_a and out, of out_b
COLUMNS = 8  # of a thread
LANES = V_DIM // COLUMNS  # of a row
THREADS = 256
ROWS = THREADS // LANES
LN2, LOG2E = 0.6931471805599453, 1.4426950408889634
LOWEST = -3.0e38
PDL = int(ARCH[3:].rstrip("a")) >= 90

assert V_DIM % COLUMNS == 0 and THREADS % LANES == 0


@cute.jit
def logarithm(lse, token, head):
    """lse[token, head]; a state without keys is far below all others."""
    value = (lse.iterator + (token * lse.stride[0] + head * lse.stride[1])).load()
    return value if value > LOWEST and value < -LOWEST else Float32(LOWEST)


@cute.jit
def columns(x, token, head, column):
    """Eight columns of a row, in global memory."""
    at = x.iterator + (token * x.stride[0] + head * x.stride[1] + column)
    return cute.make_tensor(at.align(16), cute.make_layout(COLUMNS))


class MergeAttnStates:
    @cute.jit
    def __call__(
        self,
        out_a: cute.Tensor,
        lse_a: cute.Tensor,
        out_b: cute.Tensor,
        lse_b: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        stream,
    ):
        self.kernel(out_a, lse_a, out_b, lse_b, out, lse).launch(
            grid=[cute.ceil_div(out.shape[0] * out.shape[1], ROWS), 1, 1],
            block=[THREADS, 1, 1],
            stream=stream,
            use_pdl=PDL,
        )

    @cute.kernel
    def kernel(
        self,
        out_a: cute.Tensor,
        lse_a: cute.Tensor,
        out_b: cute.Tensor,
        lse_b: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
    ):
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        if cutlass.const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        tokens, heads = out.shape[0], out.shape[1]
        row = block * ROWS + tid // LANES
        lane = tid % LANES
        here = row < tokens * heads
        row = row if here else 0
        token = Int64(row // heads)
        head = Int64(row % heads)
        a = logarithm(lse_a, token, head)
        b = logarithm(lse_b, token, head)
        cute.arch.sync_threads()
        if here:
            top = cute.arch.fmax(a, b)
            none = top <= LOWEST
            w_a = cute.math.exp2((a - top) * LOG2E, fastmath=True) if a > LOWEST else Float32(0.0)
            w_b = cute.math.exp2((b - top) * LOG2E, fastmath=True) if b > LOWEST else Float32(0.0)
            total = w_a + w_b
            inverse = Float32(0.0) if none else 1.0 / total
            w_a = w_a * inverse
            w_b = w_b * inverse
            rA = cute.make_rmem_tensor((COLUMNS,), A)
            rB = cute.make_rmem_tensor((COLUMNS,), B)
            cute.autovec_copy(columns(out_a, token, head, lane * COLUMNS), rA)
            cute.autovec_copy(columns(out_b, token, head, lane * COLUMNS), rB)
            for i in cutlass.range_constexpr(COLUMNS):
                x = rA[i].to(Float32) * w_a if w_a > 0.0 else Float32(0.0)  # the other may be NaN
                y = rB[i].to(Float32) * w_b if w_b > 0.0 else Float32(0.0)
                rA[i] = (x + y).to(A)
            cute.autovec_copy(rA, columns(out, token, head, lane * COLUMNS))
            if lane == 0:
                value = -Float32(float("inf")) if none else top + cute.math.log2(total, fastmath=True) * LN2
                (lse.iterator + (token * lse.stride[0] + head * lse.stride[1])).store(value)


def fake_args():
    """out_a, lse_a, out_b, lse_b, out, lse; stream. All sizes but V_DIM and all outer strides are dynamic."""
    n = cute.sym_int
    tokens, heads = n(), n()

    def rows(dtype):
        stride = (cute.sym_int64(divisibility=8), cute.sym_int64(divisibility=8), 1)
        return rt.make_fake_tensor(dtype, (tokens, heads, V_DIM), stride, assumed_align=16)

    def logarithms():
        return rt.make_fake_tensor(Float32, (tokens, heads), (cute.sym_int64(), cute.sym_int64()), assumed_align=4)

    return (
        rows(A), logarithms(), rows(B), logarithms(), rows(A), logarithms(),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return MergeAttnStates(), fake_args()
