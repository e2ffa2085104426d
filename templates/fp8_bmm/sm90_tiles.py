"""FP8 grouped matrix product with block scales for sm_90a: tokens as M, persistent tiles.

    out[g, t, n] = sum over kb of a_scale[g, kb, t] * b_scale[g, n / 128, kb] * (a[g, t, kb] . b[g, n, kb])

    a [G, M, K] e4m3, a_scale [G, K/128, >= M] fp32 (tokens innermost), b [G, N, K] e4m3, b_scale [G, N/128, K/128]
    fp32, out [G, M, N] bf16, any token and group stride. kb: blocks of 128 of K. The tensor core sums 128 products,
    every such sum is scaled and added in fp32 registers (the tensor core's own fp32 sums are not exact enough), rounded
    once.

Tiling. CTAs are persistent and take tiles of 128 tokens x 128 BLOCKS_N columns, columns fastest, then tokens, then
groups. Two warpgroups do the mathematics (WG0 and WG1). One warp asks for b, one for a and a_scale, one reads b_scale
(setmaxnreg 240 / 240 / 24). With BLOCKS_N = 2:

              n .......... +127 | +128 ...... +255
    tokens  +-------------------+------------------+       stage: A 16 KB, B 32 KB and 128 scales of A by TMA, and
       0-63 | WG0 acc[0]        | WG0 acc[1]       |              b_scale of each column block by a warp; STAGES of them
     64-127 | WG1 acc[0]        | WG1 acc[1]       |
            +-------------------+------------------+

Pipeline. A batch is 4 wgmma m64n128k32 into rTmp; then acc[i] += rTmp * scales. What counts is the number of
instructions beside the wgmma and these FFMA: the warpgroups fall into step by themselves, one promotes while the other
computes. Whatever is not promotion happens under a running batch: scales, waiting for the next stage, and the stores
of a finished tile. A block of a tile is stored under the batch behind its last one, which for the last block is the
first batch of the next tile:

    tensor core   A0 . B0 . A1 . B1 . A0'. B0'. ...          A = WG0, B = WG1, 0 and 1 = column block, ' = next stage
    WG0           |  promote 0 | promote 1 | ...
    WG1               |  promote 0 | promote 1 | ...
    end of tile   ... A1(last) [store 0] promote 1 | A0(next tile) [store 1] promote 0 | ...

Stores go through buffers of 64 x 64 (stmatrix, TMA) and are clipped. A ragged tile loads its tokens by SLICEs, and none
that is behind M: TMA takes longer for rows behind the end than for others. What the others are in shared memory does
not matter, since a token's products are only its own.
Launched with PDL; it lets the next one start when its last weights are under way. With `early` the first weights and
b_scale are loaded before the kernel in front has ended: the caller promises that it does not write them.

Cannot: K that 128 or N that 128 BLOCKS_N does not divide; out of another type; packed scales.
"""

# --- constants: replaced when rendered ---
BLOCKS_N = 2
STAGES = 4
# --- end of constants ---

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator

from common.fp8_bmm import fake_args, outer_last
from common.fp8_tiles import box, ring, tiled_mma
from common.sm90 import issue

BLOCK = 128  # of K, and of N for b_scale
WARPGROUPS = 2
TILE_M, TILE_N = 64 * WARPGROUPS, BLOCK * BLOCKS_N
SLICE = 32  # tokens that one instruction loads in a ragged tile: rows behind M would take longer than others
SLICES = TILE_M // SLICE
FEEDER = 4 * WARPGROUPS  # the first warp behind those that do the mathematics
REGISTERS_MATH, REGISTERS_FEEDER = 240, 24
BAR_STORE, BAR_READY = 1, 3  # named barriers: the first two one per warpgroup
READY_THREADS = 32 * (FEEDER + 3)
WINDOW = 32  # blocks of K whose b_scale the warp that reads them holds
BUFFERS = BLOCK // 64  # of 64 columns of the result, for each warpgroup

