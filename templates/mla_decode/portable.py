"""Dense paged MLA decode with warp-level MMA (m16n8k16), for sm_80 and newer: cp.async gather, no TMA, no wgmma.

    S (TILE_ROWS x BLOCK)    = Q . K^T     both from shared memory; KS warps share the columns of one product
    O (TILE_ROWS x LATENT)  += P . V       V = the first LATENT columns of the same K rows

What the others cannot do it does: any page size (each row is gathered on its own), slot caches, any width that is a
multiple of 16, e4m3 caches (converted to 16 bits in registers, where the products are exact), compact queries, and the
batch-invariant split.

Tiling. Grid (row tiles, parts); a CTA has TILE_ROWS query rows (rows = token * heads + head) and walks over blocks of
BLOCK tokens. 256 threads. In each product every warp has another part of the result; the accumulators of O stay in
registers. The three steps of a block have different owners:

    QK            warp (m, n, k) of QK_M x QK_N x QK_K: its rows, its tokens, every QK_K-th 16 columns -> shared memory
    softmax       256 / TILE_ROWS threads a row: sum of the QK_K parts, mask, running maximum, P and rescale factor
    PV            warp (m, n) of PV_M x PV_N: its rows, its columns

With STAGES >= 3 the two products of neighbouring blocks share a phase, so there are two barriers a block:

    wait for block j + 1 | barrier | issue block j + STAGES - 1, QK (j + 1), PV (j) | barrier | softmax (j + 1) | ...

With 2 there are three, and the next block is loaded meanwhile:

    wait for block j | barrier | issue block j + 1, QK (j) | barrier | softmax (j) | barrier | PV (j) | ...

A request that one part does alone is stored to out and lse. Other pieces go to the workspace as normalised fp32 with a
base-2 log-sum-exp, and a second kernel combines them: a warp for 128 columns of a row, pieces in their order. No CTA
waits for another, so the grid need not be resident as a whole.

e4m3. A register of ldmatrix holds 4 numbers of a row instead of 2. For Q K^T these are columns 4 t .. 4 t + 3 of 16
where the MMA expects 2 t, 2 t + 1, 2 t + 8, 2 t + 9: Q is stored with its columns permuted to match. For P V they are
2 columns of 2 tokens, so an n-tile has the even columns of 16, and the next one the odd ones.

Rows behind the end of a request are not read: cp.async fills them with zeros (0 * NaN in P V), and S is masked.

Cannot: sm_scale <= 0 (the maximum is taken before scaling); more than 512 query rows.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_80"
DTYPE = "bf16"
KV_DTYPE = "bf16"
LATENT = 512
ROPE = 64
PAGE_SIZE = 0
CAUSAL = False
SPLIT_CACHE = False
COMPACT = False
BATCH_INVARIANT = False
TILE_ROWS = 16
BLOCK = 32
STAGES = 3
QK_M = 1
QK_N = 2
QK_K = 4
PV_M = 1
# --- end of constants ---

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import warp
from cutlass.memory import SmemAllocator

from common.mla_arguments import mla_decode_full_arguments
from common.mla_pieces import locate_piece, n_pieces, pieces_before, slots_of
from common.mla_split import interval, n_blocks
from common.sm90 import INF, LOG2E, ex2
from common.warp_mma import (
    cp_async16,
    e4m3x2_to_f16x2,
    f16x2_to_bf16x2,
    ldmatrix2,
    ldmatrix4,
    odd_pitch,
    permute_bytes,
)

TYPES = {"bf16": BFloat16, "fp16": Float16, "e4m3": Float8E4M3FN}
Q_TYPE, KV_TYPE = TYPES[DTYPE], TYPES[KV_DTYPE]
ELEMENT = Float16 if DTYPE == "e4m3" else Q_TYPE  # of the products
OUT_TYPE = BFloat16 if DTYPE == "e4m3" else Q_TYPE
KV8 = KV_DTYPE == "e4m3"
NATIVE_CVT = ARCH not in ("sm_80", "sm_86", "sm_87")
PDL = NATIVE_CVT and ARCH != "sm_89"
WIDTH = LATENT + ROPE
STEPS = WIDTH // 16  # of the MMA over the columns
KV_BYTES = 1 if KV8 else 2
KV_CHUNKS, V_CHUNKS = WIDTH * KV_BYTES // 16, LATENT * KV_BYTES // 16  # 16-byte pieces of a cache row, of its values
Q_PITCH, KV_PITCH = odd_pitch(WIDTH * 2), odd_pitch(WIDTH * KV_BYTES)
S_PITCH = BLOCK + 8  # floats
P_PITCH = odd_pitch(BLOCK * 2)
THREADS, WARPS = 256, 8
PASSES = BLOCK // 32  # 8 threads load a row
Q_PASSES = -(-TILE_ROWS // 32)
ROW_THREADS = THREADS // TILE_ROWS  # of the softmax
ROW_TOKENS = BLOCK // ROW_THREADS
PV_N = min(WARPS // PV_M, LATENT // 16)
MT, NT = TILE_ROWS // 16 // QK_M, BLOCK // 8 // QK_N  # tiles of a warp in Q K^T
KT = -(-STEPS // QK_K)
OM, ON = TILE_ROWS // 16 // PV_M, LATENT // 8 // PV_N  # and in P V
OVERLAP = STAGES >= 3
SPLIT_BLOCK = 64  # tokens of a block of the split
PIECE_BLOCKS = 32  # of the batch-invariant split: 2048 tokens
SLICES = -(-LATENT // 128)  # of a row in the combine, each for a warp
COMBINE_LOADS = 16  # float4 of each lane in flight
LANES = LATENT // 4 if LATENT < 128 else 32  # that have columns
HAS_SINKS, WANTS_LSE, HAS_Q_DESCALE, HAS_KV_DESCALE = 1, 2, 8, 16  # bits of the flags
M_INIT = -1.0e30  # finite: -inf - maximum is never NaN

assert WIDTH % 16 == 0 and LATENT % 64 == 0 and BLOCK in (32, 64) and TILE_ROWS in (16, 32, 64) and STAGES >= 2
assert QK_M * QK_N * QK_K == WARPS and MT * QK_M * 16 == TILE_ROWS and NT * QK_N * 8 == BLOCK
assert OM * PV_M * 16 == TILE_ROWS and (ON % 2 == 0) and (KV8 or DTYPE == KV_DTYPE)


@cute.jit
def pair(x: Int32, high: cutlass.Constexpr):
    """Two e4m3 numbers of a register as two of ELEMENT."""
    y = e4m3x2_to_f16x2(x, high, NATIVE_CVT)
    return f16x2_to_bf16x2(y) if const_expr(ELEMENT is BFloat16) else y


class MlaDecode:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        q_pe: cute.Tensor,
        kv_cache: cute.Tensor,
        kpe_cache: cute.Tensor,
        block_table: cute.Tensor,
        seq_lens: cute.Tensor,
        cu_seqlens_q: cute.Tensor,
        q_descale: cute.Tensor,
        kv_descale: cute.Tensor,
        sinks: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        workspace: cute.Tensor,
        semaphores: cute.Tensor,
        sm_scale: Float32,
        v_scale: Float32,
        pe_offset: Int32,
        kpe_offset: Int32,
        flags: Int32,
        rows: Int32,
        parts: Int32,
        fixed: Int32,
        least: Int32,
        bias: Int32,
        stream,
    ):
        """See mla_arguments. sm_scale times q_descale times kv_descale is the factor of the logits, v_scale times
        kv_descale that of the values. rows: most query rows of a request. workspace: slots x rows x (LATENT + 1)
        floats, with 2 * parts slots, or as many as there can be pieces in the batch-invariant split. semaphores are
        not used."""
        B, heads = seq_lens.shape[0], q.shape[2]
        tiles = (rows + (TILE_ROWS - 1)) // TILE_ROWS
        slots = Int64(workspace.shape[0]) // (Int64(rows) * (LATENT + 1))
        o_layout = cute.make_layout((slots, rows, LATENT), stride=(Int64(rows) * LATENT, LATENT, 1))
        lse_layout = cute.make_layout((slots, rows), stride=(Int64(rows), 1))
        mOacc = cute.make_tensor(workspace.iterator, o_layout)
        mLacc = cute.make_tensor(workspace.iterator + cute.assume(slots * rows * LATENT, divby=4), lse_layout)
        split = (parts, fixed, least, bias, parts // B, (B + parts - 1) // parts)
        self.kernel(
            q,
            q_pe,
            kv_cache,
            kpe_cache,
            block_table,
            seq_lens,
            cu_seqlens_q,
            q_descale,
            kv_descale,
            sinks,
            out,
            lse,
            mOacc,
            mLacc,
            sm_scale * LOG2E,
            v_scale,
            pe_offset,
            kpe_offset,
            flags,
            rows,
            B,
            heads,
            *split,
        ).launch(grid=[tiles, parts, 1], block=[THREADS, 1, 1], stream=stream, min_blocks_per_mp=1, use_pdl=PDL)
        groups = (rows * SLICES + (WARPS - 1)) // WARPS
        self.combine(
            seq_lens, cu_seqlens_q, sinks, out, lse, mOacc, mLacc, flags, rows, groups, B, heads, *split
        ).launch(grid=[B * groups, 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=PDL)

    # -------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,
        mQpe: cute.Tensor,
        mK: cute.Tensor,
        mKpe: cute.Tensor,
        mTable: cute.Tensor,
        mSeqlens: cute.Tensor,
        mCu: cute.Tensor,
        mQscale: cute.Tensor,
        mKVscale: cute.Tensor,
        mSinks: cute.Tensor,
        mO: cute.Tensor,
        mLse: cute.Tensor,
        mOacc: cute.Tensor,
        mLacc: cute.Tensor,
        c_log2: Float32,
        v_scale: Float32,
        pe_offset: Int32,
        kpe_offset: Int32,
        flags: Int32,
        rows: Int32,
        B: Int32,
        heads: Int32,
        parts: Int32,
        fixed: Int32,
        least: Int32,
        bias: Int32,
        s: Int32,
        k: Int32,
    ):
        tid, _, _ = cute.arch.thread_idx()
        tile, part, _ = cute.arch.block_idx()
        w = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = tid % 32
        row0 = tile * TILE_ROWS

        smem = SmemAllocator()
        sQ = smem.allocate_array(cutlass.Uint8, TILE_ROWS * Q_PITCH).toint()
        sK = smem.allocate_array(cutlass.Uint8, STAGES * BLOCK * KV_PITCH).toint()
        s_layout = cute.make_layout((BLOCK, TILE_ROWS, QK_K), stride=(1, S_PITCH, S_PITCH * TILE_ROWS))
        sS = smem.allocate_tensor(Float32, s_layout, 16)
        sP = smem.allocate_tensor(ELEMENT, cute.make_layout((BLOCK, TILE_ROWS), stride=(1, P_PITCH // 2)), 16)
        sFactor = smem.allocate_tensor(Float32, cute.make_layout(TILE_ROWS), 16)  # of each row of O
        sI = smem.allocate_tensor(Int32, cute.make_layout(4), 16)
        aP = sP.iterator.toint()

        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        if w == 0:
            if const_expr(BATCH_INVARIANT):
                total = pieces_before(mSeqlens, B, PIECE_BLOCKS, lane)
                x0 = Int32(Int64(part) * total // parts)
                x1 = Int32(Int64(part + 1) * total // parts)
                r0, i0 = locate_piece(mSeqlens, B, x0, PIECE_BLOCKS, lane)
                if lane == 0:
                    sI[0] = x0
                    sI[1] = x1
                    sI[2] = r0
                    sI[3] = i0
            else:
                r0, r1, j0, j1, _, _ = interval(mSeqlens, B, part, parts, fixed, least, bias, s, k, lane)
                if lane == 0:
                    sI[0] = r0
                    sI[1] = r1 + 1
                    sI[2] = j0
                    sI[3] = j1
        if (flags & HAS_KV_DESCALE) != 0:
            v_scale = v_scale * mKVscale[0]
            c_log2 = c_log2 * mKVscale[0]
        if (flags & HAS_Q_DESCALE) != 0:
            c_log2 = c_log2 * mQscale[0]
        cute.arch.sync_threads()
        x0 = sI[0]
        x1 = sI[1]
        req = sI[2] if const_expr(BATCH_INVARIANT) else x0
        piece = sI[3] if const_expr(BATCH_INVARIANT) else Int32(0)

        rO = cute.make_rmem_tensor(cute.make_layout((4, ON, OM)), Float32)
        for x in cutlass.range(x0, x1, unroll=1):
            seqlen = mSeqlens[req]
            blocks = n_blocks(seqlen)
            if const_expr(BATCH_INVARIANT):
                b0 = piece * PIECE_BLOCKS
                b1 = cutlass.min(b0 + PIECE_BLOCKS, blocks)
                slot = x
            else:
                b0 = sI[2] if req == x0 else Int32(0)
                b1 = sI[3] if (req == x1 - 1 and sI[3] > 0) else blocks
                slot = 2 * part if b0 > 0 else 2 * part + 1
            whole = b0 == 0 and b1 == blocks
            first, tokens = self.query_tokens(mQ, mCu, req)
            if row0 < tokens * heads:
                start = b0 * SPLIT_BLOCK
                cut = cutlass.min(seqlen, b1 * SPLIT_BLOCK)
                self.load_q(sQ, mQ, mQpe, pe_offset, req, first, tokens, heads, row0, tid)
                self.attend(
                    sQ, sK, sS, sP, aP, sFactor, rO, mK, mKpe, mTable, req, start, cut, seqlen, tokens, heads, row0,
                    c_log2, v_scale, whole, slot, first, kpe_offset, flags, rows, mSinks, mLse, mLacc, w, lane, tid,
                )  # fmt: skip
                if w < PV_M * PV_N:
                    if whole:
                        self.store(rO, mO, req, first, tokens, heads, row0, w, lane)
                    else:
                        self.store_partial(rO, mOacc, slot, tokens * heads, row0, w, lane)
                cute.arch.sync_threads()  # shared memory is free again
            if const_expr(BATCH_INVARIANT):
                piece = piece + 1
                if b1 == blocks:
                    piece = Int32(0)
                    req = req + 1
            else:
                req = req + 1

    @cute.jit
    def query_tokens(self, mQ, mCu, req):
        """(first query token among those of q, number of query tokens) of a request."""
        first = Int32(0)
        tokens = mQ.shape[1]
        if const_expr(COMPACT):
            first = mCu[req]
            tokens = mCu[req + 1] - first
        return first, tokens

    @cute.jit
    def plane(self, req):
        """The first index of a request in q, q_pe, out and lse."""
        return Int32(0) if const_expr(COMPACT) else req

    @cute.jit
    def row_of(self, mX, req, first, row, heads):
        """The row of q, q_pe or out that belongs to a query row of a request."""
        i = row // heads
        return mX[self.plane(req), first + i, row - i * heads, None].iterator

    # ---------------------------------------------------------------- loads
    @cute.jit
    def load_q(self, sQ, mQ, mQpe, pe_offset, req, first, tokens, heads, row0, tid):
        """Q to shared memory: as it is through cp.async (which the first wait for K covers), or, where the cache is
        e4m3, with the columns of each 16 permuted."""
        for u in cutlass.range_constexpr(Q_PASSES):
            r = u * 32 + tid // 8
            row = row0 + r
            there = row < tokens * heads
            safe = row if there else Int32(0)
            latent = self.row_of(mQ, req, first, safe, heads).toint()
            rope = (self.row_of(mQpe, req, first, safe, heads) + pe_offset).toint()
            if r < TILE_ROWS:
                if const_expr(not KV8):
                    for i in cutlass.range_constexpr(-(-WIDTH // 64)):
                        chunk = i * 8 + tid % 8
                        if chunk < WIDTH // 8:
                            src = latent + chunk * 16
                            if chunk >= LATENT // 8:
                                src = rope + (chunk - LATENT // 8) * 16
                            cp_async16(sQ + r * Q_PITCH + chunk * 16, src, Int32(16) if there else Int32(0))
                else:
                    for i in cutlass.range_constexpr(-(-STEPS // 8)):
                        step = i * 8 + tid % 8
                        if step < STEPS:
                            src = latent + step * (16 * Q_TYPE.width // 8)
                            if step >= LATENT // 16:
                                src = rope + (step - LATENT // 16) * (16 * Q_TYPE.width // 8)
                            self.permuted(sQ + r * Q_PITCH + step * 32, src, there)

    @cute.jit
    def permuted(self, dst, src, there):
        """16 columns of q to shared memory; words 0, 2, 4, 6, 1, 3, 5, 7 of what they are in memory."""
        rX = cute.make_rmem_tensor((8,), Int32)
        words = cute.make_tensor(
            cute.make_ptr(Int32, src, cute.AddressSpace.gmem, assumed_align=16), cute.make_layout(Q_TYPE.width // 2)
        )
        rX.fill(0)
        if there:
            if const_expr(DTYPE == "e4m3"):
                rW = cute.make_rmem_tensor((4,), Int32)
                cute.autovec_copy(words, rW)
                for t in cutlass.range_constexpr(4):
                    rX[t] = pair(rW[t], False)
                    rX[4 + t] = pair(rW[t], True)
            else:
                rW = cute.make_rmem_tensor((8,), Int32)
                cute.autovec_copy(words, rW)
                for t in cutlass.range_constexpr(4):
                    rX[t] = rW[2 * t]
                    rX[4 + t] = rW[2 * t + 1]
        to = cute.make_tensor(cute.make_ptr(Int32, dst, cute.AddressSpace.smem, assumed_align=16), cute.make_layout(8))
        cute.autovec_copy(rX, to)

    @cute.jit
    def look_up(self, rPage, mK, mTable, req, tok0, cut, tid):
        """The place of this thread's rows of a block: page and row in it; page -1 behind the end."""
        page_size = mK.shape[1] if const_expr(PAGE_SIZE == 0) else PAGE_SIZE
        for u in cutlass.range_constexpr(PASSES):
            tok = tok0 + u * 32 + tid // 8
            page = Int32(-1)
            if tok < cut:
                page = mTable[req, tok // page_size]
            rPage[u] = page

    @cute.jit
    def issue(self, rPage, sK, mK, mKpe, kpe_offset, stage, tok0, tid):
        page_size = mK.shape[1] if const_expr(PAGE_SIZE == 0) else PAGE_SIZE
        for u in cutlass.range_constexpr(PASSES):
            r = u * 32 + tid // 8
            page = rPage[u]
            nbytes = Int32(16) if page >= 0 else Int32(0)
            at = Int64(cutlass.max(page, 0)) * mK.stride[0] + (tok0 + r) % page_size * mK.stride[1]
            src = mK.iterator.toint() + (at if page >= 0 else Int64(0)) * KV_BYTES + tid % 8 * 16
            rope = src
            if const_expr(SPLIT_CACHE):  # where column 0 would be if the rope part followed the latent
                at = Int64(cutlass.max(page, 0)) * mKpe.stride[0] + (tok0 + r) % page_size * mKpe.stride[1]
                at = (at if page >= 0 else Int64(0)) + kpe_offset - LATENT
                rope = mKpe.iterator.toint() + at * KV_BYTES + tid % 8 * 16
            dst = sK + (stage * BLOCK + r) * KV_PITCH + tid % 8 * 16
            for i in cutlass.range_constexpr(-(-KV_CHUNKS // 8)):
                mine = src if const_expr(i * 8 + 8 <= V_CHUNKS) else rope
                if const_expr(i * 8 < V_CHUNKS < i * 8 + 8):
                    mine = src if i * 8 + tid % 8 < V_CHUNKS else rope
                if const_expr(i * 8 + 8 <= KV_CHUNKS):
                    cp_async16(dst + i * 128, mine + i * 128, nbytes)
                else:
                    if i * 8 + tid % 8 < KV_CHUNKS:
                        cp_async16(dst + i * 128, mine + i * 128, nbytes)

    # ----------------------------------------------------------------- math
    @cute.jit
    def attend(
        self, sQ, sK, sS, sP, aP, sFactor, rO, mK, mKpe, mTable, req, start, cut, seqlen, tokens, heads, row0,
        c_log2, v_scale, whole, slot, first, kpe_offset, flags, rows, mSinks, mLse, mLacc, w, lane, tid,
    ):  # fmt: skip
        """Softmax attention of one row tile over the tokens start .. cut - 1, into rO: normalised, scaled."""
        n = cutlass.max((cut - start + (BLOCK - 1)) // BLOCK, 1)
        rPage = cute.make_rmem_tensor((PASSES,), Int32)
        self.look_up(rPage, mK, mTable, req, start, cut, tid)
        for i in cutlass.range_constexpr(STAGES - 1):
            if i < n:
                self.issue(rPage, sK, mK, mKpe, kpe_offset, Int32(i), start + i * BLOCK, tid)
                self.look_up(rPage, mK, mTable, req, start + (i + 1) * BLOCK, cut, tid)
            cute.arch.cp_async_commit_group()

        # the softmax threads of a row
        r = tid // ROW_THREADS
        row = row0 + r
        limit = cut
        if const_expr(CAUSAL):
            limit = cutlass.min(cut, seqlen - (tokens - 1 - row // heads))
        top = Float32(M_INIT)
        total = Float32(0.0)
        rO.fill(0.0)
        if const_expr(OVERLAP):
            cute.arch.cp_async_wait_group(STAGES - 2)
            cute.arch.sync_threads()
            self.scores(sQ, sK, sS, w, lane)
            cute.arch.sync_threads()
            top, total = self.softmax(sS, sP, sFactor, top, total, limit - start, c_log2, tid)
        for j in cutlass.range(n, unroll=1):
            cute.arch.cp_async_wait_group(STAGES - 3 if const_expr(OVERLAP) else STAGES - 2)
            cute.arch.sync_threads()
            ahead = j + (STAGES - 1)
            if ahead < n:
                self.issue(rPage, sK, mK, mKpe, kpe_offset, ahead % STAGES, start + ahead * BLOCK, tid)
                self.look_up(rPage, mK, mTable, req, start + (ahead + 1) * BLOCK, cut, tid)
            cute.arch.cp_async_commit_group()
            aK = sK + j % STAGES * (BLOCK * KV_PITCH)
            if const_expr(OVERLAP):
                if j + 1 < n:
                    self.scores(sQ, sK + (j + 1) % STAGES * (BLOCK * KV_PITCH), sS, w, lane)
                if w < PV_M * PV_N:
                    self.values(rO, aK, aP, sFactor, w, lane)
                cute.arch.sync_threads()
                if j + 1 < n:
                    seen = limit - start - (j + 1) * BLOCK
                    top, total = self.softmax(sS, sP, sFactor, top, total, seen, c_log2, tid)
            else:
                self.scores(sQ, aK, sS, w, lane)
                cute.arch.sync_threads()
                seen = limit - start - j * BLOCK
                top, total = self.softmax(sS, sP, sFactor, top, total, seen, c_log2, tid)
                cute.arch.sync_threads()
                if w < PV_M * PV_N:
                    self.values(rO, aK, aP, sFactor, w, lane)

        for x in cutlass.range_constexpr((ROW_THREADS - 1).bit_length()):
            total = total + cute.arch.shuffle_sync_bfly(total, offset=1 << x)
        cute.arch.sync_threads()  # sFactor is read
        if tid % ROW_THREADS == 0:
            weights = total
            i = row // heads
            head = row - i * heads
            value = cute.math.log2(total, fastmath=True) + top if total != 0.0 else -Float32(INF)
            if row < tokens * heads:
                if not whole:
                    mLacc[slot, row] = value
                else:
                    if (flags & HAS_SINKS) != 0:
                        weights = total + ex2(mSinks[head] * LOG2E - top)
                    if (flags & WANTS_LSE) != 0:
                        mLse[self.plane(req), first + i, head] = value * (1.0 / LOG2E)
            sFactor[r] = v_scale / weights if total != 0.0 else Float32(0.0)
        cute.arch.sync_threads()
        if w < PV_M * PV_N:
            self.rescale(rO, sFactor, w, lane)

    @cute.jit
    def scores(self, sQ, aK, sS, w, lane):
        """This warp's part of Q K^T."""
        wm = w % QK_M
        wn = w // QK_M % QK_N
        wk = w // (QK_M * QK_N)
        mma = cute.make_mma_atom(warp.MmaF16BF16Op(ELEMENT, Float32, (16, 8, 16)))
        rS = cute.make_rmem_tensor(cute.make_layout((4, NT, MT)), Float32)
        rA = cute.make_rmem_tensor(cute.make_layout((4, MT)), Int32)
        rB = cute.make_rmem_tensor(cute.make_layout((2, NT)), Int32)
        rX = cute.make_rmem_tensor((4,), Int32)
        rS.fill(0.0)
        a = sQ + (wm * MT * 16 + lane % 16) * Q_PITCH + lane // 16 * 16 + wk * 32
        if const_expr(KV8):  # a chunk is 16 columns: one step
            b = aK + (wn * NT * 8 + lane % 16) * KV_PITCH + wk * 16
        elif const_expr(NT % 2 == 0):
            b = aK + (wn * NT * 8 + lane % 8 + lane // 16 * 8) * KV_PITCH + lane // 8 % 2 * 16 + wk * 32
        else:
            b = aK + (wn * NT * 8 + lane % 8) * KV_PITCH + lane // 8 % 2 * 16 + wk * 32
        for i in cutlass.range_constexpr(KT):
            if const_expr(i * QK_K + QK_K <= STEPS):
                self.score_step(mma, rS, rA, rB, rX, a, b, i)
            else:
                if i * QK_K + wk < STEPS:
                    self.score_step(mma, rS, rA, rB, rX, a, b, i)
        for m in cutlass.range_constexpr(MT):
            for n in cutlass.range_constexpr(NT):
                row = (wm * MT + m) * 16 + lane // 4
                at = (wn * NT + n) * 4 + lane % 4
                two = cute.make_rmem_tensor((2,), Float32)
                for h in cutlass.range_constexpr(2):
                    two[0] = rS[2 * h, n, m]
                    two[1] = rS[2 * h + 1, n, m]
                    cute.autovec_copy(two, cute.local_tile(sS[None, row + 8 * h, wk], (2,), (at,)))

    @cute.jit
    def score_step(self, mma, rS, rA, rB, rX, a, b, i: cutlass.Constexpr):
        for m in cutlass.range_constexpr(MT):
            ldmatrix4(rA[None, m], a + (m * 16 * Q_PITCH + i * QK_K * 32), False)
        if const_expr(KV8):
            for n in cutlass.range_constexpr(0, NT, 2):
                ldmatrix2(rX, b + (n * 8 * KV_PITCH + i * QK_K * 16), False)
                for h in cutlass.range_constexpr(min(2, NT)):
                    rB[0, n + h] = pair(rX[h], False)
                    rB[1, n + h] = pair(rX[h], True)
        elif const_expr(NT % 2 == 0):
            for n in cutlass.range_constexpr(0, NT, 2):
                ldmatrix4(rX, b + (n * 8 * KV_PITCH + i * QK_K * 32), False)
                for h in cutlass.range_constexpr(4):
                    rB[h % 2, n + h // 2] = rX[h]
        else:
            for n in cutlass.range_constexpr(NT):
                ldmatrix2(rB[None, n], b + (n * 8 * KV_PITCH + i * QK_K * 32), False)
        for m in cutlass.range_constexpr(MT):
            for n in cutlass.range_constexpr(NT):
                self.multiply(mma, rS[None, n, m], rA[None, m], rB[None, n])

    @cute.jit
    def multiply(self, mma, acc, a, b):
        a = cute.make_tensor(cute.recast_ptr(a.iterator, dtype=ELEMENT), cute.make_layout((8, 1)))
        b = cute.make_tensor(cute.recast_ptr(b.iterator, dtype=ELEMENT), cute.make_layout((4, 1)))
        acc = cute.make_tensor(acc.iterator, cute.make_layout((4, 1, 1)))
        cute.gemm(mma, acc, a, b, acc)

    @cute.jit
    def softmax(self, sS, sP, sFactor, top, total, limit, c_log2, tid):
        """P and the factor of O for one row and ROW_TOKENS of its tokens; limit: tokens of this block that it sees."""
        r = tid // ROW_THREADS
        sub = tid % ROW_THREADS
        rX = cute.make_rmem_tensor((ROW_TOKENS,), Float32)
        rY = cute.make_rmem_tensor((ROW_TOKENS,), Float32)
        cute.autovec_copy(cute.local_tile(sS[None, r, 0], (ROW_TOKENS,), (sub,)), rX)
        for u in cutlass.range_constexpr(1, QK_K):
            cute.autovec_copy(cute.local_tile(sS[None, r, u], (ROW_TOKENS,), (sub,)), rY)
            for i in cutlass.range_constexpr(ROW_TOKENS):
                rX[i] = rX[i] + rY[i]
        highest = -Float32(INF)
        for i in cutlass.range_constexpr(ROW_TOKENS):
            rX[i] = rX[i] if sub * ROW_TOKENS + i < limit else -Float32(INF)
            highest = cute.arch.fmax(highest, rX[i])
        for x in cutlass.range_constexpr((ROW_THREADS - 1).bit_length()):
            highest = cute.arch.fmax(highest, cute.arch.shuffle_sync_bfly(highest, offset=1 << x))
        new = cute.arch.fmax(top, highest * c_log2)
        factor = ex2(top - new)
        total = total * factor
        rP = cute.make_rmem_tensor((ROW_TOKENS,), ELEMENT)
        for i in cutlass.range_constexpr(ROW_TOKENS):
            p = ex2(rX[i] * c_log2 - new)
            total = total + p
            rP[i] = p.to(ELEMENT)
        cute.autovec_copy(rP, cute.local_tile(sP[None, r], (ROW_TOKENS,), (sub,)))
        if sub == 0:
            sFactor[r] = factor
        return new, total

    @cute.jit
    def rescale(self, rO, sFactor, w, lane):
        for m in cutlass.range_constexpr(OM):
            row = (w % PV_M * OM + m) * 16 + lane // 4
            low = sFactor[row]
            high = sFactor[row + 8]
            for n in cutlass.range_constexpr(ON):
                rO[0, n, m] = rO[0, n, m] * low
                rO[1, n, m] = rO[1, n, m] * low
                rO[2, n, m] = rO[2, n, m] * high
                rO[3, n, m] = rO[3, n, m] * high

    @cute.jit
    def values(self, rO, aK, aP, sFactor, w, lane):
        """O = factor * O + P V for this warp's rows and columns."""
        wm = w % PV_M
        wn = w // PV_M
        grew = Int32(0)
        for m in cutlass.range_constexpr(OM):
            row = (wm * OM + m) * 16 + lane // 4
            if sFactor[row] < 1.0 or sFactor[row + 8] < 1.0:
                grew = Int32(1)
        if cute.arch.vote_any_sync(grew != 0):
            self.rescale(rO, sFactor, w, lane)
        mma = cute.make_mma_atom(warp.MmaF16BF16Op(ELEMENT, Float32, (16, 8, 16)))
        rA = cute.make_rmem_tensor(cute.make_layout((4, OM)), Int32)
        rB = cute.make_rmem_tensor(cute.make_layout((2, 2)), Int32)
        rX = cute.make_rmem_tensor((4,), Int32)
        a = aP + (wm * OM * 16 + lane % 16) * P_PITCH + lane // 16 * 16
        b = aK + lane % 16 * KV_PITCH + wn * (ON * 8 * KV_BYTES)
        if const_expr(not KV8):
            b = b + lane // 16 * 16
        for t in cutlass.range_constexpr(BLOCK // 16):
            for m in cutlass.range_constexpr(OM):
                ldmatrix4(rA[None, m], a + (m * 16 * P_PITCH + t * 32), False)
            for n in cutlass.range_constexpr(0, ON, 2):
                if const_expr(KV8):
                    ldmatrix2(rX, b + (t * 16 * KV_PITCH + n * 8), True)
                    for h in cutlass.range_constexpr(2):
                        columns = permute_bytes(rX[h], 0x3120)  # the even column of both tokens, then the odd one
                        rB[h, 0] = pair(columns, False)
                        rB[h, 1] = pair(columns, True)
                else:
                    ldmatrix4(rX, b + (t * 16 * KV_PITCH + n * 16), True)
                    for h in cutlass.range_constexpr(4):
                        rB[h % 2, h // 2] = rX[h]
                for m in cutlass.range_constexpr(OM):
                    for h in cutlass.range_constexpr(2):
                        self.multiply(mma, rO[None, n + h, m], rA[None, m], rB[None, h])

    # --------------------------------------------------------------- stores
    @cute.jit
    def four(self, rX, rO, m: cutlass.Constexpr, n: cutlass.Constexpr, high: cutlass.Constexpr):
        """What a thread has of 16 columns of one row, in the order of the columns: 4 t .. 4 t + 3 with e4m3, else
        2 t, 2 t + 1, 2 t + 8, 2 t + 9."""
        h = 2 * high
        if const_expr(KV8):
            rX[0], rX[1], rX[2], rX[3] = rO[h, n, m], rO[h, n + 1, m], rO[h + 1, n, m], rO[h + 1, n + 1, m]
        else:
            rX[0], rX[1], rX[2], rX[3] = rO[h, n, m], rO[h + 1, n, m], rO[h, n + 1, m], rO[h + 1, n + 1, m]

    @cute.jit
    def put(self, row: cute.Pointer, rX, dtype: cutlass.Constexpr, column, lane):
        """Those four columns of the 16 from `column` on, of a row."""
        rY = cute.make_rmem_tensor((4,), dtype)
        for e in cutlass.range_constexpr(4):
            rY[e] = rX[e].to(dtype)
        if const_expr(KV8):
            at = cute.assume(column + lane % 4 * 4, divby=4)
            cute.autovec_copy(rY, cute.make_tensor(row + at, cute.make_layout(4)))
        else:
            for h in cutlass.range_constexpr(2):
                at = cute.assume(column + lane % 4 * 2 + 8 * h, divby=2)
                cute.autovec_copy(
                    cute.local_tile(rY, (2,), (h,)), cute.make_tensor(row + at, cute.make_layout(2))
                )

    @cute.jit
    def store(self, rO, mO, req, first, tokens, heads, row0, w, lane):
        rX = cute.make_rmem_tensor((4,), Float32)
        for m in cutlass.range_constexpr(OM):
            for h in cutlass.range_constexpr(2):
                row = row0 + (w % PV_M * OM + m) * 16 + lane // 4 + 8 * h
                if row < tokens * heads:
                    to = self.row_of(mO, req, first, row, heads)
                    for n in cutlass.range_constexpr(0, ON, 2):
                        self.four(rX, rO, m, n, h)
                        self.put(to, rX, OUT_TYPE, (w // PV_M * ON + n) * 8, lane)

    @cute.jit
    def store_partial(self, rO, mOacc, slot, limit, row0, w, lane):
        rX = cute.make_rmem_tensor((4,), Float32)
        for m in cutlass.range_constexpr(OM):
            for h in cutlass.range_constexpr(2):
                row = row0 + (w % PV_M * OM + m) * 16 + lane // 4 + 8 * h
                if row < limit:
                    to = mOacc[slot, row, None].iterator
                    for n in cutlass.range_constexpr(0, ON, 2):
                        self.four(rX, rO, m, n, h)
                        self.put(to, rX, Float32, (w // PV_M * ON + n) * 8, lane)

    # -------------------------------------------------------------- combine
    @cute.kernel
    def combine(
        self,
        mSeqlens: cute.Tensor,
        mCu: cute.Tensor,
        mSinks: cute.Tensor,
        mO: cute.Tensor,
        mLse: cute.Tensor,
        mOacc: cute.Tensor,
        mLacc: cute.Tensor,
        flags: Int32,
        rows: Int32,
        groups: Int32,
        B: Int32,
        heads: Int32,
        parts: Int32,
        fixed: Int32,
        least: Int32,
        bias: Int32,
        s: Int32,
        k: Int32,
    ):
        """One warp for a slice of a row of a request that has several pieces."""
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = tid % 32
        req = block // groups
        unit = (block - req * groups) * WARPS + tid // 32
        row = unit // SLICES
        column = cute.assume(unit % SLICES * 128 + lane * 4, divby=4)
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        first, tokens = self.query_tokens(mO, mCu, req)
        if const_expr(BATCH_INVARIANT):
            n = n_pieces(mSeqlens[req], PIECE_BLOCKS)
            p0 = Int32(0)
            if n > 1:
                p0 = pieces_before(mSeqlens, req, PIECE_BLOCKS, lane)
        else:
            p0, n = slots_of(mSeqlens, B, req, parts, fixed, least, bias, s, k, lane)
        if n > 1 and row < tokens * heads:
            top = Float32(M_INIT)
            for i in cutlass.range(lane, n, 32, unroll=1):
                top = cute.arch.fmax(top, mLacc[self.slot(p0, i), row])
            for x in cutlass.range_constexpr(5):
                top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, offset=1 << x))
            total = Float32(0.0)
            for i in cutlass.range(lane, n, 32, unroll=1):
                total = total + ex2(mLacc[self.slot(p0, i), row] - top)
            for x in cutlass.range_constexpr(5):
                total = total + cute.arch.shuffle_sync_bfly(total, offset=1 << x)
            token = row // heads
            head = row - token * heads
            weights = total
            if (flags & HAS_SINKS) != 0:
                weights = total + ex2(mSinks[head] * LOG2E - top)
            inverse = 1.0 / weights if total != 0.0 else Float32(0.0)
            rO = cute.make_rmem_tensor((4,), Float32)
            rX = cute.make_rmem_tensor((4, COMBINE_LOADS), Float32)
            rW = cute.make_rmem_tensor((COMBINE_LOADS,), Float32)
            rO.fill(0.0)
            if lane < LANES:
                for i0 in cutlass.range(0, n, COMBINE_LOADS, unroll=1):
                    for u in cutlass.range_constexpr(COMBINE_LOADS):
                        slot = self.slot(p0, cutlass.min(i0 + u, n - 1))
                        src = mOacc[slot, row, None].iterator + column
                        cute.autovec_copy(cute.make_tensor(src, cute.make_layout(4)), rX[None, u])
                        rW[u] = mLacc[slot, row]
                    for u in cutlass.range_constexpr(COMBINE_LOADS):
                        weight = ex2(rW[u] - top) * inverse if i0 + u < n else Float32(0.0)
                        for e in cutlass.range_constexpr(4):
                            rO[e] = rO[e] + weight * rX[e, u]
                to = self.row_of(mO, req, first, row, heads) + column
                rY = cute.make_rmem_tensor((4,), OUT_TYPE)
                for e in cutlass.range_constexpr(4):
                    rY[e] = rO[e].to(OUT_TYPE)
                cute.autovec_copy(rY, cute.make_tensor(to, cute.make_layout(4)))
            if (flags & WANTS_LSE) != 0 and lane == 0 and unit % SLICES == 0:
                value = (cute.math.log2(total, fastmath=True) + top) * (1.0 / LOG2E)
                mLse[self.plane(req), first + token, head] = value if total != 0.0 else -Float32(INF)

    @cute.jit
    def slot(self, p0, i):
        """Where piece i of a request lies."""
        at = p0 + i
        if const_expr(not BATCH_INVARIANT):
            at = 2 * at + (Int32(1) if i == 0 else Int32(0))
        return at


def entry():
    """What to compile: the host function and its fake arguments."""
    divisor = 128 // Q_TYPE.width, 128 // KV_TYPE.width
    return MlaDecode(), mla_decode_full_arguments(
        Q_TYPE, KV_TYPE, OUT_TYPE, LATENT, PAGE_SIZE, COMPACT, divisor
    )
