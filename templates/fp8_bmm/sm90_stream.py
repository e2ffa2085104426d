"""FP8 grouped matrix product with block scales for sm_90a, few tokens: limited by reading the weights.

    out[g, t, n] = sum over kb of a_scale[g, kb, t] * b_scale[g, n / 128, kb] * (a[g, t, kb] . b[g, n, kb])

Arguments and arithmetic as in sm90_tiles. Operands are swapped: the weights b are the M of the MMA, and TOKENS
tokens its N.

Tiling. A CTA takes ROWS weight rows x TOKENS tokens of one group: ROWS / 64 warpgroups of 64 rows, and one warp that
loads. The blocks of K come in groups of GROUP, GROUPS of which fit in the ring. A group's GROUP * 128 bytes of every
weight row are requested together (DRAM likes it), and each block has a barrier of its own, so that the mathematics
starts with the first one and little is left to do when the last one is there. Weights are read once: evict-first in L2.

    load warp   W0 W1 W2 W3 X0 X1 X2 X3 | W4 ...          W: 128 bytes of ROWS rows, X: of TOKENS tokens, and scales
    math        wait full[j]: rTmp[j % 2] = W_j . X_j (4 wgmma) | rAcc += rTmp[(j - 1) % 2] * scales | ...
    end         rAcc -> shared memory [ROWS x TOKENS, fp32] -> bf16, 8 bytes a thread

Blocks of K behind the end of a ragged last group are zeros (TMA), and so are tokens behind M.
Launched with PDL. With `early` the first weights are loaded before the kernel in front has ended: the caller promises
that it does not write them.

Cannot: K that 128 or N that ROWS does not divide; out of another type; packed scales.
"""

# --- constants: replaced when rendered ---
TOKENS = 16
ROWS = 64
GROUP = 4
GROUPS = 5
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
WARPS = ROWS // 16  # that do the mathematics
BLOCK_BYTES = (ROWS + TOKENS) * BLOCK + 4 * TOKENS
DEEP = TOKENS <= 64  # two rTmp fit in the registers
LINE = ROWS + 4  # of the partial sums: no bank conflicts
BAR_MATH, BAR_READY = 1, 2  # named barriers

