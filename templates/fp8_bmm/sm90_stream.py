"""FP8 grouped matrix product with block scales for sm_90a, few tokens: limited by reading the weights.

    out[g, t, n] = sum over kb of a_scale[g, kb, t] * b_scale[g, n / 128, kb] * (a[g, t, kb] . b[g, n, kb])

Arguments and arithmetic as in sm90_tiles.

Tiling. A CTA takes one tile of TOKENS tokens x ROWS weight rows of a group. With 64 or 128 tokens these are the M of
the MMA; up to 32 tokens the operands are swapped: the weights are its M. The mathematics is done by warpgroups of 64
rows of M, or with 64 tokens of 64 weight rows each; one warp asks for the weights and one for the tokens and their
scales. Blocks of K come in groups of GROUP, GROUPS of which fit in the ring. A group's GROUP * 128 bytes of every
weight row are requested together (DRAM likes it), and each block has a barrier of its own. Weights are read once:
evict-first in L2.

    weights     W0 W1 W2 W3 | W4 ...                      128 bytes of ROWS rows
    tokens      X0 X1 X2 X3 | X4 ...                      128 bytes of TOKENS tokens, and scales
    math        wait full[j]: rTmp[j % 2] = W_j . X_j (4 wgmma) | rAcc += rTmp[(j - 1) % 2] * scales | ...
    end         rAcc -> bf16 -> out; swapped: by way of shared memory [ROWS x TOKENS, fp32]

Blocks of K behind the end of a ragged last group are zeros (TMA). A ragged tile loads its tokens by SLICEs, and none
that is behind M: TMA takes longer for rows behind the end than for others, and for slices than for a whole tile. What
is in shared memory there does not matter, since a token's products are only its own.

Launched with PDL. With `early` the first EARLY groups of weights, and b_scale, are loaded before the kernel in front
has ended: the caller promises that it does not write them. More would delay that end: a grid does not count as finished
before the loads that its multiprocessors have under way have arrived, be they another kernel's.

Cannot: K that 128 or N that ROWS does not divide; out of another type; packed scales.
"""

# --- constants: replaced when rendered ---
TOKENS = 16
ROWS = 64
GROUP = 4
GROUPS = 3
EARLY = 2
# --- end of constants ---

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator

from common.fp8_bmm import fake_args, outer_last
from common.fp8_tiles import box, ring, tiled_mma
from common.sm90 import EVICT_FIRST, issue

