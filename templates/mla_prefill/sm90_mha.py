"""Varlen multi-head attention of prefill (keys and values expanded per head) for sm_90a.

    out[i, h] = sum_j softmax_j(sm_scale <q[i, h], k[j, h]>) v[j, h]    j of the same request, causal: bottom right

Tiling. One persistent CTA per SM. A tile is (request, head, 128 query rows); tiles are handed out by a counter in
global memory, of each request the last rows (the longest ones) first, heads in groups whose keys and values stay in L2.
Blocks of BLOCK_N keys are taken from the last one, which has the masks, down to the first.

    warp 0   takes tiles: record -> sTile[2]; Q of each math warpgroup; ring of K (TMA)        warp 1   ring of V (TMA)
    WG 1, 2  64 query rows each; they share the rings and the record of the tile

A math warpgroup; P stays in registers as the A operand of P V, and the next block's product runs under the softmax:

    tensor   QK(n)        QK(n-1) PV(n)         QK(n-2) PV(n-1)         ...  PV(0)
    fp32           sm(n)               sm(n-1)               sm(n-2)    ...         O / L -> global
                          ^ P = 16 bit(S), O *= scale (seldom)

The keys come as two tensors, so that the rotated columns, which all heads share, need not be copied for each head: the
first Q_DIM - 64 columns from k, the last 64 from k_pe, which has as many heads as q or one.

    ORDER    the warpgroups hand each other the right to issue {QK, PV}: softmax of one under the products of the other
    HALF     causal: only half of the diagonal block is computed for the rows that see no more of it
    Q_REGS   Q is moved to registers once per tile: QK reads only K from shared memory, and Q's buffer is free at once

Hazards, looked for in SASS: ptxas hoists a wait for wgmma above the softmax of the same basic block, so that the waits
for PV stand behind an mbarrier wait, which ends a block. It gives up uniform registers for descriptors (64 R2UR in the
loop, 8 % of the time) when one more wgmma shape joins the SS form. zero_tail may not be nested inside the branch of the
mask while O is live: 300 bytes of spills.

Cannot: 8-bit types; head dimensions that 64 does not divide; sinks; keys that are not expanded per head.
"""

# --- constants: replaced when rendered ---
DTYPE = "bf16"
Q_DIM = 192
V_DIM = 128
CAUSAL = True
BLOCK_N = 128
STAGES = 2
ORDER = True
HALF = True
Q_REGS = True
# --- end of constants ---

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import Float16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator

from common.prefill import (
    M_START,
    exponentials,
    find,
    mask,
    move,
    place,
    prefill_arguments,
    rescale,
    softmax,
    store_rows,
)
from common.sm90 import EVICT_FIRST, LOG2E, cutlass_dtype, issue, smem_atom, swz

ELEM = cutlass_dtype(DTYPE)
WGS = 2  # math warpgroups
ROWS = 64 * WGS  # query rows of a tile
CHUNK = 64  # columns of a swizzled 128-byte tile
Q_CHUNKS = Q_DIM // CHUNK
HALF_BLOCK = CAUSAL and HALF
REGS_LOAD, REGS_MATH = 24, 240
EVICT_LAST = 0x14F0000000000000  # L2 hint: every tile of the head reads K and V again
# record of a tile
T_VALID, T_ROW0, T_Q0, T_LQ, T_K0, T_LK, T_BLOCKS, T_HEAD = range(8)
# mbarriers: full and empty of Q per warpgroup, of K and V per stage, of the tile record per slot
Q_FULL = 0
Q_EMPTY = Q_FULL + WGS
K_FULL = Q_EMPTY + WGS
K_EMPTY = K_FULL + STAGES
V_FULL = K_EMPTY + STAGES
V_EMPTY = V_FULL + STAGES
T_FULL = V_EMPTY + STAGES
T_EMPTY = T_FULL + 2
BARRIERS = T_EMPTY + 2
# named barriers: whose turn it is (per warpgroup), zero_tail (per warpgroup)
TURN, TAIL = 1, 4

assert Q_DIM % CHUNK == 0 and V_DIM % CHUNK == 0 and BLOCK_N % 16 == 0
assert not HALF_BLOCK or (BLOCK_N % 32 == 0 and Q_REGS)


