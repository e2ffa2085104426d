"""Dense paged MLA decode for sm_90a, at most 16 query rows (rows = s_q * heads): swapped operands.

    S^T (64 tokens x ROWS)     = K . Q^T      A = K tiles (K-major),              B = Q
    O^T (LATENT   x ROWS)      = V^T . P^T    A = the same tiles read MN-major,   B = P

The query rows are the N of the MMA (8 or 16) instead of a mostly empty M of 64. Q then takes 5 to 18 KB of shared
memory, and the rest is a ring of KV tiles: about 200 KB in flight, which is what a memory-bound kernel needs.

Tiling. One CTA per part (mla_split.py); a part walks over 64-token blocks, whatever the page size. A tile is 64 tokens
x 64 columns; SLOT_TILES tiles are one slot of the ring (RING slots), a block is (LATENT + ROPE) / 64 / SLOT_TILES
slots. How a slot is laid out for pages smaller than a block: mla_ring.py.

Pipeline. 288 threads: two math warpgroups take alternate blocks, each with a running maximum and a complete O^T of its
own; nothing crosses between them until the end of the request. One TMA warp runs ahead, also into the next request.

    TMA warp      load b0 | load b1 | load b2 | ...       waits empty[slot], arms full[slot]
    warpgroup 0   S(b0) softmax PV(b0) | S(b2) ...        waits full[slot], arrives at empty[slot] (4 warps)
    warpgroup 1        S(b1) softmax PV(b1) | S(b3) ...
    end of request: the two (maximum, sum, O^T) are merged through Q's shared memory; whole requests are stored to
    out and lse (sinks applied here), pieces of split requests to the workspace; then Q's memory is free (q_free).

    end of the CTA: the math warps merge the pieces of split requests together with the other CTAs (mla_combine.py)

Page ids are read only for pages that hold tokens (j < ceil(L / PAGE_SIZE)): the boxes behind the end of a request
repeat its last page, and for a request of length 0 they lie outside the tensor map and are filled with zeros. Rows
behind the end are masked in S and cleared in V (0 * NaN).

Cannot: more than ROWS query rows; page sizes other than 16, 32, 64, 128; sm_scale <= 0 (the maximum is taken before
scaling); FP8; a ROPE width other than 64.
"""

# --- constants: replaced when rendered ---
DTYPE = "bf16"
LATENT = 512
ROPE = 64
PAGE_SIZE = 64
CAUSAL = False
ROWS = 16
SLOT_TILES = 3
RING = 8
# --- end of constants ---

from types import SimpleNamespace
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator

from common.kv_producer import KvProducer
from common.mla_arguments import mla_decode_arguments
from common.mla_combine import COOPERATIVE, HAS_SINKS, WANTS_LSE, MlaCombine
from common.mla_ring import ring_layout
from common.mla_split import n_blocks, partials, store_interval, store_sharing, touch_table
from common.sm90 import INF, LOG2E, cutlass_dtype, ex2, row_strides, smem_atom, swz
from common.transposed import over_tokens, row_of

ELEMENT = cutlass_dtype(DTYPE)
BLOCK = 64  # tokens of a block, columns of a tile
WIDTH = LATENT + ROPE
TILES = WIDTH // 64
V_TILES = LATENT // 64
SLOTS = TILES // SLOT_TILES  # per block
COLS = ROWS // 4  # query rows per thread of S^T and O^T
HALF = V_TILES // 2 * 2 * COLS  # accumulators of half of the output columns
BAR_GROUP, BAR_MATH = 1, 3  # named barriers: 1 and 2 one per warpgroup, 3 both
M_INIT = -1.0e30  # finite: -inf - maximum is never NaN

assert ROWS in (8, 16) and ROPE == 64 and LATENT % 256 == 0
assert RING >= 2 * SLOTS  # both warpgroups hold a block


def partial_column(lane, e):
    """Column of element e of the lane-th float4 of 128 columns in a partial result: as the accumulators have them."""
    return e // 2 * 64 + (lane >> 3) * 16 + (lane & 7) + e % 2 * 8


COMBINE = MlaCombine(LATENT, DTYPE, partial_column, False, BAR_MATH)
assert COMBINE.area_floats() * 4 <= RING * SLOT_TILES * BLOCK * 128


