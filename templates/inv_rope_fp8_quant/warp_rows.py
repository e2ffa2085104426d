"""Inverse RoPE and FP8 quantisation of the attention output in one pass over memory; any arch from sm_80 on.

    o [M, H, 512] bf16  ->  o_fp8 [G, M, H / G * 512] e4m3,  o_scale [G, H / G * 4, >= M] fp32
                                                      or     o_scale [G, H / G, >= M] int32 (4 UE8M0 bytes, one a chunk)

Per (token, head): the last 64 of the 512 columns are rotated back by the token's angle (fp32, not rounded after it),
and each chunk of 128 columns is divided by a scale of its own: q = e4m3(x / scale).

    raw_f32     scale = max(amax, 1e-10) / 448                            correctly rounded division
    pow2_f32    scale = 2^ceil(log2(max(amax, 1e-10) / 448))              from the bits, exact: never clips
    ue8m0_i32   as pow2_f32, stored as the biased exponent

Tiling. A block takes TOKENS tokens, one warp each, and HEADS heads of one group. A (token, head) row is 1 KB:

              head h0      h0+1   ...  h0+HEADS-1        lane l holds 16 of a row's 512 columns, in two pieces of 8:
    token t0  | warp 0 ->  warp 0 -> ...                   wide   [16 l, 16 l + 16)
          t0+1| warp 1 ->  warp 1 -> ...                   split  [8 l, 8 l + 8) and [256 + 8 l, 256 + 8 l + 8)
           :  |

wide stores 16 bytes a lane (best when DRAM is the limit; its half-sector loads need the L1), split loads 512 contiguous
bytes an instruction (best when few rows are in flight). A chunk is 8 lanes (wide) or 16 lanes (split).

Pipeline. A warp keeps STAGES rows in flight; a row's registers are filled again as soon as it is done. Sines and
cosines stay in registers for all heads of the token. Scales are staged in shared memory and leave as runs of 4 * TOKENS
bytes.

    load  r0 r1 .. | r0 -> rotate, amax, scale, convert, store; load r[STAGES] | r1 -> ... ; load r[STAGES + 1] | ...

Pairs of the rotation. Interleaved pairs (448 + 2 i, 449 + 2 i) are in one lane anyhow. NEOX pairs are (448 + i,
480 + i). In wide, lanes 28 to 31 then take the pieces [448 + 8 j, ..) and [480 + 8 j, ..), so that these pairs are in
one lane as well, and store 8 bytes twice. In split, the lane 4 further has the other half (exchanged as packed bf16).

From sm_90 on it is launched with PDL, waits for the kernel before it, and lets the one behind it start at once. With
split it asks for little L1, so that there is shared memory for that kernel while this one runs.
Tokens from M on of o_scale, as far as the tensor has them, are written 0. NaN or infinity in a chunk: no promise for
that chunk, the others are right.

Cannot: heads per group that HEADS does not divide; another head_dim, rope or group size; fp16.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
SCALE = "pow2_f32"
NEOX = False
POSITIONS = "i64"
LAYOUT = "wide"
TOKENS = 8
HEADS = 8
STAGES = 2
# --- end of constants ---

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Int64, Uint32, const_expr
from cutlass.memory import SmemAllocator

from common.launch import smem_carveout

HEAD_DIM, ROPE, CHUNK = 512, 64, 128
CHUNKS = HEAD_DIM // CHUNK
FP8_MAX = 448.0
TINY = 1e-10  # what an all-zero chunk counts as
SPLIT = LAYOUT == "split"
PACKED = SCALE == "ue8m0_i32"
SCALE_DTYPE = Int32 if PACKED else Float32
SCALE_ROWS = HEADS * (1 if PACKED else CHUNKS)  # of a block
CHUNK_LANES = 16 if SPLIT else 8
ROPE_LANE = 24 if SPLIT else 28  # lanes from here on hold columns to be rotated
PAIRS = 4 if SPLIT and not NEOX else 8  # sines and cosines of a lane
CVT = int(ARCH[3:].rstrip("a")) >= 89  # has the conversion to e4m3
PDL = int(ARCH[3:].rstrip("a")) >= 90
CARVEOUT = 100 if SPLIT and PDL else None  # room for the shared memory of the kernel behind this one
LOAD = ".nc.L1::no_allocate" if SPLIT else ""
STORE = "" if SPLIT else ".cs"

assert SCALE in ("raw_f32", "pow2_f32", "ue8m0_i32") and LAYOUT in ("wide", "split") and POSITIONS in ("i32", "i64")
assert HEADS % STAGES == 0 and TOKENS % 4 == 0  # 4: blocks end where the padding of the scales ends


@cute.jit
def load16(pointer):
    """16 bytes as four words of two bf16."""
    return cute.arch.inline_ptx(
        "ld.global" + LOAD + ".v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[pointer.to_llvm_ptr()],
    )


@cute.jit
def store8(pointer, a, b):
    cute.arch.inline_ptx(
        "st.global" + STORE + ".v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[pointer.to_llvm_ptr(), a, b]
    )


@cute.jit
def store16(pointer, a, b, c, d):
    cute.arch.inline_ptx(
        "st.global" + STORE + ".v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[pointer.to_llvm_ptr(), a, b, c, d],
    )


@cute.jit
def low(word):
    """The first of two packed bf16."""
    return (word << 16).bitcast(Float32)


@cute.jit
def high(word):
    """The second of two packed bf16."""
    return (word & Uint32(0xFFFF0000)).bitcast(Float32)


@cute.jit
def e4m3_bits(x: Float32):
    """x as e4m3 where there is no instruction for it: rounded to nearest even, saturated, NaN kept."""
    size = cute.arch.fmin(cute.math.absf(x), Float32(FP8_MAX))
    bits = size.bitcast(Int32)
    # normal: round at bit 20 and move the exponent bias from 127 to 7; below 2^-6 the sum with 2^14 rounds at 2^-9
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size + Float32(16384.0)).bitcast(Int32) - 0x46800000
    code = small if bits < 0x3C800000 else normal
    raw = x.bitcast(Int32)
    code = Int32(0x7F) if (raw & 0x7FFFFFFF) > 0x7F800000 else code
    return code | ((raw >> 24) & 0x80)


class InvRopeFp8Quant:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(
        self,
        o: cute.Tensor,
        positions: cute.Tensor,
        cos_sin: cute.Tensor,
        o_fp8: cute.Tensor,
        o_scale: cute.Tensor,
        stream,
    ):
        with smem_carveout(CARVEOUT):
            self.kernel(o, positions, cos_sin, o_fp8, o_scale).launch(
                # heads fast: neighbours in memory
                grid=[o.shape[1] // HEADS, cute.ceil_div(o_scale.shape[2], TOKENS), 1],
                block=[32 * TOKENS, 1, 1],
                stream=stream,
                use_pdl=PDL,
            )

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self, mO: cute.Tensor, mPos: cute.Tensor, mCosSin: cute.Tensor, mQ: cute.Tensor, mScale: cute.Tensor
    ):
        head_block, token_block, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        lane = tid % 32
        w = cute.arch.make_warp_uniform(tid // 32)
        M, padded = mO.shape[0], mScale.shape[2]
        heads_per_group = mQ.shape[2] // HEAD_DIM
        h0 = head_block * HEADS
        g = h0 // heads_per_group
        first_head = h0 - g * heads_per_group  # within the group
        t = token_block * TOKENS + w
        valid = t < M
        t_read = cutlass.min(t, M - 1)  # a padding token reads a row that exists, and stores nothing
        smem = SmemAllocator()
        sScale = smem.allocate_tensor(SCALE_DTYPE, cute.make_layout((SCALE_ROWS, TOKENS), stride=(TOKENS, 1)), 128)
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()

        # the chain position -> sines is the longest one: it goes first
        position = Int64(mPos[t_read])
        rope_lane = lane >= ROPE_LANE
        at = lane * (8 if SPLIT else 16)
        step = Int32(256 if SPLIT else 8)  # from a lane's first piece to its second
        if const_expr(NEOX and not SPLIT):
            at = (HEAD_DIM - ROPE) + (lane - ROPE_LANE) * 8 if rope_lane else at
            step = Int32(32) if rope_lane else step
        src = mO.iterator + (Int64(t_read) * mO.stride[0] + Int64(h0) * mO.stride[1] + at)
        dst = mQ.iterator + (Int64(g) * mQ.stride[0] + Int64(t) * mQ.stride[1] + (first_head * HEAD_DIM + at))

        rRaw = cute.make_rmem_tensor((4, 2, STAGES), Uint32)
        for u in cutlass.range_constexpr(STAGES):
            self.load_row(rRaw, u, src, step, Int64(u) * mO.stride[1])
        rCos = cute.make_rmem_tensor((PAIRS,), Float32)
        rSin = cute.make_rmem_tensor((PAIRS,), Float32)
        if rope_lane:
            i0 = (lane - ROPE_LANE) * 8  # first pair of the lane
            if const_expr(SPLIT):
                i0 = i0 % 32 if const_expr(NEOX) else (lane - ROPE_LANE) * 4
            base = mCosSin.iterator + (position * ROPE + i0)
            cute.autovec_copy(cute.make_tensor(base.align(16), cute.make_layout(PAIRS)), rCos)
            cute.autovec_copy(cute.make_tensor((base + ROPE // 2).align(16), cute.make_layout(PAIRS)), rSin)

        for h in cutlass.range_constexpr(0, HEADS, STAGES):
            for u in cutlass.range_constexpr(STAGES):
                self.row(rRaw, u, h + u, lane, rope_lane, rCos, rSin, valid, dst, step, sScale, w)
                if const_expr(h + STAGES < HEADS):
                    self.load_row(rRaw, u, src, step, Int64(h + STAGES + u) * mO.stride[1])

        cute.arch.sync_threads()
        first_row = first_head * (SCALE_ROWS // HEADS)
        for r in cutlass.range_constexpr((SCALE_ROWS * TOKENS + 32 * TOKENS - 1) // (32 * TOKENS)):
            i = tid + r * 32 * TOKENS
            token = token_block * TOKENS + i % TOKENS
            if i < SCALE_ROWS * TOKENS and token < padded:
                mScale[g, first_row + i // TOKENS, token] = sScale[i // TOKENS, i % TOKENS]

    @cute.jit
    def load_row(self, rRaw, u: cutlass.Constexpr, src, step, offset):
        for p in cutlass.range_constexpr(2):
            # an immediate where the step is one for all lanes
            jump = (step if const_expr(NEOX and not SPLIT) else Int32(256 if SPLIT else 8)) * p
            words = load16(src + (offset + jump))
            for j in cutlass.range_constexpr(4):
                rRaw[j, p, u] = words[j]

    @cute.jit
    def row(
        self, rRaw, u: cutlass.Constexpr, h: cutlass.Constexpr, lane, rope_lane, rCos, rSin, valid, dst, step, sScale, w
    ):
        """Rotate, scale, convert and store one (token, head) row; h: head within the block."""
        rX = cute.make_rmem_tensor((8, 2), Float32)
        for p in cutlass.range_constexpr(2):
            for j in cutlass.range_constexpr(4):
                rX[2 * j, p] = low(rRaw[j, p, u])
                rX[2 * j + 1, p] = high(rRaw[j, p, u])
        self.rotate(rX, rRaw, u, lane, rope_lane, rCos, rSin)

        rMax = cute.make_rmem_tensor((2,), Float32)
        for p in cutlass.range_constexpr(2):
            top = cute.math.absf(rX[0, p])
            for i in cutlass.range_constexpr(1, 8):
                top = cute.arch.fmax(top, cute.math.absf(rX[i, p]))
            rMax[p] = top
        if const_expr(not SPLIT):
            rMax[0] = cute.arch.fmax(rMax[0], rMax[1])
        for p in cutlass.range_constexpr(2 if SPLIT else 1):
            for k in cutlass.range_constexpr(CHUNK_LANES.bit_length() - 1):
                rMax[p] = cute.arch.fmax(rMax[p], cute.arch.shuffle_sync_bfly(rMax[p], offset=1 << k))
        if const_expr(not SPLIT):
            rMax[1] = rMax[0]

        rScale = cute.make_rmem_tensor((2,), SCALE_DTYPE)
        rOut = cute.make_rmem_tensor((8, 2), Float8E4M3FN)
        rWords = cute.recast_tensor(rOut, Uint32)
        for p in cutlass.range_constexpr(2):
            rY = cute.make_rmem_tensor((8,), Float32)
            rScale[p] = self.divide(rY, rX, p, cute.arch.fmax(rMax[p], Float32(TINY)))
            if const_expr(CVT):
                rOut[None, p].store(rY.load().to(Float8E4M3FN))
            else:
                for j in cutlass.range_constexpr(2):
                    word = e4m3_bits(rY[4 * j])
                    for i in cutlass.range_constexpr(1, 4):
                        word = word | (e4m3_bits(rY[4 * j + i]) << (8 * i))
                    rWords[2 * p + j] = word.to(Uint32)

        out = dst + h * HEAD_DIM
        if valid:
            if const_expr(SPLIT):
                store8(out, rWords[0], rWords[1])
                store8(out + 256, rWords[2], rWords[3])
            elif const_expr(NEOX):
                if rope_lane:
                    store8(out, rWords[0], rWords[1])
                    store8(out + step, rWords[2], rWords[3])
                else:
                    store16(out, rWords[0], rWords[1], rWords[2], rWords[3])
            else:
                store16(out, rWords[0], rWords[1], rWords[2], rWords[3])
        self.stage_scales(rScale, h, lane, valid, sScale, w)

    @cute.jit
    def rotate(self, rX, rRaw, u: cutlass.Constexpr, lane, rope_lane, rCos, rSin):
        """Inverse rotation in place: a' = a cos + b sin, b' = b cos - a sin for each pair (a, b). The other lanes keep
        their values, the sign of a zero included."""
        rOther = cute.make_rmem_tensor((8,), Float32)
        if const_expr(NEOX and SPLIT):
            for j in cutlass.range_constexpr(4):
                word = cute.arch.shuffle_sync_bfly(rRaw[j, 1, u], offset=4)
                rOther[2 * j], rOther[2 * j + 1] = low(word), high(word)
        if rope_lane:
            self.rotate_pairs(rX, rOther, lane, rCos, rSin)

    @cute.jit
    def rotate_pairs(self, rX, rOther, lane, rCos, rSin):
        if const_expr(NEOX and SPLIT):
            sign = Float32(1.0) if lane % 8 < 4 else Float32(-1.0)  # the first halves are in lanes 24 to 27
            for k in cutlass.range_constexpr(8):
                rX[k, 1] = rX[k, 1] * rCos[k] + rOther[k] * (rSin[k] * sign)
        elif const_expr(NEOX):
            for i in cutlass.range_constexpr(8):
                a, b = rX[i, 0], rX[i, 1]
                rX[i, 0] = a * rCos[i] + b * rSin[i]
                rX[i, 1] = b * rCos[i] - a * rSin[i]
        else:
            for p in cutlass.range_constexpr(1 if SPLIT else 0, 2):
                for i in cutlass.range_constexpr(4):
                    k = i if const_expr(SPLIT) else 4 * p + i
                    a, b = rX[2 * i, p], rX[2 * i + 1, p]
                    rX[2 * i, p] = a * rCos[k] + b * rSin[k]
                    rX[2 * i + 1, p] = b * rCos[k] - a * rSin[k]

    @cute.jit
    def divide(self, rY, rX, p: cutlass.Constexpr, amax):
        """rY = rX[., p] / scale; returns the scale as it is stored."""
        if const_expr(SCALE == "raw_f32"):
            scale = amax * Float32(1.0 / FP8_MAX)
            inverse = cute.arch.rcp_approx(scale)
            for i in cutlass.range_constexpr(8):
                y = rX[i, p] * inverse
                rY[i] = cute.math.fma(cute.math.fma(-y, scale, rX[i, p]), inverse, y)  # one Newton step
            return scale
        # the smallest k with 448 * 2^k >= amax, biased: 448 = 1.75 * 2^8
        bits = amax.bitcast(Int32)
        biased = (bits >> 23) - 8 + (Int32(1) if (bits & 0x7FFFFF) > 0x600000 else Int32(0))
        inverse = ((254 - biased) << 23).bitcast(Float32)
        for i in cutlass.range_constexpr(8):
            rY[i] = rX[i, p] * inverse
        return biased if const_expr(PACKED) else (biased << 23).bitcast(Float32)

    @cute.jit
    def stage_scales(self, rScale, h: cutlass.Constexpr, lane, valid, sScale, w):
        """The row's four scales into shared memory: four rows of it, or four bytes of one."""
        chunk = lane // CHUNK_LANES
        if const_expr(PACKED):
            word = (rScale[0] | (rScale[1] << 16 if const_expr(SPLIT) else Int32(0))) << (8 * chunk)
            for k in cutlass.range_constexpr(CHUNK_LANES.bit_length() - 1, 5):
                word = word | cute.arch.shuffle_sync_bfly(word, offset=1 << k)
            if lane == 0:
                sScale[h, w] = word if valid else Int32(0)
        else:
            if lane % CHUNK_LANES == 0:
                for p in cutlass.range_constexpr(2 if SPLIT else 1):
                    sScale[CHUNKS * h + 2 * p + chunk, w] = rScale[p] if valid else Float32(0.0)


def fake_args():
    """Stand-ins with the promises of the op: last stride 1, other strides multiples of 16 bytes, all dynamic."""

    def any_int(divisor=1):
        return cute.sym_int(divisibility=divisor)

    def stride(divisor):
        return cute.sym_int64(divisibility=divisor)

    M, G = any_int(), any_int()
    positions = Int32 if POSITIONS == "i32" else Int64
    return (
        rt.make_fake_tensor(BFloat16, (M, any_int(), HEAD_DIM), (stride(8), stride(8), 1), assumed_align=16),
        rt.make_fake_tensor(positions, (M,), (1,), assumed_align=positions.width // 8),
        rt.make_fake_tensor(Float32, (any_int(), ROPE), (ROPE, 1), assumed_align=16),
        rt.make_fake_tensor(Float8E4M3FN, (G, M, any_int(HEAD_DIM)), (stride(16), stride(16), 1), assumed_align=16),
        rt.make_fake_tensor(SCALE_DTYPE, (G, any_int(), any_int(4)), (stride(4), stride(4), 1), assumed_align=16),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return InvRopeFp8Quant(), fake_args()
