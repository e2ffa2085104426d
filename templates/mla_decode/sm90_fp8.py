"""Dense paged MLA decode for sm_90a over an e4m3 cache, any number of query rows: swapped operands, and the values as
register operands. Queries are e4m3 (8-bit products for the scores) or bf16 or fp16 (the keys are converted).

    S^T (64 tokens x ROWS)     = K . Q^T      A = K: e4m3 tiles in shared memory, or fp16 in registers
    O^T (LATENT   x ROWS)      = V^T . P^T    A = V^T: fp16 in registers, B = P: fp16 in shared memory

The tensor cores take 8-bit operands from shared memory in one order only (K-major), and V lies there in the other. As
A operand it may come from registers: a transposing ldmatrix on pairs of bytes brings two columns of two tokens, a byte
permutation sorts them, and one conversion of two values makes the fp16 operand; nothing is written back to shared
memory. A fragment row g is then column 2 g of the 16 of its warp and row g + 8 column 2 g + 1, which only the stores of
O^T have to know. P stays in fp16, so the only rounding that e4m3 brings is that of the inputs.

Keys in registers (16-bit queries) are read the same way without transposition: a thread gets 4 neighbouring columns
where a fragment has 2 and 2, and Q^T has its columns in that order (permuted in each 16, in its place, when the TMA has
brought it). A bf16 Q goes to fp16 times a power of two that brings its largest element to [2^14, 2^15).

Tiling. One CTA per part (mla_split.py) and row tile of ROWS query rows; it walks over 64-token blocks, whatever the
page size (kv_producer.py). SLOT_TILES tiles of 64 x 64 are one slot of the ring (mla_ring.py), a block is
(LATENT + ROPE) / 64 / SLOT_TILES slots.

Pipeline. 512 threads. Warpgroup 0 has the scores and the statistics, warpgroups 1 and 2 every other pair of 64-column
tiles of O^T, complete for all blocks: nothing is merged at the end. One warp of the last warpgroup issues the TMA (or
all four gather rows) and runs ahead, also into the next request. P has two buffers: the softmax of a block goes on
beside the product before it.

    TMA warp         load b0 | load b1 | load b2 | ...           waits empty[slot], arms full[slot]
    warpgroup 0      S(b0) P(b0) | S(b1) P(b1) | S(b2) ...       waits full[slot], p_free[b % 2]; arrives at p_full
    warpgroups 1, 2              | PV(b0)      | PV(b1) ...      wait full[slot], p_full; arrive at empty[slot] when it
                                                                 is in registers, at p_free when the product is done
    end of request   warpgroup 0: behind the last S it frees Q (q_free); sums up the weights, writes lse and 1 / sum,
                     arrives at sums[request % 2] and goes on with the next request
                     warpgroups 1, 2: wait for that, scale O^T and store it: whole requests to out, pieces to workspace
    end of the CTA   warpgroups 1, 2 merge the pieces of split requests together with the other CTAs (mla_combine.py)

Warpgroup 0 is at most two blocks ahead of the others, so two buffers of whatever it hands over are enough.

The exponents are relative to a reference: the maximum of the scores when it was last set. It is set again only when a
score exceeds it by more than SLACK (in log2 units). P is then at most 2^SLACK, the result is the same, and nearly all
blocks do without a reduction over the tokens and without scaling O^T.

Rows behind the end of a request are whatever its last page holds: they are masked in S and cleared in shared memory for
V^T (0 * NaN). A gather brings zeros there.

Cannot: sm_scale <= 0 (the maximum is taken before scaling); scales that are not one number for the tensor; a ROPE
width other than 64.
"""

# --- constants: replaced when rendered ---
DTYPE = "e4m3"
LATENT = 512
ROPE = 64
PAGE_SIZE = 64
CAUSAL = False
ROWS = 64
SLOT_TILES = 3
RING = 14
# --- end of constants ---

from types import SimpleNamespace
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator

from common.kv_producer import KvProducer
from common.mla_arguments import mla_decode_arguments
from common.mla_combine import COOPERATIVE, HAS_SINKS, WANTS_LSE, MlaCombine
from common.mla_ring import packed_rows, ring_layout
from common.mla_split import partials, piece_of, store_interval, store_sharing, touch_table
from common.sm90 import INF, LOG2E, cutlass_dtype, ex2, row_strides, smem_atom, swz
from common.sm90_e4m3 import (
    HAS_KV_DESCALE,
    HAS_Q_DESCALE,
    bits_of,
    load_matrices,
    of_bits,
    store_zeros,
    to_half,
    transposed_to_half,
)
from common.transposed import over_tokens, row_of

E4M3_QUERY = DTYPE == "e4m3"
QUERY = cutlass_dtype(DTYPE)
OUT = BFloat16 if E4M3_QUERY else QUERY
SCORE = QUERY if E4M3_QUERY else Float16  # operands of the scores
BLOCK = 64  # tokens of a block, columns of a tile
WIDTH = LATENT + ROPE
TILES = WIDTH // 64
V_TILES = LATENT // 64
SLOTS = TILES // SLOT_TILES  # per block
GROUP_BYTES = 8 * 64 * SLOT_TILES  # 8 tokens of a slot
SLOT_BYTES = 8 * GROUP_BYTES
Q_BOX = 4  # tiles of a Q box
COLS = ROWS // 4  # query rows per thread of S^T and O^T
ACC = 2 * COLS  # accumulators of a thread per tile
BAR_SCORES, BAR_END, BAR_QUERY = 1, 2, 3  # named barriers: warpgroup 0; 1 and 2; those of the scores
HELPER = not E4M3_QUERY and ROWS == 16  # one warpgroup alone would convert keys more slowly than the memory brings them
SCORERS = 2 if HELPER else 1  # warpgroups
THREADS = 512 + 128 * (SCORERS - 1)
# per thread; all warpgroups together have what the launch gave them, 128 x 512 or 96 x 640
if HELPER:
    VALUE_REGS, SCORE_REGS, PRODUCER_REGS = (112, 112, 32) if PAGE_SIZE > 0 else (104, 104, 64)