@cute.jit
def by_head(x, ptr, columns: cutlass.Constexpr):
    """`columns` columns of a (tokens, heads, any) tensor from `ptr` on, as (tokens, columns, heads): the order of a TMA
    tensor map. The stride of a dimension of size 1 may be anything, also none that TMA accepts."""
    token = x.stride[0] if x.shape[0] > 1 else Int64(CHUNK)
    head = x.stride[1] if x.shape[1] > 1 else Int64(CHUNK)
    stride = (cute.assume(token, divby=8), 1, cute.assume(head, divby=8))
    return cute.make_tensor(ptr, cute.make_layout((x.shape[0], columns, x.shape[1]), stride=stride))


@cute.jit
def uniform(x):
    """x of lane 0: ptxas then knows that the value is the same in the whole warp."""
    return cute.arch.shuffle_sync(x, offset=0)


@cute.jit
def arrive(bar, lane):
    """One arrival of this warp."""
    if lane == 0:
        cute.arch.mbarrier_arrive(bar)


@cute.jit
def to_p(S, P):
    """fp32 accumulator -> A fragment: the registers are in the right order already."""
    if const_expr(ELEM is Float16):  # LLVM would sink these conversions between the wgmmas, which ptxas then serialises
        words = cute.recast_tensor(P, Int32)
        for i in cutlass.range_constexpr(cute.size(S) // 2):
            words[i] = cute.arch.inline_ptx(
                "cvt.rn.f16x2.f32 {$w0}, {$r1}, {$r0};",
                write_only_types=[Int32],
                read_only_args=[S[2 * i], S[2 * i + 1]],
            )
    else:
        P.store(cute.make_tensor(S.iterator, P.layout).load().to(ELEM))


class MlaPrefill:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        k_pe: cute.Tensor,
        v: cute.Tensor,
        cu_q: cute.Tensor,
        cu_k: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        counters: cute.Tensor,
        sm_scale: Float32,
        pe_offset: Int32,
        flags: Int32,
        group: Int32,
        ctas: Int32,
        stream,
    ):
        load = cpasync.CopyBulkTensorTileG2SOp()
        pe = (k_pe.iterator + pe_offset).align(16)
        tma_q, mQ = cpasync.make_tiled_tma_atom(load, by_head(q, q.iterator, Q_DIM), swz(64, Q_DIM, ELEM), (64, Q_DIM))
        tma_k, mK = cpasync.make_tiled_tma_atom(
            load, by_head(k, k.iterator, Q_DIM - CHUNK), swz(BLOCK_N, CHUNK, ELEM), (BLOCK_N, CHUNK)
        )
        tma_pe, mPe = cpasync.make_tiled_tma_atom(
            load, by_head(k_pe, pe, CHUNK), swz(BLOCK_N, CHUNK, ELEM), (BLOCK_N, CHUNK)
        )
        tma_v, mV = cpasync.make_tiled_tma_atom(
            load, by_head(v, v.iterator, V_DIM), swz(BLOCK_N, V_DIM, ELEM), (BLOCK_N, V_DIM)
        )

        def mma(columns, major, source):
            k_major = OperandMajorMode.K
            return hh.make_trivial_tiled_mma(ELEM, ELEM, k_major, major, Float32, (1, 1, 1), (64, columns), source)

        source = warpgroup.OperandSource.RMEM if Q_REGS else warpgroup.OperandSource.SMEM
        mma_qk = mma(BLOCK_N, OperandMajorMode.K, source)
        mma_half = mma(BLOCK_N // 2, OperandMajorMode.K, source) if HALF_BLOCK else mma_qk
        mma_pv = mma(V_DIM, OperandMajorMode.MN, warpgroup.OperandSource.RMEM)
        self.kernel(
            tma_q, mQ, tma_k, mK, tma_pe, mPe, tma_v, mV, cu_q, cu_k, out, lse, counters, sm_scale * LOG2E, flags,
            group, mma_qk, mma_half, mma_pv,
        ).launch(grid=[ctas, 1, 1], block=[128 * (WGS + 1), 1, 1], stream=stream, min_blocks_per_mp=1)

    # ---------------------------------------------------------------- loads
    @cute.jit
    def begin(self, bars, full: cutlass.Constexpr, empty: cutlass.Constexpr, at, phase, columns: cutlass.Constexpr,
              rows: cutlass.Constexpr):
        """Wait until a buffer is free, and announce what will come into it."""
        cute.arch.mbarrier_wait(bars + empty + at, phase ^ 1)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bars + full + at, rows * columns * 2)

    @cute.jit
    def source(self, tma, smem, g, row0, head, rows: cutlass.Constexpr, columns: cutlass.Constexpr):
        """(shared, global) partitions for a request's rows from row0 on; the global one by blocks of both."""
        tiles = cute.local_tile(cute.domain_offset((row0, 0, 0), g), (rows, columns), (None, None, head))
        one = cute.make_layout(1)
        return cpasync.tma_partition(tma, 0, one, cute.group_modes(smem, 0, 2), cute.group_modes(tiles, 0, 2))

    @cute.jit
    def produce_k(
        self, bars, sTile, sQ, sK, tma_q, mQ, tma_k, mK, tma_pe, mPe, cu_q, cu_k, counters, group, heads, lane
    ):
        """Warp 0: takes tiles, describes them to the others, loads their Q and K."""
        x, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        batch = cu_q.shape[0] - 1
        tile = Int32(0)
        it = Int32(0)  # position in the ring
        run = Int32(1)
        while run == 1:
            b, start = find(cu_q, x, batch, heads, ROWS, lane)
            slot = tile & 1
            cute.arch.mbarrier_wait(bars + T_EMPTY + slot, ((tile >> 1) & 1) ^ 1)
            if b < batch:
                following = Int32(0)
                if lane == 0:
                    following = cute.arch.atomic_add(counters.iterator, Int32(1))
                q0 = cu_q[b]
                lq = cu_q[b + 1] - q0
                k0 = cu_k[b]
                lk = cu_k[b + 1] - k0
                head, row0 = place(x - start, lq, heads, group, ROWS)
                limit = lk
                if const_expr(CAUSAL):
                    limit = cutlass.min(lk, cutlass.min(lq, row0 + ROWS) + lk - lq)
                blocks = cutlass.max((limit + (BLOCK_N - 1)) // BLOCK_N, 1)
                if lane == 0:
                    sTile[T_VALID, slot] = Int32(1)
                    sTile[T_ROW0, slot] = row0
                    sTile[T_Q0, slot] = q0
                    sTile[T_LQ, slot] = lq
                    sTile[T_K0, slot] = k0
                    sTile[T_LK, slot] = lk
                    sTile[T_BLOCKS, slot] = blocks
                    sTile[T_HEAD, slot] = head
                    cute.arch.mbarrier_arrive(bars + T_FULL + slot)
                head_pe = cutlass.min(head, mPe.shape[2] - 1)
                tKs, tKg = self.source(tma_k, sK, mK, k0, head, BLOCK_N, CHUNK)
                tPs, tPg = self.source(tma_pe, sK, mPe, k0, head_pe, BLOCK_N, CHUNK)
                tQs, tQg = self.source(tma_q, sQ, mQ, q0 + row0, head, 64, Q_DIM)
                for n in cutlass.range(blocks, unroll=1):
                    s = it % STAGES
                    self.begin(bars, K_FULL, K_EMPTY, s, (it // STAGES) & 1, Q_DIM, BLOCK_N)
                    for j in cutlass.range_constexpr(Q_CHUNKS - 1):
                        cute.copy(tma_k, tKg[None, blocks - 1 - n, j], tKs[None, j, s], tma_bar_ptr=bars + K_FULL + s,
                                  cache_policy=Int64(EVICT_LAST))
                    cute.copy(tma_pe, tPg[None, blocks - 1 - n, 0], tPs[None, Q_CHUNKS - 1, s],
                              tma_bar_ptr=bars + K_FULL + s, cache_policy=Int64(EVICT_LAST))
                    if n == 0:
                        for w in cutlass.range_constexpr(WGS):
                            self.begin(bars, Q_FULL, Q_EMPTY, w, tile & 1, Q_DIM, 64)
                            cute.copy(tma_q, tQg[None, w, 0], tQs[None, w], tma_bar_ptr=bars + Q_FULL + w,
                                      cache_policy=Int64(EVICT_FIRST))
                    it = it + 1
                x = ctas + uniform(following)
            else:
                if lane == 0:
                    sTile[T_VALID, slot] = Int32(0)
                    cute.arch.mbarrier_arrive(bars + T_FULL + slot)
                    if cute.arch.atomic_add(counters.iterator + 1, Int32(1)) == ctas - 1:  # nobody takes tiles any more
                        counters[0] = Int32(0)
                        counters[1] = Int32(0)
                run = Int32(0)
            tile = tile + 1

    @cute.jit
    def produce_v(self, bars, sTile, sV, tma_v, mV, lane):
        """Warp 1: loads V of the tiles that warp 0 has taken."""
        tile = Int32(0)
        it = Int32(0)
        run = Int32(1)
        while run == 1:
            slot = tile & 1
            cute.arch.mbarrier_wait(bars + T_FULL + slot, (tile >> 1) & 1)
            run = sTile[T_VALID, slot]
            k0 = sTile[T_K0, slot]
            head = sTile[T_HEAD, slot]
            blocks = sTile[T_BLOCKS, slot]
            cute.arch.sync_warp()
            arrive(bars + T_EMPTY + slot, lane)
            if run == 1:
                tVs, tVg = self.source(tma_v, sV, mV, k0, head, BLOCK_N, V_DIM)
                for n in cutlass.range(blocks, unroll=1):
                    s = it % STAGES
                    self.begin(bars, V_FULL, V_EMPTY, s, (it // STAGES) & 1, V_DIM, BLOCK_N)
                    cute.copy(tma_v, tVg[None, blocks - 1 - n, 0], tVs[None, s], tma_bar_ptr=bars + V_FULL + s,
                              cache_policy=Int64(EVICT_LAST))
                    it = it + 1
            tile = tile + 1

    # ---------------------------------------------------------------- math
    @cute.jit
    def wait_k(self, c, it):
        cute.arch.mbarrier_wait(c["bars"] + K_FULL + it % STAGES, (it // STAGES) & 1)

    @cute.jit
    def wait_v(self, c, it):
        cute.arch.mbarrier_wait(c["bars"] + V_FULL + it % STAGES, (it // STAGES) & 1)

    @cute.jit
    def free(self, c, which: cutlass.Constexpr, it):
        arrive(c["bars"] + which + it % STAGES, c["lane"])

    @cute.jit
    def free_q(self, c):
        """Q's buffer may be loaded anew. With Q in registers, not before a product has read them: mbarrier_arrive does
        not wait for the reads of ldmatrix, and the next tile's rows could overtake them."""
        arrive(c["bars"] + Q_EMPTY + c["wg"], c["lane"])

    @cute.jit
    def turn_wait(self, c):
        if const_expr(ORDER):
            cute.arch.barrier(barrier_id=TURN + c["wg"], number_of_threads=256)

    @cute.jit
    def turn_pass(self, c):
        if const_expr(ORDER):
            cute.arch.barrier_arrive(barrier_id=TURN + (c["wg"] ^ 1), number_of_threads=256)

    @cute.jit
    def qk(self, op: cutlass.Constexpr, S, q, k):
        """Issue S = Q K^T (one commit group). q: fragments per chunk of columns, in registers or shared memory."""
        warpgroup.fence()
        for i in cutlass.range_constexpr(Q_CHUNKS):
            issue(op, S, q[i], k[None, None, (None, i)], i == 0)
        warpgroup.commit_group()

    @cute.jit
    def pv(self, op: cutlass.Constexpr, O, P, v):
        """Issue O += P V (one commit group)."""
        warpgroup.fence()
        issue(op, O, P, v, False)
        warpgroup.commit_group()

    @cute.jit
    def zero_tail(self, c, sV, it, valid):
        """Zero the V rows behind the last key of the request (they may hold NaN). Each warpgroup does so for itself."""
        s = it % STAGES
        self.wait_v(c, it)
        for row in cutlass.range(cutlass.max(valid, 0) + c["t"] // 32, BLOCK_N, 4, unroll=1):
            for j in cutlass.range_constexpr(V_DIM // 32):
                sV[row, c["lane"] + 32 * j, s] = ELEM(0.0)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=TAIL + c["wg"], number_of_threads=128)

    @cute.jit
    def half_block(self, c, O, m, L, limit, token, it, c_log2):
        """The last block when only its first half is visible to this warpgroup."""
        S = cute.make_rmem_tensor(c["shape_s_half"], Float32)
        P = cute.make_rmem_tensor(c["shape_p_half"], ELEM)
        scale = cute.make_rmem_tensor((2,), Float32)
        self.wait_k(c, it)
        self.turn_wait(c)  # one turn, as the block would have taken in the loop: every warpgroup takes blocks - 1
        self.qk(c["op_half"], S, c["q"], c["k_half"][None, None, None, it % STAGES])
        self.turn_pass(c)
        warpgroup.wait_group(0)
        self.free(c, K_EMPTY, it)
        self.free_q(c)
        mask(S, limit, token, c["lane"])
        move(S, m, L, scale, c_log2)
        exponentials(S, m, L, c_log2)
        to_p(S, P)
        self.wait_v(c, it)
        self.pv(c["op_pv"], O, P, c["v_half"][None, None, None, it % STAGES])
        warpgroup.wait_group(0)
        self.free(c, V_EMPTY, it)

    @cute.jit
    def blocks(self, c, S, O, P, m, L, limit, limit_min, lk, it, token, left, holds_q, c_log2):
        """The whole blocks of a tile, from the one at `token` on down. Returns the ring position."""
        lane = c["lane"]
        scale = cute.make_rmem_tensor((2,), Float32)
        self.wait_k(c, it)
        self.qk(c["op_qk"], S, c["q"], c["k"][None, None, None, it % STAGES])
        warpgroup.wait_group(0)
        self.free(c, K_EMPTY, it)
        if const_expr(Q_REGS):
            if holds_q:
                self.free_q(c)
        if const_expr(HALF_BLOCK):  # O is live: two separate branches, or ptxas spills
            if token + BLOCK_N > lk:
                self.zero_tail(c, c["sV"], it, lk - token)
            if token + BLOCK_N > limit_min:
                mask(S, limit, token, lane)
        elif token + BLOCK_N > limit_min:
            mask(S, limit, token, lane)
            if token + BLOCK_N > lk:
                self.zero_tail(c, c["sV"], it, lk - token)
        move(S, m, L, scale, c_log2)
        exponentials(S, m, L, c_log2)
        inverse = cute.arch.rcp_approx(c_log2)
        moved = cutlass.Boolean(True)
        for i in cutlass.range(left - 1, unroll=1):
            token = token - BLOCK_N
            self.wait_k(c, it + 1)  # ends a basic block: the wait for PV may not be hoisted above the softmax
            warpgroup.wait_group(0)
            if i > 0:
                self.free(c, V_EMPTY, it - 1)
            to_p(S, P)
            rescale(O, scale, moved)
            self.wait_v(c, it)  # ends a basic block: the rescale may not sink between QK and PV
            self.turn_wait(c)
            self.qk(c["op_qk"], S, c["q"], c["k"][None, None, None, (it + 1) % STAGES])
            self.pv(c["op_pv"], O, P, c["v"][None, None, None, it % STAGES])
            self.turn_pass(c)
            warpgroup.wait_group(1)
            self.free(c, K_EMPTY, it + 1)
            if token + BLOCK_N > limit_min:
                mask(S, limit, token, lane)
            moved = softmax(S, m, L, scale, c_log2, inverse)
            it = it + 1
        self.wait_v(c, it)
        warpgroup.wait_group(0)
        if left > 1:
            self.free(c, V_EMPTY, it - 1)
        to_p(S, P)
        rescale(O, scale, moved)
        self.pv(c["op_pv"], O, P, c["v"][None, None, None, it % STAGES])
        warpgroup.wait_group(0)
        self.free(c, V_EMPTY, it)
        return it + 1

    @cute.jit
    def tile(self, c, S, O, P, m, L, it, tile, c_log2):
        """All blocks of one tile: O, m, L hold the result before it is divided. Returns the ring position."""
        bars, wg, sTile = c["bars"], c["wg"], c["sTile"]
        slot = tile & 1
        blocks = uniform(sTile[T_BLOCKS, slot])
        lk = uniform(sTile[T_LK, slot])
        row = uniform(sTile[T_ROW0, slot]) + wg * 64
        limit = cute.make_rmem_tensor((2,), Int32)
        limit_min = lk  # of the rows of this warpgroup
        limit[0] = lk
        limit[1] = lk
        if const_expr(CAUSAL):
            row = row + (lk - uniform(sTile[T_LQ, slot]) + 1)
            limit_min = cutlass.min(lk, row)
            for r in cutlass.range_constexpr(2):
                limit[r] = cutlass.min(lk, row + c["row"] + 8 * r)
        O.fill(0.0)
        m.fill(M_START)
        L.fill(0.0)
        cute.arch.mbarrier_wait(bars + Q_FULL + wg, tile & 1)
        if const_expr(Q_REGS):
            for i in cutlass.range_constexpr(Q_CHUNKS):
                cute.copy(c["ldsm"], c["ldsm_t"].partition_S(c["q_smem"][i]), c["ldsm_t"].retile(c["q"][i]))
        token = (blocks - 1) * BLOCK_N
        left = blocks
        holds_q = cutlass.Boolean(True)
        if const_expr(HALF_BLOCK):
            middle = token + BLOCK_N // 2
            if middle >= row + 63 and middle <= lk and (blocks > 1 or const_expr(not ORDER)):
                if token + BLOCK_N > lk:
                    self.zero_tail(c, c["sV"], it, lk - token)
                self.half_block(c, O, m, L, limit, token, it, c_log2)
                holds_q = cutlass.Boolean(False)
                it = it + 1
                token = token - BLOCK_N
                left = left - 1
        if left > 0:
            it = self.blocks(c, S, O, P, m, L, limit, limit_min, lk, it, token, left, holds_q, c_log2)
        if const_expr(not Q_REGS):
            self.free_q(c)
        return it

    @cute.jit
    def epilogue(self, c, O, m, L, tile, out, lse, flags):
        """O / L to global memory, after the record of the tile is free for the next one."""
        lane, sTile = c["lane"], c["sTile"]
        slot = tile & 1
        row = sTile[T_ROW0, slot] + c["wg"] * 64 + c["row"]
        q0 = sTile[T_Q0, slot]
        lq = sTile[T_LQ, slot]
        head = sTile[T_HEAD, slot]
        cute.arch.sync_warp()
        arrive(c["bars"] + T_EMPTY + slot, lane)
        store_rows(O, m, L, out, lse, flags, q0, row, lq, head, lane, ELEM)

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        mQ: cute.Tensor,
        tma_k: cute.CopyAtom,
        mK: cute.Tensor,
        tma_pe: cute.CopyAtom,
        mPe: cute.Tensor,
        tma_v: cute.CopyAtom,
        mV: cute.Tensor,
        cu_q: cute.Tensor,
        cu_k: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        counters: cute.Tensor,
        c_log2: Float32,
        flags: Int32,
        group: Int32,
        mma_qk: cute.TiledMma,
        mma_half: cute.TiledMma,
        mma_pv: cute.TiledMma,
    ):
        tid, _, _ = cute.arch.thread_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = tid % 32
        smem = SmemAllocator()

        def tiles(rows, columns, count):
            layout = cute.tile_to_shape(smem_atom(ELEM), (rows, columns, count), order=(0, 1, 2))
            return smem.allocate_tensor(ELEM, layout.outer, 1024, swizzle=layout.inner)

        sQ = tiles(64, Q_DIM, WGS)
        sK = tiles(BLOCK_N, Q_DIM, STAGES)
        sV = tiles(BLOCK_N, V_DIM, STAGES)
        sTile = smem.allocate_tensor(Int32, cute.make_layout((8, 2)), 16)
        bars = smem.allocate_array(Int64, BARRIERS)
        if warp_idx == 0:
            for tma in (tma_q, tma_k, tma_pe, tma_v):
                cpasync.prefetch_descriptor(tma)
            with cute.arch.elect_one():
                for first, count, arrivals in (
                    (Q_FULL, WGS, 1), (Q_EMPTY, WGS, 4),
                    (K_FULL, STAGES, 1), (K_EMPTY, STAGES, 4 * WGS),
                    (V_FULL, STAGES, 1), (V_EMPTY, STAGES, 4 * WGS),
                    (T_FULL, 2, 1), (T_EMPTY, 2, 4 * WGS + 1),
                ):
                    for i in cutlass.range_constexpr(count):
                        cute.arch.mbarrier_init(bars + first + i, arrivals)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if warp_idx < 4:
            cute.arch.setmaxregister_decrease(REGS_LOAD)
            if warp_idx == 0:
                # K by chunk of columns: (BLOCK_N, CHUNK, chunk, stage)
                by_chunk = cute.local_tile(sK, (BLOCK_N, CHUNK), (0, None, None))
                self.produce_k(bars, sTile, sQ, by_chunk, tma_q, mQ, tma_k, mK, tma_pe, mPe, cu_q, cu_k, counters,
                               group, out.shape[1], lane)
            if warp_idx == 1:
                self.produce_v(bars, sTile, sV, tma_v, mV, lane)
        else:
            cute.arch.setmaxregister_increase(REGS_MATH)
            wg = warp_idx // 4 - 1
            t = tid % 128
            thr_qk = mma_qk.get_slice(t)
            thr_pv = mma_pv.get_slice(t)
            sVt = cute.composition(sV, cute.make_ordered_layout((V_DIM, BLOCK_N, STAGES), order=(1, 0, 2)))
            c = dict(
                bars=bars, sTile=sTile, sV=sV, lane=lane, wg=wg, t=t, row=(t // 32) * 16 + lane // 4,
                k=thr_qk.make_fragment_B(thr_qk.partition_B(sK)), v=thr_pv.make_fragment_B(thr_pv.partition_B(sVt)),
                op_qk=mma_qk.op, op_pv=mma_pv.op,
            )
            if const_expr(Q_REGS):
                ldsm = cute.make_tiled_copy_A(cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), ELEM), mma_qk)
                c.update(
                    ldsm=ldsm, ldsm_t=ldsm.get_slice(t),
                    q=[cute.make_rmem_tensor(((2, 2, 2), 1, 4), ELEM) for _ in range(Q_CHUNKS)],
                    q_smem=[cute.local_tile(sQ[None, None, wg], (64, CHUNK), (0, i)) for i in range(Q_CHUNKS)],
                )
            else:
                fragment = thr_qk.make_fragment_A(thr_qk.partition_A(sQ))[None, None, None, wg]
                c.update(q=[fragment[None, None, (None, i)] for i in range(Q_CHUNKS)])
            if const_expr(HALF_BLOCK):
                thr_half = mma_half.get_slice(t)
                columns = BLOCK_N // 2
                first_k = cute.local_tile(sK, (columns, Q_DIM, STAGES), (0, 0, 0))
                first_v = cute.local_tile(sVt, (V_DIM, columns, STAGES), (0, 0, 0))
                c.update(
                    op_half=mma_half.op, k_half=thr_half.make_fragment_B(thr_half.partition_B(first_k)),
                    v_half=thr_pv.make_fragment_B(thr_pv.partition_B(first_v)),
                    shape_s_half=thr_half.partition_shape_C((64, columns)),
                    shape_p_half=thr_pv.partition_shape_A((64, columns)),
                )
            O = cute.make_rmem_tensor(thr_pv.partition_shape_C((64, V_DIM)), Float32)
            S = cute.make_rmem_tensor(thr_qk.partition_shape_C((64, BLOCK_N)), Float32)
            P = cute.make_rmem_tensor(thr_pv.partition_shape_A((64, BLOCK_N)), ELEM)
            m = cute.make_rmem_tensor((2,), Float32)
            L = cute.make_rmem_tensor((2,), Float32)
            it = Int32(0)
            tile = Int32(0)
            if const_expr(ORDER):
                if wg == 1:
                    self.turn_pass(c)
            cute.arch.mbarrier_wait(bars + T_FULL, 0)
            run = sTile[T_VALID, 0]
            while run == 1:
                it = self.tile(c, S, O, P, m, L, it, tile, c_log2)
                self.epilogue(c, O, m, L, tile, out, lse, flags)
                tile = tile + 1
                cute.arch.mbarrier_wait(bars + T_FULL + (tile & 1), (tile >> 1) & 1)
                run = sTile[T_VALID, tile & 1]
            if const_expr(ORDER):
                if wg == 0:
                    self.turn_wait(c)


def entry():
    """What to compile: the host function and its fake arguments."""
    return MlaPrefill(), prefill_arguments(ELEM, Q_DIM, V_DIM)
