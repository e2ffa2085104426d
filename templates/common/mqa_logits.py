"""DSA indexer logits with e4m3 wgmma:  out[i, j] = k_scale[j] * sum_h max(q[i, h] . k[j], 0) * weights[i, h]

One kernel class and two ways to find K: ragged windows over flat rows, and the pages of a block table.

Tiling. K rows are the M of the MMA (64 a warpgroup and step), and `tokens` query rows times all heads its N (128 or
256). So the weights stay in registers for a whole tile of queries, and the sum over heads stays inside a quad of lanes:
one max and one FMA a product, then a transposing butterfly over 4 lanes, the scale of K, and a plain store.

    warps 0 .. 4G - 1    G math warpgroups, each 64 of the 64 G rows of K of a stage
    warp  4G             loads stages of K (rows and scales), and tiles of q with their work item (tile, first block of
                         K, blocks)
    warps 4G .. 4G + 3   at first: prefix sum over all tiles, from which each CTA takes its equal share of all blocks
                         (no metadata from the host, no scratch); then warps 4G + 1 .. fill what "clean" wants filled

    wg 0    | wgmma s | reduce s      | wgmma s+1 |              ordered: named barriers pass the tensor core round the
    wg 1              | wgmma s       | reduce s  | wgmma s+1    warpgroups, one multiplies while the others reduce
    finish  the lane sums and stores of a step run under the next step's wgmma

A cell is always computed by one CTA in one order: the bits do not depend on the number of CTAs.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator

from common.fp8_tiles import box, ring, tiled_mma
from common.sm90 import issue
from common.warp import warp_inclusive_sum

DIM, PAGE = 128, 64
BAR_SPLIT, BAR_ORDER = 1, 3  # named barriers; from BAR_ORDER on one for each math warpgroup
REGISTERS = {2: (232, 40), 4: (112, 32)}  # of math and other warps, by math warpgroups


@cute.jit
def landed(x: Float32):
    """Wait until x has come from shared memory: mbarrier_arrive does not, and its buffer may then be loaded anew."""
    cute.arch.inline_ptx(
        "{{ .reg .pred never; setp.eq.b32 never, {$r0}, -1; @never fence.proxy.async.shared::cta; }}",
        read_only_args=[x],
    )


class MqaLogits:
    """heads: of q. tokens: query rows of a tile. groups: math warpgroups. stages, q_stages: of the rings. store: which
    cells are written: "tiles" (whole blocks of K), "clean" (all columns, -inf outside of the windows) or "compressed"
    (cells of the window alone, at column j - start). hint: L2 policy for K, or 0."""

    def __init__(self, heads, tokens, groups, stages, q_stages, paged, ordered, store="tiles", hint=0):
        self.heads, self.tokens, self.groups, self.stages, self.q_stages = heads, tokens, groups, stages, q_stages
        self.paged, self.ordered, self.store, self.hint = paged, ordered, store, hint
        self.n = tokens * heads
        self.rows = 64 * groups
        self.clean, self.windows = store == "clean", store != "tiles"
        self.registers = REGISTERS[groups]
        self.unit = PAGE if paged else self.rows  # granularity of the split over CTAs
        assert self.n in (32, 64, 128, 256) and store in ("tiles", "clean", "compressed")
        assert not (paged and (self.windows or ordered)) and not (self.clean and groups != 2)

    # ---------------------------------------------------------------- host
    @cute.jit
    def launch(self, q, k, scale, weights, x0, x1, out, ctas, stream):
        """q: [rows * heads, 128]; k: [N, 128] or, paged, [64, 128, pages]; scale: [N] or [64, pages]; weights: [rows,
        heads]; x0, x1: start and end of the windows [rows], or, paged, lengths [requests] and block table."""
        load = cpasync.CopyBulkTensorTileG2SOp()
        k_rows = PAGE if const_expr(self.paged) else self.rows
        tma_q, mQ = cpasync.make_tiled_tma_atom(load, q, box(self.n, DIM), (self.n, DIM))
        turned = cute.make_tensor(weights.iterator, cute.select(weights.layout, mode=[1, 0]))
        shape_w = (self.heads, self.tokens)
        tma_w, mW = cpasync.make_tiled_tma_atom(load, turned, cute.make_layout(shape_w), shape_w)
        tma_k, mK = cpasync.make_tiled_tma_atom(load, k, box(k_rows, DIM), (k_rows, DIM))
        shape_s = (PAGE, 1) if const_expr(self.paged) else (self.rows,)
        tma_s, mS = cpasync.make_tiled_tma_atom(load, scale, cute.make_layout(shape_s), shape_s)
        self.kernel(tma_q, mQ, tma_w, mW, tma_k, mK, tma_s, mS, x0, x1, out, tiled_mma(self.n)).launch(
            grid=[ctas, 1, 1],
            block=[128 * (self.groups + 1), 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )

    # ---------------------------------------------------------------- device
    @cute.jit
    def blocks(self, tile, x0, x1, limit):
        """First block of K and number of blocks of a tile. limit: tokens that exist, or that out has room for."""
        first = Int32(0)
        n = Int32(0)
        if const_expr(self.paged):
            n = (cutlass.max(cutlass.min(x0[tile], limit), 0) + (PAGE - 1)) // PAGE
        else:
            low = Int32(0x3FFFFFFF)
            high = Int32(0)
            for t in cutlass.range_constexpr(self.tokens):
                i = cutlass.min(tile * self.tokens + t, x0.shape[0] - 1)
                start = cutlass.max(x0[i], 0)
                end = cutlass.min(x1[i], limit)
                low = cutlass.min(low, start) if end > start else low
                high = cutlass.max(high, end) if end > start else high
            first = low // self.rows
            n = cutlass.max((high + (self.rows - 1)) // self.rows - first, 0)
        return first, n

    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        mQ: cute.Tensor,
        tma_w: cute.CopyAtom,
        mW: cute.Tensor,
        tma_k: cute.CopyAtom,
        mK: cute.Tensor,
        tma_s: cute.CopyAtom,
        mS: cute.Tensor,
        x0: cute.Tensor,
        x1: cute.Tensor,
        mOut: cute.Tensor,
        mma: cute.TiledMma,
    ):
        H, T, G, S, QS, N = self.heads, self.tokens, self.groups, self.stages, self.q_stages, self.n
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = SmemAllocator()
        layout_q, layout_k = ring(N, QS), ring(self.rows, S)
        sQ = smem.allocate_tensor(Float8E4M3FN, layout_q.outer, 1024, swizzle=layout_q.inner)
        sK = smem.allocate_tensor(Float8E4M3FN, layout_k.outer, 1024, swizzle=layout_k.inner)
        sW = smem.allocate_tensor(Float32, cute.make_layout((H, T, QS)), 128)
        sS = smem.allocate_tensor(Float32, cute.make_layout((self.rows, S)), 128)
        sItem = smem.allocate_tensor(Int32, cute.make_layout((4, QS)), 16)
        sSplit = smem.allocate_tensor(Int32, cute.make_layout((8,)), 16)
        full, empty = smem.allocate_array(Int64, S), smem.allocate_array(Int64, S)
        q_full, q_empty = smem.allocate_array(Int64, QS), smem.allocate_array(Int64, QS)
        if warp_idx == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(S):
                    cute.arch.mbarrier_init(full + i, 1)
                    cute.arch.mbarrier_init(empty + i, 4 * G)
                for i in cutlass.range_constexpr(QS):
                    cute.arch.mbarrier_init(q_full + i, 1)
                    cute.arch.mbarrier_init(q_empty + i, 4 * G)
            cute.arch.mbarrier_init_fence()
        if warp_idx == 4 * G:
            for tma in (tma_k, tma_s, tma_q, tma_w):
                cpasync.prefetch_descriptor(tma)
        limit = mK.shape[0]
        if const_expr(self.paged):
            limit = cutlass.min(mOut.shape[1] // PAGE, x1.shape[1]) * PAGE
        tiles = x0.shape[0] if const_expr(self.paged) else cute.ceil_div(x0.shape[0], T)
        cute.arch.griddepcontrol_wait()
        left = Int32(0)
        if warp_idx >= 4 * G:  # beside the barriers' initialisation: until it is done, nothing else can begin
            left = self.split(sSplit, x0, x1, limit, tiles, tid - 128 * G, cta, ctas)
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_launch_dependents()
        if warp_idx >= 4 * G:
            cute.arch.setmaxregister_decrease(self.registers[1])
            if warp_idx == 4 * G:
                self.load(
                    tma_q, mQ, tma_w, mW, tma_k, mK, tma_s, mS, sQ, sK, sW, sS, sItem, sSplit, full, empty, q_full,
                    q_empty, x0, x1, limit, left,
                )
            elif const_expr(self.clean):
                self.fill(x0, x1, mOut, limit, tiles, tid - 128 * G - 32, cta, ctas)
        else:
            cute.arch.setmaxregister_increase(self.registers[0])
            self.multiply(
                mma, sQ, sK, sW, sS, sItem, full, empty, q_full, q_empty, x0, x1, mK.shape[0], mOut, tid, warp_idx
            )

    @cute.jit
    def split(self, sSplit, x0, x1, limit, tiles, t, cta, ctas):
        """Where this CTA's equal share of all blocks begins, into sSplit[4:6] (tile, block of it); returns its
        blocks."""
        lane = t % 32
        w = t // 32
        each = cute.ceil_div(tiles, 128)
        t0 = t * each
        t1 = cutlass.min(t0 + each, tiles)
        if const_expr(self.paged):  # the table is in L2 by the time the split is known
            word = (Int64(cta) * 128 + t) * 32
            if word < Int64(tiles) * x1.stride[0]:
                cute.arch.inline_ptx("prefetch.global.L2 [{$r0}];", read_only_args=[(x1.iterator + word).to_llvm_ptr()])
        mine = Int32(0)
        for i in cutlass.range(t0, t1, 1, unroll=4):
            _, n = self.blocks(i, x0, x1, limit)
            mine += n
        inclusive = warp_inclusive_sum(mine, lane)
        if lane == 31:
            sSplit[w] = inclusive
        cute.arch.barrier(barrier_id=BAR_SPLIT, number_of_threads=128)
        total = Int32(0)
        before = inclusive - mine
        for i in cutlass.range_constexpr(4):
            v = sSplit[i]
            total += v
            before = before + (v if w > i else Int32(0))
        share = total // ctas
        rest = total - share * ctas
        low = cta * share + cutlass.min(cta, rest)
        if before <= low and low < before + mine:
            at = low - before
            for i in cutlass.range(t0, t1, 1, unroll=1):
                _, n = self.blocks(i, x0, x1, limit)
                if at >= 0 and at < n:
                    sSplit[4] = i
                    sSplit[5] = at
                at = at - n
        cute.arch.barrier(barrier_id=BAR_SPLIT, number_of_threads=128)
        return share + (Int32(1) if cta < rest else Int32(0))

    @cute.jit
    def load(
        self, tma_q, mQ, tma_w, mW, tma_k, mK, tma_s, mS, sQ, sK, sW, sS, sItem, sSplit, full, empty, q_full, q_empty,
        x0, x1, limit, left,
    ):
        """The load warp: K stage by stage, and q with its work item whenever a tile begins. No blocks: the end."""
        H, T, G, S, QS, N = self.heads, self.tokens, self.groups, self.stages, self.q_stages, self.n
        lane = cute.arch.lane_idx()
        one = cute.make_layout(1)
        hint = dict(cache_policy=Int64(self.hint)) if self.hint else {}

        def tile_of(x, shape, at):
            """Tiles of a tensor, the coordinates within a tile as one mode."""
            return cute.group_modes(cute.local_tile(x, shape, at), 0, 2)

        tQsQ, tQgQ = cpasync.tma_partition(tma_q, 0, one, cute.group_modes(sQ, 0, 2), tile_of(mQ, (N, DIM), (None, 0)))
        tWsW, tWgW = cpasync.tma_partition(tma_w, 0, one, cute.group_modes(sW, 0, 2), tile_of(mW, (H, T), (0, None)))
        if const_expr(self.paged):
            tKsK, tKgK = cpasync.tma_partition(
                tma_k, 0, one, tile_of(sK, (PAGE, DIM), (None, 0, None)), tile_of(mK, (PAGE, DIM), (0, 0, None))
            )
            sPages = cute.make_tensor(sS.iterator, cute.make_layout((PAGE, 1, G, S), stride=(1, 0, PAGE, self.rows)))
            tSsS, tSgS = cpasync.tma_partition(
                tma_s, 0, one, cute.group_modes(sPages, 0, 2), tile_of(mS, (PAGE, 1), (0, None))
            )
        else:
            tKsK, tKgK = cpasync.tma_partition(
                tma_k, 0, one, cute.group_modes(sK, 0, 2), tile_of(mK, (self.rows, DIM), (None, 0))
            )
            tSsS, tSgS = cpasync.tma_partition(
                tma_s, 0, one, cute.group_modes(sS, 0, 1),
                cute.group_modes(cute.local_tile(mS, (self.rows,), (None,)), 0, 1),
            )
        tile = sSplit[4]
        offset = sSplit[5]
        s, phase = Int32(0), Int32(1)
        qs, q_phase = Int32(0), Int32(1)
        while left > 0:
            first, n = self.blocks(tile, x0, x1, limit)
            take = cutlass.min(n - offset, left)
            if take > 0:
                if const_expr(self.paged):  # on their way while q is asked for
                    last = offset + take - 1
                    table = x1.iterator + Int64(tile) * x1.stride[0]
                    pages = (table + cutlass.min(offset + lane, last)).load()
                    more = (table + cutlass.min(offset + 32 + lane, last)).load()
                cute.arch.mbarrier_wait(q_empty + qs, q_phase)
                with cute.arch.elect_one():
                    sItem[0, qs] = tile
                    sItem[1, qs] = first + offset
                    sItem[2, qs] = take
                    cute.arch.mbarrier_arrive_and_expect_tx(q_full + qs, N * DIM + 4 * N)
                cute.arch.sync_warp()
                cute.copy(tma_q, tQgQ[None, tile], tQsQ[None, qs], tma_bar_ptr=q_full + qs)
                cute.copy(tma_w, tWgW[None, tile], tWsW[None, qs], tma_bar_ptr=q_full + qs)
                qs, q_phase = self.advance(qs, q_phase, QS)
                if const_expr(self.paged):
                    for p in cutlass.range(0, take, G, unroll=1):
                        if p % 32 == 0 and p > 0:
                            pages = more
                            more = (table + cutlass.min(offset + p + 32 + lane, last)).load()
                        have = cutlass.min(take - p, G)  # the last stage may hold fewer pages
                        cute.arch.mbarrier_wait(empty + s, phase)
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive_and_expect_tx(full + s, have * (PAGE * DIM + 4 * PAGE))
                        for j in cutlass.range_constexpr(G):
                            if j < have:
                                page = cute.arch.make_warp_uniform(cute.arch.shuffle_sync(pages, (p + j) % 32))
                                cute.copy(tma_k, tKgK[None, page], tKsK[None, j, s], tma_bar_ptr=full + s, **hint)
                                cute.copy(tma_s, tSgS[None, page], tSsS[None, j, s], tma_bar_ptr=full + s, **hint)
                        s, phase = self.advance(s, phase, S)
                else:
                    for p in cutlass.range(take, unroll=1):
                        cute.arch.mbarrier_wait(empty + s, phase)
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive_and_expect_tx(full + s, self.rows * (DIM + 4))
                        cute.copy(tma_k, tKgK[None, first + offset + p], tKsK[None, s], tma_bar_ptr=full + s, **hint)
                        cute.copy(tma_s, tSgS[None, first + offset + p], tSsS[None, s], tma_bar_ptr=full + s, **hint)
                        s, phase = self.advance(s, phase, S)
                left = left - take
            offset = Int32(0)
            tile = tile + 1
        cute.arch.mbarrier_wait(q_empty + qs, q_phase)
        with cute.arch.elect_one():
            sItem[2, qs] = 0
            cute.arch.mbarrier_arrive(q_full + qs)

    @cute.jit
    def fill(self, x0, x1, mOut, limit, tiles, t, cta, ctas):
        """-inf in the columns that no block of a tile covers; t: thread of 96."""
        T = self.tokens
        for tile in cutlass.range(cta, tiles, ctas, unroll=1):
            first, n = self.blocks(tile, x0, x1, limit)
            head = cutlass.min(first * self.rows, limit) if n > 0 else limit
            tail = (first + n) * self.rows if n > 0 else limit
            for r in cutlass.range(tile * T, cutlass.min(tile * T + T, x0.shape[0]), 1, unroll=1):
                line = mOut.iterator + Int64(r) * mOut.stride[0]
                for j in cutlass.range(t, head, 96, unroll=1):
                    (line + j).store(-Float32.inf)
                for j in cutlass.range(tail + t, limit, 96, unroll=1):
                    (line + j).store(-Float32.inf)

    @cute.jit
    def multiply(self, mma, sQ, sK, sW, sS, sItem, full, empty, q_full, q_empty, x0, x1, limit, mOut, tid, warp_idx):
        """A math warpgroup: its 64 rows of every stage."""
        H, T, G, S, QS, N = self.heads, self.tokens, self.groups, self.stages, self.q_stages, self.n
        wg = cute.arch.make_warp_uniform(warp_idx // 4)
        t = tid % 128
        lane = tid % 32
        quad = lane % 4
        thread = mma.get_slice(t)
        tCsK = thread.make_fragment_A(thread.partition_A(cute.local_tile(sK, (64, DIM), (wg, 0, None))))
        tCsQ = thread.make_fragment_B(thread.partition_B(sQ))
        rAcc = cute.make_rmem_tensor(thread.partition_shape_C((64, N)), Float32)
        rW = cute.make_rmem_tensor((2, H // 8, T), Float32)
        PER_LANE = max(2 * T // 4, 1)  # of the 2 T sums of a thread (row half + 2 * token), what a lane ends up with
        half = Int32(0)
        token0 = Int32(0)
        if const_expr(T == 1):
            half = quad // 2
        elif const_expr(T == 2):
            half = quad % 2
            token0 = quad // 2
        else:
            token0 = quad * (PER_LANE // 2)
        row = wg * 64 + (t // 32) * 16 + lane // 4 + 8 * half
        rScale = cute.make_rmem_tensor((2,), Float32)
        rSum = cute.make_rmem_tensor((2 * T,), Float32)
        rWindow = cute.make_rmem_tensor((2, max(PER_LANE // 2, 1)), Int32)  # of this lane's tokens
        rScale.fill(0.0)
        rSum.fill(0.0)
        rWindow.fill(0)
        s, phase = Int32(0), Int32(0)
        qs, q_phase = Int32(0), Int32(0)
        if const_expr(self.ordered):
            if wg == G - 1:
                cute.arch.barrier_arrive(barrier_id=BAR_ORDER, number_of_threads=256)
        cute.arch.mbarrier_wait(q_full, 0)
        n = sItem[2, 0]
        while n > 0:
            token = sItem[0, qs] * T + token0
            column = sItem[1, qs] * self.unit + row
            for i in cutlass.range_constexpr(T):
                for j in cutlass.range_constexpr(H // 8):
                    for c in cutlass.range_constexpr(2):
                        rW[c, j, i] = sW[8 * j + 2 * quad + c, i, qs]
            dst = mOut.iterator + (Int64(token) * mOut.stride[0] + column)
            if const_expr(self.windows):
                for i in cutlass.range_constexpr(max(PER_LANE // 2, 1)):
                    own = cutlass.min(token + i, x0.shape[0] - 1)
                    rWindow[0, i] = x0[own]
                    rWindow[1, i] = cutlass.min(x1[own], limit)
            steps = n
            if const_expr(self.paged):
                steps = cute.ceil_div(n, G)
            cute.arch.mbarrier_wait(full + s, phase)
            for it in cutlass.range(steps, unroll=1):
                now = s
                if const_expr(self.ordered):
                    cute.arch.barrier(barrier_id=BAR_ORDER + wg, number_of_threads=256)
                warpgroup.fence()
                issue(mma.op, rAcc, tCsK[None, None, None, now], tCsQ[None, None, None, qs], True)
                warpgroup.commit_group()
                if const_expr(self.ordered):
                    cute.arch.barrier_arrive(barrier_id=BAR_ORDER + (wg + 1) % G, number_of_threads=256)
                # under the running product: the step before
                before = self.inside(n, it - 1, wg) and it > 0
                at = column + (it - 1) * self.rows
                self.finish(rSum, rScale, dst - self.rows, mOut, token, quad, before, rWindow, at)
                rScale[0] = sS[row, now]
                if const_expr(PER_LANE > 1):
                    rScale[1] = sS[row + 8, now]
                s, phase = self.advance(s, phase, S)
                if it + 1 < steps:
                    cute.arch.mbarrier_wait(full + s, phase)
                warpgroup.wait_group(0)
                for r in cutlass.range_constexpr(min(PER_LANE, 2)):
                    landed(rScale[r])
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(empty + now)
                self.sum_heads(rAcc, rW, rSum)
                dst = dst + self.rows
            last = self.inside(n, steps - 1, wg)
            end = column + (steps - 1) * self.rows
            self.finish(rSum, rScale, dst - self.rows, mOut, token, quad, last, rWindow, end)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(q_empty + qs)
            qs, q_phase = self.advance(qs, q_phase, QS)
            cute.arch.mbarrier_wait(q_full + qs, q_phase)
            n = sItem[2, qs]

    @cute.jit
    def inside(self, n, it, wg):
        """Paged: whether this warpgroup's page of step `it` is one of the work item (its last stage may be half
        full)."""
        if const_expr(self.paged):
            return it * self.groups + wg < n
        else:
            return it < n

    @cute.jit
    def sum_heads(self, rAcc, rW, rSum):
        """max(., 0), weight, sum over the heads of this lane: rSum[row half + 2 * token]."""
        J = self.heads // 8
        for j in cutlass.range_constexpr(J):
            for c in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(self.tokens):
                    for r in cutlass.range_constexpr(2):
                        a = cute.arch.fmax(rAcc[c + 2 * r + 4 * (i * J + j)], Float32(0.0))
                        if const_expr(j + c == 0):
                            rSum[r + 2 * i] = a * rW[c, j, i]
                        else:
                            rSum[r + 2 * i] = a * rW[c, j, i] + rSum[r + 2 * i]

    @cute.jit
    def finish(self, rSum, rScale, dst, mOut, token, quad, valid, rWindow, column):
        """Sum over the quad (transposing butterfly: each lane ends with its own part of the 2 T sums), scale, store."""
        T = self.tokens
        upper = quad >= 2
        odd = quad % 2 == 1
        rX = cute.make_rmem_tensor((T,), Float32)
        for i in cutlass.range_constexpr(T):
            keep = rSum[T + i] if upper else rSum[i]
            send = rSum[i] if upper else rSum[T + i]
            rX[i] = keep + cute.arch.shuffle_sync_bfly(send, offset=2)
        rY = cute.make_rmem_tensor((max(T // 2, 1),), Float32)
        if const_expr(T == 1):
            rY[0] = rX[0] + cute.arch.shuffle_sync_bfly(rX[0], offset=1)
        else:
            for i in cutlass.range_constexpr(T // 2):
                keep = rX[T // 2 + i] if odd else rX[i]
                send = rX[i] if odd else rX[T // 2 + i]
                rY[i] = keep + cute.arch.shuffle_sync_bfly(send, offset=1)
        for i in cutlass.range_constexpr(max(T // 2, 1)):
            z = rY[i] * rScale[i % 2]
            j = column + (i % 2) * 8
            ok = valid and token + i // 2 < mOut.shape[0]
            if const_expr(T == 1):
                ok = ok and quad % 2 == 0
            p = dst + (i % 2) * 8
            if const_expr(i >= 2):
                p = p + (i // 2) * mOut.stride[0]
            if const_expr(self.windows):
                within = j >= rWindow[0, i // 2] and j < rWindow[1, i // 2]
                if const_expr(self.clean):
                    z = z if within else -Float32.inf
                else:
                    ok = ok and within and j - rWindow[0, i // 2] < mOut.shape[1]
                    p = p - rWindow[0, i // 2]
            if ok:
                p.store(z)

    @cute.jit
    def advance(self, s, phase, n: cutlass.Constexpr):
        m = s + 1
        wrap = m == n
        return (Int32(0) if wrap else m), (phase ^ 1 if wrap else phase)