class MlaDecode(KvProducer):
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
        B, s_q, heads = q.shape[0], q.shape[1], q.shape[2]
        R = s_q * heads
        row, request = row_strides(q)
        mQ = cute.make_tensor(q.iterator, cute.make_layout((R, 64, V_TILES, B), stride=(row, 1, 64, request)))
        row, request = row_strides(q_pe)
        mQpe = cute.make_tensor(
            q_pe.iterator + cute.assume(pe_offset, divby=8), cute.make_layout((R, 64, B), stride=(row, 1, request))
        )
        tma_k, mK = self.kv_source(kv_cache)
        row, request = row_strides(out)
        mO = cute.make_tensor(out.iterator, cute.make_layout((B, R, LATENT), stride=(request, row, 1)))
        mOacc, mLacc = partials(workspace, parts, R, LATENT)

        g2s = cpasync.CopyBulkTensorTileG2SOp()
        atom = smem_atom(ELEMENT)
        q_box = cute.tile_to_shape(atom, (ROWS, 64, V_TILES), order=(0, 1, 2))
        tma_q, gQ = cpasync.make_tiled_tma_atom(g2s, mQ, q_box, (ROWS, 64, V_TILES))
        tma_pe, gQpe = cpasync.make_tiled_tma_atom(g2s, mQpe, swz(ROWS, 64, ELEMENT), (ROWS, 64))
        self.kernel(
            tma_q,
            gQ,
            tma_pe,
            gQpe,
            tma_k,
            mK,
            block_table,
            seq_lens,
            sinks,
            mO,
            lse,
            mOacc,
            mLacc,
            semaphores,
            sm_scale * LOG2E,
            flags,
            B,
            s_q,
            heads,
            cutlass.max(kv_cache.shape[0], 1),
            parts,
            fixed,
            least,
            bias,
            parts // B,
            (B + parts - 1) // parts,
            self.mma(OperandMajorMode.K),
            self.mma(OperandMajorMode.MN),
            ring_layout(ELEMENT, SLOT_TILES, RING),
            swz(ROWS, WIDTH, ELEMENT),
            swz(ROWS, LATENT, ELEMENT).outer,
            swz(ROWS, 2 * BLOCK, ELEMENT),
        ).launch(
            grid=[cute.ceil_div(R, ROWS), 1, parts],
            block=[256 + 32 * self.warps, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
            cooperative=(flags & COOPERATIVE) // COOPERATIVE,
        )

    def mma(self, a_major):
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

    # -------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        gQ: cute.Tensor,
        tma_pe: cute.CopyAtom,
        gQpe: cute.Tensor,
        tma_k: Optional[cute.CopyAtom],
        mK: cute.Tensor,
        mTable: cute.Tensor,
        mSeqlens: cute.Tensor,
        mSinks: cute.Tensor,
        mO: cute.Tensor,
        mLse: cute.Tensor,
        mOacc: cute.Tensor,
        mLacc: cute.Tensor,
        semaphores: cute.Tensor,
        c_log2: Float32,
        flags: Int32,
        B: Int32,
        s_q: Int32,
        heads: Int32,
        pages: Int32,
        parts: Int32,
        fixed: Int32,
        least: Int32,
        bias: Int32,
        s: Int32,
        k: Int32,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
        ring: cute.ComposedLayout,
        q_layout: cute.ComposedLayout,
        q_latent: cute.Layout,
        p_layout: cute.ComposedLayout,
    ):
        tid, _, _ = cute.arch.thread_idx()
        row_tile, _, part = cute.arch.block_idx()
        row_tiles, _, _ = cute.arch.grid_dim()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        wg = warp_idx // 4
        w = warp_idx % 4
        t = tid % 128
        lane = tid % 32
        row0 = row_tile * ROWS

        smem = SmemAllocator()
        sK = smem.allocate_tensor(ELEMENT, ring.outer, 1024, swizzle=ring.inner)
        sQ = smem.allocate_tensor(ELEMENT, q_layout.outer, 1024, swizzle=q_layout.inner)
        sP = smem.allocate_tensor(ELEMENT, p_layout.outer, 1024, swizzle=p_layout.inner)  # one half per warpgroup
        sMx = smem.allocate_tensor(Float32, cute.make_layout((16, 4, 2)), 16)  # maxima: row, warp, warpgroup
        sL = smem.allocate_tensor(Float32, cute.make_layout((16, 4, 2)), 16)  # sums
        sM = smem.allocate_tensor(Float32, cute.make_layout((16, 2)), 16)  # running maxima at the end of a request
        sI = smem.allocate_tensor(Int32, cute.make_layout(6), 16)  # what mla_split.interval returned
        sShare = smem.allocate_tensor(Int32, cute.make_layout(6), 16)  # what mla_split.sharing returned, r0, r1
        full = smem.allocate_array(Int64, RING)
        empty = smem.allocate_array(Int64, RING)
        q_full = smem.allocate_array(Int64, 1)
        q_free = smem.allocate_array(Int64, 1)

        if warp_idx == 8:
            cpasync.prefetch_descriptor(tma_q)
            cpasync.prefetch_descriptor(tma_pe)
            if const_expr(not self.gather):
                cpasync.prefetch_descriptor(tma_k)
        if warp_idx == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(RING):
                    cute.arch.mbarrier_init(full + i, self.arrivals)
                    cute.arch.mbarrier_init(empty + i, 4)
                cute.arch.mbarrier_init(q_full, 1)
                cute.arch.mbarrier_init(q_free, 8)
            cute.arch.mbarrier_init_fence()

        one = cute.make_layout(1)
        q_tiles = cute.local_tile(sQ, (ROWS, 64), (0, None))  # (row, column, tile)
        k_tiles = cute.local_tile(sK, (64, 64), (0, None, None))  # (token, column, tile, slot)
        v_view = cute.make_tensor(sK.iterator, cute.select(sK.layout, mode=[1, 0, 2]))
        v_tiles = cute.local_tile(v_view, (64, 64), (None, 0, None))  # (column, token, tile, slot)
        p_tiles = cute.local_tile(sP, (ROWS, BLOCK), (0, None))
        q_lat = cute.local_tile(cute.make_tensor(sQ.iterator, q_latent), (ROWS, 64), (0, None))
        tQs, tQg = cpasync.tma_partition(
            tma_q,
            0,
            one,
            cute.group_modes(q_lat, 0, 3),
            cute.group_modes(cute.local_tile(gQ, (ROWS, 64, V_TILES), (None, 0, 0, None)), 0, 3),
        )
        tPs, tPg = cpasync.tma_partition(
            tma_pe,
            0,
            one,
            cute.group_modes(q_tiles[None, None, V_TILES], 0, 2),
            cute.group_modes(cute.local_tile(gQpe, (ROWS, 64), (None, 0, None)), 0, 2),
        )
        tKs, tKg = self.kv_views(tma_k, mK, sK)
        qk = mma_qk.get_slice(t)
        pv = mma_pv.get_slice(t)
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
            sI=sI,
            row_tile=row_tile,
            row0=row0,
            sP=p_tiles,
            sMx=sMx,
            sL=sL,
            sM=sM,
            op_qk=mma_qk.op,
            op_pv=mma_pv.op,
            tK=qk.make_fragment_A(qk.partition_A(sK)),
            tQ=qk.make_fragment_B(qk.partition_B(q_tiles)),
            tV=pv.make_fragment_A(pv.partition_A(v_tiles)),
            tP=pv.make_fragment_B(pv.partition_B(p_tiles)),
            lane=lane,
            w=w,
            wg=wg,
        )

        if warp_idx == 4:
            touch_table(mTable, mSeqlens, B, part, s, k, PAGE_SIZE or mK.shape[1], lane)
        # everything above overlaps the previous kernel's tail
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()  # all CTAs run: nobody can take the SM of one that others wait for
        if warp_idx == 8:
            store_interval(sI, mSeqlens, B, part, parts, fixed, least, bias, s, k, lane)
        cute.arch.sync_threads()
        if warp_idx >= 8:
            self.fill(c, mK, mTable, mSeqlens, warp_idx - 8, pages, row_tiles > 1)
        else:
            # while the first loads are under way; a branch on tid would make the compiler take the warps for diverged
            if warp_idx == 0:
                store_sharing(sShare, sI, mSeqlens, part, s, lane)
            self.consume(
                c, mma_qk, sQ, sI, mSeqlens, mSinks, mO, mLse, mOacc, mLacc, c_log2, flags, s_q, heads, part, t, tid
            )
            # every load into the ring has been waited for
            area = cute.recast_ptr(sK.iterator, dtype=Float32)
            COMBINE.run(
                area, sShare, mO, mLse, mSinks, mOacc, mLacc, semaphores, flags, heads, part, row_tile, row_tiles,
                row0, cutlass.min(s_q * heads - row0, ROWS), tid,
            )  # fmt: skip

    # ------------------------------------------------------------- queries
    @cute.jit
    def load_q(self, c, req):
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(c.q_full, ROWS * WIDTH * 2)
        cute.copy(c.tma_q, c.tQg[None, c.row_tile, req], c.tQs, tma_bar_ptr=c.q_full)
        cute.copy(c.tma_pe, c.tPg[None, c.row_tile, req], c.tPs, tma_bar_ptr=c.q_full)

    # ---------------------------------------------------------------- math
    @cute.jit
    def block(self, c, rS, rO, rM, rL, rLim, min_lim, tok0, seqlen, c_log2, number):
        """One block by one warpgroup; number = of the block in this CTA. rLim: tokens that each query row may see, of
        which min_lim is the smallest."""
        lane, w, wg = c.lane, c.w, c.wg
        sK, sP, sMx = c.k_tiles, c.sP, c.sMx  # storing through c would make all of it loop-carried
        slots = [(number * SLOTS + i) % RING for i in range(SLOTS)]
        phases = [((number * SLOTS + i) // RING) & 1 for i in range(SLOTS)]
        # S^T = K Q^T
        qk = cute.make_mma_atom(c.op_qk)
        qk.set(warpgroup.Field.ACCUMULATE, False)
        for g in cutlass.range_constexpr(SLOTS):
            self.wait_slot(c.full + slots[g], phases[g])
            warpgroup.fence()
            for i in cutlass.range_constexpr(SLOT_TILES):
                for x in cutlass.range_constexpr(4):
                    tile = g * SLOT_TILES + i
                    cute.gemm(qk, rS, c.tK[None, None, (x, i), slots[g]], c.tQ[None, None, x, tile], rS)
                    qk.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
        warpgroup.wait_group(0)
        if tok0 + BLOCK > min_lim:
            for i in cutlass.range_constexpr(cute.size(rS)):
                tok = tok0 + w * 16 + lane // 4 + 8 * ((i // 2) % 2)
                rS[i] = rS[i] if tok < rLim[(i // 4) * 2 + i % 2] else -Float32(INF)
        # maximum over the 64 tokens: two registers, 8 lanes, 4 warps
        for h in cutlass.range_constexpr(COLS):
            i = (h // 2) * 4 + h % 2
            mx = over_tokens(cute.arch.fmax(rS[i], rS[i + 2]), True)
            if lane < 4:
                sMx[row_of(h, lane), w, wg] = mx
        cute.arch.barrier(barrier_id=BAR_GROUP + wg, number_of_threads=128)
        rSc = cute.make_rmem_tensor((COLS,), Float32)
        for h in cutlass.range_constexpr(COLS):
            row = row_of(h, lane)
            top = cute.arch.fmax(
                cute.arch.fmax(sMx[row, 0, wg], sMx[row, 1, wg]), cute.arch.fmax(sMx[row, 2, wg], sMx[row, 3, wg])
            )
            m_new = cute.arch.fmax(rM[h], top * c_log2)
            rSc[h] = ex2(rM[h] - m_new)
            rM[h] = m_new
            i = (h // 2) * 4 + h % 2
            a = ex2(rS[i] * c_log2 - m_new)
            b = ex2(rS[i + 2] * c_log2 - m_new)
            rL[h] = rL[h] * rSc[h] + (a + b)
            sP[row, w * 16 + lane // 4, wg] = a.to(ELEMENT)
            sP[row, w * 16 + lane // 4 + 8, wg] = b.to(ELEMENT)
        grew = rSc[0] < 1.0 or rSc[1] < 1.0
        if const_expr(COLS > 2):
            grew = grew or rSc[2] < 1.0 or rSc[3] < 1.0
        if cute.arch.vote_any_sync(grew):
            for i in cutlass.range_constexpr(cute.size(rO)):
                rO[i] = rO[i] * rSc[((i % (2 * COLS)) // 4) * 2 + i % 2]
        if const_expr(not self.gather):
            if tok0 + BLOCK > seqlen:
                # 0 * NaN: clear the V rows behind the end of the request
                for row in cutlass.range(cutlass.max(seqlen - tok0, 0) + w, BLOCK, 4, unroll=1):
                    for i in cutlass.range_constexpr(V_TILES):
                        sK[row, lane * 2, i % SLOT_TILES, slots[i // SLOT_TILES]] = ELEMENT(0.0)
                        sK[row, lane * 2 + 1, i % SLOT_TILES, slots[i // SLOT_TILES]] = ELEMENT(0.0)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=BAR_GROUP + wg, number_of_threads=128)
        # O^T += V^T P^T
        pv = cute.make_mma_atom(c.op_pv)
        pv.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for i in cutlass.range_constexpr(V_TILES):
            rOi = cute.make_tensor(rO.iterator + i * 2 * COLS, rS.layout)
            for x in cutlass.range_constexpr(4):
                tV = c.tV[None, None, x, i % SLOT_TILES, slots[i // SLOT_TILES]]
                cute.gemm(pv, rOi, tV, c.tP[None, None, x, wg], rOi)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        if lane < SLOTS:
            cute.arch.mbarrier_arrive(c.empty + (number * SLOTS + lane) % RING)

    @cute.jit
    def consume(
        self, c, mma_qk, sQ, sI, mSeqlens, mSinks, mO, mLse, mOacc, mLacc, c_log2, flags, s_q, heads, part, t, tid
    ):
        lane, w, wg, sL, sM = c.lane, c.w, c.wg, c.sL, c.sM
        sX = cute.make_tensor(cute.recast_ptr(sQ.iterator, dtype=Float32), cute.make_layout((128, HALF)))  # merge area
        rS = cute.make_rmem_tensor(mma_qk.get_slice(t).partition_shape_C((BLOCK, ROWS)), Float32)
        rO = cute.make_rmem_tensor((2 * HALF,), Float32)
        rM = cute.make_rmem_tensor((COLS,), Float32)
        rL = cute.make_rmem_tensor((COLS,), Float32)
        rLim = cute.make_rmem_tensor((COLS,), Int32)
        rBack = cute.make_rmem_tensor((COLS,), Int32)  # tokens at the end that a row does not see
        for h in cutlass.range_constexpr(COLS):
            rBack[h] = 0
            if const_expr(CAUSAL):
                rBack[h] = cutlass.max(s_q - 1 - (c.row0 + row_of(h, lane)) // heads, 0)
        done = Int32(0)  # blocks of this CTA before this request
        phase_q = Int32(0)
        for req in cutlass.range(sI[0], sI[1] + 1, unroll=1):
            seqlen = mSeqlens[req]
            b0 = sI[2] if req == sI[0] else Int32(0)
            b1 = sI[3] if (req == sI[1] and sI[3] > 0) else n_blocks(seqlen)
            cut = cutlass.min(seqlen, b1 * BLOCK)
            min_lim = cut
            for h in cutlass.range_constexpr(COLS):
                rLim[h] = cut
                if const_expr(CAUSAL):
                    rLim[h] = cutlass.min(cut, seqlen - rBack[h])
            if const_expr(CAUSAL):
                min_lim = cutlass.min(cut, seqlen - (s_q - 1))
            rO.fill(0.0)
            rM.fill(M_INIT)
            rL.fill(0.0)
            cute.arch.mbarrier_wait(c.q_full, phase_q)
            phase_q = phase_q ^ 1
            for j in cutlass.range(b0 + wg, b1, 2, unroll=1):
                self.block(c, rS, rO, rM, rL, rLim, min_lim, j * BLOCK, seqlen, c_log2, done + j - b0)
            done = done + b1 - b0

            # merge the two warpgroups
            for h in cutlass.range_constexpr(COLS):
                rL[h] = over_tokens(rL[h], False)
                if lane < 4:
                    sL[row_of(h, lane), w, wg] = rL[h]
                    if w == 0:
                        sM[row_of(h, lane), wg] = rM[h]
            cute.arch.barrier(barrier_id=BAR_MATH, number_of_threads=256)
            first = sI[2] if req == sI[0] else Int32(0)
            whole = first == 0 and (req != sI[1] or sI[3] == 0 or sI[3] == n_blocks(mSeqlens[req]))
            slot = 2 * part if first > 0 else 2 * part + 1
            for h in cutlass.range_constexpr(COLS):
                total, top = self.total(sL, sM, row_of(h, lane))
                weights = total
                if (flags & HAS_SINKS) != 0 and whole:
                    weights = total + ex2(mSinks[(c.row0 + row_of(h, lane)) % heads] * LOG2E - top)
                mine = ex2(rM[h] - top)
                rL[h] = mine * cute.arch.rcp_approx(weights) if total > 0.0 else Float32(0.0)
            for i in cutlass.range_constexpr(2 * HALF):
                rO[i] = rO[i] * rL[((i % (2 * COLS)) // 4) * 2 + i % 2]
            row = c.row0 + tid
            if tid < ROWS and row < mO.shape[1]:
                total, top = self.total(sL, sM, tid)
                value = cute.math.log2(total, fastmath=True) + top if total > 0.0 else -Float32(INF)
                if not whole:
                    mLacc[slot, row] = value
                elif (flags & WANTS_LSE) != 0:
                    mLse[req, row // heads, row % heads] = value * (1.0 / LOG2E)
            if wg == 1:
                self.give(sX, rO, t, 0)
            cute.arch.barrier(barrier_id=BAR_MATH, number_of_threads=256)
            if wg == 0:
                self.take(sX, rO, t, 0)
            cute.arch.barrier(barrier_id=BAR_MATH, number_of_threads=256)
            if wg == 0:
                self.give(sX, rO, t, HALF)
            cute.arch.barrier(barrier_id=BAR_MATH, number_of_threads=256)
            if wg == 1:
                self.take(sX, rO, t, HALF)
            cute.arch.fence_view_async_shared()  # the next Q will overwrite sX
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(c.q_free)
            # each warpgroup its half of the columns
            if whole:
                if wg == 0:
                    self.store(c, rO, 0, mO, req)
                else:
                    self.store(c, rO, HALF, mO, req)
            else:
                if wg == 0:
                    self.store_partial(c, rO, 0, mOacc, slot)
                else:
                    self.store_partial(c, rO, HALF, mOacc, slot)

    @cute.jit
    def store(self, c, rO, lo: cutlass.Constexpr, mO, req):
        """Straight from the accumulators: 8 neighbouring columns per row and store."""
        lane, w = c.lane, c.w
        for i in cutlass.range_constexpr(HALF):
            e = i % (2 * COLS)
            row = c.row0 + row_of((e // 4) * 2 + e % 2, lane)
            col = (lo + i) // (2 * COLS) * 64 + w * 16 + lane // 4 + 8 * ((e // 2) % 2)
            if row < mO.shape[1]:
                mO[req, row, col] = rO[lo + i].to(ELEMENT)

    @cute.jit
    def store_partial(self, c, rO, lo: cutlass.Constexpr, mOacc, slot):
        """The same with permuted columns: 8 lanes store 128 bytes of a row, 4 accumulators each of two tiles."""
        lane, w = c.lane, c.w
        v4 = cute.make_rmem_tensor((4,), Float32)
        for i in cutlass.range_constexpr(HALF // 4):
            h, pair = i % COLS, i // COLS
            row = c.row0 + row_of(h, lane)
            if row < mOacc.shape[1]:
                for e in cutlass.range_constexpr(4):
                    v4[e] = rO[lo + (2 * pair + e // 2) * 2 * COLS + h // 2 * 4 + h % 2 + e % 2 * 2]
                at = (lo // (4 * COLS) + pair) * 32 + w * 8 + lane // 4
                cute.autovec_copy(v4, cute.local_tile(mOacc[slot, row, None], (4,), (at,)))

    @cute.jit
    def total(self, sL, sM, row):
        """(sum of the weights, maximum) of one query row over both warpgroups."""
        m0 = sM[row, 0]
        m1 = sM[row, 1]
        top = cute.arch.fmax(m0, m1)
        l0 = (sL[row, 0, 0] + sL[row, 1, 0]) + (sL[row, 2, 0] + sL[row, 3, 0])
        l1 = (sL[row, 0, 1] + sL[row, 1, 1]) + (sL[row, 2, 1] + sL[row, 3, 1])
        return l0 * ex2(m0 - top) + l1 * ex2(m1 - top), top

    @cute.jit
    def give(self, sX, rO, t, lo: cutlass.Constexpr):
        for i in cutlass.range_constexpr(HALF):
            sX[t, i] = rO[lo + i]

    @cute.jit
    def take(self, sX, rO, t, lo: cutlass.Constexpr):
        for i in cutlass.range_constexpr(HALF):
            rO[lo + i] = rO[lo + i] + sX[t, i]


def entry():
    """What to compile: the host function and its fake arguments."""
    kernel = MlaDecode(ELEMENT, LATENT, ROPE, PAGE_SIZE, SLOT_TILES, RING)
    return kernel, mla_decode_arguments(ELEMENT, LATENT, ROPE, PAGE_SIZE)
