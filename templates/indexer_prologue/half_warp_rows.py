"""What lies between the indexer's projections and its cache and logits, in one pass over memory; sm_89 and newer.

    q [T, HEADS, 128] bf16     RoPE, [Hadamard], FP8                          -> q_fp8 [T, HEADS, 128]
    k_raw [T, 128]             layer norm, RoPE, [Hadamard], FP8              -> k_fp8 [T, 128], k_scale [T, 1]
    w_raw [T, HEADS]           times the scale of q, HEADS^-0.5 * 128^-0.5    -> weights [T, HEADS]

RoPE turns the first 64 of the 128 columns: pairs (i, i + 32), or with INTERLEAVE (2 i, 2 i + 1). The layer norm's
result, the turned values and those after the Hadamard transform are rounded to bf16, and computed from in float32.

Tiling. A block takes a token: 8 warps for the heads of q, one for k. Sixteen lanes hold a row, 8 columns each:

    lane      0 .. 3          4 .. 7          8 .. 15
    columns   0 .. 31         32 .. 63        64 .. 127
              first of pairs  second of pairs  stay as they are

so that a load instruction of a warp is 512 contiguous bytes, and halves of a pair are 4 lanes apart. All rows of a half
warp are requested before the first one is worked on, the position's sines before them.

NaN in a row stays in that row. Cannot: heads that are not a multiple of 16; widths other than 128 and 64.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
HEADS = 64
INTERLEAVE = False
SCALE = "pow2_f32"
HADAMARD = False
K_DTYPE = "bf16"
W_DTYPE = "fp32"
LN_DTYPE = "fp32"
POSITIONS = "i64"
# --- end of constants ---

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Int64, const_expr

from common.e4m3 import E4M3_MAX
from common.fp8_rows import (
    AMAX_FLOOR, lanes_amax, lanes_sum, load_words, quantise, round_bf16, store_words, unpack,
)

DIM, ROPE, LANES = 128, 64, 16
WARPS = 8  # for q
ROWS = HEADS // (2 * WARPS)  # of a half warp
TYPES = {"bf16": BFloat16, "fp32": Float32, "i32": Int32, "i64": Int64}
WEIGHT = (HEADS * DIM) ** -0.5
CVT = int(ARCH[3:].rstrip("a")) >= 89  # has the conversion to e4m3
PDL = int(ARCH[3:].rstrip("a")) >= 90

assert HEADS % (2 * WARPS) == 0 and SCALE in ("raw_f32", "pow2_f32")


class IndexerPrologue:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k_raw: cute.Tensor,
        w_raw: cute.Tensor,
        ln_weight: cute.Tensor,
        ln_bias: cute.Tensor,
        positions: cute.Tensor,
        cos_sin: cute.Tensor,
        eps: Float32,
        q_fp8: cute.Tensor,
        k_fp8: cute.Tensor,
        k_scale: cute.Tensor,
        weights: cute.Tensor,
        stream,
    ):
        self.kernel(
            q, k_raw, w_raw, ln_weight, ln_bias, positions, cos_sin, eps, q_fp8, k_fp8, k_scale, weights
        ).launch(grid=[q.shape[0], 1, 1], block=[32 * (WARPS + 1), 1, 1], stream=stream, use_pdl=PDL)

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mW: cute.Tensor,
        mGain: cute.Tensor,
        mBias: cute.Tensor,
        mPos: cute.Tensor,
        mCosSin: cute.Tensor,
        eps: Float32,
        mQ8: cute.Tensor,
        mK8: cute.Tensor,
        mKScale: cute.Tensor,
        mWeights: cute.Tensor,
    ):
        tid, _, _ = cute.arch.thread_idx()
        t, _, _ = cute.arch.block_idx()
        w = cute.arch.make_warp_uniform(tid // 32)
        lane = tid % LANES
        column = 8 * lane
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        position = Int64(mPos[t])
        if w < WARPS:
            h0 = (tid // LANES) * ROWS
            src = mQ.iterator + (Int64(t) * mQ.stride[0] + (h0 * DIM + column))
            raw = [load_words(src + i * DIM, 4) for i in range(ROWS)]
            gain = [Float32(mW[t, h0 + i]) for i in range(ROWS)]
            rCos, rSin = self.angles(mCosSin, position, lane)
            dst = mQ8.iterator + ((Int64(t) * HEADS + h0) * DIM + column)
            for i in cutlass.range_constexpr(ROWS):
                rX = cute.make_rmem_tensor((8,), Float32)
                unpack(rX, 0, raw[i])
                scale = self.row(rX, rCos, rSin, lane, dst + i * DIM)
                if lane == 0:
                    mWeights[t, h0 + i] = gain[i] * scale * Float32(WEIGHT)
        else:
            rX = cute.make_rmem_tensor((8,), Float32)
            for j in cutlass.range_constexpr(8):
                rX[j] = round_bf16(Float32(mK[t, column + j]))
            rCos, rSin = self.angles(mCosSin, position, lane)
            self.layer_norm(rX, mGain, mBias, eps, column)
            scale = self.row(rX, rCos, rSin, lane, mK8.iterator + (Int64(t) * DIM + column))
            if lane == 0:
                mKScale[t, 0] = scale

    @cute.jit
    def angles(self, mCosSin, position, lane):
        """Cosines and signed sines for this lane's 8 columns: x cos + other sin; 1 and 0 where nothing turns."""
        rCos = cute.make_rmem_tensor((8,), Float32)
        rSin = cute.make_rmem_tensor((8,), Float32)
        rCos.fill(1.0)
        rSin.fill(0.0)
        if lane < ROPE // 8:
            line = mCosSin.iterator + position * ROPE
            if const_expr(INTERLEAVE):
                for j in cutlass.range_constexpr(4):
                    for e in cutlass.range_constexpr(2):
                        rCos[2 * j + e] = (line + (4 * lane + j)).load()
                        sine = (line + (ROPE // 2 + 4 * lane + j)).load()
                        rSin[2 * j + e] = -sine if const_expr(e == 0) else sine
            else:
                base = line + 8 * (lane % 4)
                cute.autovec_copy(cute.make_tensor(base.align(16), cute.make_layout(8)), rCos)
                cute.autovec_copy(cute.make_tensor((base + ROPE // 2).align(16), cute.make_layout(8)), rSin)
                for j in cutlass.range_constexpr(8):
                    rSin[j] = -rSin[j] if lane < 4 else rSin[j]
        return rCos, rSin

    @cute.jit
    def layer_norm(self, rX, mGain, mBias, eps, column):
        total = Float32(0.0)
        for j in cutlass.range_constexpr(8):
            total = total + rX[j]
        mean = lanes_sum(total, LANES) * Float32(1.0 / DIM)
        total = Float32(0.0)
        for j in cutlass.range_constexpr(8):
            rX[j] = rX[j] - mean
            total = total + rX[j] * rX[j]
        inverse = cute.math.rsqrt(lanes_sum(total, LANES) * Float32(1.0 / DIM) + eps)
        for j in cutlass.range_constexpr(8):
            rX[j] = round_bf16(rX[j] * inverse * Float32(mGain[column + j]) + Float32(mBias[column + j]))

    @cute.jit
    def row(self, rX, rCos, rSin, lane, dst):
        """Turn, transform, quantise and store 8 columns of a row; returns its scale."""
        rOther = cute.make_rmem_tensor((8,), Float32)
        for j in cutlass.range_constexpr(8):
            if const_expr(INTERLEAVE):
                rOther[j] = rX[j ^ 1]
            else:
                rOther[j] = cute.arch.shuffle_sync_bfly(rX[j], offset=4)
        for j in cutlass.range_constexpr(8):
            turned = round_bf16(rX[j] * rCos[j] + rOther[j] * rSin[j])
            rX[j] = turned if lane < ROPE // 8 else rX[j]
        if const_expr(HADAMARD):
            self.hadamard(rX, lane)
        ratio = cute.arch.fmax(lanes_amax(rX, LANES), Float32(AMAX_FLOOR)) / Float32(E4M3_MAX)
        words, scale = quantise(rX, ratio, SCALE == "pow2_f32", CVT)
        store_words(dst, *words)
        return scale

    @cute.jit
    def hadamard(self, rX, lane):
        """Orthonormal Walsh-Hadamard transform over the 128 columns, rounded to bf16."""
        for k in cutlass.range_constexpr(3):
            for j in cutlass.range_constexpr(8):
                if const_expr(j & (1 << k) == 0):
                    a, b = rX[j], rX[j | (1 << k)]
                    rX[j] = a + b
                    rX[j | (1 << k)] = a - b
        for k in cutlass.range_constexpr(4):
            sign = Float32(1.0) if (lane >> k) & 1 == 0 else Float32(-1.0)
            for j in cutlass.range_constexpr(8):
                rX[j] = cute.arch.shuffle_sync_bfly(rX[j], offset=1 << k) + sign * rX[j]
        for j in cutlass.range_constexpr(8):
            rX[j] = round_bf16(rX[j] * Float32(DIM**-0.5))


def fake_args():
    """Stand-ins with the promises of the op: last strides 1, token strides dynamic."""

    def stride(divisor=1):
        return cute.sym_int64(divisibility=divisor)

    T = cute.sym_int()
    ln = rt.make_fake_tensor(TYPES[LN_DTYPE], (DIM,), (1,), assumed_align=4)
    k_type, w_type, positions = TYPES[K_DTYPE], TYPES[W_DTYPE], TYPES[POSITIONS]
    return (
        rt.make_fake_tensor(BFloat16, (T, HEADS, DIM), (stride(8), DIM, 1), assumed_align=16),
        rt.make_fake_tensor(k_type, (T, DIM), (stride(), 1), assumed_align=k_type.width // 8),
        rt.make_fake_tensor(w_type, (T, HEADS), (stride(), 1), assumed_align=w_type.width // 8),
        ln,
        ln,
        rt.make_fake_tensor(positions, (T,), (1,), assumed_align=positions.width // 8),
        rt.make_fake_tensor(Float32, (cute.sym_int(), ROPE), (ROPE, 1), assumed_align=16),
        Float32(1e-6),
        rt.make_fake_tensor(Float8E4M3FN, (T, HEADS, DIM), (HEADS * DIM, DIM, 1), assumed_align=16),
        rt.make_fake_tensor(Float8E4M3FN, (T, DIM), (DIM, 1), assumed_align=16),
        rt.make_fake_tensor(Float32, (T, 1), (1, 1), assumed_align=4),
        rt.make_fake_tensor(Float32, (T, HEADS), (HEADS, 1), assumed_align=4),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return IndexerPrologue(), fake_args()
