"""Token-sparse MLA for sm_90a over bf16 rows, more than 16 heads: two math warpgroups that take turns.

Algorithm. A CTA takes 64 heads of a query token (grid x) and a run of 64-entry blocks of the lists of one or several
tokens (grid z, common/mla_split.py, where a query token is a request), in pairs. The rows of a block are gathered into
shared memory once and serve as K (K-major, LATENT + ROPE columns) and as V (the same bytes read MN-major, LATENT
columns). Online softmax in the log2 domain with sm_scale * log2(e) folded into the exponent. Whole tokens go straight
to `out` and `lse`; pieces go to fp32 partial results in `workspace`, which the CTAs merge when they are done
(common/mla_combine.py).

Tiling. 384 threads; K0 and K1 hold the two blocks of a pair, each in two halves: L = the left half of the latent
columns, R = the right half. WG0 has O.L and the softmax of K0, WG1 has O.R and the softmax of K1, WG2 gathers
(common/sparse_halves.py). The rope tile of a block becomes its P once its scores are there.

The pipeline, one pair of blocks (m0, m1: running maximum after K0 and after K1; m1' of the pair before):

    WG0                                              WG1
    S0 = Q K0 is there                               S1 = Q K1 is there
    m0 = max(m1', rowmax S0); signal M0 ------M0---> m1 = max(m0, rowmax S1); signal M1
    O.L *= 2^(m1'-m0); P0 = 2^(S0-m0)                P1 = 2^(S1-m1) -> smem; O.R *= 2^(m1'-m1)
    O.L += P0(registers) V0.L; free K0.L             O.R += P1(registers) V1.R (issued); signal P1
    wait M1 <---------------------------------M1---
    P0 *= 2^(m0-m1) -> smem; signal P0 -------P0---> wait P0; O.R += P0(smem) V0.R (issued)
    O.L *= 2^(m0-m1)                                 P1 V1.R is done: free K1.R
    wait P1 <---------------------------------P1---  P0 V0.R is done: free K0.R and P0
    O.L += P1(smem) V1.L (issued)                    S1 = Q K1 of the next pair (R, L, rope)
    S0 = Q K0 of the next pair (L; then P1 V1.L is done: free K1.L and P1; R, rope)

The scores of the next token's first pair are under way while a token's output is stored; its Q is loaded as soon as
the last scores of this one are there.

Barriers. mbarriers: full and empty of each half of each block, one for Q. Named barriers, one warpgroup arrives and the
other waits: M0, M1 (the maxima are in sM), P0, P1 (the probabilities are in shared memory); END for both.

Cannot: fp8 rows, more than 128 heads, sm_scale <= 0, latent sizes other than 512. Fewer than 64 heads cost as much as
64, and an odd block as much as two.
"""

# --- constants: replaced when rendered ---
ROPE = 64
# --- end of constants ---

from types import SimpleNamespace

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import BFloat16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator

from common.mla_combine import MlaCombine
from common.sm90 import INF, ex2, issue, quad_max, quad_sum, smem_atom, swz
from common.sparse_halves import HalfGather
from common.sparse_kernel import SparseKernel, mask_entries
from common.sparse_rows import ptx, sparse_mla_arguments

LATENT = 512
ROWS = 64  # heads of a CTA
BLOCK = 64  # entries of a block
HALF = LATENT // 2  # output columns of a warpgroup
V_TILES = LATENT // 64
HALF_TILES = V_TILES // 2
TILES = V_TILES + ROPE // 64
TILE_BYTES = 64 * 64 * 2
FULL, EMPTY, Q_FULL = 0, 4, 8  # mbarriers; the first two: + 2 * block + half
BAR_M0, BAR_M1, BAR_P0, BAR_P1, BAR_END = 1, 2, 3, 4, 5  # named barriers
MATH_REGS, GATHER_REGS = 216, 72
M_INIT = -1.0e30  # finite, so that a block without entries has no NaN

assert ROPE in (0, 64)
GATHER = HalfGather(LATENT, ROPE, TILE_BYTES)


def opaque(x):
    """The same shared-memory tensor with an address that went through a shuffle: the compiler then knows that it is
    uniform and not that it is a constant, and does the arithmetic of the MMA descriptors in uniform registers. To be
    called in the branch of one warpgroup."""
    address = cute.arch.make_warp_uniform(x.iterator.toint())
    swizzle = smem_atom(BFloat16).inner
    ptr = cute.make_ptr(BFloat16, address, cutlass.AddressSpace.smem, assumed_align=1024, swizzle_=swizzle)
    return cute.make_tensor(ptr, x.layout)


