"""Dense paged MLA decode for sm_90a, 64 query rows a CTA (rows = s_q * heads): a trio of warpgroups, of which one has
the scores and two the values.

    S (64 rows x 64 tokens)  = Q . K^T     A = Q,               B = K tiles (K-major)
    O (64 rows x LATENT)     = P . V       A = P in registers,  B = the same tiles read MN-major

A row's scores lie in four lanes of one warp, so nothing is reduced over warps, and a thread's weights are the elements
of the A operand that the same thread of the other warpgroups needs: they go through shared memory as they are, and are
in registers there before they are used. Every tile is read by one warpgroup as K and by one as V. A block takes 2176
clocks of the tensor cores, and of shared memory, at 128 bytes, the operands 1664, P 200 and the TMA 576.

Tiling. One CTA per part (mla_split.py); a part walks over 64-token blocks, whatever the page size. SLOT_TILES tiles of
64 x 64 are one slot of the ring (mla_ring.py), a block is (LATENT + ROPE) / 64 / SLOT_TILES slots.

Pipeline. 512 threads. Warpgroup 0 has the scores and the statistics, warpgroups 1 and 2 half of the 64-column tiles of
O each, complete for all blocks: nothing is merged at the end. One warp of the last warpgroup issues the TMA and runs
ahead, also into the next request.

    TMA warp         load q, b0 | load b1 | load b2 | ...        waits empty[slot], arms full[slot]
    warpgroup 0      S(b0) P(b0) | S(b1) P(b1) | S(b2) ...       waits full[slot], P_FREE; arrives at P_FULL
    warpgroups 1, 2              | PV(b0)      | PV(b1) ...      wait P_FULL, take P, arrive at P_FREE; at empty[slot]
                                                                 slot by slot (4 warps each)
    end of request   warpgroup 0: behind the last S it frees Q (q_free); sums up the weights, writes lse and 1 / sum,
                     arrives at SUMS and goes on with the next request
                     warpgroups 1, 2: wait SUMS, take 1 / sum, and only now arrive at P_FREE; whole requests go to out
                     through the slots of the last block, which they free only then; pieces of split requests to the
                     workspace
    end of the CTA   warpgroups 1, 2 merge the pieces of split requests together with the other CTAs (mla_combine.py)

The exponents are relative to a reference: the maximum of a row's scores when it was last set. It is set again only when
a score of the warp's rows exceeds its own by more than SLACK (in log2 units). P is then at most 2^SLACK, the result is
the same, and nearly all blocks do without scaling O.

Page ids are read only for pages that hold tokens (j < ceil(L / PAGE_SIZE)): the boxes behind the end of a request
repeat its last page, and for a request of length 0 they lie outside the tensor map and are filled with zeros. Tokens
behind the end are masked in S and cleared in V (0 * NaN).

Cannot: more than 64 query rows; sm_scale <= 0 (the maximum is taken before scaling); FP8; a ROPE width other than 64.
"""

# --- constants: replaced when rendered ---
DTYPE = "bf16"
LATENT = 512
ROPE = 64
PAGE_SIZE = 64
CAUSAL = False
ROWS = 64
SLOT_TILES = 3
RING = 6
# --- end of constants ---

from types import SimpleNamespace
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator

from common.kv_handover import Q_BOX, KvHandover
from common.mla_arguments import mla_decode_arguments
from common.mla_combine import COOPERATIVE, HAS_SINKS, WANTS_LSE, MlaCombine
from common.mla_ring import packed_rows, ring_layout
from common.mla_split import partials, piece_of, store_interval, store_sharing, touch_table
from common.sm90 import INF, LOG2E, cutlass_dtype, ex2, quad_max, quad_sum, row_strides, smem_atom, swz

