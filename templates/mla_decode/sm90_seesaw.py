"""Dense paged MLA decode for Hopper (sm_90a), more than 16 query rows: the seesaw kernel.

Algorithm. Rows = (query token, head) pairs of one request, packed; a CTA takes 64 of them (grid x) and a run of
64-token blocks of one or several requests (grid z, common/mla_split.py). Every block is read into shared memory once
and serves as K (K-major, LATENT + 64 columns) and as V (the same bytes read MN-major, LATENT columns). Online softmax
in the log2 domain with sm_scale * log2(e) folded into the exponent. Whole requests go straight to `out` and `lse`;
pieces go to fp32 partial results in `workspace`, which the CTAs merge when they are done (common/mla_combine.py).

Tiling. Two warpgroups, no producer warp, two block buffers K0 (even block of a pair) and K1 (odd block), each in two
halves of the latent columns, L and R, and a rope tile. WG0 owns O.L and the softmax of even blocks, WG1 owns O.R and
the softmax of odd blocks. The rope tile of Q lives in registers; its shared memory is the buffer P1.

The pipeline, one pair of blocks (m0, m1: running maximum after the even and the odd block; m1' of the pair before):

    WG0                                              WG1
    S0 = Q K0 (L and the rope tile, then R)          S1 = Q K1 (R and the rope tile, then L)
    m0 = max(m1', rowmax S0); signal M0 ------M0---> m1 = max(m0, rowmax S1); signal M1
    O.L *= 2^(m1'-m0); P0 = 2^(S0-m0)                P1 = 2^(S1-m1) -> smem; O.R *= 2^(m1'-m1)
    O.L += P0(registers) V0.L                        O.R += P1(registers) V1.R (issued); signal P1
    refill K0.L and its rope tile
    wait M1 <---------------------------------M1---
    P0 *= 2^(m0-m1) -> smem; signal P0 -------P0---> wait P0; O.R += P0(smem) V0.R (issued)
    O.L *= 2^(m0-m1)                                 P1 done: refill K1.R and its rope tile
    wait P1 <---------------------------------P1---  P0 done: refill K0.R
    O.L += P1(smem) V1.L; refill K1.L

All pairs have the same code, and both warpgroups the same epilogue: code that is executed once is fetched from memory
for longer than it runs. The last pair of a piece masks, clears V rows beyond the length (0 * NaN), and refills for the
next request of the CTA (K0 and Q; K1, which stages the output, and the rope tile of Q in the epilogue). A piece with
an odd number of blocks loads its last block twice; the copy is masked out. The first loads of a CTA are issued by the
warp that finds out its share of the work, before anybody else knows it.

Barriers. mbarriers (TMA): K0.L K0.R K1.L K1.R, one for Q. Named barriers, one warpgroup arrives and the other waits:
M0, M1 (the maxima are in sM), P0, P1 (the probabilities are in shared memory); one per warpgroup for its own writes.
There are no "empty" barriers: the warpgroup whose product read half a block last also refills it.

Pages. The unit is the 64-token block whatever the page size. A half of a block keeps the 8-token groups of all its
tiles together (mla_ring.py), so that a page of 16 or 32 tokens is one TMA box per half: 64 / PAGE_SIZE boxes per half
and block. Lane l of the issuing warp holds the page of box l: one register per block for every page size. Block-table
entries from ceil(L / PAGE_SIZE) on are never read.

Cannot do: FP8 caches, page sizes below 16, ROPE other than 64, more than 512 rows (block_table is re-read for each 64).
Fewer than 64 rows cost as much as 64.
"""

# --- constants: replaced when rendered ---
DTYPE = "bf16"
LATENT = 512
ROPE = 64
PAGE_SIZE = 64
CAUSAL = False
# --- end of constants ---

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator

from common.mla_arguments import mla_decode_arguments
from common.mla_combine import COOPERATIVE, HAS_SINKS, WANTS_LSE, MlaCombine
from common.mla_ring import grouped_pages, packed_rows, ring_box, ring_boxes
from common.mla_split import interval, n_blocks, partials, piece_of, store_sharing, touch_table
from common.sm90 import EVICT_FIRST, EVICT_NORMAL, INF, LOG2E, cutlass_dtype, row_strides, smem_atom, swz
from common.sm90 import ex2, issue, quad_max, quad_sum

