"""What the kernels of token-sparse MLA have in common beside the gathering of rows (sparse_rows.py): the host part, a
CTA's share of the work and its queries, and what is known of a head at the end.

Of a query token each CTA takes `rows` heads (grid x, where there may be more) and a run of 64-entry blocks of the lists
of one or several tokens (grid z, or x; mla_split.py, where a query token is a request).
"""

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from common.mla_combine import COOPERATIVE, HAS_SINKS, WANTS_LSE
from common.mla_split import interval, n_blocks, partials, sharing
from common.sm90 import INF, LOG2E, ex2, swz
from common.sparse_rows import (
    WANTS_MAX, RowAddress, TokenLengths, by_head, end_of_piece, half2_of_bf16x2, load_shared2, load_shared16, per_token,
    quotient, store_shared16,
)


@cute.jit
def mask_entries(S, ok, lane):
    """Scores (64 rows, 64 entries) of what is no row of the pool become -inf. ok: shared address of a byte for each."""
    if cute.arch.vote_any_sync(load_shared2(ok + lane * 2) != 0x0101):
        for j in cutlass.range_constexpr(8):
            pair = load_shared2(ok + (lane % 4) * 2, j * 8)
            for r in cutlass.range_constexpr(2):
                S[4 * j + 2 * r] = S[4 * j + 2 * r] if (pair & 0xFF) != 0 else -Float32(INF)
                S[4 * j + 2 * r + 1] = S[4 * j + 2 * r + 1] if (pair >> 8) != 0 else -Float32(INF)