ELEMENT = cutlass_dtype(DTYPE)
BLOCK = 64  # tokens of a block, columns of a tile
WIDTH = LATENT + ROPE
TILES = WIDTH // 64
V_TILES = LATENT // 64
SLOTS = TILES // SLOT_TILES  # per block
OWN = V_TILES // 2  # tiles of O that a warpgroup of values has
ACC = 32  # accumulators of a thread per tile
# named barriers; 5 and 6 one per warpgroup of values, 7 both
P_FULL, P_FREE, SUMS, BAR_SCORES, BAR_VALUES, BAR_END = 1, 2, 3, 4, 5, 7
# registers of the scores, of the values and of what fills the ring: 65536 in all
SCORE_REGS, VALUE_REGS, PRODUCER_REGS = (128, 176, 32) if PAGE_SIZE > 0 else (96, 176, 64)
M_INIT = -1.0e30  # finite: -inf - maximum is never NaN
SLACK = 14.0  # P up to 2^14: fp16 holds 2^15, and with 8 large logits moved the maximum in one block of ten

assert ROWS == 64 and ROPE == 64 and LATENT in (256, 512) and RING >= 2 * SLOTS
# of warpgroup 1 + v: so that both are done with the first slot of a block soon
TILES_OF = [[2 * i + (1 - v if i == 1 else v) for i in range(OWN)] for v in (0, 1)]


def rows_stack(n):
    """Shared-memory layout (ROWS rows, 64 columns, n tiles), one tile behind the other."""
    return cute.tile_to_shape(smem_atom(ELEMENT), (ROWS, 64, n), order=(0, 1, 2))


def partial_column(lane, e):
    """Column of element e of the lane-th float4 of 128 columns in a partial result: as the accumulators have them."""
    return (lane >> 2) * 16 + (lane & 3) * 2 + e % 2 + e // 2 * 8


COMBINE = MlaCombine(LATENT, DTYPE, partial_column, True, BAR_END, teams=False)
assert COMBINE.area_floats() * 4 <= RING * SLOT_TILES * BLOCK * 128