BLOCK = 128  # of K, and of N for b_scale
SWAPPED = TOKENS < 64
SIDE_M = (ROWS if SWAPPED else TOKENS) // 64  # warpgroups along M of the MMA
SIDE_N = ROWS // 64 if TOKENS == 64 else 1  # and along its N
WARPS = 4 * SIDE_M * SIDE_N  # that do the mathematics
MMA_N = (TOKENS if SWAPPED else ROWS) // SIDE_N
SLICE = max(16, TOKENS // 4)  # tokens that one instruction loads in a ragged tile
SLICES = TOKENS // SLICE
LINE = ROWS + 4  # of the partial sums: no bank conflicts
WINDOW = 32  # blocks whose b_scale a warp holds
BAR_MATH, BAR_READY = 1, 2  # named barriers
READY_THREADS = 32 * WARPS + 64

assert ROWS in (64, 128) and TOKENS in (16, 32, 64, 128) and ROWS * TOKENS < 128 * 128  # registers
assert WINDOW % GROUP == 0 and 0 < EARLY <= GROUPS
assert not SWAPPED or LINE * TOKENS * 4 <= GROUP * GROUPS * ROWS * BLOCK  # partial sums reuse the memory of the weights


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
        load = cpasync.CopyBulkTensorTileG2SOp()
        tma_x, mX = cpasync.make_tiled_tma_atom(load, outer_last(a), box(TOKENS, BLOCK), (TOKENS, BLOCK))
        tma_r, mR = cpasync.make_tiled_tma_atom(load, outer_last(a), box(SLICE, BLOCK), (SLICE, BLOCK))
        tma_w, mW = cpasync.make_tiled_tma_atom(load, outer_last(b), box(ROWS, BLOCK), (ROWS, BLOCK))
        mS = cute.make_tensor(a_scale.iterator, cute.select(a_scale.layout, mode=[2, 1, 0]))
        tma_s, mS = cpasync.make_tiled_tma_atom(load, mS, cute.make_layout((TOKENS, 1)), (TOKENS, 1))
        tiles_m = cute.ceil_div(out.shape[1], TOKENS)
        self.kernel(tma_x, mX, tma_r, mR, tma_w, mW, tma_s, mS, b_scale, out, early, tiled_mma(MMA_N)).launch(
            grid=[b.shape[1] // ROWS, b.shape[0] * tiles_m, 1],
            block=[32 * WARPS + 64, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        tma_x: cute.CopyAtom,
        mX: cute.Tensor,
        tma_r: cute.CopyAtom,
        mR: cute.Tensor,
        tma_w: cute.CopyAtom,
        mW: cute.Tensor,
        tma_s: cute.CopyAtom,
        mS: cute.Tensor,
        mBScale: cute.Tensor,
        mOut: cute.Tensor,
        early: Int32,
        mma: cute.TiledMma,
    ):
        tid, _, _ = cute.arch.thread_idx()
        n, by, _ = cute.arch.block_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = SmemAllocator()
        layout_x, layout_w = ring(TOKENS, GROUP * GROUPS), ring(ROWS, GROUP * GROUPS)
        sX = smem.allocate_tensor(Float8E4M3FN, layout_x.outer, 1024, swizzle=layout_x.inner)
        sW = smem.allocate_tensor(Float8E4M3FN, layout_w.outer, 1024, swizzle=layout_w.inner)
        layout_s = cute.make_layout((TOKENS, 1, GROUP * GROUPS), stride=(1, 0, max(TOKENS, 32)))  # TMA: 128 bytes
        sS = smem.allocate_tensor(Float32, layout_s, 128)
        sums = cute.recast_ptr(sW.iterator, cute.make_swizzle(0, 4, 3), dtype=Float32)
        sSum = cute.make_tensor(sums, cute.make_layout((LINE, TOKENS)))
        full = smem.allocate_array(Int64, GROUP * GROUPS)  # one for each block
        empty = smem.allocate_array(Int64, GROUPS)
        tiles_m = cute.ceil_div(mOut.shape[1], TOKENS)
        g = by // tiles_m
        m = by - g * tiles_m
        blocks_k = mW.shape[1] // BLOCK
        count = cute.ceil_div(blocks_k, GROUP)  # groups of K
        slices = cutlass.min(cute.ceil_div(mOut.shape[1] - m * TOKENS, SLICE), SLICES)

        if warp_idx == WARPS:
            self.load_weights(tma_w, mW, sW, full, empty, early, n, g, count, slices)
        elif warp_idx == WARPS + 1:
            for tma in (tma_x, tma_r, tma_s):
                cpasync.prefetch_descriptor(tma)
            cute.arch.barrier(barrier_id=BAR_READY, number_of_threads=READY_THREADS)
            self.load_tokens(tma_x, mX, tma_r, mR, tma_s, mS, sX, sS, full, empty, m, g, count, slices)
        else:
            cute.arch.barrier(barrier_id=BAR_READY, number_of_threads=READY_THREADS)
            wg = cute.arch.make_warp_uniform(warp_idx // 4)
            t = tid % 128
            thread = mma.get_slice(t)
            sM, sN = (sW, sX) if SWAPPED else (sX, sW)
            wg_m, wg_n = (wg, Int32(0)) if const_expr(SIDE_N == 1) else (Int32(0), wg)
            tCsM = thread.make_fragment_A(thread.partition_A(cute.local_tile(sM, (64, BLOCK), (wg_m, 0, None))))
            tCsN = thread.make_fragment_B(thread.partition_B(cute.local_tile(sN, (MMA_N, BLOCK), (wg_n, 0, None))))
            rAcc = cute.make_rmem_tensor(thread.partition_shape_C((64, MMA_N)), Float32)
            rTmp = [cute.make_rmem_tensor(rAcc.layout, Float32) for _ in range(2)]
            rAcc.fill(0.0)
            row = wg_m * 64 + (t // 32) * 16 + (t % 32) // 4  # the first of two in the registers, of the tile
            column = (t % 4) * 2
            # a lane has b_scale of one of WINDOW blocks, and of one of the WINDOW behind them: a load would take longer
            # than the mathematics of a group
            lane = t % WINDOW
            scales = mBScale.iterator + (
                (g * mBScale.shape[1] + (n * ROWS + (wg_m * 64 if SWAPPED else 0)) // BLOCK) * blocks_k
            )
            if early == 0:
                cute.arch.griddepcontrol_wait()
            b_next = (scales + cutlass.min(lane, blocks_k - 1)).load()
            b_scale = b_next
            if early != 0:
                cute.arch.griddepcontrol_wait()
            kb = Int32(0)
            slot, phase = Int32(0), Int32(0)
            for _ in cutlass.range(count, unroll=1):
                if kb % WINDOW == 0:
                    b_scale = b_next
                    b_next = (scales + cutlass.min(kb + (WINDOW + lane), blocks_k - 1)).load()
                self.multiply(mma.op, rTmp[0], tCsM, tCsN, full, slot * GROUP, phase)
                for j in cutlass.range_constexpr(GROUP):
                    at = slot * GROUP + j
                    if const_expr(j + 1 < GROUP):
                        self.multiply(mma.op, rTmp[(j + 1) % 2], tCsM, tCsN, full, at + 1, phase)
                    f = cute.arch.shuffle_sync(b_scale, offset=(kb + j) % WINDOW)
                    rScale = cute.make_rmem_tensor((2, TOKENS // 8 if SWAPPED else 1), Float32)
                    for i in cutlass.range_constexpr(cute.size(rScale.shape[1])):
                        for e in cutlass.range_constexpr(2):
                            token = i * 8 + column + e if SWAPPED else row + 8 * e
                            rScale[e, i] = sS[token, 0, at] * f
                    warpgroup.wait_group(1 if j + 1 < GROUP else 0)
                    for e in cutlass.range_constexpr(MMA_N // 2):
                        scale = rScale[e % 2, e // 4] if SWAPPED else rScale[(e // 2) % 2, 0]
                        rAcc[e] = rTmp[j % 2][e] * scale + rAcc[e]
                cute.arch.sync_warp()  # all lanes have read their scales
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(empty + slot)
                slot, phase = self.advance(slot, phase)
                kb = kb + GROUP
            if const_expr(SWAPPED):
                cute.arch.barrier(barrier_id=BAR_MATH, number_of_threads=32 * WARPS)  # no warp reads the ring any more
                for e in cutlass.range_constexpr(TOKENS // 2):
                    sSum[row + 8 * ((e // 2) % 2), (e // 4) * 8 + column + e % 2] = rAcc[e]
                cute.arch.barrier(barrier_id=BAR_MATH, number_of_threads=32 * WARPS)
                self.store_sums(sSum, mOut, tid, n, m, g)
            else:
                self.store(rAcc, mOut, m * TOKENS + row, n * ROWS + wg_n * MMA_N + column, g)

    @cute.jit
    def load_weights(self, tma_w, mW, sW, full, empty, early, n, g, count, slices):
        """The warp that prepares the barriers and asks for the weights."""
        cpasync.prefetch_descriptor(tma_w)
        with cute.arch.elect_one():
            for i in cutlass.range_constexpr(GROUP * GROUPS):
                cute.arch.mbarrier_init(full + i, 1)
            for i in cutlass.range_constexpr(GROUPS):
                cute.arch.mbarrier_init(empty + i, WARPS)
        cute.arch.mbarrier_init_fence()
        cute.arch.barrier_arrive(barrier_id=BAR_READY, number_of_threads=READY_THREADS)  # and start to load at once
        alone = Int32(EARLY) if early != 0 else Int32(0)
        tWsW, tWgW = self.parts(tma_w, sW, mW, (ROWS, BLOCK))
        bytes = ROWS * BLOCK + 4 * TOKENS + slices * (SLICE * BLOCK)
        slot, phase = Int32(0), Int32(1)
        for i in cutlass.range(count, unroll=1):
            if i == alone:
                cute.arch.griddepcontrol_wait()
            cute.arch.mbarrier_wait(empty + slot, phase)
            with cute.arch.elect_one():
                for j in cutlass.range_constexpr(GROUP):
                    cute.arch.mbarrier_arrive_and_expect_tx(full + (slot * GROUP + j), bytes)
            for j in cutlass.range_constexpr(GROUP):
                at = slot * GROUP + j
                src = tWgW[None, n, i * GROUP + j, g]
                cute.copy(tma_w, src, tWsW[None, at], tma_bar_ptr=full + at, cache_policy=Int64(EVICT_FIRST))
            slot, phase = self.advance(slot, phase)
        cute.arch.griddepcontrol_launch_dependents()

    @cute.jit
    def load_tokens(self, tma_x, mX, tma_r, mR, tma_s, mS, sX, sS, full, empty, m, g, count, slices):
        """The warp that asks for the tokens and their scales."""
        tXsX, tXgX = self.parts(tma_x, sX, mX, (TOKENS, BLOCK))
        sliced = cute.local_tile(sX, (SLICE, BLOCK), (None, 0, None))
        tRsR, tRgR = self.parts(tma_r, sliced, mR, (SLICE, BLOCK))
        tSsS, tSgS = self.parts(tma_s, sS, mS, (TOKENS, 1))
        cute.arch.griddepcontrol_wait()
        slot, phase = Int32(0), Int32(1)
        for i in cutlass.range(count, unroll=1):
            cute.arch.mbarrier_wait(empty + slot, phase)
            for j in cutlass.range_constexpr(GROUP):
                at = slot * GROUP + j
                kb = i * GROUP + j
                if slices == SLICES:
                    cute.copy(tma_x, tXgX[None, m, kb, g], tXsX[None, at], tma_bar_ptr=full + at)
                else:
                    for r in cutlass.range(slices, unroll=1):
                        src = tRgR[None, m * SLICES + r, kb, g]
                        cute.copy(tma_r, src, tRsR[None, r, at], tma_bar_ptr=full + at)
                cute.copy(tma_s, tSgS[None, m, kb, g], tSsS[None, at], tma_bar_ptr=full + at)
            slot, phase = self.advance(slot, phase)

    @cute.jit
    def parts(self, tma: cutlass.Constexpr, smem, gmem, shape: cutlass.Constexpr):
        """What TMA copies, the coordinates within a tile as one mode: (tile, stage), (tile, row, block, group)."""
        tiles = cute.group_modes(cute.local_tile(gmem, shape, (None, None, None)), 0, 2)
        return cpasync.tma_partition(tma, 0, cute.make_layout(1), cute.group_modes(smem, 0, 2), tiles)

    @cute.jit
    def multiply(self, op: cutlass.Constexpr, rTmp, tCsM, tCsN, full, at, phase):
        """Start the products of a block as soon as it is there."""
        cute.arch.mbarrier_wait(full + at, phase)
        warpgroup.fence()
        issue(op, rTmp, tCsM[None, None, None, at], tCsN[None, None, None, at], True)
        warpgroup.commit_group()

    @cute.jit
    def advance(self, slot, phase):
        n = slot + 1
        wrap = n == GROUPS
        return (Int32(0) if wrap else n), (phase ^ 1 if wrap else phase)

    @cute.jit
    def store(self, rAcc, mOut, token, column, g):
        """The two rows of a thread: pairs of columns, 16 bytes of the quad."""
        for h in cutlass.range_constexpr(2):
            if token + 8 * h < mOut.shape[1]:
                dst = mOut.iterator + (Int64(g) * mOut.stride[0] + Int64(token + 8 * h) * mOut.stride[1] + column)
                for i in cutlass.range_constexpr(MMA_N // 8):
                    rOut = cute.make_rmem_tensor((2,), BFloat16)
                    for e in cutlass.range_constexpr(2):
                        rOut[e] = rAcc[4 * i + 2 * h + e].to(BFloat16)
                    cute.autovec_copy(rOut, cute.make_tensor((dst + 8 * i).align(4), cute.make_layout(2)))

    @cute.jit
    def store_sums(self, sSum, mOut, tid, n, m, g):
        """4 columns of out per thread."""
        PER_TOKEN = ROWS // 4  # threads
        SIDE = 32 * WARPS // PER_TOKEN  # tokens at a time
        row = (tid % PER_TOKEN) * 4
        for i in cutlass.range_constexpr((TOKENS + SIDE - 1) // SIDE):
            tile_token = i * SIDE + tid // PER_TOKEN
            token = m * TOKENS + tile_token
            if tile_token < TOKENS and token < mOut.shape[1]:
                rSum = cute.make_rmem_tensor((4,), Float32)
                src = sSum.iterator + (tile_token * LINE + row)
                for j in cutlass.range_constexpr(4):
                    rSum[j] = (src + j).load()
                rOut = cute.make_rmem_tensor((4,), BFloat16)
                rOut.store(rSum.load().to(BFloat16))
                dst = mOut.iterator + (Int64(g) * mOut.stride[0] + Int64(token) * mOut.stride[1] + (n * ROWS + row))
                cute.autovec_copy(rOut, cute.make_tensor(dst.align(8), cute.make_layout(4)))


def entry():
    """What to compile: the host function and its fake arguments."""
    return Fp8Bmm(), fake_args()
