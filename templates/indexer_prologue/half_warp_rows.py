"""What lies between the indexer's projections and its cache and logits, in one pass; any arch from sm_80 on.

    q [T, HEADS, 128] bf16     RoPE, [Hadamard], FP8                          -> q_fp8 [T, HEADS, 128]
    k_raw [T, 128]             layer norm, RoPE, [Hadamard], FP8              -> k_fp8 [T, 128], k_scale [T, 1]
    w_raw [T, HEADS]           times the scale of q, HEADS^-0.5 * 128^-0.5    -> weights [T, HEADS]

RoPE turns the first 64 of the 128 columns: pairs (i, i + 32), or with INTERLEAVE (2 i, 2 i + 1). The layer norm's
result, the turned values and those after the Hadamard transform are rounded to bf16, and computed from in float32.

Tiling. A block takes a token: 8 warps for the heads of q, one for k. Sixteen lanes hold a row, and each lane 4 columns
that turn and 4 that do not, so that no lane computes what others throw away:

    lane l    columns 4 l .. 4 l + 3 and 64 + 4 l .. 64 + 4 l + 3

Halves of a pair are in the same lane with INTERLEAVE, else 8 lanes apart. All rows of a half warp are requested before
the first one is worked on. Their values stay packed as bf16 but for the arithmetic in float32, and magnitudes of two
rows are compared at once: with one value a register the kernel is bound by instructions instead of memory.

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

from common.fp8_rows import (
    high_half, lanes_amax, largest, load_value, load_words, low_half, pack, quantise, round_bf16, store_words, unpack,
)
from common.warp import lanes_sum

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
        column = 4 * lane
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        position = Int64(mPos[t])
        if w < WARPS:
            h0 = (tid // LANES) * ROWS
            src = mQ.iterator + (Int64(t) * mQ.stride[0] + (h0 * DIM + column))
            rows = [[*load_words(src + i * DIM, 2), *load_words(src + (i * DIM + ROPE), 2)] for i in range(ROWS)]
            w_raw = mW.iterator + (Int64(t) * mW.stride[0] + h0)
            gain = [load_value(w_raw + i, TYPES[W_DTYPE]) for i in range(ROWS)]
            rCos, rSin = self.angles(mCosSin, position, lane)
            dst = mQ8.iterator + ((Int64(t) * HEADS + h0) * DIM + column)
            for i in cutlass.range_constexpr(ROWS):
                rows[i] = self.turn(rows[i], rCos, rSin, lane)
            for i in cutlass.range_constexpr(0, ROWS, 2):
                tops = lanes_amax(largest(rows[i]), largest(rows[i + 1]), LANES)
                for j in cutlass.range_constexpr(2):
                    scale = self.store(rows[i + j], tops[j], dst + (i + j) * DIM)
                    if lane == 0:
                        mWeights[t, h0 + i + j] = gain[i + j] * scale * Float32(WEIGHT)
        else:
            columns = [column + j % 4 + ROPE * (j // 4) for j in range(8)]
            src = mK.iterator + Int64(t) * mK.stride[0]
            raw = [load_value(src + c, TYPES[K_DTYPE]) for c in columns]
            gain = [load_value(mGain.iterator + c, TYPES[LN_DTYPE]) for c in columns]
            bias = [load_value(mBias.iterator + c, TYPES[LN_DTYPE]) for c in columns]
            rCos, rSin = self.angles(mCosSin, position, lane)
            rX = cute.make_rmem_tensor((8,), Float32)
            for j in cutlass.range_constexpr(8):
                rX[j] = round_bf16(raw[j])
            row = self.turn(self.layer_norm(rX, gain, bias, eps), rCos, rSin, lane)
            top = largest(row)
            amax, _ = lanes_amax(top, top, LANES)
            scale = self.store(row, amax, mK8.iterator + (Int64(t) * DIM + column))
            if lane == 0:
                mKScale[t, 0] = scale

    @cute.jit
    def angles(self, mCosSin, position, lane):
        """Cosines and signed sines for this lane's 4 columns that turn: x cos + other sin."""
        rCos = cute.make_rmem_tensor((4,), Float32)
        rSin = cute.make_rmem_tensor((4,), Float32)
        line = mCosSin.iterator + position * ROPE
        if const_expr(INTERLEAVE):
            cosines = load_words(line + 2 * lane, 2)
            sines = load_words(line + (ROPE // 2 + 2 * lane), 2)
            for j in cutlass.range_constexpr(4):
                rCos[j] = cosines[j // 2].bitcast(Float32)
                rSin[j] = sines[j // 2].bitcast(Float32) * (2 * (j % 2) - 1)
        else:
            cosines = load_words(line + 4 * (lane % 8), 4)
            sines = load_words(line + (ROPE // 2 + 4 * (lane % 8)), 4)
            sign = Float32(-1.0) if lane < 8 else Float32(1.0)
            for j in cutlass.range_constexpr(4):
                rCos[j] = cosines[j].bitcast(Float32)
                rSin[j] = sines[j].bitcast(Float32) * sign
        return rCos, rSin

    @cute.jit
    def layer_norm(self, rX, gain, bias, eps):
        """The packed words of the normed row."""
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
            rX[j] = rX[j] * inverse * gain[j] + bias[j]
        return [pack(rX[2 * j], rX[2 * j + 1]) for j in range(4)]

    @cute.jit
    def turn(self, words, rCos, rSin, lane):
        """The row after RoPE and the transform; `words`: 2 of columns that turn, then 2 others."""
        found = []
        for j in cutlass.range_constexpr(2):
            x = (low_half(words[j]), high_half(words[j]))
            if const_expr(INTERLEAVE):
                other = (x[1], x[0])
            else:
                word = cute.arch.shuffle_sync_bfly(words[j], offset=8)
                other = (low_half(word), high_half(word))
            y = [x[e] * rCos[2 * j + e] + other[e] * rSin[2 * j + e] for e in range(2)]
            found.append(pack(*y))
        found += words[2:]
        return self.hadamard(found, lane) if const_expr(HADAMARD) else found

    @cute.jit
    def store(self, words, amax, dst):
        """Quantise and store 8 columns of a row; returns its scale."""
        codes, scale = quantise(words, amax, SCALE == "pow2_f32", CVT)
        store_words(dst, codes[0])
        store_words(dst + ROPE, codes[1])
        return scale

    @cute.jit
    def hadamard(self, words, lane):
        """Orthonormal Walsh-Hadamard transform over the 128 columns, rounded to bf16."""
        rX = cute.make_rmem_tensor((8,), Float32)
        unpack(rX, 0, words)
        for k in cutlass.range_constexpr(3):  # bits 0, 1 and 6 of the column
            for j in cutlass.range_constexpr(8):
                if const_expr(j & (1 << k) == 0):
                    a, b = rX[j], rX[j | (1 << k)]
                    rX[j] = a + b
                    rX[j | (1 << k)] = a - b
        for k in cutlass.range_constexpr(4):
            sign = Float32(1.0) if (lane >> k) & 1 == 0 else Float32(-1.0)
            for j in cutlass.range_constexpr(8):
                rX[j] = cute.arch.shuffle_sync_bfly(rX[j], offset=1 << k) + sign * rX[j]
        scaled = [rX[j] * Float32(DIM**-0.5) for j in range(8)]
        return [pack(scaled[2 * j], scaled[2 * j + 1]) for j in range(4)]


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