elif ROWS < 64 or LATENT == 256:
    VALUE_REGS, SCORE_REGS, PRODUCER_REGS = (160, 160, 32) if PAGE_SIZE > 0 else (152, 144, 64)
else:
    VALUE_REGS, SCORE_REGS, PRODUCER_REGS = (184, 120, 24) if PAGE_SIZE > 0 else (184, 104, 40)
K_STEPS = 2  # of an operand that is converted at once: 32 columns of keys, 32 tokens of values
FRAGMENTS = 3  # of that size in registers
AHEAD = 1 if ROWS == 64 else 2 * SLOT_TILES  # so many pieces of keys are read before they are converted
HOLD = ROWS == 64  # the weights of a block are handed over behind the scores of the next one
KEY_PIECES = 2 * TILES  # half tiles, which are converted at once
SHARE = KEY_PIECES // 3 if HELPER else KEY_PIECES  # those of warpgroup 0, which also has the softmax
M_INIT = -1.0e30  # finite: -inf - maximum is never NaN
SLACK = 14.0  # P up to 2^14: fp16 holds 2^15

assert ROWS in (16, 32, 64) and ROPE == 64 and LATENT in (256, 512)
assert RING >= 2 * SLOTS
OWN_TILES = V_TILES // 2  # of each of the warpgroups 1 and 2


def rows_stack(n):
    """Shared-memory layout (ROWS rows, 64 columns, n tiles) of Q, one tile behind the other."""
    return cute.tile_to_shape(smem_atom(SCORE), (ROWS, 64, n), order=(0, 1, 2))