assert ROWS in (64, 128) and TOKENS in (16, 32, 64, 128)
assert LINE * TOKENS * 4 <= GROUP * GROUPS * ROWS * BLOCK  # partial sums reuse the memory of the weights


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
        tma_w, mW = cpasync.make_tiled_tma_atom(load, outer_last(b), box(ROWS, BLOCK), (ROWS, BLOCK))
        mS = cute.make_tensor(a_scale.iterator, cute.select(a_scale.layout, mode=[2, 1, 0]))
        tma_s, mS = cpasync.make_tiled_tma_atom(load, mS, cute.make_layout((TOKENS, 1)), (TOKENS, 1))
        tiles_m = cute.ceil_div(out.shape[1], TOKENS)
        self.kernel(tma_x, mX, tma_w, mW, tma_s, mS, b_scale, out, early, tiled_mma(TOKENS)).launch(
            grid=[b.shape[1] // ROWS, b.shape[0] * tiles_m, 1],
            block=[32 * WARPS + 32, 1, 1],
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

        if warp_idx == WARPS:
            self.load(tma_x, mX, tma_w, mW, tma_s, mS, sX, sW, sS, full, empty, early, n, m, g, count)
        else:
            cute.arch.barrier(barrier_id=BAR_READY, number_of_threads=32 * WARPS + 32)
            cute.arch.griddepcontrol_wait()
            wg = cute.arch.make_warp_uniform(warp_idx // 4)
            t = tid % 128
            thread = mma.get_slice(t)
            tCsW = thread.make_fragment_A(thread.partition_A(cute.local_tile(sW, (64, BLOCK), (wg, 0, None))))
            tCsX = thread.make_fragment_B(thread.partition_B(sX))
            rAcc = cute.make_rmem_tensor(thread.partition_shape_C((64, TOKENS)), Float32)
            rTmp = [cute.make_rmem_tensor(rAcc.layout, Float32) for _ in range(2 if DEEP else 1)]
            rAcc.fill(0.0)
            token = (t % 4) * 2
            # lane j has b_scale of block j of the group: in one register of all lanes, ptxas would move it to a uniform
            # one, and wait for it there
            scales = mBScale.iterator + (g * mBScale.shape[1] + (n * ROWS + wg * 64) // BLOCK) * blocks_k
            ahead = cutlass.min(t % 32, GROUP - 1)
            b_next = (scales + cutlass.min(ahead, blocks_k - 1)).load()
            slot, phase = Int32(0), Int32(0)
            for _ in cutlass.range(count, unroll=1):
                b_scale = b_next
                ahead = ahead + GROUP
                b_next = (scales + cutlass.min(ahead, blocks_k - 1)).load()
                if const_expr(DEEP):
                    self.multiply(mma.op, rTmp[0], tCsW, tCsX, full, slot * GROUP, phase)
                for j in cutlass.range_constexpr(GROUP):
                    at = slot * GROUP + j
                    if const_expr(not DEEP):
                        self.multiply(mma.op, rTmp[0], tCsW, tCsX, full, at, phase)
                        warpgroup.wait_group(0)  # registers: the scales are loaded afterwards
                    elif const_expr(j + 1 < GROUP):
                        self.multiply(mma.op, rTmp[(j + 1) % 2], tCsW, tCsX, full, at + 1, phase)
                    f = cute.arch.shuffle_sync(b_scale, offset=j)
                    rScale = cute.make_rmem_tensor((2, TOKENS // 8), Float32)
                    for i in cutlass.range_constexpr(TOKENS // 8):
                        for e in cutlass.range_constexpr(2):
                            rScale[e, i] = sS[i * 8 + token + e, 0, at] * f
                    if const_expr(DEEP):
                        warpgroup.wait_group(1 if j + 1 < GROUP else 0)
                    for e in cutlass.range_constexpr(TOKENS // 2):
                        rAcc[e] = rTmp[j % 2 if DEEP else 0][e] * rScale[e % 2, e // 4] + rAcc[e]
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(empty + slot)
                slot, phase = self.advance(slot, phase)
            cute.arch.barrier(barrier_id=BAR_MATH, number_of_threads=32 * WARPS)  # no warp reads the ring any more
            row = wg * 64 + (t // 32) * 16 + (t % 32) // 4
            for e in cutlass.range_constexpr(TOKENS // 2):
                sSum[row + 8 * ((e // 2) % 2), (e // 4) * 8 + token + e % 2] = rAcc[e]

        cute.arch.sync_threads()
        if warp_idx < WARPS:
            self.store(sSum, mOut, tid, n, m, g)

    @cute.jit
    def load(self, tma_x, mX, tma_w, mW, tma_s, mS, sX, sW, sS, full, empty, early, n, m, g, count):
        """The load warp."""
        for tma in (tma_w, tma_x, tma_s):
            cpasync.prefetch_descriptor(tma)
        with cute.arch.elect_one():
            for i in cutlass.range_constexpr(GROUP * GROUPS):
                cute.arch.mbarrier_init(full + i, 1)
            for i in cutlass.range_constexpr(GROUPS):
                cute.arch.mbarrier_init(empty + i, WARPS)
        cute.arch.mbarrier_init_fence()
        cute.arch.barrier_arrive(barrier_id=BAR_READY, number_of_threads=32 * WARPS + 32)  # and start to load at once

        def tile_of(x, shape):
            """Tiles of a global tensor, the coordinates within a tile as one mode."""
            return cute.group_modes(cute.local_tile(x, shape, (None, None, None)), 0, 2)

        one = cute.make_layout(1)
        tXsX, tXgX = cpasync.tma_partition(tma_x, 0, one, cute.group_modes(sX, 0, 2), tile_of(mX, (TOKENS, BLOCK)))
        tWsW, tWgW = cpasync.tma_partition(tma_w, 0, one, cute.group_modes(sW, 0, 2), tile_of(mW, (ROWS, BLOCK)))
        tSsS, tSgS = cpasync.tma_partition(tma_s, 0, one, cute.group_modes(sS, 0, 2), tile_of(mS, (TOKENS, 1)))
        if early == 0:
            cute.arch.griddepcontrol_wait()
        for i in cutlass.range_constexpr(GROUPS):
            if i < count:
                self.load_weights(tma_w, tWgW[None, n, None, g], tWsW, full, i * GROUP, i)
        if early != 0:
            cute.arch.griddepcontrol_wait()
        slot, phase = Int32(0), Int32(1)
        for i in cutlass.range(count, unroll=1):
            if i >= GROUPS:
                cute.arch.mbarrier_wait(empty + slot, phase)
                self.load_weights(tma_w, tWgW[None, n, None, g], tWsW, full, i * GROUP, slot)
            for j in cutlass.range_constexpr(GROUP):
                at = slot * GROUP + j
                kb = i * GROUP + j
                cute.copy(tma_x, tXgX[None, m, kb, g], tXsX[None, at], tma_bar_ptr=full + at)
                cute.copy(tma_s, tSgS[None, m, kb, g], tSsS[None, at], tma_bar_ptr=full + at)
            slot, phase = self.advance(slot, phase)
        cute.arch.griddepcontrol_launch_dependents()

    @cute.jit
    def load_weights(self, tma_w, tWgW, tWsW, full, kb, slot):
        """Arm the barriers of a group and ask for its weights."""
        with cute.arch.elect_one():
            for j in cutlass.range_constexpr(GROUP):
                cute.arch.mbarrier_arrive_and_expect_tx(full + (slot * GROUP + j), BLOCK_BYTES)
        for j in cutlass.range_constexpr(GROUP):
            at = slot * GROUP + j
            cute.copy(
                tma_w, tWgW[None, kb + j], tWsW[None, at], tma_bar_ptr=full + at, cache_policy=Int64(EVICT_FIRST)
            )

    @cute.jit
    def multiply(self, op: cutlass.Constexpr, rTmp, tCsW, tCsX, full, at, phase):
        """Start rTmp = W . X of a block as soon as it is there."""
        cute.arch.mbarrier_wait(full + at, phase)
        warpgroup.fence()
        issue(op, rTmp, tCsW[None, None, None, at], tCsX[None, None, None, at], True)
        warpgroup.commit_group()

    @cute.jit
    def advance(self, slot, phase):
        n = slot + 1
        wrap = n == GROUPS
        return (Int32(0) if wrap else n), (phase ^ 1 if wrap else phase)

    @cute.jit
    def store(self, sSum, mOut, tid, n, m, g):
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