class MlaDecode(KvHandover):
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        q_pe: cute.Tensor,
        kv_cache: cute.Tensor,
        block_table: cute.Tensor,
        seq_lens: cute.Tensor,
        sinks: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        workspace: cute.Tensor,
        semaphores: cute.Tensor,
        sm_scale: Float32,
        pe_offset: Int32,
        flags: Int32,
        parts: Int32,
        fixed: Int32,
        least: Int32,
        bias: Int32,
        stream,
    ):
        """q (B, s_q, H, >= LATENT) and q_pe, whose rope part starts at column pe_offset (q itself and LATENT when they
        are joined); kv_cache (pages, PAGE_SIZE, LATENT + ROPE); block_table (B, max_pages); seq_lens (B);
        sinks (>= H); out (B, s_q, H, LATENT); lse (B, s_q, H); workspace: see mla_split.partials; semaphores: zeros,
        `parts` of them, left as zeros. flags: HAS_SINKS + WANTS_LSE + COOPERATIVE; without the first, sinks are not
        read, without the second, lse is not written and may have any shape. Strides may be anything within these: q,
        q_pe, kv_cache, out multiples of 8; the (query token, head) rows of q, q_pe and out evenly spaced. sm_scale > 0.
        From parts on: the split; parts is at most the number of SMs."""
        batch, s_q, heads = q.shape[0], q.shape[1], q.shape[2]
        rows = s_q * heads
        o_acc, lse_acc = partials(workspace, parts, rows, LATENT)
        row, request = row_strides(out)
        mO = cute.make_tensor(out.iterator, cute.make_layout((batch, rows, LATENT), stride=(request, row, 1)))

        g2s = cpasync.CopyBulkTensorTileG2SOp()
        tma_q, mQ = cpasync.make_tiled_tma_atom(
            g2s, packed_rows(q, Int32(0), V_TILES), rows_stack(Q_BOX), (ROWS, 64, Q_BOX)
        )
        tma_pe, mQpe = cpasync.make_tiled_tma_atom(g2s, packed_rows(q_pe, pe_offset, 1), rows_stack(1), (ROWS, 64, 1))
        tma_k, mK = self.kv_source(kv_cache)

        def mma(b_major, source):
            return hh.make_trivial_tiled_mma(
                ELEMENT, ELEMENT, OperandMajorMode.K, b_major, Float32, (1, 1, 1), (64, 64), source
            )

        self.kernel(
            tma_q,
            mQ,
            tma_pe,
            mQpe,
            tma_k,
            mK,
            block_table,
            seq_lens,
            sinks,
            mO,
            lse,
            o_acc,
            lse_acc,
            semaphores,
            sm_scale * LOG2E,
            flags,
            batch,
            s_q,
            heads,
            cutlass.max(kv_cache.shape[0], 1),
            parts,
            fixed,
            least,
            bias,
            parts // batch,
            (batch + parts - 1) // parts,
            mma(OperandMajorMode.K, warpgroup.OperandSource.SMEM),
            mma(OperandMajorMode.MN, warpgroup.OperandSource.RMEM),
        ).launch(
            grid=[cute.ceil_div(rows, ROWS), 1, parts],
            block=[512, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
            cooperative=(flags & COOPERATIVE) // COOPERATIVE,
        )

    # -------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        mQ: cute.Tensor,
        tma_pe: cute.CopyAtom,
        mQpe: cute.Tensor,
        tma_k: Optional[cute.CopyAtom],
        mK: cute.Tensor,
        table: cute.Tensor,
        seqlens: cute.Tensor,
        sinks: cute.Tensor,
        mO: cute.Tensor,
        lse: cute.Tensor,
        o_acc: cute.Tensor,
        lse_acc: cute.Tensor,
        semaphores: cute.Tensor,
        scale: Float32,
        flags: Int32,
        batch: Int32,
        s_q: Int32,
        heads: Int32,
        pages: Int32,
        parts: Int32,
        fixed: Int32,
        least: Int32,
        bias: Int32,
        parts_per_request: Int32,
        requests_per_part: Int32,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
    ):
        tid, _, _ = cute.arch.thread_idx()
        row_tile, _, part = cute.arch.block_idx()
        row_tiles, _, _ = cute.arch.grid_dim()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        wg = warp_idx // 4
        t = tid % 128
        lane = tid % 32
        row0 = row_tile * ROWS

        smem = SmemAllocator()

        def swizzled(layout):
            return smem.allocate_tensor(ELEMENT, layout.outer, 1024, swizzle=layout.inner)

        sK = swizzled(ring_layout(ELEMENT, SLOT_TILES, RING))
        sQ = swizzled(swz(ROWS, WIDTH, ELEMENT))
        sP = smem.allocate_tensor(ELEMENT, cute.make_layout((8, 128, 4)), 16)  # (element, thread, 16 tokens)
        sFactor = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)  # of O when the reference was set again
        sInv = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)  # 1 / sum of the weights
        sAgain = smem.allocate_tensor(Int32, cute.make_layout(4), 16)  # per warp: the reference was set again
        sI = smem.allocate_tensor(Int32, cute.make_layout(6), 16)  # what mla_split.interval returned
        sShare = smem.allocate_tensor(Int32, cute.make_layout(6), 16)  # what mla_split.sharing returned, r0, r1
        full = smem.allocate_array(Int64, RING)
        empty = smem.allocate_array(Int64, RING)
        q_full = smem.allocate_array(Int64, 1)
        q_free = smem.allocate_array(Int64, 1)

        if warp_idx == 12:
            for tma in (tma_q, tma_pe, tma_k)[: 2 if self.gather else 3]:
                cpasync.prefetch_descriptor(tma)
        if warp_idx == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(RING):
                    cute.arch.mbarrier_init(full + i, self.arrivals)
                    cute.arch.mbarrier_init(empty + i, 8)
                cute.arch.mbarrier_init(q_full, 1)
                cute.arch.mbarrier_init(q_free, 4)
            cute.arch.mbarrier_init_fence()

        one = cute.make_layout(1)
        q_tiles = cute.local_tile(sQ, (ROWS, 64), (0, None))  # (row, column, tile)
        k_tiles = cute.local_tile(sK, (64, 64), (0, None, None))  # (token, column, tile, slot)
        v_view = cute.make_tensor(sK.iterator, cute.select(sK.layout, mode=[1, 0, 2]))
        v_tiles = cute.local_tile(v_view, (64, 64), (None, 0, None))  # (column, token, tile, slot)
        tQs, tQg = cpasync.tma_partition(
            tma_q,
            0,
            one,
            cute.group_modes(cute.local_tile(q_tiles, (ROWS, 64, Q_BOX), (0, 0, None)), 0, 3),
            cute.group_modes(cute.local_tile(mQ, (ROWS, 64, Q_BOX), (None, 0, None, None)), 0, 3),
        )
        tPs, tPg = cpasync.tma_partition(
            tma_pe,
            0,
            one,
            cute.group_modes(
                cute.local_tile(cute.domain_offset((0, 0, V_TILES), q_tiles), (ROWS, 64, 1), (0, 0, 0)), 0, 3
            ),
            cute.group_modes(cute.local_tile(mQpe, (ROWS, 64, 1), (None, 0, 0, None)), 0, 3),
        )
        tKs, tKg = self.kv_views(tma_k, mK, sK)
        qk = mma_qk.get_slice(t)
        pv = mma_pv.get_slice(t)
        stsm = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), ELEMENT), mma_pv)
        stsm_thr = stsm.get_slice(t)

        # read-only in loops and branches: what is assigned there would have to be a value of the program
        c = SimpleNamespace(
            full=full,
            empty=empty,
            q_full=q_full,
            q_free=q_free,
            tma_q=tma_q,
            tQs=tQs,
            tQg=tQg,
            tma_pe=tma_pe,
            tPs=tPs,
            tPg=tPg,
            tma_k=tma_k,
            tKs=tKs,
            tKg=tKg,
            sK=sK,
            k_tiles=k_tiles,
            sP=sP,
            sFactor=sFactor,
            sInv=sInv,
            sAgain=sAgain,
            sI=sI,
            s_shape=qk.partition_shape_C((ROWS, BLOCK)),
            op_qk=mma_qk.op,
            op_pv=mma_pv.op,
            tQ=qk.make_fragment_A(qk.partition_A(q_tiles)),
            tK=qk.make_fragment_B(qk.partition_B(sK)),
            tV=pv.make_fragment_B(pv.partition_B(v_tiles)),
            stsm=stsm,
            stsm_thr=stsm_thr,
            seqlens=seqlens,
            scale=scale,
            part=part,
            row_tile=row_tile,
            row0=row0,
            lane=lane,
            t=t,
            w=warp_idx % 4,
            row=warp_idx % 4 * 16 + lane // 4,
        )

        if warp_idx == 13:
            touch_table(
                table, seqlens, batch, part, parts_per_request, requests_per_part, PAGE_SIZE or mK.shape[1], lane
            )
        # everything above overlaps the previous kernel's tail
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()  # all CTAs run: nobody can take the SM of one that others wait for
        if warp_idx == 12:
            store_interval(
                sI, seqlens, batch, part, parts, fixed, least, bias, parts_per_request, requests_per_part, lane
            )
        cute.arch.sync_threads()
        if wg == 3:
            cute.arch.setmaxregister_decrease(PRODUCER_REGS)
            if warp_idx < 12 + self.warps:
                self.fill(c, mK, table, seqlens, warp_idx - 12, pages, row_tiles > 1)
        elif wg == 0:
            if const_expr(SCORE_REGS < 128):
                cute.arch.setmaxregister_decrease(SCORE_REGS)
            self.scores(c, lse, lse_acc, sinks, flags, s_q, heads)
        else:
            cute.arch.setmaxregister_increase(VALUE_REGS)
            # while the first loads are under way; a branch on tid would make the compiler take the warps for diverged
            if warp_idx == 4:
                store_sharing(sShare, sI, seqlens, part, parts_per_request, lane)
            self.values(c, wg - 1, mO, o_acc)
            # every load into the ring has been waited for; SUMS ordered what warpgroup 0 wrote to lse_acc
            area = cute.recast_ptr(sK.iterator, dtype=Float32)
            COMBINE.run(
                area, sShare, mO, lse, sinks, o_acc, lse_acc, semaphores, flags, heads, part, row_tile, row_tiles,
                row0, cutlass.min(s_q * heads - row0, ROWS), tid - 128,
            )  # fmt: skip

    # -------------------------------------------------------------- scores
    @cute.jit
    def score_block(self, c, rM, rL, rBack, slot, phase, tok0, seqlen, cut, min_lim, number, is_first, is_last):
        """Scores and weights of one block. cut: tokens of the piece; min_lim: tokens that every row may see;
        number: of the block in this CTA; is_first, is_last: of this request."""
        lane, scale = c.lane, c.scale
        sFactor, sAgain, sP = c.sFactor, c.sAgain, c.sP  # storing through c would make all of it loop-carried
        rS = cute.make_rmem_tensor(c.s_shape, Float32)
        rP = cute.make_rmem_tensor((8, 4), ELEMENT)
        qk = cute.make_mma_atom(c.op_qk)
        qk.set(warpgroup.Field.ACCUMULATE, False)
        for g in cutlass.range_constexpr(SLOTS):
            s, ph = self.slot_of(g, slot, phase)
            self.wait_slot(c.full + s, ph)
            # a shuffle: the descriptors of this slot are then computed here and not moved to and fro before the wait
            s = cute.arch.make_warp_uniform(s)
            warpgroup.fence()
            for i in cutlass.range_constexpr(SLOT_TILES):
                for x in cutlass.range_constexpr(4):
                    tile = g * SLOT_TILES + i
                    cute.gemm(qk, rS, c.tQ[None, None, x, tile], c.tK[None, None, (x, i), s], rS)
                    qk.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
        warpgroup.wait_group(0)
        if is_last:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(c.q_free)
        if tok0 + BLOCK > min_lim:
            for r in cutlass.range_constexpr(2):
                lim = cut
                if const_expr(CAUSAL):
                    lim = cutlass.min(cut, seqlen - rBack[r])
                left = lim - tok0 - lane % 4 * 2
                for n in cutlass.range_constexpr(8):
                    for e in cutlass.range_constexpr(2):
                        at = n * 4 + r * 2 + e
                        rS[at] = rS[at] if n * 8 + e < left else -Float32(INF)
        top = cute.make_rmem_tensor((2,), Float32)
        for r in cutlass.range_constexpr(2):
            top[r] = cute.arch.fmax(rS[r * 2], rS[r * 2 + 1])
            for n in cutlass.range_constexpr(1, 8):
                top[r] = cute.arch.fmax(top[r], cute.arch.fmax(rS[n * 4 + r * 2], rS[n * 4 + r * 2 + 1]))
        above = cute.arch.fmax(top[0] * scale - rM[0], top[1] * scale - rM[1])
        again = cute.arch.vote_any_sync(above > SLACK)
        # what is written from here on was read for the block before
        if number > 0:
            cute.arch.barrier(barrier_id=P_FREE, number_of_threads=384)
        if again:
            for r in cutlass.range_constexpr(2):
                m = cute.arch.fmax(rM[r], quad_max(top[r]) * scale)
                factor = ex2(rM[r] - m)
                rM[r] = m
                rL[r] = rL[r] * factor
                sFactor[c.row + 8 * r] = factor
        if lane == 0:
            sAgain[c.w] = Int32(1) if again and not is_first else Int32(0)
        for n in cutlass.range_constexpr(8):
            for r in cutlass.range_constexpr(2):
                at = n * 4 + r * 2
                rS[at] = ex2(rS[at] * scale - rM[r])
                rS[at + 1] = ex2(rS[at + 1] * scale - rM[r])
                rL[r] = rL[r] + (rS[at] + rS[at + 1])
        # a thread's scores are the elements of the A operand that the same thread of the values needs
        rP.store(cute.make_tensor(rS.iterator, cute.make_layout((8, 4))).load().to(ELEMENT))
        for k in cutlass.range_constexpr(4):
            cute.autovec_copy(rP[None, k], sP[None, c.t, k])
        if const_expr(not self.gather):
            if tok0 + BLOCK > seqlen:
                cute.arch.barrier(barrier_id=BAR_SCORES, number_of_threads=128)  # all have read these rows
                self.clear_tail(c, slot, phase, cutlass.max(seqlen - tok0, 0))
                cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=P_FULL, number_of_threads=384)

    @cute.jit
    def scores(self, c, lse, lse_acc, sinks, flags, s_q, heads):
        """Warpgroup 0. A thread has the rows `row` and `row` + 8."""
        lane, sInv, sI = c.lane, c.sInv, c.sI
        rM = cute.make_rmem_tensor((2,), Float32)
        rL = cute.make_rmem_tensor((2,), Float32)
        rBack = cute.make_rmem_tensor((2,), Int32)  # causal: tokens at the end that a row does not see
        if const_expr(CAUSAL):
            for r in cutlass.range_constexpr(2):
                rBack[r] = cutlass.max(s_q - 1 - (c.row0 + c.row + 8 * r) // heads, 0)
        slot = Int32(0)
        phase = Int32(0)
        phase_q = Int32(0)
        number = Int32(0)
        for req in cutlass.range(sI[0], sI[1] + 1, unroll=1):
            seqlen, b0, b1, whole = piece_of(c.seqlens, sI, req)
            cut = cutlass.min(seqlen, b1 * BLOCK)
            min_lim = cut
            if const_expr(CAUSAL):
                min_lim = cutlass.min(cut, seqlen - (s_q - 1))
            rM.fill(M_INIT)
            rL.fill(0.0)
            cute.arch.mbarrier_wait(c.q_full, phase_q)
            phase_q = phase_q ^ 1
            for j in cutlass.range(b0, b1, unroll=1):
                self.score_block(
                    c, rM, rL, rBack, slot, phase, j * BLOCK, seqlen, cut, min_lim, number, j == b0, j == b1 - 1
                )
                number = number + 1
                slot, phase = self.slot_of(SLOTS, slot, phase)
            totals = quad_sum(rL[0]), quad_sum(rL[1])
            if lane % 4 < 2:  # lane 0 of a quad has its first row, lane 1 the other one
                total = totals[0] if lane % 4 == 0 else totals[1]
                m = rM[0] if lane % 4 == 0 else rM[1]
                at = c.row + lane % 4 * 8
                row = c.row0 + at
                weights = total
                if (flags & HAS_SINKS) != 0 and whole and row < s_q * heads:
                    weights = total + ex2(sinks[row % heads] * LOG2E - m)
                sInv[at] = cute.arch.rcp_approx(weights) if total > 0.0 else Float32(0.0)
                if row < s_q * heads:
                    value = cute.math.log2(total, fastmath=True) + m if total > 0.0 else -Float32(INF)
                    if not whole:
                        lse_acc[self.piece_slot(c, b0), row] = value
                    elif (flags & WANTS_LSE) != 0:
                        lse[req, row // heads, row % heads] = value * (1.0 / LOG2E)
            cute.arch.barrier_arrive(barrier_id=SUMS, number_of_threads=384)

    # -------------------------------------------------------------- values
    @cute.jit
    def scale_o(self, c, rO, sScale):
        factors = sScale[c.row], sScale[c.row + 8]
        for i in cutlass.range_constexpr(cute.size(rO)):
            rO[i] = rO[i] * factors[i // 2 % 2]

    @cute.jit
    def value_block(self, c, v, rO, slot, phase, last, keep):
        """O += P V of one block; frees its slots unless `keep`."""
        if const_expr(not self.gather):  # there, P_FULL is behind a fence of those who have waited
            for g in cutlass.range_constexpr(SLOTS):
                s, ph = self.slot_of(g, slot, phase)
                cute.arch.mbarrier_wait(c.full + s, ph)  # landed long ago; makes what the TMA wrote visible here too
        rP = cute.make_rmem_tensor(((2, 2, 2), 1, 4), ELEMENT)
        cute.arch.barrier(barrier_id=P_FULL, number_of_threads=384)
        for k in cutlass.range_constexpr(4):
            part = cute.make_tensor(rP.iterator + 8 * k, cute.make_layout(8))
            cute.autovec_copy(c.sP[None, c.t, k], part)
        if c.sAgain[c.w] != 0:
            self.scale_o(c, rO, c.sFactor)
        if not last:
            cute.arch.barrier_arrive(barrier_id=P_FREE, number_of_threads=384)
        pv = cute.make_mma_atom(c.op_pv)
        pv.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for i in cutlass.range_constexpr(OWN):
            g, tile, _ = self.tile_of(i, v)
            s, _ = self.slot_of(g, slot, phase)
            rOi = cute.make_tensor(rO.iterator + i * ACC, cute.make_layout(c.s_shape))
            for x in cutlass.range_constexpr(4):
                cute.gemm(pv, rOi, rP[None, None, x], c.tV[None, None, x, tile, s], rOi)
            if const_expr(i in self.done):
                warpgroup.commit_group()
        for g in cutlass.range_constexpr(SLOTS):
            warpgroup.wait_group(len({i for i in self.done if i > self.done[g]}))
            if not keep:
                self.free_slot(c, self.slot_of(g, slot, phase)[0])

    @cute.jit
    def values(self, c, v, mO, o_acc):
        """Warpgroup 1 + v: its tiles of O."""
        sI = c.sI
        rO = cute.make_rmem_tensor((OWN * ACC,), Float32)
        slot = Int32(0)
        phase = Int32(0)
        for req in cutlass.range(sI[0], sI[1] + 1, unroll=1):
            _, b0, b1, whole = piece_of(c.seqlens, sI, req)
            rO.fill(0.0)
            out_slot = slot
            for j in cutlass.range(b0, b1, unroll=1):
                self.value_block(c, v, rO, slot, phase, j == b1 - 1, whole and j == b1 - 1)
                out_slot = slot
                slot, phase = self.slot_of(SLOTS, slot, phase)
            cute.arch.barrier(barrier_id=SUMS, number_of_threads=384)
            inv = c.sInv[c.row], c.sInv[c.row + 8]
            if req < sI[1]:
                cute.arch.barrier_arrive(barrier_id=P_FREE, number_of_threads=384)
            if whole:
                self.store_whole(c, v, rO, inv, mO, req, out_slot)
            else:
                self.store_piece(c, v, rO, inv, o_acc, self.piece_slot(c, b0))

    @cute.jit
    def store_whole(self, c, v, rO, inv, mO, req, slot):
        """To `out`, through the tiles that this warpgroup has just read as V; then frees their slots."""
        for i in cutlass.range_constexpr(OWN):
            g, tile, _ = self.tile_of(i, v)
            s, _ = self.slot_of(g, slot, 0)
            rX = cute.make_rmem_tensor(c.s_shape, ELEMENT)
            for n in cutlass.range_constexpr(ACC):
                rX[n] = (rO[i * ACC + n] * inv[n // 2 % 2]).to(ELEMENT)
            tOs = c.stsm_thr.partition_D(c.k_tiles[None, None, tile, s])
            cute.copy(c.stsm, c.stsm_thr.retile(rX), tOs)
        cute.arch.barrier(barrier_id=BAR_VALUES + v, number_of_threads=128)
        self.copy_out(c, v, mO, req, slot)

    @cute.jit
    def store_piece(self, c, v, rO, inv, o_acc, at_slot):
        """To the workspace with permuted columns: four accumulators of a thread together."""
        v4 = cute.make_rmem_tensor((4,), Float32)
        for r in cutlass.range_constexpr(2):
            row = c.row0 + c.row + 8 * r
            if row < o_acc.shape[1]:
                for i in cutlass.range_constexpr(OWN):
                    for q in cutlass.range_constexpr(4):
                        for e in cutlass.range_constexpr(4):
                            v4[e] = rO[i * ACC + q * 8 + e // 2 * 4 + r * 2 + e % 2] * inv[r]
                        to = self.tile_of(i, v)[2] * 16 + q * 4 + c.lane % 4
                        cute.autovec_copy(v4, cute.local_tile(o_acc[at_slot, row, None], (4,), (to,)))


def entry():
    """What to compile: the host function and its fake arguments."""
    kernel = MlaDecode(ELEMENT, LATENT, ROPE, PAGE_SIZE, SLOT_TILES, RING, ROWS, TILES_OF)
    return kernel, mla_decode_arguments(ELEMENT, LATENT, ROPE, PAGE_SIZE)