ELEMENT = cutlass_dtype(DTYPE)
ROWS = 64  # query rows of a CTA
BLOCK = 64  # tokens of a block
TILE = 64  # columns of a tile: 128 bytes, the swizzle span
TILES = (LATENT + ROPE) // TILE  # the last one is the rope tile
HALF = LATENT // 2  # output columns of a warpgroup
HALF_TILES = HALF // TILE
TILE_BYTES = BLOCK * TILE * ELEMENT.width // 8
BOX_TOKENS = min(PAGE_SIZE, BLOCK)  # tokens of a TMA box
BOXES = BLOCK // BOX_TOKENS  # boxes per half and block
PER_PAGE = max(PAGE_SIZE // BLOCK, 1)  # blocks of a page
LOG2_PAGE, LOG2_PER_PAGE = PAGE_SIZE.bit_length() - 1, PER_PAGE.bit_length() - 1
Q_BOX = 4  # tiles of a Q box
Q_FULL = 4  # mbarrier of Q; 0-3: 2 * buffer + half
BAR_M0, BAR_M1, BAR_P0, BAR_P1, BAR_WG0, BAR_WG1, BAR_END = 1, 2, 3, 4, 5, 6, 7
FIRST_BLOCKS = 4096  # evict-first pays for batches up to about 300 MB; beyond, only when several CTAs read a block
M_INIT = -1.0e30  # finite, so that a row without keys has no NaN

assert ROPE == TILE and LATENT in (256, 512) and PAGE_SIZE in (16, 32, 64, 128)


# ------------------------------------------------------------------------------------------------ layouts


def tile_stack(n):
    """Shared-memory layout (64 rows, 64 columns, n tiles), one tile behind the other."""
    return cute.tile_to_shape(smem_atom(ELEMENT), (ROWS, TILE, n), order=(0, 1, 2))


def kv_boxes(n):
    """The same tiles as TMA boxes: (8, groups, 64 columns, n tiles, box)."""
    return cute.select(ring_boxes(n, BOXES, 1), mode=[0, 1, 2, 3, 4])


def kv_source(g, first, n):
    """Boxes of the tiles first .. first + n - 1 in the global tensor: (box ..., block of the page, page)."""
    g = cute.domain_offset((0, 0, 0, first, 0), g)
    return cute.group_modes(cute.local_tile(g, (8, BOX_TOKENS // 8, TILE, n), (0, None, 0, 0, None)), 0, 4)


def opaque(x):
    """The same shared-memory tensor with an address that went through a shuffle: the compiler then knows that it is
    uniform and not that it is a constant, and does the arithmetic of the MMA descriptors in uniform registers. For a
    plain address it does it in vector registers, with two 64-bit additions and four moves to uniform registers per MMA.
    To be called in the branch of one warpgroup; in code that both share it has no effect."""
    address = cute.arch.make_warp_uniform(x.iterator.toint())
    swizzle = smem_atom(ELEMENT).inner
    ptr = cute.make_ptr(ELEMENT, address, cutlass.AddressSpace.smem, assumed_align=1024, swizzle_=swizzle)
    return cute.make_tensor(ptr, x.layout)


def partial_column(lane, e):
    """Column of element e of the lane-th float4 of 128 columns in a partial result: as the accumulators have them."""
    return (lane >> 2) * 16 + (lane & 3) * 2 + e % 2 + e // 2 * 8


# teams gain nothing here (a row tile has at most 66 parts), and cost compile time
COMBINE = MlaCombine(LATENT, DTYPE, partial_column, True, BAR_END, teams=False)
assert COMBINE.area_floats() * 4 <= 2 * TILES * TILE_BYTES  # K0, K1 and the rope tiles


class MlaDecode:
    # -------------------------------------------------------------------------------------------- host
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
        are joined); kv_cache (pages >= 1, PAGE_SIZE, LATENT + ROPE); block_table (B, max_pages); seq_lens (B);
        sinks (>= H); out (B, s_q, H, LATENT); lse (B, s_q, H); workspace: see mla_split.partials; semaphores: zeros,
        parts * row tiles of them, left as zeros. flags: HAS_SINKS + WANTS_LSE + COOPERATIVE; without the first, sinks
        are not read, without the second, lse is not written and may have any shape. Strides may be anything within
        these: q, q_pe, kv_cache, out multiples of 8; the (query token, head) rows of q, q_pe and out evenly spaced.
        sm_scale > 0. From parts on: the split; parts * row tiles is at most the number of SMs."""
        batch, s_q, heads = q.shape[0], q.shape[1], q.shape[2]
        rows = s_q * heads
        o_acc, lse_acc = partials(workspace, parts, rows, LATENT)

        g2s, s2g = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        tma_q, mQ = cpasync.make_tiled_tma_atom(
            g2s, packed_rows(q, Int32(0), TILES - 1), tile_stack(Q_BOX), (ROWS, TILE, Q_BOX)
        )
        tma_pe, mQpe = cpasync.make_tiled_tma_atom(g2s, packed_rows(q_pe, pe_offset, 1), tile_stack(1), (ROWS, TILE, 1))
        mKV = grouped_pages(kv_cache, PAGE_SIZE, TILES)
        (tma_k, mK), (tma_r, mR) = [
            cpasync.make_tiled_tma_atom(g2s, mKV, ring_box(ELEMENT, n, BOXES), (8, BOX_TOKENS // 8, TILE, n))
            for n in (HALF_TILES, 1)
        ]
        tma_o, mO = cpasync.make_tiled_tma_atom(
            s2g, packed_rows(out, Int32(0), TILES - 1), tile_stack(HALF_TILES), (ROWS, TILE, HALF_TILES)
        )
        row, request = row_strides(out)
        out_rows = cute.make_tensor(out.iterator, cute.make_layout((batch, rows, LATENT), stride=(request, row, 1)))

        def mma(n, b_major, a_source):
            return hh.make_trivial_tiled_mma(
                ELEMENT, ELEMENT, OperandMajorMode.K, b_major, Float32, (1, 1, 1), (ROWS, n), a_source
            )

        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        smem, rmem = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM
        self.kernel(
            tma_q,
            mQ,
            tma_pe,
            mQpe,
            tma_k,
            mK,
            tma_r,
            mR,
            tma_o,
            mO,
            block_table,
            seq_lens,
            sinks,
            out_rows,
            lse,
            o_acc,
            lse_acc,
            semaphores,
            sm_scale * LOG2E,
            flags,
            batch,
            s_q,
            heads,
            parts,
            fixed,
            least,
            bias,
            parts // batch,
            (batch + parts - 1) // parts,
            mma(BLOCK, k_major, smem),
            mma(BLOCK, k_major, rmem),
            mma(HALF, mn_major, rmem),
            mma(HALF, mn_major, smem),
        ).launch(
            grid=[cute.ceil_div(rows, ROWS), 1, parts],
            block=[256, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
            cooperative=(flags & COOPERATIVE) // COOPERATIVE,
        )

    # -------------------------------------------------------------------------------------------- loads
    @cute.jit
    def page_of(self, c, req, blk, seqlen):
        """What `load_half` needs to find a block of a request (seqlen > 0): page * PER_PAGE + block of the page; with
        pages smaller than a block, the page of box `lane`."""
        if const_expr(PAGE_SIZE < BLOCK):
            page = c.table[req, cutlass.min(blk * BOXES + (c.lane & (BOXES - 1)), (seqlen - 1) >> LOG2_PAGE)]
        else:
            page = c.table[req, blk >> LOG2_PER_PAGE]
            if const_expr(PER_PAGE > 1):
                page = (page << LOG2_PER_PAGE) + (blk & (PER_PAGE - 1))
        return page

    @cute.jit
    def page_of_any(self, c, req, blk, seqlen):
        """The same for a request that may be empty: its one block is masked out, any page will do."""
        page = Int32(0)
        if seqlen > 0:
            page = self.page_of(c, req, blk, seqlen)
        return page

    @cute.jit
    def load_half(self, c, buf: cutlass.Constexpr, half: cutlass.Constexpr, page):
        """Arm the barrier of one half of a buffer and fill it; called by one whole warp. The rope tile comes with the
        half that is free first: the other one is what the next scores wait for."""
        rope: cutlass.Constexpr = buf == half
        bar = c.bars + (2 * buf + half)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bar, (HALF_TILES + rope) * TILE_BYTES)
        policy = Int64(c.sI[4]) << 32
        for i in cutlass.range(BOXES, unroll=1):
            box_page, sub = page, 0
            if const_expr(BOXES > 1):
                box_page = cute.arch.shuffle_sync(page, offset=i)
            if const_expr(PER_PAGE > 1):
                box_page, sub = page >> LOG2_PER_PAGE, page & (PER_PAGE - 1)
            cute.copy(
                c.tma_k,
                c.tKgK[half][None, sub, box_page],
                c.tKsK[buf][half][None, i],
                tma_bar_ptr=bar,
                cache_policy=policy,
            )
            if const_expr(rope):
                cute.copy(
                    c.tma_r, c.tRgR[None, sub, box_page], c.tRsR[buf][None, i], tma_bar_ptr=bar, cache_policy=policy
                )

    @cute.jit
    def load_q(self, c, req):
        """Fill all of Q but the rope tile; arms the barrier for that too."""
        bar = c.bars + Q_FULL
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bar, TILES * TILE_BYTES)
        for i in cutlass.range_constexpr((TILES - 1) // Q_BOX):
            cute.copy(c.tma_q, c.tQgQ[None, c.m_block, i, req], c.tQsQ[None, i], tma_bar_ptr=bar)

    @cute.jit
    def load_q_rope(self, c, req):
        cute.copy(c.tma_pe, c.tQgPe[None, c.m_block, req], c.tQsPe, tma_bar_ptr=c.bars + Q_FULL)

    # -------------------------------------------------------------------------------------------- math
    @cute.jit
    def qk_half(self, c, ops, buf: cutlass.Constexpr, half: cutlass.Constexpr, S, rQpe, phase):
        """S (+)= Q K^T over the tiles of one half as soon as they landed; one wgmma group."""
        first: cutlass.Constexpr = buf == half  # the half that is freed, and filled, first
        cute.arch.mbarrier_wait(c.bars + (2 * buf + half), phase)
        warpgroup.fence()
        for i in cutlass.range_constexpr(HALF_TILES):
            tile = half * HALF_TILES + i
            tKi = ops.tK[None, None, (None, i), half, buf]
            issue(c.op_qk_s, S, ops.tQ[None, None, (None, tile)], tKi, first and i == 0)
        if const_expr(first):
            issue(c.op_qk_r, S, rQpe, ops.tR, False)
        warpgroup.commit_group()

    @cute.jit
    def mask(self, c, x, S, tok0):
        """Scores of the tokens from `cut` on (causal: from the row's own limit on) become -inf."""
        lim = cute.make_rmem_tensor((2,), Int32)
        for r in cutlass.range_constexpr(2):
            lim[r] = x.cut
            if const_expr(CAUSAL):
                lim[r] = cutlass.min(x.cut, x.seqlen - c.sBack[c.row + 8 * r])
        for i in cutlass.range_constexpr(cute.size(S)):
            tok = tok0 + (i // 4) * 8 + (c.lane % 4) * 2 + (i % 2)
            S[i] = S[i] if tok < lim[(i // 2) % 2] else -Float32(INF)

    @cute.jit
    def row_max(self, S, r: cutlass.Constexpr, scale):
        m = S[2 * r]
        for j in cutlass.range_constexpr(cute.size(S) // 4):
            m = cute.arch.fmax(m, cute.arch.fmax(S[4 * j + 2 * r], S[4 * j + 2 * r + 1]))
        return quad_max(m) * scale

    @cute.jit
    def scale_rows(self, x, s):
        for i in cutlass.range_constexpr(cute.size(x)):
            x[i] = x[i] * s[(i // 2) % 2]

    @cute.jit
    def rescale_o(self, O, s):
        """O *= s; a warp whose 16 rows all kept their maximum skips it (exact)."""
        if cute.arch.vote_any_sync(s[0] < 1.0 or s[1] < 1.0):
            self.scale_rows(O, s)

    @cute.jit
    def exp_rows(self, S, rP, m, L, scale):
        """S becomes 2^(S * scale - m), rP the same rounded; L sums the unrounded values."""
        for r in cutlass.range_constexpr(2):
            acc = Float32(0.0)
            for j in cutlass.range_constexpr(cute.size(S) // 4):
                a = ex2(S[4 * j + 2 * r] * scale - m[r])
                b = ex2(S[4 * j + 2 * r + 1] * scale - m[r])
                S[4 * j + 2 * r] = a
                S[4 * j + 2 * r + 1] = b
                acc = acc + (a + b)
            L[r] = L[r] + acc
        rP.store(S.load().to(ELEMENT))

    @cute.jit
    def zero_tail(self, c, buf: cutlass.Constexpr, half: cutlass.Constexpr, valid):
        """Clear the rows from `valid` on of this warpgroup's V columns: what lies there may be NaN. 16 bytes a lane; a
        swizzle permutes only within the 128 bytes of a row of a tile."""
        group = HALF_TILES * 8 * 128
        at = c.sK[None, None, half, buf].iterator.toint() + c.lane // 8 % HALF_TILES * 1024 + c.lane % 8 * 16
        zeros = cute.make_rmem_tensor((4,), Int32)
        zeros.fill(0)
        for row in cutlass.range(cutlass.max(valid, 0) + c.t // 32, BLOCK, 4, unroll=1):
            to = cute.make_ptr(
                Int32, at + (row >> 3) * group + (row & 7) * 128, cutlass.AddressSpace.smem, assumed_align=16
            )
            cute.autovec_copy(zeros, cute.make_tensor(to, cute.make_layout(4)))

    @cute.jit
    def publish(self, half: cutlass.Constexpr):
        """Let the MMAs of a warpgroup see what all its threads have written."""
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=BAR_WG0 + half, number_of_threads=128)

    @cute.jit
    def pair_wg0(self, c, x, y, O, rQpe, m, L):
        """WG0's share of a pair."""
        sM0, sM1, lane, row, scale, seqlen = c.sM0, c.sM1, c.lane, c.row, c.scale, x.seqlen
        ops = self.operands(c, 0)
        S = cute.make_rmem_tensor(c.s_shape, Float32)
        rP = cute.make_rmem_tensor(((2, 2, 2), 1, 4), ELEMENT)
        self.qk_half(c, ops, 0, 0, S, rQpe, y.phase)
        self.qk_half(c, ops, 0, 1, S, rQpe, y.phase)
        page0, page1 = self.next_pages(c, x, y)
        warpgroup.wait_group(0)
        # the ends of requests before the exponentials: behind a branch the compiler would compute those a second time
        if y.tok0 + BLOCK > x.min_lim:
            self.mask(c, x, S, y.tok0)
            self.zero_tail(c, 0, 0, seqlen - y.tok0)
            self.publish(0)
        sc = cute.make_rmem_tensor((2,), Float32)
        for r in cutlass.range_constexpr(2):
            m_new = cute.arch.fmax(m[r], self.row_max(S, r, scale))
            sc[r] = ex2(m[r] - m_new)
            m[r] = m_new
            L[r] = L[r] * sc[r]
            if lane % 4 == 0:
                sM0[row + 8 * r] = m_new
        cute.arch.barrier_arrive(barrier_id=BAR_M0, number_of_threads=256)
        self.rescale_o(O, sc)
        self.exp_rows(S, rP, m, L, scale)
        # O.L += P0 V0.L
        warpgroup.fence()
        issue(c.op_pv_r, O, rP, ops.tV[None, None, None, 0, 0], False)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        if c.warp_in_wg == 0 and y.more:
            self.load_half(c, 0, 0, page0)
        # the maximum after the odd block
        cute.arch.barrier(barrier_id=BAR_M1, number_of_threads=256)
        if c.warp_in_wg == 0 and y.new_q:
            self.load_q(c, x.nxt)  # both QK products of this request are done
        if y.tok0 + 2 * BLOCK > seqlen:
            self.zero_tail(c, 1, 0, seqlen - y.tok0 - BLOCK)
            self.publish(0)
        for r in cutlass.range_constexpr(2):
            m_new = sM1[row + 8 * r]
            sc[r] = ex2(m[r] - m_new)
            m[r] = m_new
            L[r] = L[r] * sc[r]
        self.scale_rows(S, sc)
        rP.store(S.load().to(ELEMENT))
        cute.copy(c.stsm, c.stsm_thr.retile(rP), c.tP_st[0])
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=BAR_P0, number_of_threads=256)
        self.rescale_o(O, sc)
        cute.arch.barrier(barrier_id=BAR_P1, number_of_threads=256)
        # O.L += P1 V1.L
        warpgroup.fence()
        issue(c.op_pv_s, O, ops.tP, ops.tV[None, None, None, 0, 1], False)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        if c.warp_in_wg == 0 and not y.last:
            self.load_half(c, 1, 0, page1)
        return page1

    @cute.jit
    def pair_wg1(self, c, x, y, O, rQpe, m, L):
        """WG1's share of a pair."""
        sM0, sM1, lane, row, scale, seqlen = c.sM0, c.sM1, c.lane, c.row, c.scale, x.seqlen
        ops = self.operands(c, 1)
        S = cute.make_rmem_tensor(c.s_shape, Float32)
        rP = cute.make_rmem_tensor(((2, 2, 2), 1, 4), ELEMENT)
        self.qk_half(c, ops, 1, 1, S, rQpe, y.phase)
        self.qk_half(c, ops, 1, 0, S, rQpe, y.phase)
        page0, page1 = self.next_pages(c, x, y)
        warpgroup.wait_group(0)
        if y.tok0 + 2 * BLOCK > x.min_lim:
            self.mask(c, x, S, y.tok0 + BLOCK)
        mx = cute.make_rmem_tensor((2,), Float32)
        for r in cutlass.range_constexpr(2):
            mx[r] = self.row_max(S, r, scale)
        cute.arch.barrier(barrier_id=BAR_M0, number_of_threads=256)
        sc = cute.make_rmem_tensor((2,), Float32)
        for r in cutlass.range_constexpr(2):
            m_new = cute.arch.fmax(sM0[row + 8 * r], mx[r])
            sc[r] = ex2(m[r] - m_new)
            m[r] = m_new
            L[r] = L[r] * sc[r]
            if lane % 4 == 0:
                sM1[row + 8 * r] = m_new
        cute.arch.barrier_arrive(barrier_id=BAR_M1, number_of_threads=256)
        if y.tok0 + 2 * BLOCK > seqlen:
            self.zero_tail(c, 1, 1, seqlen - y.tok0 - BLOCK)
            self.zero_tail(c, 0, 1, seqlen - y.tok0)
            self.publish(1)
        self.exp_rows(S, rP, m, L, scale)
        cute.copy(c.stsm, c.stsm_thr.retile(rP), c.tP_st[1])
        self.rescale_o(O, sc)
        cute.arch.fence_view_async_shared()
        # O.R += P1 V1.R
        warpgroup.fence()
        issue(c.op_pv_r, O, rP, ops.tV[None, None, None, 1, 1], False)
        warpgroup.commit_group()
        cute.arch.barrier_arrive(barrier_id=BAR_P1, number_of_threads=256)
        cute.arch.barrier(barrier_id=BAR_P0, number_of_threads=256)
        # O.R += P0 V0.R
        warpgroup.fence()
        issue(c.op_pv_s, O, ops.tP, ops.tV[None, None, None, 1, 0], False)
        warpgroup.commit_group()
        warpgroup.wait_group(1)
        if c.warp_in_wg == 0 and not y.last:
            self.load_half(c, 1, 1, page1)
        warpgroup.wait_group(0)
        if c.warp_in_wg == 0 and y.more:
            self.load_half(c, 0, 1, page0)
        return page1

    @cute.jit
    def next_pages(self, c, x, y):
        """Of the blocks of the pair that follows, here or in the next request."""
        req, seqlen, blk, end = x.req, x.seqlen, y.tok0 // BLOCK + 2, x.b1
        if y.last:
            req, seqlen, blk, end = x.nxt, x.next_len, Int32(0), x.next_end
        page0 = self.page_of_any(c, req, blk, seqlen)
        return page0, self.page_of_any(c, req, cutlass.min(blk + 1, end - 1), seqlen)

    def operands(self, c, wg):
        """What the MMAs of a warpgroup read. Made anew for each pair: carried through the loop, a descriptor would lie
        in vector registers, from which every MMA would move it."""
        return SimpleNamespace(
            tQ=c.qk.make_fragment_A(c.qk.partition_A(opaque(c.sQ))),
            tK=c.qk.make_fragment_B(c.qk.partition_B(opaque(c.sK))),
            tR=c.qk.make_fragment_B(c.qk.partition_B(opaque(c.sR[wg]))),
            tV=c.v_view(opaque(c.sK)),
            tP=c.pv_s.make_fragment_A(c.pv_s.partition_A(opaque(c.sP[1 - wg]))),
        )

    @cute.jit
    def blocks(self, c, x, wg: cutlass.Constexpr, O, rQpe, m, L, ph):
        """All blocks of the piece x by one warpgroup; ph: phase of the barriers of the first pair. Returns the page of
        the odd block of the next request."""
        pair = self.pair_wg1 if wg else self.pair_wg0
        pairs = (x.b1 - x.b0 + 1) >> 1
        page1 = Int32(0)
        for i in cutlass.range(pairs, unroll=1):
            last = i == pairs - 1
            y = SimpleNamespace(
                tok0=x.tok0 + i * (2 * BLOCK),
                phase=ph ^ (i & 1),
                last=last,
                more=not last or x.more,  # another pair follows
                new_q=last and x.more,
            )
            page1 = pair(c, x, y, O, rQpe, m, L)
        return page1

    # -------------------------------------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        mQ: cute.Tensor,
        tma_pe: cute.CopyAtom,
        mQpe: cute.Tensor,
        tma_k: cute.CopyAtom,
        mK: cute.Tensor,
        tma_r: cute.CopyAtom,
        mR: cute.Tensor,
        tma_o: cute.CopyAtom,
        mO: cute.Tensor,
        table: cute.Tensor,
        seqlens: cute.Tensor,
        sinks: cute.Tensor,
        out_rows: cute.Tensor,
        lse: cute.Tensor,
        o_acc: cute.Tensor,
        lse_acc: cute.Tensor,
        semaphores: cute.Tensor,
        scale: Float32,
        flags: Int32,
        batch: Int32,
        s_q: Int32,
        heads: Int32,
        parts: Int32,
        fixed: Int32,
        least: Int32,
        bias: Int32,
        parts_per_request: Int32,
        requests_per_part: Int32,
        mma_qk_s: cute.TiledMma,
        mma_qk_r: cute.TiledMma,
        mma_pv_r: cute.TiledMma,
        mma_pv_s: cute.TiledMma,
    ):
        tid, _, _ = cute.arch.thread_idx()
        m_block, _, part = cute.arch.block_idx()
        m_blocks, _, _ = cute.arch.grid_dim()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        wg = warp_idx // 4
        warp_in_wg = warp_idx % 4
        t = tid % 128
        lane = tid % 32
        row = warp_in_wg * 16 + lane // 4  # this thread has the rows row and row + 8
        rows = s_q * heads

        if warp_idx == 0:
            for tma in (tma_q, tma_pe, tma_k, tma_r, tma_o):
                cpasync.prefetch_descriptor(tma)

        smem = SmemAllocator()

        def swizzled(layout):
            return smem.allocate_tensor(ELEMENT, layout.outer, 1024, swizzle=layout.inner)

        sQ = swizzled(swz(ROWS, LATENT + ROPE, ELEMENT))
        # tokens, columns of a half as in mla_ring, half, buffer: with addresses of their own, the halves would need
        # more uniform registers than there are
        sK = swizzled(cute.tile_to_shape(smem_atom(ELEMENT), (BLOCK, HALF, 2, 2), order=(1, 0, 2, 3)))
        sR = [swizzled(swz(BLOCK, TILE, ELEMENT)) for _ in (0, 1)]  # the rope tiles of the blocks
        sP0 = swizzled(swz(ROWS, BLOCK, ELEMENT))
        sM0 = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)
        sM1 = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)
        sL = smem.allocate_tensor(Float32, cute.make_layout(2 * ROWS), 16)
        sSink = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)  # log2 units
        sBack = smem.allocate_tensor(Int32, cute.make_layout(ROWS), 16)  # causal: tokens at the end a row does not see
        sI = smem.allocate_tensor(Int32, cute.make_layout(6), 16)  # the CTA's share of the work, and the L2 hint
        sShare = smem.allocate_tensor(Int32, cute.make_layout(6), 16)  # its share of the combine
        bars = smem.allocate_array(Int64, Q_FULL + 1)
        sP1 = cute.local_tile(sQ, (ROWS, TILE), (0, TILES - 1))  # the rope tile of Q, until it is in registers

        if warp_idx == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(Q_FULL + 1):
                    cute.arch.mbarrier_init(bars + i, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        # TMA views
        one = cute.make_layout(1)
        q_tiles = cute.local_tile(sQ, (ROWS, TILE), (0, None))
        tQsQ, tQgQ = cpasync.tma_partition(
            tma_q,
            0,
            one,
            cute.group_modes(cute.local_tile(q_tiles, (ROWS, TILE, Q_BOX), (0, 0, None)), 0, 3),
            cute.group_modes(cute.local_tile(mQ, (ROWS, TILE, Q_BOX), (None, 0, None, None)), 0, 3),
        )
        tQsPe, tQgPe = cpasync.tma_partition(
            tma_pe,
            0,
            one,
            cute.group_modes(
                cute.local_tile(cute.domain_offset((0, 0, TILES - 1), q_tiles), (ROWS, TILE, 1), (0, 0, 0)), 0, 3
            ),
            cute.group_modes(cute.local_tile(mQpe, (ROWS, TILE, 1), (None, 0, 0, None)), 0, 3),
        )
        tKsK, tKgK, tRsR, tRgR = [[None, None], [None, None]], [None, None], [None, None], None
        for buf in (0, 1):
            for half in (0, 1):
                boxes = cute.make_tensor(sK[None, None, half, buf].iterator, kv_boxes(HALF_TILES))
                source = kv_source(mK, half * HALF_TILES, HALF_TILES)
                tKsK[buf][half], tKgK[half] = cpasync.tma_partition(
                    tma_k, 0, one, cute.group_modes(boxes, 0, cute.rank(boxes) - 1), source
                )
            boxes = cute.make_tensor(sR[buf].iterator, kv_boxes(1))
            tRsR[buf], tRgR = cpasync.tma_partition(
                tma_r, 0, one, cute.group_modes(boxes, 0, cute.rank(boxes) - 1), kv_source(mR, TILES - 1, 1)
            )
        # the output is staged in K1, by each warpgroup in its half
        gO = cute.group_modes(cute.local_tile(mO, (ROWS, TILE, HALF_TILES), (None, 0, None, None)), 0, 3)
        stage = sK[None, None, None, 1].iterator
        halves = cute.tile_to_shape(smem_atom(ELEMENT), (ROWS, HALF, 2), order=(0, 1, 2))
        sO = cute.make_tensor(stage, halves.outer)
        stack = cute.tile_to_shape(smem_atom(ELEMENT), (ROWS, TILE, HALF_TILES, 2), order=(0, 1, 2, 3))
        stack = cute.make_tensor(stage, stack.outer)
        tOsO, tOgO = cpasync.tma_partition(tma_o, 0, one, cute.group_modes(stack, 0, 3), gO)

        # MMA views
        qk = mma_qk_s.get_slice(t)
        pv_r = mma_pv_r.get_slice(t)
        pv_s = mma_pv_s.get_slice(t)
        stsm_atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), ELEMENT)
        ldsm_atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), ELEMENT)
        stsm = cute.make_tiled_copy_C(stsm_atom, mma_qk_s)
        stsm_thr = stsm.get_slice(t)
        stsm_o = cute.make_tiled_copy_C(stsm_atom, mma_pv_r)
        stsm_o_thr = stsm_o.get_slice(t)
        ldsm = cute.make_tiled_copy_A(ldsm_atom, mma_qk_r)
        ldsm_thr = ldsm.get_slice(t)

        def v_view(b):
            vt = cute.make_tensor(b.iterator, cute.select(b.layout, mode=[1, 0, 2, 3]))
            return pv_s.make_fragment_B(pv_s.partition_B(vt))

        # read-only in loops and branches: what is assigned there would have to be a value of the program
        c = SimpleNamespace(
            t=t,
            lane=lane,
            warp_in_wg=warp_in_wg,
            row=row,
            m_block=m_block,
            bars=bars,
            sI=sI,
            table=table,
            scale=scale,
            sM0=sM0,
            sM1=sM1,
            sBack=sBack,
            sK=sK,
            tma_q=tma_q,
            tma_pe=tma_pe,
            tma_k=tma_k,
            tma_r=tma_r,
            tQgQ=tQgQ,
            tQsQ=tQsQ,
            tQgPe=tQgPe,
            tQsPe=tQsPe,
            tKgK=tKgK,
            tKsK=tKsK,
            tRgR=tRgR,
            tRsR=tRsR,
            sQ=sQ,
            sR=sR,
            sP=(sP0, sP1),
            v_view=v_view,
            qk=qk,
            pv_s=pv_s,
            stsm=stsm,
            stsm_thr=stsm_thr,
            s_shape=qk.partition_shape_C((ROWS, BLOCK)),
            tP_st=[stsm_thr.partition_D(x) for x in (sP0, sP1)],
            op_qk_s=mma_qk_s.op,
            op_qk_r=mma_qk_r.op,
            op_pv_r=mma_pv_r.op,
            op_pv_s=mma_pv_s.op,
        )

        if warp_idx == 2:
            touch_table(table, seqlens, batch, part, parts_per_request, requests_per_part, PAGE_SIZE, lane)
        # everything above overlaps the previous kernel's tail
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()  # all CTAs run: nobody can take the SM of one that others wait for

        # what does not change from request to request lies in shared memory: the main loop has no register to spare
        if warp_idx == 0:
            r0, r1, j0, j1, total, unit = interval(
                seqlens, batch, part, parts, fixed, least, bias, parts_per_request, requests_per_part, lane
            )
            if lane == 0:
                sI[0] = r0
                sI[1] = r1
                sI[2] = j0
                sI[3] = j1
                sI[4] = EVICT_FIRST >> 32 if m_blocks > 1 or total <= FIRST_BLOCKS else EVICT_NORMAL >> 32
                sI[5] = unit
            cute.arch.sync_warp()
            if r0 <= r1:
                seqlen, b0, b1, _ = piece_of(seqlens, sI, r0)
                page0 = self.page_of_any(c, r0, b0, seqlen)
                page1 = self.page_of_any(c, r0, cutlass.min(b0 + 1, b1 - 1), seqlen)
                self.load_half(c, 0, 0, page0)
                self.load_q(c, r0)
                self.load_q_rope(c, r0)
                self.load_half(c, 0, 1, page0)
                self.load_half(c, 1, 1, page1)
                self.load_half(c, 1, 0, page1)
        if wg == 1 and t < ROWS:
            g_row = m_block * ROWS + t
            sink = -Float32(INF)
            if (flags & HAS_SINKS) != 0 and g_row < rows:
                sink = sinks[g_row % heads] * LOG2E
            sSink[t] = sink
            if const_expr(CAUSAL):
                sBack[t] = cutlass.max(s_q - 1 - g_row // heads, 0)
        cute.arch.sync_threads()
        ph = Int32(0)  # phase of the K barriers; both buffers flip once per pair
        ph_q = Int32(0)
        next_len = seqlens[cutlass.min(sI[0], batch - 1)]
        # A branch on warp_idx, here while the first loads are under way: after one on tid, the compiler does not take
        # the warps for converged, and moves descriptors to uniform registers for every MMA of the main loop.
        if warp_idx == 1:
            store_sharing(sShare, sI, seqlens, part, parts_per_request, lane)

        for req in cutlass.range(sI[0], sI[1] + 1, unroll=1):
            seqlen = next_len
            b0 = sI[2] if req == sI[0] else Int32(0)
            b1 = sI[3] if (req == sI[1] and sI[3] > 0) else n_blocks(seqlen)
            cut = cutlass.min(seqlen, b1 * BLOCK)
            min_lim = cut
            if const_expr(CAUSAL):
                min_lim = cutlass.min(cut, seqlen - sBack[0])
            more = req < sI[1]  # this CTA has another request
            nxt = cutlass.min(req + 1, sI[1])
            next_len = seqlens[nxt]
            next_end = sI[3] if (nxt == sI[1] and sI[3] > 0) else n_blocks(next_len)

            O = cute.make_rmem_tensor(pv_r.partition_shape_C((ROWS, HALF)), Float32)
            rQpe = cute.make_rmem_tensor(((2, 2, 2), 1, 4), ELEMENT)
            m = cute.make_rmem_tensor((2,), Float32)
            L = cute.make_rmem_tensor((2,), Float32)
            O.fill(0.0)
            m.fill(M_INIT)
            L.fill(0.0)
            cute.arch.mbarrier_wait(bars + Q_FULL, ph_q)
            ph_q = ph_q ^ 1
            cute.copy(ldsm, ldsm_thr.partition_S(sP1), ldsm_thr.retile(rQpe))

            x = SimpleNamespace(  # the piece: blocks b0 .. b1 - 1 of req, tokens tok0 .. cut - 1; the next of this CTA
                req=req,
                b0=b0,
                b1=b1,
                tok0=b0 * BLOCK,
                seqlen=seqlen,
                cut=cut,
                min_lim=min_lim,
                more=more,
                nxt=nxt,
                next_len=next_len,
                next_end=next_end,
            )
            page1 = Int32(0)
            if wg == 0:
                page1 = self.blocks(c, x, 0, O, rQpe, m, L, ph)
            else:
                page1 = self.blocks(c, x, 1, O, rQpe, m, L, ph)
            ph = ph ^ (((b1 - b0 + 1) >> 1) & 1)  # one flip per pair

            # ------------------------------------------------ epilogue
            for r in cutlass.range_constexpr(2):
                L[r] = quad_sum(L[r])
                if lane % 4 == 0:
                    sL[wg * ROWS + row + 8 * r] = L[r]
            cute.arch.sync_threads()
            if warp_idx == 0 and req != sI[1]:
                self.load_q_rope(c, req + 1)
            # recomputed here rather than kept live through the main loop
            first = sI[2] if req == sI[0] else Int32(0)
            whole = first == 0 and (req != sI[1] or sI[3] == 0 or sI[3] == n_blocks(seqlens[req]))
            split = 2 * part if first > 0 else 2 * part + 1
            inv = cute.make_rmem_tensor((2,), Float32)
            for r in cutlass.range_constexpr(2):
                at = row + 8 * r
                total = sL[at] + sL[ROWS + at]
                weights = total
                if whole:
                    weights = total + ex2(sSink[at] - sM1[at])
                inv[r] = cute.arch.rcp_approx(weights) if total != 0.0 else Float32(0.0)
            self.scale_rows(O, inv)
            g_row = m_block * ROWS + tid
            if tid < ROWS and g_row < rows:
                total = sL[tid] + sL[ROWS + tid]
                v = cute.math.log2(total, fastmath=True) + sM1[tid] if total != 0.0 else -Float32(INF)
                if not whole:
                    lse_acc[split, g_row] = v
                elif (flags & WANTS_LSE) != 0:
                    lse[req, g_row // heads, g_row % heads] = v * (1.0 / LOG2E)
            if whole:
                # through this warpgroup's half of K1, and one TMA store that clips rows >= s_q * H
                rO = cute.make_rmem_tensor(O.layout, ELEMENT)
                rO.store(O.load().to(ELEMENT))
                cute.copy(stsm_o, stsm_o_thr.retile(rO), stsm_o_thr.partition_D(sO[None, None, wg]))
                cute.arch.fence_view_async_shared()
                cute.arch.barrier(barrier_id=BAR_WG0 + wg, number_of_threads=128)
                if warp_in_wg == 0:
                    cute.copy(tma_o, tOsO[None, wg], tOgO[None, m_block, wg, req])
                    cute.arch.cp_async_bulk_commit_group()
                    cute.arch.cp_async_bulk_wait_group(0, read=True)
            else:
                for r in cutlass.range_constexpr(2):
                    g_row = m_block * ROWS + row + 8 * r
                    if g_row < rows:
                        for j in cutlass.range_constexpr(HALF // 16):
                            v4 = cute.make_rmem_tensor((4,), Float32)
                            for e in cutlass.range_constexpr(4):
                                v4[e] = O[8 * j + e // 2 * 4 + 2 * r + e % 2]
                            at = wg * (HALF // 4) + j * 4 + lane % 4
                            cute.autovec_copy(v4, cute.local_tile(o_acc[split, g_row, None], (4,), (at,)))
            if warp_in_wg == 0 and req != sI[1]:
                if wg == 0:
                    self.load_half(c, 1, 0, page1)
                else:
                    self.load_half(c, 1, 1, page1)

        # every load into K0 and K1 has been waited for
        area = cute.recast_ptr(sK.iterator, dtype=Float32)
        first_row = m_block * ROWS
        COMBINE.run(
            area, sShare, out_rows, lse, sinks, o_acc, lse_acc, semaphores, flags, heads, part, m_block, m_blocks,
            first_row, cutlass.min(rows - first_row, ROWS), tid,
        )  # fmt: skip


def entry():
    """What to compile: the host function and its fake arguments."""
    return MlaDecode(), mla_decode_arguments(ELEMENT, LATENT, ROPE, PAGE_SIZE)