def partial_column(lane, e):
    """Column of element e of the lane-th float4 of 128 columns in a partial result: as the accumulators have them."""
    return (lane >> 2) * 16 + (lane & 3) * 2 + e % 2 + e // 2 * 8


COMBINE = MlaCombine(LATENT, "bf16", partial_column, True, BAR_END, teams=False, empty_lse=INF)
assert COMBINE.area_floats() * 4 <= 2 * (V_TILES + 1) * TILE_BYTES  # K and the rope tiles


@cute.jit
def bf16x2(low, high):
    """Two floats as a word."""
    return ptx("cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", (low, high), (Int32,))


def store_global16(address, offset, words):
    ptx(f"st.global.v4.b32 [{{$r0}}+{offset}], {{{{$r1}}, {{$r2}}, {{$r3}}, {{$r4}}}};", (address, *words))


@cute.jit
def exchanged(a, b, lane, bit: cutlass.Constexpr):
    """One step of a transposition: this lane's a and b for the partner's, lanes with `bit` give a, the others b."""
    high = (lane & bit) != 0
    got = cute.arch.shuffle_sync_bfly(a if high else b, offset=bit)
    return got if high else a, b if high else got


class SparseMla(SparseKernel):
    @cute.jit
    def cta(self, c):
        wg = c.warp_idx // 4
        t = c.tid % 128
        row = (c.warp_idx % 4) * 16 + c.lane // 4  # this thread has the rows row and row + 8

        smem = SmemAllocator()

        def swizzled(columns):  # 64 rows
            layout = swz(64, columns, BFloat16)
            return smem.allocate_tensor(BFloat16, layout.outer, 1024, swizzle=layout.inner)

        sK = [[swizzled(HALF) for _ in (0, 1)] for _ in (0, 1)]  # [block][half]
        sR = [swizzled(64) for _ in (0, 1)]  # the rope tile of a block, then its P
        sQ = swizzled(LATENT)
        sQr = swizzled(64) if ROPE > 0 else sQ
        sM0 = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)
        sM1 = smem.allocate_tensor(Float32, cute.make_layout(ROWS), 16)
        sL = smem.allocate_tensor(Float32, cute.make_layout(2 * ROWS), 16)
        sOk = smem.allocate_tensor(Int32, cute.make_layout(2 * BLOCK // 4), 16)  # a byte for each row of the blocks
        sI = smem.allocate_tensor(Int32, cute.make_layout(6), 16)  # the CTA's share of the work
        sShare = smem.allocate_tensor(Int32, cute.make_layout(6), 16)  # its share of the combine
        bars = smem.allocate_array(Int64, Q_FULL + 1)

        if c.warp_idx == 0:
            cpasync.prefetch_descriptor(c.tma_q)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(4):
                    cute.arch.mbarrier_init(bars + (FULL + i), GATHER.ARRIVALS)
                    cute.arch.mbarrier_init(bars + (EMPTY + i), 4)
                cute.arch.mbarrier_init(bars + Q_FULL, 1)
            cute.arch.mbarrier_init_fence()
        self.begin(c, sI)

        def mma(n, b_major, a_source):
            return hh.make_trivial_tiled_mma(
                BFloat16, BFloat16, OperandMajorMode.K, b_major, Float32, (1, 1, 1), (ROWS, n), a_source
            )

        from_smem, from_rmem = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM
        mma_qk = mma(BLOCK, OperandMajorMode.K, from_smem)
        mma_pv_r, mma_pv_s = [mma(HALF, OperandMajorMode.MN, x) for x in (from_rmem, from_smem)]
        qk, pv_s = mma_qk.get_slice(t), mma_pv_s.get_slice(t)
        tQsQ, tQsR, tQgQ = self.query_views(c, sQ, sQr)
        stsm = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), BFloat16), mma_qk)
        stsm_thr = stsm.get_slice(t)

        c = SimpleNamespace(
            **vars(c),
            row=row,
            bars=bars,
            sI=sI,
            sM=(sM0, sM1),
            sL=sL,
            ok=sOk.iterator.toint(),
            tQgQ=tQgQ,
            tQsQ=tQsQ,
            tQsR=tQsR,
            sQ=sQ,
            sQr=sQr,
            sK=sK,
            sR=sR,
            qk=qk,
            pv_s=pv_s,
            s_shape=qk.partition_shape_C((ROWS, BLOCK)),
            o_shape=pv_s.partition_shape_C((ROWS, HALF)),
            op_qk=mma_qk.op,
            op_pv_r=mma_pv_r.op,
            op_pv_s=mma_pv_s.op,
            stsm=stsm,
            stsm_thr=stsm_thr,
            tPst=[stsm_thr.partition_D(x) for x in sR],
        )
        if wg == 2:
            cute.arch.setmaxregister_decrease(GATHER_REGS)
            GATHER.run(
                c.rows, c.mList, c.lengths, sI, sK[0][0].iterator.toint(), V_TILES * TILE_BYTES,
                sR[0].iterator.toint(), TILE_BYTES, c.ok, bars + FULL, bars + EMPTY, c.warp_idx - 8, c.lane,
            )  # fmt: skip
        else:
            cute.arch.setmaxregister_increase(MATH_REGS)
            # while the first loads are under way; a branch on tid would make the compiler take the warps for diverged
            if c.warp_idx == 4:
                self.store_share(c, sShare)
            if wg == 0:
                if c.warp_idx == 0 and sI[0] <= sI[1]:
                    self.load_q(c, sI[0])
                self.tokens(c, 0)
            else:
                self.tokens(c, 1)
            # every row that was gathered has been waited for
            area = cute.recast_ptr(sK[0][0].iterator, dtype=Float32)
            first_row = c.m_block * ROWS
            COMBINE.run(
                area, sShare, c.mO, c.lse, c.sinks, c.o_acc, c.lse_acc, c.semaphores, c.flags, c.heads, c.part,
                c.m_block, c.m_blocks, first_row, cutlass.min(c.heads - first_row, ROWS), c.tid,
            )  # fmt: skip

    @cute.jit
    def load_q(self, c, token):
        self.load_queries(c, token, c.bars + Q_FULL, c.tQsQ, c.tQsR)

    # -------------------------------------------------------------------------------------------- math
    @cute.jit
    def free(self, c, block: cutlass.Constexpr, half: cutlass.Constexpr):
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(c.bars + (EMPTY + 2 * block + half))

    @cute.jit
    def scores_half(self, c, ops, S, block: cutlass.Constexpr, half: cutlass.Constexpr, there):
        """S (+)= Q K^T over one half of a block, as soon as it is there; one wgmma group. there: phase of its barrier,
        or -1: do not wait, whatever is there will do."""
        first: cutlass.Constexpr = block == half  # the half that is filled first; the rope tile comes with the other
        if there >= 0:
            cute.arch.mbarrier_wait(c.bars + (FULL + 2 * block + half), there)
        cute.arch.fence_view_async_shared()  # cp.async has no fence of its own on the writer's side
        warpgroup.fence()
        for i in cutlass.range_constexpr(HALF_TILES):
            tile = half * HALF_TILES + i
            issue(c.op_qk, S, ops.tQ[None, None, (None, tile)], ops.tK[half][None, None, (None, i)], first and i == 0)
        if const_expr(ROPE > 0 and not first):
            issue(c.op_qk, S, ops.tQr, ops.tR, False)
        warpgroup.commit_group()

    @cute.jit
    def row_max(self, S, r: cutlass.Constexpr, scale):
        m = S[2 * r]
        for j in cutlass.range_constexpr(BLOCK // 8):
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
            for j in cutlass.range_constexpr(BLOCK // 8):
                a = ex2(S[4 * j + 2 * r] * scale - m[r])
                b = ex2(S[4 * j + 2 * r + 1] * scale - m[r])
                S[4 * j + 2 * r] = a
                S[4 * j + 2 * r + 1] = b
                acc = acc + (a + b)
            L[r] = L[r] + acc
        rP.store(S.load().to(BFloat16))

    @cute.jit
    def pair_wg0(self, c, ops, S, O, m, L, x):
        """WG0's share of a pair. The scores of K0 come to S; those of the pair that follows are under way on return."""
        sM0, sM1, lane, row = c.sM[0], c.sM[1], c.lane, c.row
        rP = cute.make_rmem_tensor(((2, 2, 2), 1, 4), BFloat16)
        sc = cute.make_rmem_tensor((2,), Float32)
        warpgroup.wait_group(0)
        mask_entries(S, c.ok, lane)
        for r in cutlass.range_constexpr(2):
            m_new = cute.arch.fmax(m[r], self.row_max(S, r, c.scale))
            sc[r] = ex2(m[r] - m_new)
            m[r] = m_new
            L[r] = L[r] * sc[r]
            if lane % 4 == 0:
                sM0[row + 8 * r] = m_new
        cute.arch.barrier_arrive(barrier_id=BAR_M0, number_of_threads=256)
        self.rescale_o(O, sc)
        self.exp_rows(S, rP, m, L, c.scale)
        # O.L += P0 V0.L
        warpgroup.fence()
        issue(c.op_pv_r, O, rP, ops.tV[0], False)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        self.free(c, 0, 0)
        # the maximum after K1
        cute.arch.barrier(barrier_id=BAR_M1, number_of_threads=256)
        if c.warp_idx == 0 and x.new_q:
            self.load_q(c, x.token + 1)  # all scores of this token are there
        for r in cutlass.range_constexpr(2):
            m_new = sM1[row + 8 * r]
            sc[r] = ex2(m[r] - m_new)
            m[r] = m_new
            L[r] = L[r] * sc[r]
        self.scale_rows(S, sc)
        rP.store(S.load().to(BFloat16))
        cute.copy(c.stsm, c.stsm_thr.retile(rP), c.tPst[0])
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=BAR_P0, number_of_threads=256)
        self.rescale_o(O, sc)
        cute.arch.barrier(barrier_id=BAR_P1, number_of_threads=256)
        # O.L += P1 V1.L
        warpgroup.fence()
        issue(c.op_pv_s, O, ops.tP, ops.tV[1], False)
        warpgroup.commit_group()
        if x.new_q:
            cute.arch.mbarrier_wait(c.bars + Q_FULL, x.phase_q)
        self.scores_half(c, ops, S, 0, 0, x.there)
        warpgroup.wait_group(1)
        self.free(c, 1, 0)
        self.scores_half(c, ops, S, 0, 1, x.there)

    @cute.jit
    def pair_wg1(self, c, ops, S, O, m, L, x):
        """WG1's share of a pair. The scores of K1 come to S; those of the pair that follows are under way on return."""
        sM0, sM1, lane, row = c.sM[0], c.sM[1], c.lane, c.row
        rP = cute.make_rmem_tensor(((2, 2, 2), 1, 4), BFloat16)
        sc = cute.make_rmem_tensor((2,), Float32)
        mx = cute.make_rmem_tensor((2,), Float32)
        warpgroup.wait_group(0)
        mask_entries(S, c.ok + BLOCK, lane)
        for r in cutlass.range_constexpr(2):
            mx[r] = self.row_max(S, r, c.scale)
        cute.arch.barrier(barrier_id=BAR_M0, number_of_threads=256)
        for r in cutlass.range_constexpr(2):
            m_new = cute.arch.fmax(sM0[row + 8 * r], mx[r])
            sc[r] = ex2(m[r] - m_new)
            m[r] = m_new
            L[r] = L[r] * sc[r]
            if lane % 4 == 0:
                sM1[row + 8 * r] = m_new
        cute.arch.barrier_arrive(barrier_id=BAR_M1, number_of_threads=256)
        self.exp_rows(S, rP, m, L, c.scale)
        cute.copy(c.stsm, c.stsm_thr.retile(rP), c.tPst[1])
        self.rescale_o(O, sc)
        cute.arch.fence_view_async_shared()
        # O.R += P1 V1.R
        warpgroup.fence()
        issue(c.op_pv_r, O, rP, ops.tV[1], False)
        warpgroup.commit_group()
        cute.arch.barrier_arrive(barrier_id=BAR_P1, number_of_threads=256)
        cute.arch.barrier(barrier_id=BAR_P0, number_of_threads=256)
        # O.R += P0 V0.R
        warpgroup.fence()
        issue(c.op_pv_s, O, ops.tP, ops.tV[0], False)
        warpgroup.commit_group()
        warpgroup.wait_group(1)
        self.free(c, 1, 1)
        warpgroup.wait_group(0)
        self.free(c, 0, 1)
        if x.new_q:
            cute.arch.mbarrier_wait(c.bars + Q_FULL, x.phase_q)
        self.scores_half(c, ops, S, 1, 1, x.there)
        self.scores_half(c, ops, S, 1, 0, x.there)

    @cute.jit
    def tokens(self, c, wg: cutlass.Constexpr):
        """All tokens of this CTA by one warpgroup."""

        def v_view(x):
            vt = cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 0]))
            return c.pv_s.make_fragment_B(c.pv_s.partition_B(cute.local_tile(vt, (HALF, BLOCK), (0, 0))))

        ops = SimpleNamespace(
            tQ=c.qk.make_fragment_A(c.qk.partition_A(opaque(c.sQ))),
            tQr=c.qk.make_fragment_A(c.qk.partition_A(opaque(c.sQr))),
            tK=[c.qk.make_fragment_B(c.qk.partition_B(opaque(x))) for x in c.sK[wg]],
            tR=c.qk.make_fragment_B(c.qk.partition_B(opaque(c.sR[wg]))),
            tV=[v_view(opaque(x[wg])) for x in c.sK],
            tP=c.pv_s.make_fragment_A(c.pv_s.partition_A(opaque(c.sR[1 - wg]))),
        )
        pair = self.pair_wg1 if wg else self.pair_wg0
        first, last = c.sI[0], c.sI[1]
        S = cute.make_rmem_tensor(c.s_shape, Float32)
        O = cute.make_rmem_tensor(c.o_shape, Float32)
        m = cute.make_rmem_tensor((2,), Float32)
        L = cute.make_rmem_tensor((2,), Float32)
        number = Int32(0)  # of the pair in this CTA
        if first <= last:
            cute.arch.mbarrier_wait(c.bars + Q_FULL, 0)
            self.scores_half(c, ops, S, wg, wg, Int32(0))
            self.scores_half(c, ops, S, wg, 1 - wg, Int32(0))
        for token in cutlass.range(first, last + 1, unroll=1):
            n, _, _ = self.piece(c, token)
            pairs = (n + 1) >> 1
            O.fill(0.0)
            m.fill(M_INIT)
            L.fill(0.0)
            for i in cutlass.range(pairs, unroll=1):
                ends = i == pairs - 1
                number = number + 1
                x = SimpleNamespace(
                    token=token,
                    new_q=ends and token < last,  # the pair that follows is of the next token
                    phase_q=(token + 1 - first) & 1,
                    there=Int32(-1) if ends and token == last else number & 1,  # phase of its full barriers; -1: none
                )
                pair(c, ops, S, O, m, L, x)
            self.finish(c, O, m, L, token, wg)
        warpgroup.wait_group(0)

    @cute.jit
    def finish(self, c, O, m, L, token, wg: cutlass.Constexpr):
        """What is known of a token or of a piece of one, to where it belongs."""
        sL = c.sL
        for r in cutlass.range_constexpr(2):
            L[r] = quad_sum(L[r])
            if c.lane % 4 == 0:
                sL[wg * ROWS + c.row + 8 * r] = L[r]
        cute.arch.barrier(barrier_id=BAR_END, number_of_threads=256)
        # recomputed here rather than kept live through the main loop
        _, whole, slot = self.piece(c, token)
        inv = cute.make_rmem_tensor((2,), Float32)
        for r in cutlass.range_constexpr(2):
            at = c.row + 8 * r
            head = c.m_block * ROWS + at
            total = sL[at] + sL[ROWS + at]
            inv[r] = self.share(c, head, whole, total, m[r])
            if c.lane % 4 == 0 and head < c.heads and wg == 0:
                self.store_sum(c, token, head, whole, slot, total, m[r])
        for r in cutlass.range_constexpr(2):
            head = c.m_block * ROWS + c.row + 8 * r
            if whole:
                to = c.mO[token, cutlass.min(head, c.heads - 1), None].iterator.toint()
                to = to + Int64(wg * HALF * 2 + c.lane % 4 * 16)
                for i in cutlass.range_constexpr(HALF // 32):
                    words = [
                        bf16x2(O[16 * i + 4 * j + 2 * r] * inv[r], O[16 * i + 4 * j + 2 * r + 1] * inv[r])
                        for j in range(4)
                    ]
                    # 4 lanes have 2 columns of each of 4 groups of 8; afterwards each has a group
                    words[0], words[1] = exchanged(words[0], words[1], c.lane, 1)
                    words[2], words[3] = exchanged(words[2], words[3], c.lane, 1)
                    words[0], words[2] = exchanged(words[0], words[2], c.lane, 2)
                    words[1], words[3] = exchanged(words[1], words[3], c.lane, 2)
                    if head < c.heads:
                        store_global16(to, i * 64, words)
            else:
                if head < c.heads:
                    for j in cutlass.range_constexpr(HALF // 16):
                        v4 = cute.make_rmem_tensor((4,), Float32)
                        for e in cutlass.range_constexpr(4):
                            v4[e] = O[8 * j + e // 2 * 4 + 2 * r + e % 2] * inv[r]
                        part_at = wg * (HALF // 4) + j * 4 + c.lane % 4
                        cute.autovec_copy(v4, cute.local_tile(c.o_acc[slot, head, None], (4,), (part_at,)))


def entry():
    """What to compile: the host function and its fake arguments."""
    return SparseMla(LATENT, ROPE, ROWS, 384), sparse_mla_arguments((LATENT + ROPE) * 2, LATENT)
