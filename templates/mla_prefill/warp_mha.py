"""Varlen multi-head attention of prefill with warp-level MMA (m16n8k16), for sm_80 and newer: no TMA, no wgmma.

    out[i, h] = sum_j softmax_j(sm_scale <q[i, h], k[j, h]>) v[j, h]    j of the same request, causal: bottom right

Tiling. A CTA for each tile of (request, head, ROWS query rows); the grid is what the batch can have at most, and those
behind the last tile return. 16 rows a warp, whose output stays in registers. Blocks of BLOCK_N keys are taken from the
last one, which has the masks, down to the first; a warp whose rows see nothing of a block leaves it out.

    copies (cp.async)    K(n)        V(n)            K(n-1)           V(n-1)
    products                   |  Q K(n)^T  |  softmax, P V(n)  |  Q K(n-1)^T  | ...          |: barrier

Rows behind the last key of a request are not read: cp.async fills them with zeros (0 * NaN in P V), and S is masked.
The keys come as two tensors, as for the other template: the last 64 columns from k_pe, which all heads may share.

Cannot: 8-bit types; head dimensions that 64 does not divide; sinks; keys that are not expanded per head.
"""

# --- constants: replaced when rendered ---
DTYPE = "bf16"
Q_DIM = 192
V_DIM = 128
CAUSAL = True
ROWS = 128
BLOCK_N = 64
# --- end of constants ---

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.memory import SmemAllocator

from common.prefill import M_START, find, mask, place, prefill_arguments, rescale, softmax, store_rows
from common.register_mma import mma, pack
from common.sm90 import LOG2E, cutlass_dtype
from common.warp_mma import cp_async16, ldmatrix4, odd_pitch

ELEM = cutlass_dtype(DTYPE)
THREADS = ROWS * 2
PASS = THREADS // 8  # rows that all threads load at a time, 8 of them each
PE = 64  # columns of k_pe
Q_PITCH, V_PITCH = odd_pitch(Q_DIM * 2), odd_pitch(V_DIM * 2)

assert Q_DIM % 64 == 0 and V_DIM % 64 == 0 and BLOCK_N % PASS == 0 and BLOCK_N % 16 == 0


@cute.jit
def row_address(x, row, head, column):
    """Of one element of a (tokens, heads, columns) tensor."""
    return x.iterator.toint() + (Int64(row) * x.stride[0] + Int64(head) * x.stride[1] + column) * 2


