"""Token-sparse MLA for sm_90a, at most 16 heads: swapped operands.

    S^T (64 entries x ROWS) = K . Q^T      A = K tiles (K-major),              B = Q
    O^T (LATENT    x ROWS)  = V^T . P^T    A = the same tiles read MN-major,   B = P

The heads are the N of the MMA (8 or 16) instead of a mostly empty M of 64: the tensor core has a quarter of the work,
and what remains is gathering and converting rows.

Tiling. One CTA per part (mla_split.py, where a query token is a request); a part walks over 64-entry blocks of the
lists of its tokens. 512 threads: two streams, each a warpgroup that gathers every other block into a buffer of its own
(sparse_rows.py), and a warpgroup with scores, softmax and a complete O^T of the blocks in it.

    gather 0     b0 | b2 ...                           waits empty[0], arrives at full[0]
    gather 1     b1 | b3 ...                           waits empty[1], arrives at full[1]
    math 0          S(b0) softmax PV(b0) | S(b2) ...   waits full, arrives at empty (4 warps)
    math 1          S(b1) softmax PV(b1) | S(b3) ...
    end of token: the two (maximum, sum, O^T) are merged through shared memory; whole tokens are stored to out and lse
    (sinks applied here), pieces of split tokens to the workspace. The Q of the next token is loaded meanwhile, into a
    second buffer.

    end of the CTA: the math warps merge the pieces of split tokens together with the other CTAs (mla_combine.py)

With the fp8 format the latent columns of Q, K, P and V are fp16, for which Q is converted in shared memory once for
each token; the rope columns stay bf16 and add to the same accumulators.

Cannot: more than ROWS heads; sm_scale <= 0; latent sizes other than 512. fp8: |q| above 65504 is infinite in fp16.
"""

# --- constants: replaced when rendered ---
FORMAT = "fp8"
ROPE = 64
ROWS = 16
# --- end of constants ---

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import BFloat16, Float16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator

from common.mla_combine import MlaCombine
from common.sm90 import INF, ex2, issue, smem_atom
from common.sparse_kernel import SparseKernel, queries_to_fp16
from common.sparse_rows import FP8_BYTES, RowGather, load_shared1, sparse_mla_arguments
from common.transposed import over_tokens, row_of

FP8 = FORMAT == "fp8"
ELEMENT = Float16 if FP8 else BFloat16  # of the latent columns
LATENT = 512
BLOCK = 64  # entries of a block
V_TILES = LATENT // 64
TILES = V_TILES + ROPE // 64
TILE_BYTES = 64 * 64 * 2
LATENT_BYTES = V_TILES * TILE_BYTES  # of a buffer
Q_BYTES = ROWS * LATENT * 2
COLS = ROWS // 4  # heads per thread of S^T and O^T
ACC = 2 * COLS  # accumulators of a thread per tile
HALF = V_TILES // 2 * ACC  # accumulators of half of the output columns
FULL, EMPTY, Q_FULL = 0, 2, 4  # mbarriers, two of each
BAR_GROUP, BAR_MATH = 1, 3  # named barriers: 1 and 2 one per math warpgroup, 3 both
MATH_REGS, GATHER_REGS = 112, 144  # fp8; otherwise 128 each
M_INIT = -1.0e30  # finite: -inf - maximum is never NaN

assert FORMAT in ("fp8", "bf16") and ROPE in (0, 64) and ROWS in (8, 16)
GATHER = RowGather(FORMAT, LATENT, ROPE, TILE_BYTES)


def two(rows, columns, dtype):
    """Shared-memory layout (rows, columns, 2), swizzled: tiles of 128 bytes x rows one behind the other."""
    return cute.tile_to_shape(smem_atom(dtype), (rows, columns, 2), order=(0, 1, 2))


def partial_column(lane, e):
    """Column of element e of the lane-th float4 of 128 columns in a partial result: as the accumulators have them."""
    return e // 2 * 64 + (lane >> 3) * 16 + (lane & 7) + e % 2 * 8


