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

from common.mla_combine import COOPERATIVE, HAS_SINKS, WANTS_LSE, MlaCombine
from common.mla_split import interval, n_blocks, partials, sharing
from common.sm90 import INF, LOG2E, ex2, issue, quad_max, quad_sum, smem_atom, swz
from common.sparse_rows import FP8_BYTES, WANTS_MAX, RowAddress, RowGather, TokenLengths, by_head, end_of_piece
from common.sparse_rows import half2_of_bf16x2, load_shared2, load_shared16, per_token
from common.sparse_rows import quotient, sparse_mla_arguments, store_shared16

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


class SparseMla:
    # -------------------------------------------------------------------------------------------- host
    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        kv: cute.Tensor,
        indices: cute.Tensor,
        lengths: cute.Tensor,
        sinks: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        max_logits: cute.Tensor,
        workspace: cute.Tensor,
        semaphores: cute.Tensor,
        sm_scale: Float32,
        page_magic: Int32,
        page_shift: Int32,
        s_q_magic: Int32,
        s_q_shift: Int32,
        flags: Int32,
        parts: Int32,
        fixed: Int32,
        least: Int32,
        bias: Int32,
        stream,
    ):
        """q (B, s_q, H, LATENT + ROPE); kv (pages, page_size, 1, bytes of a row); indices (B, s_q, topk >= 1); lengths
        (B) if HAS_LENGTHS; sinks (>= H) if HAS_SINKS; out (B, s_q, H, LATENT); lse, max_logits (B, s_q, H) if
        WANTS_LSE, WANTS_MAX (whole tokens only); workspace: see mla_split.partials, of H rows; semaphores: zeros,
        parts * ceil(H / 64) of them, left as zeros. sm_scale > 0. Query tokens of all but q are evenly spaced.
        page_magic, page_shift: see RowAddress; s_q_magic, s_q_shift divide by s_q (see quotient). From parts on: the
        split; parts * ceil(H / 64) is at most the number of SMs."""
        batch, s_q, heads = q.shape[0], q.shape[1], q.shape[2]
        tokens = batch * s_q
        o_acc, lse_acc = partials(workspace, parts, heads, LATENT, PARTIAL)
        tile = swz(ROWS, 64, BFloat16)
        # the stride of a mode of size 1 may be anything, also none that TMA accepts
        head = q.stride[2] if heads > 1 else Int64(64)
        token = q.stride[1] if s_q > 1 else Int64(64)
        request = q.stride[0] if batch > 1 else Int64(64)
        head, token, request = [cute.assume(x, divby=8) for x in (head, token, request)]
        q_rows = cute.make_layout((heads, LATENT + ROPE, s_q, batch), stride=(head, 1, token, request))
        tma_q, mQ = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), cute.make_tensor(q.iterator, q_rows), tile, (ROWS, 64)
        )

        def mma(dtype, n, b_major, a_source):
            return hh.make_trivial_tiled_mma(
                dtype, dtype, OperandMajorMode.K, b_major, Float32, (1, 1, 1), (ROWS, n), a_source
            )

        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        smem, rmem = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM
        self.kernel(
            tma_q,
            mQ,
            kv,
            per_token(indices),
            lengths,
            sinks,
            per_token(out),
            by_head(lse),
            by_head(max_logits),
            o_acc,
            lse_acc,
            semaphores,
            sm_scale * LOG2E,
            page_magic,
            page_shift,
            s_q_magic,
            s_q_shift,
            flags,
            tokens,
            s_q,
            heads,
            parts,
            fixed,
            least,
            bias,
            parts // tokens,
            (tokens + parts - 1) // parts,
            mma(ELEMENT, BLOCK, k_major, smem),
            mma(BFloat16, BLOCK, k_major, smem),
            mma(ELEMENT, HALF, mn_major, rmem),
            mma(ELEMENT, HALF, mn_major, smem),
        ).launch(
            grid=[cute.ceil_div(heads, ROWS), 1, parts],
            block=[384, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
            cooperative=(flags & COOPERATIVE) // COOPERATIVE,
        )

    # -------------------------------------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        mQ: cute.Tensor,
        kv: cute.Tensor,
        mList: cute.Tensor,
        mLengths: cute.Tensor,
        sinks: cute.Tensor,
        mO: cute.Tensor,
        lse: cute.Tensor,
        max_logits: cute.Tensor,
        o_acc: cute.Tensor,
        lse_acc: cute.Tensor,
        semaphores: cute.Tensor,
        scale: Float32,
        page_magic: Int32,
        page_shift: Int32,
        s_q_magic: Int32,
        s_q_shift: Int32,
        flags: Int32,
        tokens: Int32,
        s_q: Int32,
        heads: Int32,
        parts: Int32,
        fixed: Int32,
        least: Int32,
        bias: Int32,
        parts_per_token: Int32,
        tokens_per_part: Int32,
        mma_qk: cute.TiledMma,
        mma_rope: cute.TiledMma,
        mma_pv_r: cute.TiledMma,
        mma_pv_s: cute.TiledMma,
    ):
        tid, _, _ = cute.arch.thread_idx()
        m_block, _, part = cute.arch.block_idx()
        m_blocks, _, _ = cute.arch.grid_dim()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        wg = warp_idx // 4
        t = tid % 128
        lane = tid % 32
        row = (warp_idx % 4) * 16 + lane // 4  # this thread has the rows row and row + 8
        lengths = TokenLengths(mLengths, mList.shape[1], flags, s_q_magic, s_q_shift)

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

        if warp_idx == 0:
            cpasync.prefetch_descriptor(tma_q)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(bars + (FULL + i), 4 if FP8 else 132)
                    cute.arch.mbarrier_init(bars + (EMPTY + i), 8)
                cute.arch.mbarrier_init(bars + Q_FULL, 1)
            cute.arch.mbarrier_init_fence()
        # everything above overlaps the previous kernel's tail
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()  # all CTAs run: nobody can take the SM of one that others wait for
        if warp_idx == 0:
            r0, r1, j0, j1, _, unit = interval(
                lengths, tokens, part, parts, fixed, least, bias, parts_per_token, tokens_per_part, lane
            )
            if lane == 0:
                sI[0] = r0
                sI[1] = r1
                sI[2] = j0
                sI[3] = j1
                sI[5] = unit
        cute.arch.sync_threads()

        one = cute.make_layout(1)
        gQ = cute.group_modes(cute.local_tile(mQ, (ROWS, 64), (m_block, None, None, None)), 0, 2)
        tQsQ, tQgQ = cpasync.tma_partition(
            tma_q, 0, one, cute.group_modes(cute.local_tile(sQ, (ROWS, 64), (0, None)), 0, 2), gQ
        )
        tQsR, _ = cpasync.tma_partition(
            tma_q, 0, one, cute.group_modes(cute.local_tile(sQr, (ROWS, 64), (0, None)), 0, 2), gQ
        )
        qk, rope, pv_r, pv_s = [mma.get_slice(t) for mma in (mma_qk, mma_rope, mma_pv_r, mma_pv_s)]
        sV = cute.local_tile(  # (column of a half, row, half, buffer)
            cute.composition(sK, cute.make_ordered_layout((LATENT, BLOCK, 2), order=(1, 0, 2))),
            (HALF, BLOCK),
            (None, 0, None),
        )
        stsm = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), ELEMENT), mma_qk)
        stsm_thr = stsm.get_slice(t)

        # read-only in loops and branches: what is assigned there would have to be a value of the program
        c = SimpleNamespace(
            tid=tid,
            lane=lane,
            warp_idx=warp_idx,
            row=row,
            m_block=m_block,
            part=part,
            heads=heads,
            s_q=s_q,
            bars=bars,
            sI=sI,
            lengths=lengths,
            flags=flags,
            scale=scale,
            sinks=sinks,
            sFactor=sFactor,
            sInv=sInv,
            ok=sOk.iterator.toint(),
            q_at=sQ.iterator.toint(),
            tma_q=tma_q,
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
            mO=mO,
            lse=lse,
            max_logits=max_logits,
            o_acc=o_acc,
            lse_acc=lse_acc,
        )
        if wg == 2:
            cute.arch.setmaxregister_decrease(GATHER_REGS)
            GATHER.run(
                RowAddress(kv, page_magic, page_shift), mList, lengths, sI, sK.iterator.toint(), LATENT_BYTES,
                sKr.iterator.toint(), TILE_BYTES, c.ok, bars + FULL, bars + EMPTY, warp_idx - 8, lane,
                Int32(0), 1,
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
                if warp_idx == 4:
                    p0, n, sharers, started = sharing(lengths, part, parts_per_token, sI[5], sI[0], sI[1], sI[2], sI[3])
                    if lane == 0:
                        sShare[0] = p0
                        sShare[1] = n
                        sShare[2] = sharers
                        sShare[3] = started
                        sShare[4] = sI[0]
                        sShare[5] = sI[1]
                self.values(c)
            # every row that was gathered has been waited for
            area = cute.recast_ptr(sK.iterator, dtype=Float32)
            first_row = m_block * ROWS
            COMBINE.run(
                area, sShare, mO, lse, sinks, o_acc, lse_acc, semaphores, flags, heads, part, m_block, m_blocks,
                first_row, cutlass.min(heads - first_row, ROWS), tid,
            )  # fmt: skip

    @cute.jit
    def piece(self, c, token):
        """(number of blocks, has it the whole token, slot of its partial result) of a token of this CTA."""
        b0 = c.sI[2] if token == c.sI[0] else Int32(0)
        b1 = end_of_piece(c.lengths, c.sI, token)
        slot = 2 * c.part if b0 > 0 else 2 * c.part + 1
        return b1 - b0, b0 == 0 and b1 == n_blocks(c.lengths[token]), slot

    # -------------------------------------------------------------------------------------------- queries
    @cute.jit
    def load_q(self, c, token):
        bar = c.bars + Q_FULL
        request = quotient(token, c.lengths.magic, c.lengths.shift)
        i = token - request * c.s_q
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bar, TILES * TILE_BYTES)
        for j in cutlass.range_constexpr(V_TILES):
            cute.copy(c.tma_q, c.tQgQ[None, j, i, request], c.tQsQ[None, j], tma_bar_ptr=bar)
        if const_expr(ROPE > 0):
            cute.copy(c.tma_q, c.tQgQ[None, V_TILES, i, request], c.tQsR[None, 0], tma_bar_ptr=bar)

    @cute.jit
    def q_ready(self, c, phase):
        """Wait for Q; fp8: turn its latent tiles into fp16 in place, as 256 threads."""
        cute.arch.mbarrier_wait(c.bars + Q_FULL, phase)
        if const_expr(FP8):
            at = c.q_at + c.tid * 16
            for i in cutlass.range_constexpr(LATENT_BYTES // 4096):
                words = load_shared16(at, i * 4096)
                store_shared16(at, i * 4096, [half2_of_bf16x2(w) for w in words])
            cute.arch.fence_view_async_shared()

    # -------------------------------------------------------------------------------------------- warpgroup 0
    @cute.jit
    def scores(self, c):
        sI, sInv, lse, max_logits, lse_acc = c.sI, c.sInv, c.lse, c.max_logits, c.lse_acc
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
                weights = total
                if (c.flags & HAS_SINKS) != 0 and whole and head < c.heads:
                    weights = total + ex2(c.sinks[head] * LOG2E - m[r])
                inv[r] = cute.arch.rcp_approx(weights) if total > 0.0 else Float32(0.0)
                if c.lane % 4 == 0:
                    sInv[at] = inv[r]
                    if head < c.heads:
                        value = cute.math.log2(total, fastmath=True) + m[r]
                        if not whole:
                            lse_acc[slot, head] = value if total > 0.0 else -Float32(INF)
                        else:
                            if (c.flags & WANTS_LSE) != 0:
                                lse[token, 0, head] = value * (1.0 / LOG2E) if total > 0.0 else Float32(INF)
                            if (c.flags & WANTS_MAX) != 0:
                                max_logits[token, 0, head] = m[r] * (1.0 / LOG2E) if total > 0.0 else -Float32(INF)
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
        ok = c.ok + buffer * BLOCK
        if cute.arch.vote_any_sync(load_shared2(ok + lane * 2) != 0x0101):
            for j in cutlass.range_constexpr(BLOCK // 8):
                pair = load_shared2(ok + (lane % 4) * 2, j * 8)
                for r in cutlass.range_constexpr(2):
                    S[4 * j + 2 * r] = S[4 * j + 2 * r] if (pair & 0xFF) != 0 else -Float32(INF)
                    S[4 * j + 2 * r + 1] = S[4 * j + 2 * r + 1] if (pair >> 8) != 0 else -Float32(INF)
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
    return SparseMla(), sparse_mla_arguments(FP8_BYTES if FP8 else (LATENT + ROPE) * 2, LATENT)
