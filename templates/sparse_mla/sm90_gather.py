"""Token-sparse MLA for sm_90a, up to 128 heads: every query token has its own list of cache rows.

Algorithm. A CTA takes 64 heads of a query token (grid x) and a run of 64-entry blocks of the lists of one or several
tokens (grid z, common/mla_split.py, where a query token is a request). The rows of a block are gathered into shared
memory once and serve as K (K-major, LATENT + ROPE columns) and as V (the same bytes read MN-major, LATENT columns).
Online softmax in the log2 domain with sm_scale * log2(e) folded into the exponent. Whole tokens go straight to `out`
and `lse`; pieces go to fp32 partial results in `workspace`, which the CTAs merge when they are done
(common/mla_combine.py).

Tiling. 384 threads, two buffers of 64 rows.

    producer     gather b0 | gather b1      | gather b2 ...     waits empty[buffer], arrives at full[buffer]
    warpgroup 0    S(b0) P(b0) | O.L(b0), S(b1) P(b1) | ...     S, softmax, the left half of O; S of the next block is
                                                                queued behind the product of this one
    warpgroup 1                | O.R(b0)        | O.R(b1) ...   the right half of O; waits READY, arrives at FREE

How rows get into shared memory, and the two formats: common/sparse_rows.py. With the fp8 format the latent columns of
Q, K, P and V are fp16, for which Q is converted in shared memory once for each token; the rope columns stay bf16 and
add to the same accumulators.

Barriers. mbarriers: full and empty of each buffer, one for Q. Named barriers of 256: READY (P and the factors of O are
in shared memory), FREE (warpgroup 1 has read them), SUMS (1 / sum is there), Q_READY (Q is converted).

Cannot: more than 128 heads, sm_scale <= 0, latent sizes other than 512. Fewer than 64 heads cost as much as 64.
fp8: |q| above 65504 is infinite in fp16, in which partial results are as well.
"""

# --- constants: replaced when rendered ---
FORMAT = "fp8"
ROPE = 64
# --- end of constants ---

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import BFloat16, Float16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator

from common.mla_combine import MlaCombine
from common.sm90 import INF, ex2, issue, quad_max, quad_sum, smem_atom, swz
from common.sparse_kernel import SparseKernel, mask_entries, queries_to_fp16
from common.sparse_rows import FP8_BYTES, RowGather, sparse_mla_arguments

FP8 = FORMAT == "fp8"
ELEMENT = Float16 if FP8 else BFloat16  # of the latent columns
LATENT = 512
ROWS = 64  # heads of a CTA
BLOCK = 64  # entries of a block
HALF = LATENT // 2  # output columns of a warpgroup
V_TILES = LATENT // 64
TILES = V_TILES + ROPE // 64
TILE_BYTES = 64 * 64 * 2
LATENT_BYTES = V_TILES * TILE_BYTES  # of a buffer
FULL, EMPTY, Q_FULL = 0, 2, 4  # mbarriers
READY, FREE, SUMS, Q_READY, BAR_END = 1, 2, 3, 4, 5  # named barriers
SCORE_REGS, VALUE_REGS, GATHER_REGS = (208, 160, 136) if FP8 else (208, 176, 120)
LAUNCH_REGS = 168
M_INIT = -1.0e30  # finite, so that a block without entries has no NaN

assert FORMAT in ("fp8", "bf16") and ROPE in (0, 64)
GATHER = RowGather(FORMAT, LATENT, ROPE, TILE_BYTES)


def buffers(columns, dtype):
    """Shared-memory layout (64 rows, columns, 2 buffers), swizzled: tiles of 64 rows x 128 bytes one behind the
    other."""
    return cute.tile_to_shape(smem_atom(dtype), (BLOCK, columns, 2), order=(0, 1, 2))