COMBINE = MlaCombine(LATENT, "bf16", partial_column, False, BAR_MATH, empty_lse=INF)
assert COMBINE.area_floats() * 4 <= 2 * LATENT_BYTES + 128 * HALF * 4


class SparseMla(SparseKernel):
    @cute.jit
    def cta(self, c):
        wg = c.warp_idx // 4
        t = c.tid % 128

        smem = SmemAllocator()

        def swizzled(dtype, layout):
            return smem.allocate_tensor(dtype, layout.outer, 1024, swizzle=layout.inner)

        sK = swizzled(ELEMENT, two(BLOCK, LATENT, ELEMENT))
        sX = smem.allocate_tensor(Float32, cute.make_layout((128, HALF)), 16)  # merge; behind K: the combine takes both
        sQ = swizzled(BFloat16, two(ROWS, LATENT, BFloat16))
        sQr, sKr = sQ, sK
        if const_expr(ROPE > 0):
            sKr = swizzled(BFloat16, two(BLOCK, 64, BFloat16))
            sQr = swizzled(BFloat16, two(ROWS, 64, BFloat16))
        sP = swizzled(ELEMENT, two(ROWS, BLOCK, ELEMENT))  # one for each math warpgroup
        sMx = smem.allocate_tensor(Float32, cute.make_layout((16, 4, 2)), 16)  # maxima: head, warp, warpgroup
        sL = smem.allocate_tensor(Float32, cute.make_layout((16, 4, 2)), 16)  # sums
        sM = smem.allocate_tensor(Float32, cute.make_layout((16, 2)), 16)  # running maxima at the end of a token
        sOk = smem.allocate_tensor(Int32, cute.make_layout(2 * BLOCK // 4), 16)  # a byte for each row of the buffers
        sI = smem.allocate_tensor(Int32, cute.make_layout(6), 16)  # the CTA's share of the work
        sShare = smem.allocate_tensor(Int32, cute.make_layout(6), 16)  # its share of the combine
        bars = smem.allocate_array(Int64, 6)
        # the latent tiles of Q as the MMA sees them: after the conversion
        sQm = cute.make_tensor(cute.recast_ptr(sQ.iterator, smem_atom(ELEMENT).inner, dtype=ELEMENT), sQ.layout)

        if c.warp_idx == 0:
            cpasync.prefetch_descriptor(c.tma_q)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(bars + (FULL + i), 4 if FP8 else 132)
                    cute.arch.mbarrier_init(bars + (EMPTY + i), 4)
                    cute.arch.mbarrier_init(bars + (Q_FULL + i), 1)
            cute.arch.mbarrier_init_fence()
        self.begin(c, sI)

        def mma(dtype, a_major):
            return hh.make_trivial_tiled_mma(
                dtype, dtype, a_major, OperandMajorMode.K, Float32, (1, 1, 1), (64, ROWS), warpgroup.OperandSource.SMEM
            )

        mma_qk, mma_rope = [mma(x, OperandMajorMode.K) for x in (ELEMENT, BFloat16)]
        mma_pv = mma(ELEMENT, OperandMajorMode.MN)
        qk, rope, pv = [x.get_slice(t) for x in (mma_qk, mma_rope, mma_pv)]
        tQsQ, tQsR, tQgQ = self.query_views(c, sQ, sQr)
        v_view = cute.make_tensor(sK.iterator, cute.select(sK.layout, mode=[1, 0, 2]))
        v_tiles = cute.local_tile(v_view, (64, BLOCK), (None, 0, None))  # (column, row, tile, buffer)
        c = SimpleNamespace(
            **vars(c),
            t=t,
            w=c.warp_idx % 4,
            wg=wg,
            bars=bars,
            sI=sI,
            sP=sP,
            sMx=sMx,
            sL=sL,
            sM=sM,
            sX=sX,
            ok=sOk.iterator.toint(),
            q_at=sQ.iterator.toint(),
            tQgQ=tQgQ,
            tQsQ=tQsQ,
            tQsR=tQsR,
            tK=qk.make_fragment_A(qk.partition_A(sK)),
            tQ=qk.make_fragment_B(qk.partition_B(sQm)),
            tKr=rope.make_fragment_A(rope.partition_A(sKr)),
            tQr=rope.make_fragment_B(rope.partition_B(sQr)),
            tV=pv.make_fragment_A(pv.partition_A(v_tiles)),
            tP=pv.make_fragment_B(pv.partition_B(sP)),
            s_shape=qk.partition_shape_C((BLOCK, ROWS)),
            op_qk=mma_qk.op,
            op_rope=mma_rope.op,
            op_pv=mma_pv.op,
        )
        if wg >= 2:
            if const_expr(FP8):
                cute.arch.setmaxregister_increase(GATHER_REGS)
            GATHER.run(
                c.rows, c.mList, c.lengths, sI, sK.iterator.toint(), LATENT_BYTES, sKr.iterator.toint(), TILE_BYTES,
                c.ok, bars + FULL, bars + EMPTY, c.w, c.lane, wg - 2, 2,
            )  # fmt: skip
        else:
            if const_expr(FP8):
                cute.arch.setmaxregister_decrease(MATH_REGS)
            # while the first loads are under way; a branch on tid would make the compiler take the warps for diverged
            if c.warp_idx == 4:
                self.store_share(c, sShare)
            self.math(c)
            # every row that was gathered has been waited for
            area = cute.recast_ptr(sK.iterator, dtype=Float32)
            COMBINE.run(
                area, sShare, c.mO, c.lse, c.sinks, c.o_acc, c.lse_acc, c.semaphores, c.flags, c.heads, c.part,
                Int32(0), Int32(1), Int32(0), c.heads, c.tid,
            )  # fmt: skip

    @cute.jit
    def load_q(self, c, token, stage):
        bar = c.bars + (Q_FULL + stage)
        self.load_queries(c, token, bar, c.tQsQ[None, None, stage], c.tQsR[None, None, stage])

    @cute.jit
    def q_ready(self, c, stage, phase):
        """Wait for Q; fp8: turn its latent tiles into fp16."""
        cute.arch.mbarrier_wait(c.bars + (Q_FULL + stage), phase)
        if const_expr(FP8):
            queries_to_fp16(c.q_at + stage * Q_BYTES, c.tid, Q_BYTES)
            cute.arch.barrier(barrier_id=BAR_MATH, number_of_threads=256)

    # ---------------------------------------------------------------- math
    @cute.jit
    def block(self, c, rS, rO, rM, rL, number, stage):
        """One block by one warpgroup. number: of the block in this CTA; stage: of Q."""
        lane, w, wg, sP, sMx = c.lane, c.w, c.wg, c.sP, c.sMx
        buffer = number & 1
        cute.arch.mbarrier_wait(c.bars + (FULL + buffer), (number >> 1) & 1)
        # on the readers' side: gathering threads would wait for the rows that they are loading
        cute.arch.fence_view_async_shared()
        # S^T = K Q^T
        warpgroup.fence()
        issue(c.op_qk, rS, c.tK[None, None, None, buffer], c.tQ[None, None, None, stage], True)
        if const_expr(ROPE > 0):
            issue(c.op_rope, rS, c.tKr[None, None, None, buffer], c.tQr[None, None, None, stage], False)
        warpgroup.commit_group()
        ok = c.ok + buffer * BLOCK + w * 16 + lane // 4
        valid = [load_shared1(ok), load_shared1(ok, 8)]
        warpgroup.wait_group(0)
        for i in cutlass.range_constexpr(cute.size(rS)):
            rS[i] = rS[i] if valid[(i // 2) % 2] != 0 else -Float32(INF)
        # maximum over the 64 entries: two registers, 8 lanes, 4 warps
        for h in cutlass.range_constexpr(COLS):
            i = (h // 2) * 4 + h % 2
            top = over_tokens(cute.arch.fmax(rS[i], rS[i + 2]), True)
            if lane < 4:
                sMx[row_of(h, lane), w, wg] = top
        cute.arch.barrier(barrier_id=BAR_GROUP + wg, number_of_threads=128)
        rFactor = cute.make_rmem_tensor((COLS,), Float32)
        for h in cutlass.range_constexpr(COLS):
            row = row_of(h, lane)
            top = cute.arch.fmax(
                cute.arch.fmax(sMx[row, 0, wg], sMx[row, 1, wg]), cute.arch.fmax(sMx[row, 2, wg], sMx[row, 3, wg])
            )
            m_new = cute.arch.fmax(rM[h], top * c.scale)
            rFactor[h] = ex2(rM[h] - m_new)
            rM[h] = m_new
            i = (h // 2) * 4 + h % 2
            a = ex2(rS[i] * c.scale - m_new)
            b = ex2(rS[i + 2] * c.scale - m_new)
            rL[h] = rL[h] * rFactor[h] + (a + b)
            sP[row, w * 16 + lane // 4, wg] = a.to(ELEMENT)
            sP[row, w * 16 + lane // 4 + 8, wg] = b.to(ELEMENT)
        grew = rFactor[0] < 1.0 or rFactor[1] < 1.0
        if const_expr(COLS > 2):
            grew = grew or rFactor[2] < 1.0 or rFactor[3] < 1.0
        if cute.arch.vote_any_sync(grew):
            for i in cutlass.range_constexpr(cute.size(rO)):
                rO[i] = rO[i] * rFactor[((i % ACC) // 4) * 2 + i % 2]
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=BAR_GROUP + wg, number_of_threads=128)
        # O^T += V^T P^T
        pv = cute.make_mma_atom(c.op_pv)
        pv.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for i in cutlass.range_constexpr(V_TILES):
            rOi = cute.make_tensor(rO.iterator + i * ACC, rS.layout)
            for x in cutlass.range_constexpr(4):
                cute.gemm(pv, rOi, c.tV[None, None, x, i, buffer], c.tP[None, None, x, wg], rOi)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(c.bars + (EMPTY + buffer))

    @cute.jit
    def math(self, c):
        lane, w, wg, tid, sI, sL, sM = c.lane, c.w, c.wg, c.tid, c.sI, c.sL, c.sM
        rS = cute.make_rmem_tensor(c.s_shape, Float32)
        rO = cute.make_rmem_tensor((2 * HALF,), Float32)
        rM = cute.make_rmem_tensor((COLS,), Float32)
        rL = cute.make_rmem_tensor((COLS,), Float32)
        done = Int32(0)  # blocks of this CTA before this token
        if c.warp_idx == 0 and sI[0] <= sI[1]:
            self.load_q(c, sI[0], Int32(0))
        for token in cutlass.range(sI[0], sI[1] + 1, unroll=1):
            n, whole, slot = self.piece(c, token)
            stage = (token - sI[0]) & 1
            if c.warp_idx == 0 and token < sI[1]:
                self.load_q(c, token + 1, stage ^ 1)  # the token before is through with it
            rO.fill(0.0)
            rM.fill(M_INIT)
            rL.fill(0.0)
            self.q_ready(c, stage, ((token - sI[0]) >> 1) & 1)
            for j in cutlass.range(wg, n, 2, unroll=1):
                self.block(c, rS, rO, rM, rL, done + j, stage)
            done = done + n

            # merge the two warpgroups
            for h in cutlass.range_constexpr(COLS):
                rL[h] = over_tokens(rL[h], False)
                if lane < 4:
                    sL[row_of(h, lane), w, wg] = rL[h]
                    if w == 0:
                        sM[row_of(h, lane), wg] = rM[h]
            cute.arch.barrier(barrier_id=BAR_MATH, number_of_threads=256)
            for h in cutlass.range_constexpr(COLS):
                row = row_of(h, lane)
                total, top = self.total(sL, sM, row)
                rL[h] = self.share(c, row, whole, total, top, rM[h])
            for i in cutlass.range_constexpr(2 * HALF):
                rO[i] = rO[i] * rL[((i % ACC) // 4) * 2 + i % 2]
            if tid < c.heads:
                total, top = self.total(sL, sM, tid)
                self.store_sum(c, token, tid, whole, slot, total, top)
            if wg == 1:
                self.give(c, rO, 0)
            cute.arch.barrier(barrier_id=BAR_MATH, number_of_threads=256)
            if wg == 0:
                self.take(c, rO, 0)
            cute.arch.barrier(barrier_id=BAR_MATH, number_of_threads=256)
            if wg == 0:
                self.give(c, rO, HALF)
            cute.arch.barrier(barrier_id=BAR_MATH, number_of_threads=256)
            if wg == 1:
                self.take(c, rO, HALF)
            # each warpgroup its half of the columns
            if whole:
                if wg == 0:
                    self.store(c, rO, 0, token)
                else:
                    self.store(c, rO, HALF, token)
            else:
                if wg == 0:
                    self.store_partial(c, rO, 0, slot)
                else:
                    self.store_partial(c, rO, HALF, slot)

    @cute.jit
    def store(self, c, rO, lo: cutlass.Constexpr, token):
        """Straight from the accumulators: 8 neighbouring columns per head and store."""
        lane, w, mO = c.lane, c.w, c.mO
        for i in cutlass.range_constexpr(HALF):
            e = i % ACC
            row = row_of((e // 4) * 2 + e % 2, lane)
            col = (lo + i) // ACC * 64 + w * 16 + lane // 4 + 8 * ((e // 2) % 2)
            if row < c.heads:
                mO[token, row, col] = rO[lo + i].to(BFloat16)

    @cute.jit
    def store_partial(self, c, rO, lo: cutlass.Constexpr, slot):
        """The same with permuted columns: 8 lanes store 128 bytes of a row, 4 accumulators each of two tiles."""
        lane, w, o_acc = c.lane, c.w, c.o_acc
        v4 = cute.make_rmem_tensor((4,), Float32)
        for i in cutlass.range_constexpr(HALF // 4):
            h, pair = i % COLS, i // COLS
            row = row_of(h, lane)
            if row < c.heads:
                for e in cutlass.range_constexpr(4):
                    v4[e] = rO[lo + (2 * pair + e // 2) * ACC + h // 2 * 4 + h % 2 + e % 2 * 2]
                at = (lo // (2 * ACC) + pair) * 32 + w * 8 + lane // 4
                cute.autovec_copy(v4, cute.local_tile(o_acc[slot, row, None], (4,), (at,)))

    @cute.jit
    def total(self, sL, sM, row):
        """(sum of the weights, maximum) of one head over both warpgroups."""
        m0 = sM[row, 0]
        m1 = sM[row, 1]
        top = cute.arch.fmax(m0, m1)
        l0 = (sL[row, 0, 0] + sL[row, 1, 0]) + (sL[row, 2, 0] + sL[row, 3, 0])
        l1 = (sL[row, 0, 1] + sL[row, 1, 1]) + (sL[row, 2, 1] + sL[row, 3, 1])
        return l0 * ex2(m0 - top) + l1 * ex2(m1 - top), top

    @cute.jit
    def give(self, c, rO, lo: cutlass.Constexpr):
        sX = c.sX
        for i in cutlass.range_constexpr(HALF):
            sX[c.t, i] = rO[lo + i]

    @cute.jit
    def take(self, c, rO, lo: cutlass.Constexpr):
        for i in cutlass.range_constexpr(HALF):
            rO[lo + i] = rO[lo + i] + c.sX[c.t, i]


def entry():
    """What to compile: the host function and its fake arguments."""
    kernel = SparseMla(LATENT, ROPE, ROWS, 512, more_heads=False)
    return kernel, sparse_mla_arguments(FP8_BYTES if FP8 else (LATENT + ROPE) * 2, LATENT)
