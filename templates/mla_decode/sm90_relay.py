"""Dense paged MLA decode for sm_90a, 32 query rows a CTA (rows = s_q * heads): swapped operands, handed on from one
warpgroup to two others.

    S^T (64 tokens x ROWS)     = K . Q^T      A = K tiles (K-major),              B = Q
    O^T (LATENT   x ROWS)      = V^T . P^T    A = the same tiles read MN-major,   B = P

The query rows are the N of the MMA. Q takes 20 or 36 KB of shared memory, P 4, a ring of KV tiles the rest. With so
many rows the operands that the MMAs read from shared memory matter: every tile is read by exactly one warpgroup as K
and by exactly one as V, each with all the rows as N. A block takes 1632 clocks of 128 bytes, and the TMA 576 more.

Tiling. One CTA per part (mla_split.py); a part walks over 64-token blocks, whatever the page size. SLOT_TILES tiles of
64 x 64 are one slot of the ring (mla_ring.py), a block is (LATENT + ROPE) / 64 / SLOT_TILES slots.

Pipeline. 512 threads. Warpgroup 0 has the scores and the statistics, warpgroups 1 and 2 every other pair of 64-column
tiles of O^T, complete for all blocks: nothing is merged at the end. One warp of the last warpgroup issues the TMA and
runs ahead, also into the next request.

    TMA warp         load b0 | load b1 | load b2 | ...           waits empty[slot], arms full[slot]
    warpgroup 0      S(b0) P(b0) | S(b1) P(b1) | S(b2) ...       waits full[slot], P_FREE; arrives at P_FULL
    warpgroups 1, 2              | PV(b0)      | PV(b1) ...      wait P_FULL; arrive at empty[slot] slot by slot
                                                                 (4 warps each), then at P_FREE
    end of request   warpgroup 0: behind the last S it frees Q (q_free); sums up the weights, writes lse and 1 / sum,
                     arrives at SUMS and goes on with the next request
                     warpgroups 1, 2: wait SUMS, scale O^T; whole requests go to out through the slots of the last
                     block, which they free only then; pieces of split requests to the workspace
    end of the CTA   warpgroups 1, 2 merge the pieces of split requests together with the other CTAs (mla_combine.py)

The exponents are relative to a reference: the maximum of the scores when it was last set. It is set again only when a
score exceeds it by more than SLACK (in log2 units). P is then at most 2^SLACK, the result is the same, and nearly all
blocks do without a reduction over the tokens and without scaling O^T.

Page ids are read only for pages that hold tokens (j < ceil(L / PAGE_SIZE)): the boxes behind the end of a request
repeat its last page, and for a request of length 0 they lie outside the tensor map and are filled with zeros. Rows
behind the end are masked in S and cleared in V (0 * NaN).

Cannot: more than ROWS query rows; sm_scale <= 0 (the maximum is taken before scaling); FP8; a ROPE width other than 64.
"""

# --- constants: replaced when rendered ---
DTYPE = "bf16"
LATENT = 512
ROPE = 64
PAGE_SIZE = 64
CAUSAL = False
ROWS = 32
SLOT_TILES = 3
RING = 7
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
from common.sm90 import INF, LOG2E, cutlass_dtype, ex2, row_strides, smem_atom, swz
from common.transposed import over_tokens, row_of

ELEMENT = cutlass_dtype(DTYPE)
BLOCK = 64  # tokens of a block, columns of a tile
WIDTH = LATENT + ROPE
TILES = WIDTH // 64
V_TILES = LATENT // 64
SLOTS = TILES // SLOT_TILES  # per block
COLS = ROWS // 4  # query rows per thread of S^T and O^T
ACC = 2 * COLS  # accumulators of a thread per tile
# named barriers; 5 and 6 one per warpgroup of values, 7 both
P_FULL, P_FREE, SUMS, BAR_SCORES, BAR_VALUES, BAR_END = 1, 2, 3, 4, 5, 7
# registers of the values and of what fills the ring, and 128 for the scores: 65536 in all
VALUE_REGS, PRODUCER_REGS = (176, 32) if PAGE_SIZE > 0 else (160, 64)
M_INIT = -1.0e30  # finite: -inf - maximum is never NaN
SLACK = 14.0  # P up to 2^14: fp16 holds 2^15, and with 8 large logits moved the maximum in one block of ten