@cute.jit
def queries_to_fp16(at, tid, n_bytes: cutlass.Constexpr):
    """Turn bf16 in shared memory into fp16 in place, as 256 threads; at: its address."""
    at = at + tid * 16
    for i in cutlass.range_constexpr(n_bytes // 4096):
        words = load_shared16(at, i * 4096)
        store_shared16(at, i * 4096, [half2_of_bf16x2(w) for w in words])
    cute.arch.fence_view_async_shared()


class SparseKernel:
    """What a kernel derives from. It has cta(c), all that a CTA does; c is what `kernel` puts there, and what cta adds:
    read-only in loops and branches, where what is assigned would have to be a value of the program."""

    def __init__(self, latent, rope, rows, threads, more_heads=True, partial=Float32):
        """rows: heads of a CTA; more_heads: there may be more than these; partial: dtype of the partial results."""
        self.latent, self.rope, self.rows, self.threads, self.partial = latent, rope, rows, threads, partial
        self.more_heads = more_heads

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
        """q (B, s_q, H, latent + rope); kv (pages, page_size, 1, bytes of a row); indices (B, s_q, topk >= 1); lengths
        (B) if HAS_LENGTHS; sinks (>= H) if HAS_SINKS; out (B, s_q, H, latent); lse, max_logits (B, s_q, H) if
        WANTS_LSE, WANTS_MAX (whole tokens only); workspace: see mla_split.partials, of H rows; semaphores: zeros,
        parts * ceil(H / rows) of them, left as zeros. sm_scale > 0. Query tokens of all but q are evenly spaced.
        page_magic, page_shift: see RowAddress; s_q_magic, s_q_shift divide by s_q (see quotient). From parts on: the
        split; parts * ceil(H / rows) is at most the number of SMs."""
        batch, s_q, heads = q.shape[0], q.shape[1], q.shape[2]
        tokens = batch * s_q
        o_acc, lse_acc = partials(workspace, parts, heads, self.latent, self.partial)
        # the stride of a mode of size 1 may be anything, also none that TMA accepts
        head = q.stride[2] if heads > 1 else Int64(64)
        token = q.stride[1] if s_q > 1 else Int64(64)
        request = q.stride[0] if batch > 1 else Int64(64)
        head, token, request = [cute.assume(x, divby=8) for x in (head, token, request)]
        q_rows = cute.make_layout((heads, self.latent + self.rope, s_q, batch), stride=(head, 1, token, request))
        tile = (self.rows, 64)
        tma_q, mQ = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), cute.make_tensor(q.iterator, q_rows), swz(*tile, BFloat16), tile
        )
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
        ).launch(
            grid=[cute.ceil_div(heads, self.rows), 1, parts] if self.more_heads else [parts, 1, 1],
            block=[self.threads, 1, 1],
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
    ):
        tid, _, _ = cute.arch.thread_idx()
        m_block, _, part = cute.arch.block_idx()
        m_blocks, _, _ = cute.arch.grid_dim()
        if const_expr(not self.more_heads):
            part, m_block, m_blocks = m_block, 0, 1
        self.cta(
            SimpleNamespace(
                tid=tid,
                lane=tid % 32,
                warp_idx=cute.arch.make_warp_uniform(cute.arch.warp_idx()),
                m_block=m_block,
                m_blocks=m_blocks,
                part=part,
                tma_q=tma_q,
                mQ=mQ,
                rows=RowAddress(kv, page_magic, page_shift),
                mList=mList,
                lengths=TokenLengths(mLengths, mList.shape[1], flags, s_q_magic, s_q_shift),
                sinks=sinks,
                mO=mO,
                lse=lse,
                max_logits=max_logits,
                o_acc=o_acc,
                lse_acc=lse_acc,
                semaphores=semaphores,
                scale=scale,
                flags=flags,
                s_q=s_q,
                heads=heads,
                split=(tokens, part, parts, fixed, least, bias, parts_per_token, tokens_per_part),
                parts_per_token=parts_per_token,
            )
        )

    @cute.jit
    def begin(self, c, sI):
        """Wait for the kernel before, then this CTA's share of the work to sI; everything before overlaps its tail."""
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()  # all CTAs run: nobody can take the SM of one that others wait for
        if c.warp_idx == 0:
            r0, r1, j0, j1, _, unit = interval(c.lengths, *c.split, c.lane)
            if c.lane == 0:
                for i, x in ((0, r0), (1, r1), (2, j0), (3, j1), (5, unit)):  # as `piece` and store_share read it
                    sI[i] = x
        cute.arch.sync_threads()

    @cute.jit
    def store_share(self, c, sShare):
        """This CTA's share of the combine to sShare, by one warp. Measured: with mla_split.store_sharing ptxas orders
        the whole kernel otherwise, and 656-byte rows take 0.4 us longer at up to 8 tokens."""
        sI = c.sI
        p0, n, sharers, started = sharing(c.lengths, c.part, c.parts_per_token, sI[5], sI[0], sI[1], sI[2], sI[3])
        if c.lane == 0:
            sShare[0] = p0
            sShare[1] = n
            sShare[2] = sharers
            sShare[3] = started
            sShare[4] = sI[0]
            sShare[5] = sI[1]

    @cute.jit
    def piece(self, c, token):
        """(number of blocks, has it the whole token, slot of its partial result) of a token of this CTA, with the share
        c.sI."""
        b0 = c.sI[2] if token == c.sI[0] else Int32(0)
        b1 = end_of_piece(c.lengths, c.sI, token)
        slot = 2 * c.part if b0 > 0 else 2 * c.part + 1
        return b1 - b0, b0 == 0 and b1 == n_blocks(c.lengths[token]), slot

    # -------------------------------------------------------------------------------------------- queries
    @cute.jit
    def query_views(self, c, sQ, sQr):
        """(shared latent, shared rope, global) tiles of the heads of this CTA, as load_queries takes them."""
        def tiles(x, *at):
            return cute.group_modes(cute.local_tile(x, (self.rows, 64), at), 0, 2)

        one, free = cute.make_layout(1), (None,) * (cute.rank(sQ) - 1)
        gQ = tiles(c.mQ, c.m_block, None, None, None)
        tQsQ, tQgQ = cpasync.tma_partition(c.tma_q, 0, one, tiles(sQ, 0, *free), gQ)
        tQsR, _ = cpasync.tma_partition(c.tma_q, 0, one, tiles(sQr, 0, *free), gQ)
        return tQsQ, tQsR, tQgQ

    @cute.jit
    def load_queries(self, c, token, bar, tQsQ, tQsR):
        """The queries of a token, by one warp. c.tQgQ, tQsQ, tQsR: from query_views."""
        n = const_expr(self.latent // 64)
        request = quotient(token, c.lengths.magic, c.lengths.shift)
        i = token - request * c.s_q
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bar, (n + self.rope // 64) * self.rows * 128)
        for j in cutlass.range_constexpr(n):
            cute.copy(c.tma_q, c.tQgQ[None, j, i, request], tQsQ[None, j], tma_bar_ptr=bar)
        if const_expr(self.rope > 0):
            cute.copy(c.tma_q, c.tQgQ[None, n, i, request], tQsR[None, 0], tma_bar_ptr=bar)

    # -------------------------------------------------------------------------------------------- heads
    @cute.jit
    def share(self, c, head, whole, total, top, part=None):
        """What the product with V of a head is multiplied with: 1 / the sum of its weights, which are relative to top,
        a maximum in the log2 domain; 0 where it sees no row. part: the maximum of a product over some of its rows."""
        weights = total
        if (c.flags & HAS_SINKS) != 0 and whole and head < c.heads:
            weights = total + ex2(c.sinks[head] * LOG2E - top)
        inverse = cute.arch.rcp_approx(weights)
        if const_expr(part is not None):
            inverse = ex2(part - top) * inverse
        return inverse if total > 0.0 else Float32(0.0)

    @cute.jit
    def store_sum(self, c, token, head, whole, slot, total, top):
        """The log-sum-exp and the largest logit of a head, where they belong and are wanted, by one thread."""
        lse, lse_acc, max_logits = c.lse, c.lse_acc, c.max_logits
        value = cute.math.log2(total, fastmath=True) + top
        if not whole:
            lse_acc[slot, head] = value if total > 0.0 else -Float32(INF)
        else:
            if (c.flags & WANTS_LSE) != 0:
                lse[token, 0, head] = value * (1.0 / LOG2E) if total > 0.0 else Float32(INF)
            if (c.flags & WANTS_MAX) != 0:
                max_logits[token, 0, head] = top * (1.0 / LOG2E) if total > 0.0 else -Float32(INF)