@cute.jit
def load(dst, pitch: cutlass.Constexpr, src, stride, valid, rows: cutlass.Constexpr, columns: cutlass.Constexpr, tid):
    """`rows` rows of `columns` columns to shared memory, zeros from row `valid` on. stride: bytes from row to row."""
    for u in cutlass.range_constexpr(rows // PASS):
        r = u * PASS + tid // 8
        there = r < valid
        at = src + (Int64(r) * stride if there else Int64(0)) + tid % 8 * 16
        for i in cutlass.range_constexpr(columns // 64):
            cp_async16(dst + r * pitch + tid % 8 * 16 + i * 128, at + i * 128, Int32(16) if there else Int32(0))


class MlaPrefill:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        k_pe: cute.Tensor,
        v: cute.Tensor,
        cu_q: cute.Tensor,
        cu_k: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        counters: cute.Tensor,
        sm_scale: Float32,
        pe_offset: Int32,
        flags: Int32,
        group: Int32,
        ctas: Int32,
        stream,
    ):
        """counters and ctas are not used: the GPU hands out the tiles."""
        tiles = (q.shape[0] // ROWS + cu_q.shape[0] - 1) * q.shape[1]  # of the sum of ceil(rows / ROWS), at most
        self.kernel(q, k, k_pe, v, cu_q, cu_k, out, lse, sm_scale * LOG2E, pe_offset, flags, group).launch(
            grid=[cutlass.max(tiles, 1), 1, 1], block=[THREADS, 1, 1], stream=stream, min_blocks_per_mp=1
        )

    # -------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mPe: cute.Tensor,
        mV: cute.Tensor,
        mCuQ: cute.Tensor,
        mCuK: cute.Tensor,
        mOut: cute.Tensor,
        mLse: cute.Tensor,
        c_log2: Float32,
        pe_offset: Int32,
        flags: Int32,
        group: Int32,
    ):
        tid, _, _ = cute.arch.thread_idx()
        x, _, _ = cute.arch.block_idx()
        lane = tid % 32
        smem = SmemAllocator()
        sQ = smem.allocate_array(cutlass.Uint8, ROWS * Q_PITCH).toint()
        sK = smem.allocate_array(cutlass.Uint8, BLOCK_N * Q_PITCH).toint()
        sV = smem.allocate_array(cutlass.Uint8, BLOCK_N * V_PITCH).toint()
        heads = mQ.shape[1]
        batch = mCuQ.shape[0] - 1
        b, start = find(mCuQ, x, batch, heads, ROWS, lane)
        if b < batch:
            q0 = mCuQ[b]
            lq = mCuQ[b + 1] - q0
            k0 = mCuK[b]
            lk = mCuK[b + 1] - k0
            head, row0 = place(x - start, lq, heads, group, ROWS)
            self.tile(
                mQ, mK, mPe, mV, mOut, mLse, sQ, sK, sV, q0, lq, k0, lk, head, row0, c_log2, pe_offset, flags, tid
            )

    @cute.jit
    def tile(self, mQ, mK, mPe, mV, mOut, mLse, sQ, sK, sV, q0, lq, k0, lk, head, row0, c_log2, pe_offset, flags, tid):
        lane = tid % 32
        w = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        row = row0 + w * 16 + lane // 4  # this lane's first row; the other one is 8 behind
        limit = cute.make_rmem_tensor((2,), Int32)  # keys that its rows see
        limit[0] = lk
        limit[1] = lk
        limit_cta = lk
        limit_min = lk  # of the warp's rows
        limit_max = lk
        if const_expr(CAUSAL):
            last = lk - lq + 1
            for r in cutlass.range_constexpr(2):
                limit[r] = cutlass.min(lk, row + 8 * r + last)
            limit_cta = cutlass.min(lk, cutlass.min(lq - 1, row0 + (ROWS - 1)) + last)
            limit_min = cutlass.min(lk, row0 + w * 16 + last)
            limit_max = cutlass.min(lk, row0 + w * 16 + 15 + last)

        O = cute.make_rmem_tensor((V_DIM // 2,), Float32)
        S = cute.make_rmem_tensor((BLOCK_N // 2,), Float32)
        m = cute.make_rmem_tensor((2,), Float32)
        L = cute.make_rmem_tensor((2,), Float32)
        scale = cute.make_rmem_tensor((2,), Float32)
        inverse = cute.arch.rcp_approx(c_log2)
        O.fill(0.0)
        m.fill(M_START)
        L.fill(0.0)
        head_pe = cutlass.min(head, mPe.shape[1] - 1)
        k_at = row_address(mK, k0, head, 0)
        pe_at = row_address(mPe, k0, head_pe, pe_offset)
        v_at = row_address(mV, k0, head, 0)
        blocks = (cutlass.max(limit_cta, 0) + (BLOCK_N - 1)) // BLOCK_N
        token = (blocks - 1) * BLOCK_N
        if blocks > 0:
            q_at = row_address(mQ, q0 + row0, head, 0)
            load(sQ, Q_PITCH, q_at, mQ.stride[0] * 2, lq - row0, ROWS, Q_DIM, tid)
            self.load_k(sK, mK, mPe, k_at, pe_at, token, lk, tid)
        for n in cutlass.range(blocks, unroll=1):
            cute.arch.cp_async_wait_group(0)
            cute.arch.sync_threads()
            load(sV, V_PITCH, v_at + Int64(token) * mV.stride[0] * 2, mV.stride[0] * 2, lk - token, BLOCK_N, V_DIM, tid)
            cute.arch.cp_async_commit_group()
            if token < limit_max:
                self.scores(S, sQ, sK, w, lane)
            cute.arch.cp_async_wait_group(0)
            cute.arch.sync_threads()
            if n + 1 < blocks:
                self.load_k(sK, mK, mPe, k_at, pe_at, token - BLOCK_N, lk, tid)
            if token < limit_max:
                if token + BLOCK_N > limit_min:
                    mask(S, limit, token, lane)
                moved = softmax(S, m, L, scale, c_log2, inverse)
                rescale(O, scale, moved)
                self.values(O, S, sV, lane)
            token = token - BLOCK_N
        store_rows(O, m, L, mOut, mLse, flags, q0, row, lq, head, lane, ELEM)

    @cute.jit
    def load_k(self, sK, mK, mPe, k_at, pe_at, token, lk, tid):
        first, stride = Int64(token) * mK.stride[0] * 2, mK.stride[0] * 2
        load(sK, Q_PITCH, k_at + first, stride, lk - token, BLOCK_N, Q_DIM - PE, tid)
        first, stride = Int64(token) * mPe.stride[0] * 2, mPe.stride[0] * 2
        load(sK + (Q_DIM - PE) * 2, Q_PITCH, pe_at + first, stride, lk - token, BLOCK_N, PE, tid)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def scores(self, S, sQ, sK, w, lane):
        """S = Q K^T of this warp's rows."""
        rA = cute.make_rmem_tensor((4,), Int32)
        rB = cute.make_rmem_tensor((4,), Int32)
        tiles = cute.make_tensor(S.iterator, cute.make_layout((4, BLOCK_N // 8)))
        a = sQ + (w * 16 + lane % 16) * Q_PITCH + lane // 16 * 16
        b = sK + (lane % 8 + lane // 16 * 8) * Q_PITCH + lane // 8 % 2 * 16
        S.fill(0.0)
        for i in cutlass.range_constexpr(Q_DIM // 16):
            ldmatrix4(rA, a + i * 32, False)
            for j in cutlass.range_constexpr(0, BLOCK_N // 8, 2):
                ldmatrix4(rB, b + (j * 8 * Q_PITCH + i * 32), False)
                for h in cutlass.range_constexpr(2):
                    mma(tiles[None, j + h], rA[0], rA[1], rA[2], rA[3], rB[2 * h], rB[2 * h + 1], DTYPE)

    @cute.jit
    def values(self, O, S, sV, lane):
        """O += P V, with P = S rounded: accumulators of S are in the order of an A operand."""
        rB = cute.make_rmem_tensor((4,), Int32)
        tiles = cute.make_tensor(O.iterator, cute.make_layout((4, V_DIM // 8)))
        b = sV + lane % 16 * V_PITCH + lane // 16 * 16
        for t in cutlass.range_constexpr(BLOCK_N // 16):
            p = [pack(S[8 * t + 2 * i], S[8 * t + 2 * i + 1], DTYPE) for i in range(4)]
            for j in cutlass.range_constexpr(0, V_DIM // 8, 2):
                ldmatrix4(rB, b + (t * 16 * V_PITCH + j * 16), True)
                for h in cutlass.range_constexpr(2):
                    mma(tiles[None, j + h], p[0], p[1], p[2], p[3], rB[2 * h], rB[2 * h + 1], DTYPE)


def entry():
    """What to compile: the host function and its fake arguments."""
    return MlaPrefill(), prefill_arguments(ELEM, Q_DIM, V_DIM)