assert ROWS == 32 and ROPE == 64 and LATENT in (256, 512) and RING >= 2 * SLOTS
OWN = V_TILES // 2  # tiles of O^T that a warpgroup of values has, two and two together
TILES_OF = [[i // 2 * 4 + 2 * v + i % 2 for i in range(OWN)] for v in (0, 1)]


def rows_stack(n):
    """Shared-memory layout (ROWS rows, 64 columns, n tiles), one tile behind the other."""
    return cute.tile_to_shape(smem_atom(ELEMENT), (ROWS, 64, n), order=(0, 1, 2))


def at(h):
    """Index in an accumulator of the first of a thread's two values (+ 2: the other) of its h-th query row."""
    return (h // 2) * 4 + h % 2


def partial_column(lane, e):
    """Column of element e of the lane-th float4 of 128 columns in a partial result: as the accumulators have them."""
    return e // 2 * 64 + (lane >> 3) * 16 + (lane & 7) + e % 2 * 8


# measured: with the code for teams in the kernel the main loop is 2 to 5 % slower, even where no team is formed
COMBINE = MlaCombine(LATENT, DTYPE, partial_column, False, BAR_END, teams=False)
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

        def mma(a_major):
            return hh.make_trivial_tiled_mma(
                ELEMENT,
                ELEMENT,
                a_major,
                OperandMajorMode.K,
                Float32,
                (1, 1, 1),
                (64, ROWS),
                warpgroup.OperandSource.SMEM,
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
            mma(OperandMajorMode.K),
            mma(OperandMajorMode.MN),
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
        sP = swizzled(swz(ROWS, BLOCK, ELEMENT))
        sX = smem.allocate_tensor(Float32, cute.make_layout((4, ROWS)), 16)  # maxima or sums: warp, row
        sM = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)  # references at the end of a request
        sFactor = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)  # of O when the reference was set again
        sInv = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)  # 1 / sum of the weights
        sBack = smem.allocate_tensor(Int32, cute.make_layout(ROWS), 16)  # causal: tokens at the end a row does not see
        sAbove = smem.allocate_tensor(Int32, cute.make_layout(4), 16)  # per warp: a score is above the reference
        sAgain = smem.allocate_tensor(Int32, cute.make_layout(1), 16)  # the reference was set again
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
        # P^T and O^T leave the registers transposed: the rows in memory are query rows
        stsm = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(True, 4), ELEMENT), mma_qk)
        stsm_thr = stsm.get_slice(t)
        p_view = cute.make_tensor(sP.iterator, cute.select(sP.layout, mode=[1, 0]))  # (token, query row)

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
            o_tiles=cute.local_tile(v_tiles, (64, ROWS), (0, 0, None, None)),  # (column, query row, tile, slot)
            sX=sX,
            sM=sM,
            sFactor=sFactor,
            sInv=sInv,
            sBack=sBack,
            sAbove=sAbove,
            sAgain=sAgain,
            sI=sI,
            s_shape=qk.partition_shape_C((BLOCK, ROWS)),
            op_qk=mma_qk.op,
            op_pv=mma_pv.op,
            tK=qk.make_fragment_A(qk.partition_A(sK)),
            tQ=qk.make_fragment_B(qk.partition_B(q_tiles)),
            tV=pv.make_fragment_A(pv.partition_A(v_tiles)),
            tP=pv.make_fragment_B(pv.partition_B(sP)),
            stsm=stsm,
            stsm_thr=stsm_thr,
            tPst=stsm_thr.partition_D(p_view),
            seqlens=seqlens,
            scale=scale,
            part=part,
            row_tile=row_tile,
            row0=row0,
            lane=lane,
            t=t,
            w=warp_idx % 4,
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
        if const_expr(CAUSAL):
            # not on tid: the compiler would not take the warps for converged, and move descriptors for every MMA
            if warp_idx < ROWS // 32:
                sBack[tid] = cutlass.max(s_q - 1 - (row0 + tid) // heads, 0)
        cute.arch.sync_threads()
        if wg == 3:
            cute.arch.setmaxregister_decrease(PRODUCER_REGS)
            if warp_idx < 12 + self.warps:
                self.fill(c, mK, table, seqlens, warp_idx - 12, pages, row_tiles > 1)
        elif wg == 0:
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
    def raise_reference(self, c, rS, rM, rL):
        """Set the reference to the maximum so far: over two registers, 8 lanes, 4 warps."""
        lane, sX, sFactor = c.lane, c.sX, c.sFactor
        for h in cutlass.range_constexpr(COLS):
            top = over_tokens(cute.arch.fmax(rS[at(h)], rS[at(h) + 2]), True)
            if lane < 4:
                sX[c.w, row_of(h, lane)] = top
        cute.arch.barrier(barrier_id=BAR_SCORES, number_of_threads=128)
        for h in cutlass.range_constexpr(COLS):
            row = row_of(h, lane)
            top = cute.arch.fmax(cute.arch.fmax(sX[0, row], sX[1, row]), cute.arch.fmax(sX[2, row], sX[3, row]))
            m = cute.arch.fmax(rM[h], top * c.scale)
            factor = ex2(rM[h] - m)
            rM[h] = m
            rL[h] = rL[h] * factor
            if c.w == 0 and lane < 4:
                sFactor[row] = factor

    @cute.jit
    def score_block(self, c, rM, rL, slot, phase, tok0, seqlen, cut, min_lim, number, is_last):
        """Scores and weights of one block. cut: tokens of the piece; min_lim: tokens that every row may see;
        number: of the block in this CTA; is_last: of this request."""
        lane, w, scale = c.lane, c.w, c.scale
        sAbove, sAgain = c.sAbove, c.sAgain  # storing through c would make all of it loop-carried
        rS = cute.make_rmem_tensor(c.s_shape, Float32)
        rP = cute.make_rmem_tensor(c.s_shape, ELEMENT)
        # S^T = K Q^T
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
                    cute.gemm(qk, rS, c.tK[None, None, (x, i), s], c.tQ[None, None, x, tile], rS)
                    qk.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
        warpgroup.wait_group(0)
        if is_last:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(c.q_free)
        if tok0 + BLOCK > min_lim:
            for h in cutlass.range_constexpr(COLS):
                lim = cut
                if const_expr(CAUSAL):
                    lim = cutlass.min(cut, seqlen - c.sBack[row_of(h, lane)])
                for u in cutlass.range_constexpr(2):
                    tok = tok0 + w * 16 + lane // 4 + 8 * u
                    rS[at(h) + 2 * u] = rS[at(h) + 2 * u] if tok < lim else -Float32(INF)
        # what is written from here on was read for the block before
        if number > 0:
            cute.arch.barrier(barrier_id=P_FREE, number_of_threads=384)
        above = -Float32(INF)
        for h in cutlass.range_constexpr(COLS):
            above = cute.arch.fmax(above, cute.arch.fmax(rS[at(h)], rS[at(h) + 2]) * scale - rM[h])
        above_any = Int32(1) if cute.arch.vote_any_sync(above > SLACK) else Int32(0)
        if lane == 0:
            sAbove[w] = above_any
        cute.arch.barrier(barrier_id=BAR_SCORES, number_of_threads=128)
        again = sAbove[0] | sAbove[1] | sAbove[2] | sAbove[3]
        if again != 0:
            self.raise_reference(c, rS, rM, rL)
        if c.t == 0:
            sAgain[0] = again
        for h in cutlass.range_constexpr(COLS):
            a = ex2(rS[at(h)] * scale - rM[h])
            b = ex2(rS[at(h) + 2] * scale - rM[h])
            rS[at(h)] = a
            rS[at(h) + 2] = b
            rL[h] = rL[h] + (a + b)
        rP.store(rS.load().to(ELEMENT))
        cute.copy(c.stsm, c.stsm_thr.retile(rP), c.tPst)
        if const_expr(not self.gather):
            if tok0 + BLOCK > seqlen:
                self.clear_tail(c, slot, phase, cutlass.max(seqlen - tok0, 0))
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=P_FULL, number_of_threads=384)

    @cute.jit
    def scores(self, c, lse, lse_acc, sinks, flags, s_q, heads):
        """Warpgroup 0."""
        lane, t, sX, sM, sInv, sI = c.lane, c.t, c.sX, c.sM, c.sInv, c.sI
        rM = cute.make_rmem_tensor((COLS,), Float32)
        rL = cute.make_rmem_tensor((COLS,), Float32)
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
                self.score_block(c, rM, rL, slot, phase, j * BLOCK, seqlen, cut, min_lim, number, j == b1 - 1)
                number = number + 1
                slot, phase = self.slot_of(SLOTS, slot, phase)
            # sums of the weights
            cute.arch.barrier(barrier_id=BAR_SCORES, number_of_threads=128)  # sX may still be read
            for h in cutlass.range_constexpr(COLS):
                total = over_tokens(rL[h], False)
                if lane < 4:
                    sX[c.w, row_of(h, lane)] = total
                    if c.w == 0:
                        sM[row_of(h, lane)] = rM[h]
            cute.arch.barrier(barrier_id=BAR_SCORES, number_of_threads=128)
            if t < ROWS:
                total = (sX[0, t] + sX[1, t]) + (sX[2, t] + sX[3, t])
                weights = total
                row = c.row0 + t
                if (flags & HAS_SINKS) != 0 and whole and row < s_q * heads:
                    weights = total + ex2(sinks[row % heads] * LOG2E - sM[t])
                sInv[t] = cute.arch.rcp_approx(weights) if total > 0.0 else Float32(0.0)
                if row < s_q * heads:
                    value = cute.math.log2(total, fastmath=True) + sM[t] if total > 0.0 else -Float32(INF)
                    if not whole:
                        lse_acc[self.piece_slot(c, b0), row] = value
                    elif (flags & WANTS_LSE) != 0:
                        lse[req, row // heads, row % heads] = value * (1.0 / LOG2E)
            cute.arch.barrier_arrive(barrier_id=SUMS, number_of_threads=384)

    # -------------------------------------------------------------- values
    @cute.jit
    def scale_o(self, c, rO, sScale):
        for k in cutlass.range_constexpr(COLS // 2):
            pair = cute.make_rmem_tensor((2,), Float32)
            cute.autovec_copy(cute.local_tile(sScale, (2,), (k * 4 + c.lane % 4,)), pair)
            for i in cutlass.range_constexpr(cute.size(rO) // ACC):
                for e in cutlass.range_constexpr(4):
                    rO[i * ACC + k * 4 + e] = rO[i * ACC + k * 4 + e] * pair[e % 2]

    @cute.jit
    def value_block(self, c, v, rO, slot, phase, keep):
        """O^T += V^T P^T of one block; frees its slots unless `keep`."""
        if const_expr(not self.gather):  # there, P_FULL is behind a fence of those who have waited
            for g in cutlass.range_constexpr(SLOTS):
                s, ph = self.slot_of(g, slot, phase)
                cute.arch.mbarrier_wait(c.full + s, ph)  # landed long ago; makes what the TMA wrote visible here too
        cute.arch.barrier(barrier_id=P_FULL, number_of_threads=384)
        if c.sAgain[0] != 0:
            self.scale_o(c, rO, c.sFactor)
        pv = cute.make_mma_atom(c.op_pv)
        pv.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for i in cutlass.range_constexpr(OWN):
            g, tile, _ = self.tile_of(i, v)
            s, _ = self.slot_of(g, slot, phase)
            rOi = cute.make_tensor(rO.iterator + i * ACC, cute.make_layout(c.s_shape))
            for x in cutlass.range_constexpr(4):
                cute.gemm(pv, rOi, c.tV[None, None, x, tile, s], c.tP[None, None, x], rOi)
            if const_expr(i in self.done):
                warpgroup.commit_group()
        for g in cutlass.range_constexpr(SLOTS):
            warpgroup.wait_group(len({i for i in self.done if i > self.done[g]}))
            if not keep:
                self.free_slot(c, self.slot_of(g, slot, 0)[0])

    @cute.jit
    def values(self, c, v, mO, o_acc):
        """Warpgroup 1 + v: its tiles of O^T."""
        sI = c.sI
        rO = cute.make_rmem_tensor((OWN * ACC,), Float32)
        slot = Int32(0)
        phase = Int32(0)
        for req in cutlass.range(sI[0], sI[1] + 1, unroll=1):
            _, b0, b1, whole = piece_of(c.seqlens, sI, req)
            rO.fill(0.0)
            out_slot = slot
            for j in cutlass.range(b0, b1, unroll=1):
                self.value_block(c, v, rO, slot, phase, whole and j == b1 - 1)
                if j < b1 - 1:
                    cute.arch.barrier_arrive(barrier_id=P_FREE, number_of_threads=384)
                out_slot = slot
                slot, phase = self.slot_of(SLOTS, slot, phase)
            cute.arch.barrier(barrier_id=SUMS, number_of_threads=384)
            self.scale_o(c, rO, c.sInv)
            if req < sI[1]:
                cute.arch.barrier_arrive(barrier_id=P_FREE, number_of_threads=384)
            if whole:
                self.store_whole(c, v, rO, mO, req, out_slot)
            else:
                self.store_piece(c, v, rO, o_acc, self.piece_slot(c, b0))

    @cute.jit
    def store_whole(self, c, v, rO, mO, req, slot):
        """To `out`, through the tiles that this warpgroup has just read as V; then frees their slots."""
        for i in cutlass.range_constexpr(OWN):
            g, tile, _ = self.tile_of(i, v)
            s, _ = self.slot_of(g, slot, 0)
            rX = cute.make_rmem_tensor(c.s_shape, ELEMENT)
            rX.store(cute.make_tensor(rO.iterator + i * ACC, cute.make_layout(c.s_shape)).load().to(ELEMENT))
            tOs = c.stsm_thr.partition_D(c.o_tiles[None, None, tile, s])
            cute.copy(c.stsm, c.stsm_thr.retile(rX), tOs)
        cute.arch.barrier(barrier_id=BAR_VALUES + v, number_of_threads=128)
        self.copy_out(c, v, mO, req, slot)

    @cute.jit
    def store_piece(self, c, v, rO, o_acc, at_slot):
        """To the workspace with permuted columns: a row of two tiles has four accumulators of a thread, 128 bytes of 8
        lanes."""
        v4 = cute.make_rmem_tensor((4,), Float32)
        for h in cutlass.range_constexpr(COLS):
            row = c.row0 + row_of(h, c.lane)
            if row < o_acc.shape[1]:
                for k in cutlass.range_constexpr(OWN // 2):
                    for e in cutlass.range_constexpr(4):
                        v4[e] = rO[(2 * k + e // 2) * ACC + at(h) + e % 2 * 2]
                    to = (2 * k + v) * 32 + c.w * 8 + c.lane // 4
                    cute.autovec_copy(v4, cute.local_tile(o_acc[at_slot, row, None], (4,), (to,)))


def entry():
    """What to compile: the host function and its fake arguments."""
    kernel = MlaDecode(ELEMENT, LATENT, ROPE, PAGE_SIZE, SLOT_TILES, RING, ROWS, TILES_OF)
    return kernel, mla_decode_arguments(ELEMENT, LATENT, ROPE, PAGE_SIZE)