assert BLOCKS_N in (1, 2)


class Fp8Bmm:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(
        self,
        a: cute.Tensor,
        a_scale: cute.Tensor,
        b: cute.Tensor,
        b_scale: cute.Tensor,
        out: cute.Tensor,
        ctas: Int32,
        early: Int32,
        stream,
    ):
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        tma_a, mA = cpasync.make_tiled_tma_atom(load, outer_last(a), box(TILE_M, BLOCK), (TILE_M, BLOCK))
        tma_r, mR = cpasync.make_tiled_tma_atom(load, outer_last(a), box(SLICE, BLOCK), (SLICE, BLOCK))
        tma_b, mB = cpasync.make_tiled_tma_atom(load, outer_last(b), box(TILE_N, BLOCK), (TILE_N, BLOCK))
        mS = cute.make_tensor(a_scale.iterator, cute.select(a_scale.layout, mode=[2, 1, 0]))
        tma_s, mS = cpasync.make_tiled_tma_atom(load, mS, cute.make_layout((TILE_M, 1)), (TILE_M, 1))
        tma_o, mO = cpasync.make_tiled_tma_atom(store, outer_last(out), box(64, 64, BFloat16), (64, 64))
        mma, mma_half = tiled_mma(BLOCK), tiled_mma(64)
        self.kernel(tma_a, mA, tma_r, mR, tma_b, mB, tma_s, mS, tma_o, mO, b_scale, early, mma, mma_half).launch(
            grid=[ctas, 1, 1], block=[128 * WARPGROUPS + 128, 1, 1], stream=stream, min_blocks_per_mp=1, use_pdl=True
        )

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        tma_a: cute.CopyAtom,
        mA: cute.Tensor,
        tma_r: cute.CopyAtom,
        mR: cute.Tensor,
        tma_b: cute.CopyAtom,
        mB: cute.Tensor,
        tma_s: cute.CopyAtom,
        mS: cute.Tensor,
        tma_o: cute.CopyAtom,
        mO: cute.Tensor,
        mBScale: cute.Tensor,
        early: Int32,
        mma: cute.TiledMma,
        mma_half: cute.TiledMma,
    ):
        tid, _, _ = cute.arch.thread_idx()
        first, _, _ = cute.arch.block_idx()
        stride, _, _ = cute.arch.grid_dim()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = SmemAllocator()
        layout_a, layout_b = ring(TILE_M, STAGES), ring(TILE_N, STAGES)
        layout_o = ring(64, BUFFERS * WARPGROUPS, BFloat16, 64)
        sA = smem.allocate_tensor(Float8E4M3FN, layout_a.outer, 1024, swizzle=layout_a.inner)
        sB = smem.allocate_tensor(Float8E4M3FN, layout_b.outer, 1024, swizzle=layout_b.inner)
        sO = smem.allocate_tensor(BFloat16, layout_o.outer, 1024, swizzle=layout_o.inner)
        sS = smem.allocate_tensor(Float32, cute.make_layout((TILE_M, 1, STAGES), stride=(1, 0, TILE_M)), 128)
        sF = smem.allocate_tensor(Float32, cute.make_layout((BLOCKS_N, STAGES)), 16)
        full = smem.allocate_array(Int64, STAGES)
        empty = smem.allocate_array(Int64, STAGES)
        if warp_idx == FEEDER:
            for tma in (tma_a, tma_b, tma_s, tma_o):
                cpasync.prefetch_descriptor(tma)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(STAGES):
                    cute.arch.mbarrier_init(full + i, 2)  # the feeder and the warp that reads b_scale
                    cute.arch.mbarrier_init(empty + i, 4 * WARPGROUPS)
            cute.arch.mbarrier_init_fence()
            cute.arch.barrier_arrive(barrier_id=BAR_READY, number_of_threads=READY_THREADS)  # and start to load at once
        elif warp_idx < FEEDER + 3:
            cute.arch.barrier(barrier_id=BAR_READY, number_of_threads=READY_THREADS)

        tiles_n = mB.shape[0] // TILE_N
        tiles_m = cute.ceil_div(mO.shape[0], TILE_M)
        grid = (tiles_n, tiles_m)
        total = tiles_n * tiles_m * mB.shape[2]
        blocks_k = mB.shape[1] // BLOCK
        mine = cutlass.max((total - first + stride - 1) // stride, 0)

        def tile_of(x, shape):
            """Tiles of a global tensor, the coordinates within a tile as one mode."""
            return cute.group_modes(cute.local_tile(x, shape, (None, None, None)), 0, 2)

        one = cute.make_layout(1)
        if warp_idx >= FEEDER:
            cute.arch.setmaxregister_decrease(REGISTERS_FEEDER)
            if warp_idx == FEEDER:
                gB = tile_of(mB, (TILE_N, BLOCK))
                tBsB, tBgB = cpasync.tma_partition(tma_b, 0, one, cute.group_modes(sB, 0, 2), gB)
                if early == 0:
                    cute.arch.griddepcontrol_wait()
                s, phase = Int32(0), Int32(1)
                for tile in cutlass.range(first, total, stride, unroll=1):
                    n, m, g = self.place(tile, grid)
                    bytes = TILE_N * BLOCK + 4 * TILE_M + self.slices(m, mO) * (SLICE * BLOCK)
                    for kb in cutlass.range(blocks_k, unroll=1):
                        cute.arch.mbarrier_wait(empty + s, phase)
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive_and_expect_tx(full + s, bytes)
                        cute.copy(tma_b, tBgB[None, n, kb, g], tBsB[None, s], tma_bar_ptr=full + s)
                        s, phase = self.advance(s, phase)
                cute.arch.griddepcontrol_launch_dependents()
            if warp_idx == FEEDER + 1:
                gA, gR, gS = tile_of(mA, (TILE_M, BLOCK)), tile_of(mR, (SLICE, BLOCK)), tile_of(mS, (TILE_M, 1))
                tAsA, tAgA = cpasync.tma_partition(tma_a, 0, one, cute.group_modes(sA, 0, 2), gA)
                sR = cute.local_tile(sA, (SLICE, BLOCK), (None, 0, None))
                tRsR, tRgR = cpasync.tma_partition(tma_r, 0, one, cute.group_modes(sR, 0, 2), gR)
                tSsS, tSgS = cpasync.tma_partition(tma_s, 0, one, cute.group_modes(sS, 0, 2), gS)
                cute.arch.griddepcontrol_wait()
                s, phase = Int32(0), Int32(1)
                for tile in cutlass.range(first, total, stride, unroll=1):
                    _, m, g = self.place(tile, grid)
                    slices = self.slices(m, mO)
                    for kb in cutlass.range(blocks_k, unroll=1):
                        cute.arch.mbarrier_wait(empty + s, phase)
                        if slices == SLICES:
                            cute.copy(tma_a, tAgA[None, m, kb, g], tAsA[None, s], tma_bar_ptr=full + s)
                        else:
                            for r in cutlass.range(slices, unroll=1):
                                src = tRgR[None, m * SLICES + r, kb, g]
                                cute.copy(tma_r, src, tRsR[None, r, s], tma_bar_ptr=full + s)
                        cute.copy(tma_s, tSgS[None, m, kb, g], tSsS[None, s], tma_bar_ptr=full + s)
                        s, phase = self.advance(s, phase)
            if warp_idx == FEEDER + 2:
                if early == 0:
                    cute.arch.griddepcontrol_wait()
                lane = tid % WINDOW
                windows = cute.ceil_div(blocks_k, WINDOW)
                rScaleB = cute.make_rmem_tensor((BLOCKS_N,), Float32)  # of block `lane` of the window
                rNext = cute.make_rmem_tensor((BLOCKS_N,), Float32)
                self.load_scales(rNext, mBScale, first, lane, total, grid, blocks_k)
                s, phase = Int32(0), Int32(1)
                for tile in cutlass.range(first, total, stride, unroll=1):
                    for w in cutlass.range(windows, unroll=1):
                        for i in cutlass.range_constexpr(BLOCKS_N):
                            rScaleB[i] = rNext[i]
                        # those of the next window at once: from DRAM they take longer than a few blocks
                        last = w == windows - 1
                        tile_next = tile + stride if last else tile
                        kb_next = lane if last else (w + 1) * WINDOW + lane
                        self.load_scales(rNext, mBScale, tile_next, kb_next, total, grid, blocks_k)
                        for j in cutlass.range(cutlass.min(blocks_k - w * WINDOW, WINDOW), unroll=1):
                            cute.arch.mbarrier_wait(empty + s, phase)
                            if lane == j:
                                for i in cutlass.range_constexpr(BLOCKS_N):
                                    sF[i, s] = rScaleB[i]
                                cute.arch.mbarrier_arrive(full + s)
                            s, phase = self.advance(s, phase)
        else:
            cute.arch.setmaxregister_increase(REGISTERS_MATH)
            wg = cute.arch.make_warp_uniform(warp_idx // 4)
            t = tid % 128
            sOw = cute.local_tile(sO, (64, 64, BUFFERS), (0, 0, wg))
            tOsO, tOgO = cpasync.tma_partition(tma_o, 0, one, cute.group_modes(sOw, 0, 2), tile_of(mO, (64, 64)))
            thread = mma.get_slice(t)
            tCsA = thread.make_fragment_A(thread.partition_A(cute.local_tile(sA, (64, BLOCK), (wg, 0, None))))
            tCsB = [
                thread.make_fragment_B(thread.partition_B(cute.local_tile(sB, (BLOCK, BLOCK), (i, 0, None))))
                for i in range(BLOCKS_N)
            ]
            acc = [cute.make_rmem_tensor(thread.partition_shape_C((64, BLOCK)), Float32) for _ in range(BLOCKS_N)]
            rTmp = cute.make_rmem_tensor(thread.partition_shape_C((64, BLOCK)), Float32)
            stmatrix = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), BFloat16), mma_half)
            c = dict(wg=wg, leader=warp_idx % 4 == 0, op=mma.op, tCsA=tCsA, tCsB=tCsB, grid=grid)
            c.update(tma_o=tma_o, tOsO=tOsO, tOgO=tOgO, sOw=sOw, stmatrix=stmatrix.get_slice(t))
            c.update(half=mma_half.get_slice(t).partition_shape_C((64, 64)))

            row = wg * 64 + (t // 32) * 16 + (t % 32) // 4
            rScale = cute.make_rmem_tensor((2, BLOCKS_N), Float32)  # a_scale * b_scale: two rows, each column block
            for i in cutlass.range_constexpr(BLOCKS_N):
                acc[i].fill(0.0)
            s, phase = Int32(0), Int32(0)
            tile, kb = first, Int32(0)
            units = mine * blocks_k
            if mine > 0:
                cute.arch.mbarrier_wait(full, 0)
            for u in cutlass.range(units, unroll=1):
                last = kb == blocks_k - 1
                for i in cutlass.range_constexpr(BLOCKS_N):
                    self.batch(c, i, s, rTmp)
                    # from here to wait_group: under the running batch
                    if const_expr(i == 0):
                        if kb == 0 and u > 0:
                            self.store(c, acc[BLOCKS_N - 1], tile - stride, BLOCKS_N - 1)
                            acc[BLOCKS_N - 1].fill(0.0)
                        for h in cutlass.range_constexpr(2):
                            f = sS[row + 8 * h, 0, s]
                            for j in cutlass.range_constexpr(BLOCKS_N):
                                rScale[h, j] = f * sF[j, s]
                    else:
                        if last:
                            self.store(c, acc[i - 1], tile, i - 1)
                            acc[i - 1].fill(0.0)
                    if const_expr(i == BLOCKS_N - 1):
                        done = s
                        s, phase = self.advance(s, phase)
                        if u + 1 < units:
                            cute.arch.mbarrier_wait(full + s, phase)
                    warpgroup.wait_group(0)
                    if const_expr(i == BLOCKS_N - 1):
                        cute.arch.sync_warp()  # all lanes have read their scales
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive(empty + done)
                    for e in cutlass.range_constexpr(BLOCK // 2):
                        acc[i][e] = rTmp[e] * rScale[(e // 2) % 2, i] + acc[i][e]
                kb = kb + 1
                if last:
                    kb = Int32(0)
                    tile = tile + stride
            if mine > 0:
                self.store(c, acc[BLOCKS_N - 1], tile - stride, BLOCKS_N - 1)
            if c["leader"]:
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def place(self, tile, grid):
        """(column tile, token tile, group)"""
        tiles_n, tiles_m = grid
        return tile % tiles_n, (tile // tiles_n) % tiles_m, tile // (tiles_n * tiles_m)

    @cute.jit
    def slices(self, m, mO):
        """Of SLICE tokens, that a token tile has."""
        return cutlass.min(cute.ceil_div(mO.shape[0] - m * TILE_M, SLICE), SLICES)

    @cute.jit
    def load_scales(self, rScaleB, mBScale, tile, kb, total, grid, blocks_k):
        """b_scale of block kb of a tile, each column block; of the last ones where there are no more."""
        n, _, g = self.place(cutlass.min(tile, total - 1), grid)
        first = (g * grid[0] + n) * BLOCKS_N
        for i in cutlass.range_constexpr(BLOCKS_N):
            rScaleB[i] = (mBScale.iterator + ((first + i) * blocks_k + cutlass.min(kb, blocks_k - 1))).load()

    @cute.jit
    def advance(self, s, phase):
        n = s + 1
        wrap = n == STAGES
        return (Int32(0) if wrap else n), (phase ^ 1 if wrap else phase)

    @cute.jit
    def batch(self, c, i: cutlass.Constexpr, s, rTmp):
        """Start rTmp = A . B_i of stage s."""
        warpgroup.fence()
        issue(c["op"], rTmp, c["tCsA"][None, None, None, s], c["tCsB"][i][None, None, None, s], True)
        warpgroup.commit_group()

    @cute.jit
    def store(self, c, acc, tile, i: cutlass.Constexpr):
        """Column block i of a finished tile, 64 columns at a time."""
        n, m, g = self.place(tile, c["grid"])
        if c["leader"]:
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # the buffers have been read
        cute.arch.barrier(barrier_id=BAR_STORE + c["wg"], number_of_threads=128)
        for h in cutlass.range_constexpr(BUFFERS):
            rO = cute.make_rmem_tensor(c["half"], BFloat16)
            for e in cutlass.range_constexpr(32):
                rO[e] = acc[32 * h + e].to(BFloat16)
            cute.copy(c["stmatrix"], c["stmatrix"].retile(rO), c["stmatrix"].partition_D(c["sOw"][None, None, h]))
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=BAR_STORE + c["wg"], number_of_threads=128)
        if c["leader"]:
            for h in cutlass.range_constexpr(BUFFERS):
                column = (n * BLOCKS_N + i) * BUFFERS + h
                cute.copy(c["tma_o"], c["tOsO"][None, h], c["tOgO"][None, m * WARPGROUPS + c["wg"], column, g])
            cute.arch.cp_async_bulk_commit_group()


def entry():
    """What to compile: the host function and its fake arguments."""
    return Fp8Bmm(), fake_args()