def partial_column(lane, e):
    """Column of element e of the lane-th four of 128 columns in a partial result: as the accumulators have them, 16
    bytes of a thread one behind the other."""
    if const_expr(FP8):
        return (lane >> 3) * 32 + (lane & 1) * 16 + e // 2 * 8 + ((lane >> 1) & 3) * 2 + e % 2
    return (lane >> 2) * 16 + (lane & 3) * 2 + e % 2 + e // 2 * 8


PARTIAL = Float16 if FP8 else Float32  # a mean of fp16 rows is no larger than they are
COMBINE = MlaCombine(
    LATENT, "bf16", partial_column, True, BAR_END, teams=False, empty_lse=INF, partial="fp16" if FP8 else "fp32"
)
assert COMBINE.area_floats() * 4 <= 2 * LATENT_BYTES + TILE_BYTES


class SparseMla(SparseKernel):
    @cute.jit
    def cta(self, c):
        wg = c.warp_idx // 4
        t = c.tid % 128
        row = (c.warp_idx % 4) * 16 + c.lane // 4  # this thread has the rows row and row + 8

        smem = SmemAllocator()

        def swizzled(dtype, layout):
            return smem.allocate_tensor(dtype, layout.outer, 1024, swizzle=layout.inner)

        sQ = swizzled(BFloat16, swz(ROWS, LATENT, BFloat16))
        sK = swizzled(ELEMENT, buffers(LATENT, ELEMENT))
        sQr, sKr = sQ, sK
        if const_expr(ROPE > 0):
            sKr = swizzled(BFloat16, buffers(64, BFloat16))
        sP = swizzled(ELEMENT, swz(ROWS, BLOCK, ELEMENT))  # behind K: the combine takes both
        if const_expr(ROPE > 0):
            sQr = swizzled(BFloat16, swz(ROWS, 64, BFloat16))
        sFactor = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)
        sInv = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)
        sOk = smem.allocate_tensor(Int32, cute.make_layout(2 * BLOCK // 4), 16)  # a byte for each row of the buffers
        sI = smem.allocate_tensor(Int32, cute.make_layout(6), 16)  # the CTA's share of the work
        sShare = smem.allocate_tensor(Int32, cute.make_layout(6), 16)  # its share of the combine
        bars = smem.allocate_array(Int64, 5)
        # the latent tiles of Q as the MMA sees them: after the conversion
        sQm = cute.make_tensor(cute.recast_ptr(sQ.iterator, smem_atom(ELEMENT).inner, dtype=ELEMENT), sQ.layout)

        if c.warp_idx == 0:
            cpasync.prefetch_descriptor(c.tma_q)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(bars + (FULL + i), 4 if FP8 else 132)
                    cute.arch.mbarrier_init(bars + (EMPTY + i), 8)
                cute.arch.mbarrier_init(bars + Q_FULL, 1)
            cute.arch.mbarrier_init_fence()
        self.begin(c, sI)

        def mma(dtype, n, b_major, a_source):
            return hh.make_trivial_tiled_mma(
                dtype, dtype, OperandMajorMode.K, b_major, Float32, (1, 1, 1), (ROWS, n), a_source
            )

        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        from_smem, from_rmem = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM
        mma_qk, mma_rope = [mma(x, BLOCK, k_major, from_smem) for x in (ELEMENT, BFloat16)]
        mma_pv_r, mma_pv_s = [mma(ELEMENT, HALF, mn_major, x) for x in (from_rmem, from_smem)]
        qk, rope, pv_r, pv_s = [x.get_slice(t) for x in (mma_qk, mma_rope, mma_pv_r, mma_pv_s)]
        tQsQ, tQsR, tQgQ = self.query_views(c, sQ, sQr)
        sV = cute.local_tile(  # (column of a half, row, half, buffer)
            cute.composition(sK, cute.make_ordered_layout((LATENT, BLOCK, 2), order=(1, 0, 2))),
            (HALF, BLOCK),
            (None, 0, None),
        )
        stsm = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), ELEMENT), mma_qk)
        stsm_thr = stsm.get_slice(t)

        c = SimpleNamespace(
            **vars(c),
            row=row,
            bars=bars,
            sI=sI,
            sFactor=sFactor,
            sInv=sInv,
            ok=sOk.iterator.toint(),
            q_at=sQ.iterator.toint(),
            tQgQ=tQgQ,
            tQsQ=tQsQ,
            tQsR=tQsR,
            tQ=qk.make_fragment_A(qk.partition_A(sQm)),
            tK=qk.make_fragment_B(qk.partition_B(sK)),
            tQr=rope.make_fragment_A(rope.partition_A(sQr)),
            tKr=rope.make_fragment_B(rope.partition_B(sKr)),
            tVl=pv_r.make_fragment_B(pv_r.partition_B(sV[None, None, 0, None])),
            tVr=pv_s.make_fragment_B(pv_s.partition_B(sV[None, None, 1, None])),
            tP=pv_s.make_fragment_A(pv_s.partition_A(sP)),
            s_shape=qk.partition_shape_C((ROWS, BLOCK)),
            o_shape=pv_r.partition_shape_C((ROWS, HALF)),
            op_qk=mma_qk.op,
            op_rope=mma_rope.op,
            op_pv_r=mma_pv_r.op,
            op_pv_s=mma_pv_s.op,
            stsm=stsm,
            stsm_thr=stsm_thr,
            tPst=stsm_thr.partition_D(sP),
        )
        if wg == 2:
            cute.arch.setmaxregister_decrease(GATHER_REGS)
            GATHER.run(
                c.rows, c.mList, c.lengths, sI, sK.iterator.toint(), LATENT_BYTES, sKr.iterator.toint(), TILE_BYTES,
                c.ok, bars + FULL, bars + EMPTY, c.warp_idx - 8, c.lane, Int32(0), 1,
            )  # fmt: skip
        else:
            if wg == 0:
                cute.arch.setmaxregister_increase(SCORE_REGS)
                self.scores(c)
            else:
                if const_expr(VALUE_REGS > LAUNCH_REGS):
                    cute.arch.setmaxregister_increase(VALUE_REGS)
                else:
                    cute.arch.setmaxregister_decrease(VALUE_REGS)
                # while the first loads are under way; a branch on tid would make the compiler take the warps for
                # diverged
                if c.warp_idx == 4:
                    self.store_share(c, sShare)
                self.values(c)
            # every row that was gathered has been waited for
            area = cute.recast_ptr(sK.iterator, dtype=Float32)
            first_row = c.m_block * ROWS
            COMBINE.run(
                area, sShare, c.mO, c.lse, c.sinks, c.o_acc, c.lse_acc, c.semaphores, c.flags, c.heads, c.part,
                c.m_block, c.m_blocks, first_row, cutlass.min(c.heads - first_row, ROWS), c.tid,
            )  # fmt: skip

    @cute.jit
    def load_q(self, c, token):
        self.load_queries(c, token, c.bars + Q_FULL, c.tQsQ, c.tQsR)

    @cute.jit
    def q_ready(self, c, phase):
        """Wait for Q; fp8: turn its latent tiles into fp16."""
        cute.arch.mbarrier_wait(c.bars + Q_FULL, phase)
        if const_expr(FP8):
            queries_to_fp16(c.q_at, c.tid, LATENT_BYTES)

    # -------------------------------------------------------------------------------------------- warpgroup 0
    @cute.jit
    def scores(self, c):
        sI, sInv = c.sI, c.sInv
        if c.warp_idx == 0 and sI[0] <= sI[1]:
            self.load_q(c, sI[0])
        number = Int32(0)  # of the block in this CTA
        phase_q = Int32(0)
        for token in cutlass.range(sI[0], sI[1] + 1, unroll=1):
            n, whole, slot = self.piece(c, token)
            S = cute.make_rmem_tensor(c.s_shape, Float32)
            O = cute.make_rmem_tensor(c.o_shape, Float32)
            m = cute.make_rmem_tensor((2,), Float32)
            L = cute.make_rmem_tensor((2,), Float32)
            O.fill(0.0)
            m.fill(M_INIT)
            L.fill(0.0)
            self.q_ready(c, phase_q)
            cute.arch.barrier(barrier_id=Q_READY, number_of_threads=256)
            phase_q = phase_q ^ 1
            self.issue_scores(c, S, number)
            warpgroup.wait_group(0)
            for i in cutlass.range(n - 1, unroll=1):
                self.block(c, S, O, m, L, number + i, token, token, False)
            self.block(c, S, O, m, L, number + n - 1, token, cutlass.min(token + 1, sI[1]), True)
            number = number + n

            # recomputed here rather than kept live through the main loop
            n, whole, slot = self.piece(c, token)
            inv = cute.make_rmem_tensor((2,), Float32)
            for r in cutlass.range_constexpr(2):
                total = quad_sum(L[r])
                at = c.row + 8 * r
                head = c.m_block * ROWS + at
                inv[r] = self.share(c, head, whole, total, m[r])
                if c.lane % 4 == 0:
                    sInv[at] = inv[r]
                    if head < c.heads:
                        self.store_sum(c, token, head, whole, slot, total, m[r])
            cute.arch.barrier_arrive(barrier_id=SUMS, number_of_threads=256)
            self.store(c, O, inv, whole, token, slot, 0)
        cute.arch.barrier(barrier_id=FREE, number_of_threads=256)

    @cute.jit
    def issue_scores(self, c, S, number):
        buffer = number & 1
        cute.arch.mbarrier_wait(c.bars + (FULL + buffer), (number >> 1) & 1)
        # on the readers' side: gathering threads would wait for the rows that they are loading
        cute.arch.fence_view_async_shared()
        warpgroup.fence()
        issue(c.op_qk, S, c.tQ, c.tK[None, None, None, buffer], True)
        if const_expr(ROPE > 0):
            issue(c.op_rope, S, c.tQr, c.tKr[None, None, None, buffer], False)
        warpgroup.commit_group()

    @cute.jit
    def block(self, c, S, O, m, L, number, token, following, last: cutlass.Constexpr):
        """Softmax of one block, its product, and the scores of the next one. last: of this token; following: the token
        whose Q to load then, if it is another."""
        lane, sFactor, buffer = c.lane, c.sFactor, number & 1
        mask_entries(S, c.ok + buffer * BLOCK, lane)
        factor = cute.make_rmem_tensor((2,), Float32)
        rP = cute.make_rmem_tensor(((2, 2, 2), 1, 4), ELEMENT)
        for r in cutlass.range_constexpr(2):
            top = S[2 * r]
            for j in cutlass.range_constexpr(BLOCK // 8):
                top = cute.arch.fmax(top, cute.arch.fmax(S[4 * j + 2 * r], S[4 * j + 2 * r + 1]))
            m_new = cute.arch.fmax(m[r], quad_max(top) * c.scale)
            factor[r] = ex2(m[r] - m_new)
            m[r] = m_new
            total = Float32(0.0)
            for j in cutlass.range_constexpr(BLOCK // 8):
                a = ex2(S[4 * j + 2 * r] * c.scale - m_new)
                b = ex2(S[4 * j + 2 * r + 1] * c.scale - m_new)
                S[4 * j + 2 * r] = a
                S[4 * j + 2 * r + 1] = b
                total = total + (a + b)
            L[r] = L[r] * factor[r] + total
        rP.store(S.load().to(ELEMENT))
        cute.arch.barrier(barrier_id=FREE, number_of_threads=256)  # warpgroup 1 is done with P and the factors
        if const_expr(last):
            if c.warp_idx == 0 and following > token:
                self.load_q(c, following)  # all scores of this token are there
        for r in cutlass.range_constexpr(2):
            if lane % 4 == 0:
                sFactor[c.row + 8 * r] = factor[r]
        cute.copy(c.stsm, c.stsm_thr.retile(rP), c.tPst)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=READY, number_of_threads=256)
        self.rescale(O, factor)
        warpgroup.fence()
        issue(c.op_pv_r, O, rP, c.tVl[None, None, None, buffer], False)
        warpgroup.commit_group()
        if const_expr(not last):
            self.issue_scores(c, S, number + 1)
            warpgroup.wait_group(1)
        else:
            warpgroup.wait_group(0)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(c.bars + (EMPTY + buffer))
        if const_expr(not last):
            warpgroup.wait_group(0)

    # -------------------------------------------------------------------------------------------- warpgroup 1
    @cute.jit
    def values(self, c):
        sI, sFactor, sInv = c.sI, c.sFactor, c.sInv
        factor = cute.make_rmem_tensor((2,), Float32)
        cute.arch.barrier_arrive(barrier_id=FREE, number_of_threads=256)
        number = Int32(0)
        phase_q = Int32(0)
        for token in cutlass.range(sI[0], sI[1] + 1, unroll=1):
            n, whole, slot = self.piece(c, token)
            O = cute.make_rmem_tensor(c.o_shape, Float32)
            O.fill(0.0)
            self.q_ready(c, phase_q)
            cute.arch.barrier_arrive(barrier_id=Q_READY, number_of_threads=256)
            phase_q = phase_q ^ 1
            for i in cutlass.range(n, unroll=1):
                buffer = (number + i) & 1
                cute.arch.barrier(barrier_id=READY, number_of_threads=256)
                for r in cutlass.range_constexpr(2):
                    factor[r] = sFactor[c.row + 8 * r]
                self.rescale(O, factor)
                warpgroup.fence()
                issue(c.op_pv_s, O, c.tP, c.tVr[None, None, None, buffer], False)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(c.bars + (EMPTY + buffer))
                cute.arch.barrier_arrive(barrier_id=FREE, number_of_threads=256)
            number = number + n
            n, whole, slot = self.piece(c, token)
            cute.arch.barrier(barrier_id=SUMS, number_of_threads=256)
            for r in cutlass.range_constexpr(2):
                factor[r] = sInv[c.row + 8 * r]
            self.store(c, O, factor, whole, token, slot, 1)

    @cute.jit
    def rescale(self, O, factor):
        if cute.arch.vote_any_sync(factor[0] < 1.0 or factor[1] < 1.0):
            for e in cutlass.range_constexpr(cute.size(O)):
                O[e] = O[e] * factor[(e // 2) % 2]

    @cute.jit
    def store(self, c, O, inv, whole, token, slot, half: cutlass.Constexpr):
        """One half of the columns of a token or of a piece of one, straight from the accumulators."""
        for r in cutlass.range_constexpr(2):
            head = c.m_block * ROWS + c.row + 8 * r
            if head < c.heads:
                if whole:
                    for j in cutlass.range_constexpr(HALF // 8):
                        v2 = cute.make_rmem_tensor((2,), BFloat16)
                        for e in cutlass.range_constexpr(2):
                            v2[e] = (O[4 * j + 2 * r + e] * inv[r]).to(BFloat16)
                        at = half * (HALF // 2) + j * 4 + c.lane % 4
                        cute.autovec_copy(v2, cute.local_tile(c.mO[token, head, None], (2,), (at,)))
                else:
                    n = const_expr(128 // PARTIAL.width)  # 16 bytes
                    for j in cutlass.range_constexpr(HALF // (4 * n)):
                        v = cute.make_rmem_tensor((n,), PARTIAL)
                        for e in cutlass.range_constexpr(n):
                            v[e] = (O[2 * n * j + e // 2 * 4 + 2 * r + e % 2] * inv[r]).to(PARTIAL)
                        at = half * (HALF // n) + j * 4 + c.lane % 4
                        cute.autovec_copy(v, cute.local_tile(c.o_acc[slot, head, None], (n,), (at,)))


def entry():
    """What to compile: the host function and its fake arguments."""
    kernel = SparseMla(LATENT, ROPE, ROWS, 384, partial=PARTIAL)
    return kernel, sparse_mla_arguments(FP8_BYTES if FP8 else (LATENT + ROPE) * 2, LATENT)