def at(h):
    """Index in an accumulator of the first of a thread's two values (+ 2: the other) of its h-th query row."""
    return (h // 2) * 4 + h % 2


def own_tile(n):
    """The n-th tile of warpgroup 1; that of warpgroup 2 is two further."""
    return n // 2 * 4 + n % 2


@cute.jit
def slot_of(i: cutlass.Constexpr, slot, phase):
    """(slot, phase) of the i-th slot of a block that starts at `slot`; SLOTS: the start of the next block."""
    s = slot + i
    if const_expr(i == SLOTS or RING % SLOTS != 0):
        phase = phase ^ 1 if s >= RING else phase
        s = s - RING if s >= RING else s
    return s, phase


def partial_column(lane, e):
    """Column of element e of the lane-th float4 of 128 columns in a partial result: as the accumulators have them."""
    return e // 2 * 64 + (lane >> 3) * 16 + (lane & 7) * 2 + e % 2


# measured in sm90_relay: with the code for teams in the kernel the main loop is slower, even where no team is formed
COMBINE = MlaCombine(LATENT, "bf16" if E4M3_QUERY else DTYPE, partial_column, True, BAR_END, teams=False)
assert COMBINE.area_floats() * 4 <= RING * SLOT_BYTES + 2 * ROWS * BLOCK * 2  # the ring and P


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
        q_descale: cute.Tensor,
        kv_descale: cute.Tensor,
        value_scale: Float32,
        stream,
    ):
        """q (B, s_q, H, >= LATENT) and q_pe, whose rope part starts at column pe_offset (q itself and LATENT when they
        are joined); kv_cache (pages, PAGE_SIZE, LATENT + ROPE); block_table (B, max_pages); seq_lens (B);
        sinks (>= H); out (B, s_q, H, LATENT); lse (B, s_q, H); workspace: see mla_split.partials; semaphores: zeros,
        parts * row tiles of them, left as zeros. flags: HAS_SINKS + WANTS_LSE + COOPERATIVE + HAS_Q_DESCALE +
        HAS_KV_DESCALE; without the first, sinks are not read, without the second, lse is not written and may have any
        shape. Strides may be anything within these: q, q_pe, kv_cache, out multiples of 16 bytes; the (query token,
        head) rows of q, q_pe and out evenly spaced. sm_scale > 0 is the factor of the logits and value_scale that of
        out, but for q_descale[0] and kv_descale[0], one number each, read when flags say so. From parts on: the split;
        parts * row tiles is at most the number of SMs."""
        batch, s_q, heads = q.shape[0], q.shape[1], q.shape[2]
        rows = s_q * heads
        o_acc, lse_acc = partials(workspace, parts, rows, LATENT)
        row, request = row_strides(out)
        mO = cute.make_tensor(out.iterator, cute.make_layout((batch, rows, LATENT), stride=(request, row, 1)))

        g2s = cpasync.CopyBulkTensorTileG2SOp()
        mQ, mQpe = packed_rows(q, Int32(0), V_TILES), packed_rows(q_pe, pe_offset, 1)
        tma_q, mQ = cpasync.make_tiled_tma_atom(g2s, mQ, rows_stack(Q_BOX), (ROWS, 64, Q_BOX))
        tma_pe, mQpe = cpasync.make_tiled_tma_atom(g2s, mQpe, rows_stack(1), (ROWS, 64, 1))
        tma_k, mK = self.kv_source(kv_cache)

        def mma(dtype, source):
            major = OperandMajorMode.K
            return hh.make_trivial_tiled_mma(dtype, dtype, major, major, Float32, (1, 1, 1), (64, ROWS), source)

        source = warpgroup.OperandSource
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
            q_descale,
            kv_descale,
            value_scale,
            parts // batch,
            (batch + parts - 1) // parts,
            mma(SCORE, source.SMEM if E4M3_QUERY else source.RMEM),
            mma(Float16, source.RMEM),
        ).launch(
            grid=[cute.ceil_div(rows, ROWS), 1, parts],
            block=[THREADS, 1, 1],
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
        q_descale: cute.Tensor,
        kv_descale: cute.Tensor,
        value_scale: Float32,
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

        def swizzled(layout, dtype):
            return smem.allocate_tensor(dtype, layout.outer, 1024, swizzle=layout.inner)

        sK = swizzled(ring_layout(Float8E4M3FN, SLOT_TILES, RING), Float8E4M3FN)
        sP = swizzled(swz(ROWS, 2 * BLOCK, Float16), Float16)
        sQ = swizzled(swz(ROWS, WIDTH, SCORE), SCORE)
        sX = smem.allocate_tensor(Float32, cute.make_layout((4, ROWS)), 16)  # maxima or sums: warp, row
        sM = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)  # references at the end of a request
        sFactor = smem.allocate_tensor(Float32, cute.make_layout((ROWS, 2)), 16)  # of O when the reference was set
        sInv = smem.allocate_tensor(Float32, cute.make_layout((ROWS, 2)), 16)  # value scale / sum of the weights
        sBack = smem.allocate_tensor(Int32, cute.make_layout(ROWS), 16)  # causal: tokens at the end a row does not see
        sAbove = smem.allocate_tensor(Int32, cute.make_layout((4, 2)), 16)  # per warp: a score is above the reference
        sAgain = smem.allocate_tensor(Int32, cute.make_layout(2), 16)  # the reference was set again
        sPart = None  # the helper's part of the scores: 4 values, thread, quarter of its accumulators, buffer
        if const_expr(HELPER):
            sPart = smem.allocate_tensor(Float32, cute.make_layout((4, 128, ACC // 4, 2)), 16)
        sScale = smem.allocate_tensor(Float32, cute.make_layout(2), 8)  # of logits and values: no registers are left
        sI = smem.allocate_tensor(Int32, cute.make_layout(6), 16)  # what mla_split.interval returned
        sShare = smem.allocate_tensor(Int32, cute.make_layout(6), 16)  # what mla_split.sharing returned, r0, r1
        full = smem.allocate_array(Int64, RING)
        empty = smem.allocate_array(Int64, RING)
        p_full = smem.allocate_array(Int64, 2)
        p_free = smem.allocate_array(Int64, 2)
        sums = smem.allocate_array(Int64, 2)
        s_full = smem.allocate_array(Int64, 2)
        s_free = smem.allocate_array(Int64, 2)
        q_full = smem.allocate_array(Int64, 1)
        q_free = smem.allocate_array(Int64, 1)

        if warp_idx == 12:
            if const_expr(not self.gather):
                cpasync.prefetch_descriptor(tma_k)
            cpasync.prefetch_descriptor(tma_q)
            cpasync.prefetch_descriptor(tma_pe)
        if warp_idx == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(RING):
                    cute.arch.mbarrier_init(full + i, self.arrivals)
                    cute.arch.mbarrier_init(empty + i, 8)
                for i in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(p_full + i, 4)
                    cute.arch.mbarrier_init(p_free + i, 8)
                    cute.arch.mbarrier_init(sums + i, 4)
                    cute.arch.mbarrier_init(s_full + i, 4)
                    cute.arch.mbarrier_init(s_free + i, 4)
                cute.arch.mbarrier_init(q_full, 1)
                cute.arch.mbarrier_init(q_free, 4 * SCORERS)
            cute.arch.mbarrier_init_fence()

        one = cute.make_layout(1)
        q_tiles = cute.local_tile(sQ, (ROWS, 64), (0, None))  # (row, column, tile)
        p_tiles = cute.local_tile(sP, (ROWS, BLOCK), (0, None))  # (row, token, buffer)
        # before it is converted
        q_given = cute.make_tensor(cute.recast_ptr(sQ.iterator, swz(ROWS, WIDTH, SCORE).inner, QUERY), sQ.layout)
        given_tiles = cute.local_tile(q_given, (ROWS, 64), (0, None))
        tQs, tQg = cpasync.tma_partition(
            tma_q,
            0,
            one,
            cute.group_modes(cute.local_tile(given_tiles, (ROWS, 64, Q_BOX), (0, 0, None)), 0, 3),
            cute.group_modes(cute.local_tile(mQ, (ROWS, 64, Q_BOX), (None, 0, None, None)), 0, 3),
        )
        tPs, tPg = cpasync.tma_partition(
            tma_pe,
            0,
            one,
            cute.group_modes(
                cute.local_tile(cute.domain_offset((0, 0, V_TILES), given_tiles), (ROWS, 64, 1), (0, 0, 0)), 0, 3
            ),
            cute.group_modes(cute.local_tile(mQpe, (ROWS, 64, 1), (None, 0, 0, None)), 0, 3),
        )
        tKs, tKg = self.kv_views(tma_k, mK, sK)
        qk = mma_qk.get_slice(t)
        pv = mma_pv.get_slice(t)
        # P^T leaves the registers transposed: the rows in memory are query rows
        stsm = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(True, 4), Float16), mma_qk)
        stsm_thr = stsm.get_slice(t)
        p_view = cute.make_tensor(p_tiles.iterator, cute.select(p_tiles.layout, mode=[1, 0, 2]))  # (token, row, buffer)

        # read-only in loops and branches: what is assigned there would have to be a value of the program
        c = SimpleNamespace(
            full=full,
            empty=empty,
            p_full=p_full,
            p_free=p_free,
            sums=sums,
            s_full=s_full,
            s_free=s_free,
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
            ring=sK.iterator.toint(),
            sQ=sQ,
            q_given=q_given,
            sX=sX,
            sPart=sPart,
            sM=sM,
            sFactor=sFactor,
            sInv=sInv,
            sScale=sScale,
            sBack=sBack,
            sAbove=sAbove,
            sAgain=sAgain,
            sI=sI,
            s_shape=qk.partition_shape_C((BLOCK, ROWS)),
            op_qk=mma_qk.op,
            op_pv=mma_pv.op,
            tK=qk.make_fragment_A(qk.partition_A(sK)) if E4M3_QUERY else None,
            tQ=qk.make_fragment_B(qk.partition_B(q_tiles)),
            tP=pv.make_fragment_B(pv.partition_B(p_tiles)),
            stsm=stsm,
            stsm_thr=stsm_thr,
            tPst=stsm_thr.partition_D(p_view),
            seqlens=seqlens,
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
            if warp_idx < (ROWS + 31) // 32:
                if lane < ROWS:
                    sBack[tid] = cutlass.max(s_q - 1 - (row0 + tid) // heads, 0)
        cute.arch.sync_threads()
        if wg == 3:
            cute.arch.setmaxregister_decrease(PRODUCER_REGS)
            if warp_idx < 12 + self.warps:
                self.fill(c, mK, table, seqlens, warp_idx - 12, pages, row_tiles > 1)
        elif wg == 4:
            if const_expr(HELPER):
                cute.arch.setmaxregister_increase(SCORE_REGS)
                self.help(c)
        elif wg == 0:
            if const_expr(SCORE_REGS > 65536 // THREADS):
                cute.arch.setmaxregister_increase(SCORE_REGS)
            else:
                cute.arch.setmaxregister_decrease(SCORE_REGS)
            if (flags & HAS_Q_DESCALE) != 0:
                scale = scale * q_descale[0]
            if (flags & HAS_KV_DESCALE) != 0:
                scale = scale * kv_descale[0]
                value_scale = value_scale * kv_descale[0]
            self.scores(c, scale, value_scale, lse, lse_acc, sinks, flags, s_q, heads)
        else:
            cute.arch.setmaxregister_increase(VALUE_REGS)
            # while the first loads are under way; a branch on tid would make the compiler take the warps for diverged
            if warp_idx == 4:
                store_sharing(sShare, sI, seqlens, part, parts_per_request, lane)
            self.values(c, wg - 1, mO, o_acc)
            # every load into the ring has been waited for; `sums` ordered what warpgroup 0 wrote to lse_acc
            area = cute.recast_ptr(sK.iterator, dtype=Float32)
            COMBINE.run(
                area, sShare, mO, lse, sinks, o_acc, lse_acc, semaphores, flags, heads, part, row_tile, row_tiles,
                row0, cutlass.min(s_q * heads - row0, ROWS), tid - 128,
            )  # fmt: skip

    @cute.jit
    def arrive(self, barrier):
        """One arrival of a warp, behind what its lanes have done."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(barrier)

    # ------------------------------------------------------------- queries
    @cute.jit
    def load_q(self, c, req):
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(c.q_full, ROWS * WIDTH * QUERY.width // 8)
        for i in cutlass.range_constexpr(V_TILES // Q_BOX):
            cute.copy(c.tma_q, c.tQg[None, c.row_tile, i, req], c.tQs[None, i], tma_bar_ptr=c.q_full)
        cute.copy(c.tma_pe, c.tPg[None, c.row_tile, req], c.tPs, tma_bar_ptr=c.q_full)

    @cute.jit
    def free_q(self, c):
        """By each warp that has scores, behind the last ones of a request."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(c.q_free)

    @cute.jit
    def given_query(self, c, i):
        """The i-th 16 columns of this thread's, those of lane % 4 in a tile of a row, and where they are."""
        rX = cute.make_rmem_tensor((16,), QUERY)
        row, at8 = i % ROWS, i // ROWS * 8 + c.lane % 4 * 2
        for e in cutlass.range_constexpr(2):
            cute.autovec_copy(cute.local_tile(c.q_given[row, None], (8,), (at8 + e,)), cute.local_tile(rX, (8,), (e,)))
        return rX, row, at8

    @cute.jit
    def sync_query(self):
        cute.arch.barrier(barrier_id=BAR_QUERY, number_of_threads=128 * SCORERS)

    @cute.jit
    def largest(self, c, scorer: cutlass.Constexpr):
        """The largest finite magnitude in this CTA's rows of Q."""
        sX = c.sX
        top = Float32(0.0)
        for i in cutlass.range(c.t // 4 + 32 * scorer, ROWS * TILES, 32 * SCORERS, unroll=2):
            rX, _, _ = self.given_query(c, i)
            for e in cutlass.range_constexpr(16):
                x = rX[e].to(Float32)
                x = cute.arch.fmax(x, -x)
                top = cute.arch.fmax(top, x if x < INF else Float32(0.0))
        for k in cutlass.range_constexpr(5):
            top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, offset=1 << k))
        if c.lane == 0:
            sX[c.w, scorer] = top
        self.sync_query()
        for w in cutlass.range_constexpr(4):
            for i in cutlass.range_constexpr(SCORERS):
                top = cute.arch.fmax(top, sX[w, i])
        return top

    @cute.jit
    def convert_query(self, c, scorer: cutlass.Constexpr):
        """Q in its place, as the products want it: fp16, columns permuted in each 16; by the warpgroups that have
        scores. Returns the factor that makes up for the power of two that Q was multiplied by."""
        sQ = c.sQ
        raise_by = Float32(1.0)
        make_up = Float32(1.0)
        if const_expr(DTYPE == "bf16"):
            self.sync_query()  # sX may still be read
            exponent = (bits_of(self.largest(c, scorer)) >> 23) - 141  # floor(log2) - 14
            exponent = cutlass.min(cutlass.max(exponent, -126), 126)
            raise_by = of_bits((127 - exponent) << 23)
            make_up = of_bits((127 + exponent) << 23)
        for i in cutlass.range(c.t // 4 + 32 * scorer, ROWS * TILES, 32 * SCORERS, unroll=2):
            rX, row, at8 = self.given_query(c, i)
            rY = cute.make_rmem_tensor((16,), Float16)
            for e in cutlass.range_constexpr(16):
                x = rX[e % 8 // 2 * 4 + e // 8 * 2 + e % 2]
                if const_expr(DTYPE == "bf16"):
                    rY[e] = (x.to(Float32) * raise_by).to(Float16)
                else:
                    rY[e] = x
            for e in cutlass.range_constexpr(2):
                to = cute.local_tile(sQ[row, None], (8,), (at8 + e,))
                cute.autovec_copy(cute.local_tile(rY, (8,), (e,)), to)
        cute.arch.fence_view_async_shared()
        self.sync_query()
        return make_up

    # -------------------------------------------------------------- scores
    @cute.jit
    def raise_reference(self, c, rS, rM, rL, scale, buf):
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
            m = cute.arch.fmax(rM[h], top * scale)
            factor = ex2(rM[h] - m)
            rM[h] = m
            rL[h] = rL[h] * factor
            if c.w == 0 and lane < 4:
                sFactor[row, buf] = factor

    @cute.jit
    def dot(self, c, rS, slot, phase, held):
        """S^T = K Q^T, 8-bit operands in shared memory. held: see hand_over."""
        qk = cute.make_mma_atom(c.op_qk)
        qk.set(warpgroup.Field.ACCUMULATE, False)
        for g in cutlass.range_constexpr(SLOTS):
            s, ph = slot_of(g, slot, phase)
            self.wait_slot(c.full + s, ph)
            # a shuffle: the descriptors of this slot are then computed here and not moved to and fro before the wait
            s = cute.arch.make_warp_uniform(s)
            warpgroup.fence()
            for i in cutlass.range_constexpr(SLOT_TILES):
                for x in cutlass.range_constexpr(2):
                    tile = g * SLOT_TILES + i
                    cute.gemm(qk, rS, c.tK[None, None, (x, i), s], c.tQ[None, None, x, tile], rS)
                    qk.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
        self.hand_over(c, held)
        warpgroup.wait_group(0)

    @cute.jit
    def hand_over(self, c, held):
        """Only the last group of scores is still under way: let the values take what the block before, in buffer
        `held`, has left (-1: nothing). Any earlier they would compete with these scores for the tensor cores, and then
        have nothing to do while the weights are computed."""
        if const_expr(HOLD):
            warpgroup.wait_group(1)
            if held >= 0:
                self.arrive(c.p_full + held)

    @cute.jit
    def dot_converted(self, c, rS, first: cutlass.Constexpr, end: cutlass.Constexpr, slot, phase, held):
        """S^T = K Q^T over the half tiles first .. end - 1, K through registers: matrices of 8 tokens and 16 columns,
        of the 16 tokens of this warp."""
        lane = c.lane
        group = 2 * c.w + (lane >> 3 & 1)
        base = c.ring + group * GROUP_BYTES + (lane & 7) * 64 + (((lane >> 4) ^ (lane & 7) >> 1) << 4)
        qk = cute.make_mma_atom(c.op_qk)
        qk.set(warpgroup.Field.ACCUMULATE, False)
        rA = [cute.make_rmem_tensor(((2, 2, 2), 1, K_STEPS), Float16) for _ in range(FRAGMENTS)]
        for g in cutlass.range_constexpr(SLOTS):
            halves = [i for i in range(2 * SLOT_TILES * g, 2 * SLOT_TILES * (g + 1)) if first <= i < end]
            if const_expr(len(halves) > 0):
                s, ph = slot_of(g, slot, phase)
                cute.arch.mbarrier_wait(c.full + s, ph)
                address = base + s * SLOT_BYTES
                read = []
                for i in cutlass.range_constexpr(len(halves)):
                    for x in halves[len(read) : i + 1 + AHEAD]:
                        read.append(load_matrices(address ^ 32 * (x % 2), x // 2 % SLOT_TILES * 512, False))
                    half = halves[i]
                    if const_expr(half - first >= FRAGMENTS):
                        warpgroup.wait_group(FRAGMENTS - 1)
                    rAi = rA[half % FRAGMENTS]
                    rK = cute.recast_tensor(rAi, Int32)
                    for u in cutlass.range_constexpr(4):
                        lo, hi = to_half(read[i][u])
                        # k-step u // 2, tokens 8 (u % 2) ..: the lower and the upper half of its columns
                        rK[u // 2 * 4 + u % 2] = lo
                        rK[u // 2 * 4 + u % 2 + 2] = hi
                    warpgroup.fence()
                    for x in cutlass.range_constexpr(K_STEPS):
                        cute.gemm(qk, rS, rAi[None, None, x], c.tQ[None, None, half % 2 * 2 + x, half // 2], rS)
                        qk.set(warpgroup.Field.ACCUMULATE, True)
                    warpgroup.commit_group()
        self.hand_over(c, held)
        warpgroup.wait_group(0)

    @cute.jit
    def help(self, c):
        """Warpgroup 4: its half tiles of the scores of all blocks, for warpgroup 0."""
        sI = c.sI
        slot = Int32(0)
        phase = Int32(0)
        number = Int32(0)
        rS = cute.make_rmem_tensor(c.s_shape, Float32)
        for req in cutlass.range(sI[0], sI[1] + 1, unroll=1):
            _, b0, b1, _ = piece_of(c.seqlens, c.sI, req)
            cute.arch.mbarrier_wait(c.q_full, (req - sI[0]) & 1)
            self.convert_query(c, 1)
            for j in cutlass.range(b0, b1, unroll=1):
                self.dot_converted(c, rS, SHARE, KEY_PIECES, slot, phase, Int32(-1))
                if j == b1 - 1:
                    self.free_q(c)
                buf = number & 1
                cute.arch.mbarrier_wait(c.s_free + buf, (number >> 1 & 1) ^ 1)
                for i in cutlass.range_constexpr(ACC // 4):
                    four = cute.make_tensor(rS.iterator + 4 * i, cute.make_layout(4))
                    cute.autovec_copy(four, c.sPart[None, c.t, i, buf])
                self.arrive(c.s_full + buf)
                number = number + 1
                slot, phase = slot_of(SLOTS, slot, phase)

    @cute.jit
    def add_help(self, c, rS, number):
        """What the helper has of the scores of this block."""
        buf = number & 1
        four = cute.make_rmem_tensor((4,), Float32)
        cute.arch.mbarrier_wait(c.s_full + buf, number >> 1 & 1)
        for i in cutlass.range_constexpr(ACC // 4):
            cute.autovec_copy(c.sPart[None, c.t, i, buf], four)
            for e in cutlass.range_constexpr(4):
                rS[4 * i + e] = rS[4 * i + e] + four[e]
        self.arrive(c.s_free + buf)

    @cute.jit
    def score_block(self, c, rM, rL, scale, slot, phase, tok0, seqlen, s_q, number, is_first, is_last):
        """Scores and weights of one block. number: of the block in this CTA; is_first, is_last: of this piece."""
        lane, w = c.lane, c.w
        sAbove, sAgain = c.sAbove, c.sAgain  # storing through c would make all of it loop-carried
        buf = number & 1
        held = Int32(-1) if is_first else buf ^ 1
        rS = cute.make_rmem_tensor(c.s_shape, Float32)
        rP = cute.make_rmem_tensor(c.s_shape, Float16)
        if const_expr(E4M3_QUERY):
            self.dot(c, rS, slot, phase, held)
        else:
            self.dot_converted(c, rS, 0, SHARE, slot, phase, held)
        if is_last:
            self.free_q(c)
        if const_expr(HELPER):
            self.add_help(c, rS, number)
        if tok0 + BLOCK > (seqlen - (s_q - 1) if const_expr(CAUSAL) else seqlen):
            for h in cutlass.range_constexpr(COLS):
                lim = seqlen
                if const_expr(CAUSAL):
                    lim = seqlen - c.sBack[row_of(h, lane)]
                for u in cutlass.range_constexpr(2):
                    tok = tok0 + w * 16 + lane // 4 + 8 * u
                    rS[at(h) + 2 * u] = rS[at(h) + 2 * u] if tok < lim else -Float32(INF)
        # what is written from here on was read two blocks before
        cute.arch.mbarrier_wait(c.p_free + buf, (number >> 1 & 1) ^ 1)
        above = -Float32(INF)
        for h in cutlass.range_constexpr(COLS):
            above = cute.arch.fmax(above, cute.arch.fmax(rS[at(h)], rS[at(h) + 2]) * scale - rM[h])
        above_any = Int32(1) if cute.arch.vote_any_sync(above > SLACK) else Int32(0)
        if lane == 0:
            sAbove[w, buf] = above_any
        cute.arch.barrier(barrier_id=BAR_SCORES, number_of_threads=128)
        again = sAbove[0, buf] | sAbove[1, buf] | sAbove[2, buf] | sAbove[3, buf]
        if again != 0:
            self.raise_reference(c, rS, rM, rL, scale, buf)
        if c.t == 0:
            sAgain[buf] = again
        for h in cutlass.range_constexpr(COLS):
            a = ex2(rS[at(h)] * scale - rM[h])
            b = ex2(rS[at(h) + 2] * scale - rM[h])
            rS[at(h)] = a
            rS[at(h) + 2] = b
            rL[h] = rL[h] + (a + b)
            if const_expr(h % 2 == 1):  # four at a time: they need half of the registers from here on
                of = at(h - 1)
                four = cute.make_tensor(rS.iterator + of, cute.make_layout(4)).load()
                cute.make_tensor(rP.iterator + of, cute.make_layout(4)).store(four.to(Float16))
        cute.copy(c.stsm, c.stsm_thr.retile(rP), c.tPst[None, None, None, buf])
        cute.arch.fence_view_async_shared()
        if const_expr(HOLD):
            if is_last:
                self.arrive(c.p_full + buf)
        else:
            self.arrive(c.p_full + buf)

    @cute.jit
    def scores(self, c, scale, value_scale, lse, lse_acc, sinks, flags, s_q, heads):
        """Warpgroup 0."""
        sScale = c.sScale
        if c.t == 0:
            sScale[0] = scale
            sScale[1] = value_scale
        lane, t, sX, sM, sInv, sI = c.lane, c.t, c.sX, c.sM, c.sInv, c.sI
        rM = cute.make_rmem_tensor((COLS,), Float32)
        rL = cute.make_rmem_tensor((COLS,), Float32)
        slot = Int32(0)
        phase = Int32(0)
        number = Int32(0)
        for req in cutlass.range(sI[0], sI[1] + 1, unroll=1):
            seqlen, b0, b1, whole = piece_of(c.seqlens, sI, req)
            rM.fill(M_INIT)
            rL.fill(0.0)
            q_scale = scale
            cute.arch.mbarrier_wait(c.q_full, (req - sI[0]) & 1)
            if const_expr(not E4M3_QUERY):
                q_scale = self.convert_query(c, 0)
                q_scale = sScale[0] * q_scale
            for j in cutlass.range(b0, b1, unroll=1):
                self.score_block(
                    c, rM, rL, q_scale, slot, phase, j * BLOCK, seqlen, s_q, number, j == b0, j == b1 - 1
                )  # fmt: skip
                number = number + 1
                slot, phase = slot_of(SLOTS, slot, phase)
            # sums of the weights
            cute.arch.barrier(barrier_id=BAR_SCORES, number_of_threads=128)  # sX may still be read
            for h in cutlass.range_constexpr(COLS):
                total = over_tokens(rL[h], False)
                if lane < 4:
                    sX[c.w, row_of(h, lane)] = total
                    if c.w == 0:
                        sM[row_of(h, lane)] = rM[h]
            cute.arch.barrier(barrier_id=BAR_SCORES, number_of_threads=128)
            parity = (req - sI[0]) & 1
            if t < ROWS:
                row = c.row0 + t
                total = (sX[0, t] + sX[1, t]) + (sX[2, t] + sX[3, t])
                weights = total
                if (flags & HAS_SINKS) != 0 and whole and row < s_q * heads:
                    weights = total + ex2(sinks[row % heads] * LOG2E - sM[t])
                sInv[t, parity] = cute.arch.rcp_approx(weights) * sScale[1] if total > 0.0 else Float32(0.0)
                if row < s_q * heads:
                    value = cute.math.log2(total, fastmath=True) + sM[t] if total > 0.0 else -Float32(INF)
                    if not whole:
                        lse_acc[self.piece_slot(c, b0), row] = value
                    elif (flags & WANTS_LSE) != 0:
                        lse[req, row // heads, row % heads] = value * (1.0 / LOG2E)
            self.arrive(c.sums + parity)

    @cute.jit
    def piece_slot(self, c, b0):
        """Slot of the partial results of a piece that starts at block b0."""
        return 2 * c.part if b0 > 0 else 2 * c.part + 1

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
    def convert_values(self, rA, read):
        """Half a tile of V^T as fp16 fragments: the 16 columns of this warp, 32 tokens."""
        rV = cute.recast_tensor(rA, Int32)
        for u in cutlass.range_constexpr(4):
            even, odd = transposed_to_half(read[u])
            rV[2 * u] = even
            rV[2 * u + 1] = odd

    @cute.jit
    def clear_tail(self, c, at_tiles, valid):
        """Zeros for what lies behind the end of a request, whatever it is: 0 * NaN is NaN. Each warp clears what it
        reads itself. The scores may be reading it too, but they are masked there."""
        for half in cutlass.range_constexpr(2):
            if c.lane + 32 * half >= valid:
                for n in cutlass.range_constexpr(OWN_TILES):
                    store_zeros(at_tiles[n], half * 4 * GROUP_BYTES)
        cute.arch.fence_view_async_shared()  # the TMA writes there next
        cute.arch.sync_warp()

    @cute.jit
    def value_block(self, c, v, rO, base, slot, phase, valid, number, is_last):
        """O^T += V^T P^T of one block."""
        buf = number & 1
        pieces = [(n, half) for n in range(OWN_TILES) for half in (0, 1)]
        rA = [cute.make_rmem_tensor(((2, 2, 2), 1, K_STEPS), Float16) for _ in range(FRAGMENTS)]
        for g in cutlass.range_constexpr(SLOTS):
            s, ph = slot_of(g, slot, phase)
            cute.arch.mbarrier_wait(c.full + s, ph)
        # the same code for both warpgroups: it fits better into the instruction caches
        at_tiles = []
        for n in cutlass.range_constexpr(OWN_TILES):
            tile, other = own_tile(n), own_tile(n) + 2
            s = slot + tile // SLOT_TILES
            if const_expr(other // SLOT_TILES > tile // SLOT_TILES):
                s = s + v
            if const_expr(other >= SLOT_TILES):
                s = s - RING if s >= RING else s
            within = v * ((other % SLOT_TILES - tile % SLOT_TILES) * 512)
            at_tiles.append(base + s * SLOT_BYTES + within + tile % SLOT_TILES * 512)
        if const_expr(not self.gather):
            if valid < BLOCK:
                self.clear_tail(c, at_tiles, valid)
        read = []
        for n, half in pieces[:FRAGMENTS]:
            read.append(load_matrices(at_tiles[n], half * 4 * GROUP_BYTES, True))
        for i in cutlass.range_constexpr(FRAGMENTS - 1):
            self.convert_values(rA[i], read[i])
        cute.arch.mbarrier_wait(c.p_full + buf, number >> 1 & 1)
        if c.sAgain[buf] != 0:
            self.scale_o(c, rO, c.sFactor[None, buf])
        pv = cute.make_mma_atom(c.op_pv)
        pv.set(warpgroup.Field.ACCUMULATE, True)
        for i in cutlass.range_constexpr(len(pieces)):
            n, half = pieces[i]
            rOi = cute.make_tensor(rO.iterator + n * ACC, cute.make_layout(c.s_shape))
            warpgroup.fence()
            for x in cutlass.range_constexpr(K_STEPS):
                cute.gemm(pv, rOi, rA[i % FRAGMENTS][None, None, x], c.tP[None, None, half * K_STEPS + x, buf], rOi)
            warpgroup.commit_group()
            for n, half in pieces[len(read) : i + FRAGMENTS + 1]:
                read.append(load_matrices(at_tiles[n], half * 4 * GROUP_BYTES, True))
            ahead = i + FRAGMENTS - 1
            if const_expr(ahead < len(pieces)):
                if const_expr(i > 0):
                    warpgroup.wait_group(1)
                self.convert_values(rA[ahead % FRAGMENTS], read[ahead])
            if const_expr(i == len(pieces) - 1):  # products have been issued with all registers that were read
                cute.arch.sync_warp()
                for g in cutlass.range_constexpr(SLOTS):
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(c.empty + slot_of(g, slot, 0)[0])
        warpgroup.wait_group(0)
        if not is_last:
            self.arrive(c.p_free + buf)

    @cute.jit
    def values(self, c, v, mO, o_acc):
        """Warpgroup 1 + v: its tiles of O^T."""
        sI, lane = c.sI, c.lane
        base = c.ring + (lane >> 3) * GROUP_BYTES + (lane & 7) * 64 + ((c.w ^ (lane & 7) >> 1) << 4)
        rO = cute.make_rmem_tensor((OWN_TILES * ACC,), Float32)
        slot = Int32(0)
        phase = Int32(0)
        number = Int32(0)
        for req in cutlass.range(sI[0], sI[1] + 1, unroll=1):
            seqlen, b0, b1, whole = piece_of(c.seqlens, c.sI, req)
            rO.fill(0.0)
            for j in cutlass.range(b0, b1, unroll=1):
                self.value_block(c, v, rO, base, slot, phase, seqlen - j * BLOCK, number, j == b1 - 1)
                number = number + 1
                slot, phase = slot_of(SLOTS, slot, phase)
            order = req - sI[0]
            cute.arch.mbarrier_wait(c.sums + (order & 1), order >> 1 & 1)
            self.scale_o(c, rO, c.sInv[None, order & 1])
            self.arrive(c.p_free + ((number - 1) & 1))  # of the last block: sInv is read too
            if whole:
                self.store_whole(c, v, rO, mO, req)
            else:
                self.store_piece(c, v, rO, o_acc, self.piece_slot(c, b0))

    @cute.jit
    def store_whole(self, c, v, rO, mO, req):
        """To `out`: 8 lanes store 16 neighbouring columns of a row."""
        rY = cute.make_rmem_tensor((2,), OUT)
        for h in cutlass.range_constexpr(COLS):
            row = c.row0 + row_of(h, c.lane)
            if row < mO.shape[1]:
                for n in cutlass.range_constexpr(OWN_TILES):
                    for e in cutlass.range_constexpr(2):
                        rY[e] = rO[n * ACC + at(h) + 2 * e].to(OUT)
                    to = (own_tile(n) + 2 * v) * 32 + c.w * 8 + c.lane // 4
                    cute.autovec_copy(rY, cute.local_tile(mO[req, row, None], (2,), (to,)))

    @cute.jit
    def store_piece(self, c, v, rO, o_acc, at_slot):
        """To the workspace with permuted columns: a row of two tiles has four accumulators of a thread, 128 bytes of 8
        lanes."""
        v4 = cute.make_rmem_tensor((4,), Float32)
        for h in cutlass.range_constexpr(COLS):
            row = c.row0 + row_of(h, c.lane)
            if row < o_acc.shape[1]:
                for pair in cutlass.range_constexpr(OWN_TILES // 2):
                    for e in cutlass.range_constexpr(4):
                        v4[e] = rO[(2 * pair + e // 2) * ACC + at(h) + e % 2 * 2]
                    to = (2 * pair + v) * 32 + c.w * 8 + c.lane // 4
                    cute.autovec_copy(v4, cute.local_tile(o_acc[at_slot, row, None], (4,), (to,)))


def entry():
    """What to compile: the host function and its fake arguments."""
    kernel = MlaDecode(Float8E4M3FN, LATENT, ROPE, PAGE_SIZE, SLOT_TILES, RING)
    return kernel, mla_decode_arguments(QUERY, LATENT, ROPE, PAGE_SIZE, Float8E4M3FN)
