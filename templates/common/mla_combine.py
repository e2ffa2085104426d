"""Combine of split-KV partial results of mla_decode: out = sum_i w_i o_i / sum_i w_i with w_i = 2^(lse_i - max lse),
lse = ln of the sum. One kernel for every launch shape and every length (no metadata tensors: the parts of a request
come from mla_split.parts_of).

Grid (row groups x column chunks, min(B, parts)); blocks of 8 warps:

    warps_per_row   1, 2, 4, 8   so many warps share one (request, row): each takes every so-manyth part with a maximum
                                 and a sum of its own, the warps are merged at the end
    slices          1, 2, 4      128-column slices that one warp handles; (LATENT / 128) / slices column chunks
    rows_per_warp   1, 2, ...    rows that one warp does one after the other

Four 16-byte loads per lane are always in flight. Load u is slice u % slices of the warp's part number
t + u // slices, and adds to acc[u]; acc[u] with equal u % slices are added up at the end:

    slices = 4: one part at a time      u: 0 1 2 3   acc[0] acc[1] acc[2] acc[3] = slices 0 1 2 3 of part t
    slices = 2: two parts at a time     u: 0 1 | 2 3   slices 0 1 of part t | of part t + 1
    slices = 1: four parts at a time    u: 0 | 1 | 2 | 3

so that register indices are static. The first loads are issued before the log-sum-exps are read. At most 64 registers:
four blocks per SM, and a grid that fits in one wave. Many parts and few requests: warps_per_row 8, slices 1; few parts
and many requests: warps_per_row 1, all slices.

Sinks (natural-log logits, one per head) are one more weight without a value; the log-sum-exp leaves them out.
The sum over the parts has a fixed order: equal launch arguments and lengths give equal bits.

Cannot: more than 160 parts per request; latent sizes that are no multiple of 128 or above 512.
Launched as the PDL secondary of the decode kernel, which must have waited for its own predecessor before it lets this
one start: the lengths are read before griddepcontrol_wait.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.memory import SmemAllocator

from common.mla_split import parts_of
from common.sm90 import INF, LOG2E, cutlass_dtype, ex2

COMBINE_WARPS = 8
COMBINE_MAX_PARTS = 160  # of one request
COMBINE_FLOOR = -1.0e30  # stands for the maximum of no weights: finite, so that -inf - maximum is never NaN


@cute.jit
def log2_of_8(x: Int32):
    """Exponent of 1, 2, 4 or 8."""
    return (Int32(1) if x >= 2 else Int32(0)) + (Int32(1) if x >= 4 else Int32(0)) + (Int32(1) if x >= 8 else Int32(0))


class MlaCombine:
    def __init__(self, latent, dtype, pdl=True):
        assert latent in (128, 256, 512)
        self.latent, self.dtype, self.pdl = latent, cutlass_dtype(dtype), pdl
        self.log_slices = {128: 0, 256: 1, 512: 2}[latent]

    @cute.jit
    def __call__(
        self,
        seqlens: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        sinks: cute.Tensor,
        o_acc: cute.Tensor,
        lse_acc: cute.Tensor,
        has_sinks: Int32,
        parts: Int32,
        fixed: Int32,
        least: Int32,
        bias: Int32,
        warps_per_row: Int32,
        slices: Int32,
        rows_per_warp: Int32,
        stream,
    ):
        """out (B, R, latent) with R = s_q * heads; lse (B, s_q, heads), any strides; o_acc, lse_acc: see partials."""
        B, R = out.shape[0], out.shape[1]
        lw = log2_of_8(warps_per_row)
        ls = log2_of_8(slices)
        lc = self.log_slices - ls
        row_groups = cute.ceil_div(R, (COMBINE_WARPS >> lw) * rows_per_warp)
        self.kernel(
            seqlens,
            out,
            lse,
            sinks,
            o_acc,
            lse_acc,
            has_sinks,
            B,
            parts,
            fixed,
            least,
            bias,
            parts // B,
            (B + parts - 1) // parts,
            lw,
            ls,
            lc,
            rows_per_warp,
        ).launch(
            grid=[row_groups << lc, cutlass.min(B, parts), 1],
            block=[COMBINE_WARPS * 32, 1, 1],
            max_number_threads=[1024, 1, 1],  # not that many threads, but as few registers as for so many: 64
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        mSeqlens: cute.Tensor,
        mO: cute.Tensor,
        mLse: cute.Tensor,
        mSinks: cute.Tensor,
        mOacc: cute.Tensor,
        mLacc: cute.Tensor,
        has_sinks: Int32,
        B: Int32,
        parts: Int32,
        fixed: Int32,
        least: Int32,
        bias: Int32,
        s: Int32,
        k: Int32,
        lw: Int32,
        ls: Int32,
        lc: Int32,
        rows_per_warp: Int32,
    ):
        """lw, ls, lc: log2 of warps_per_row, slices and column chunks."""
        tid, _, _ = cute.arch.thread_idx()
        bx, item, _ = cute.arch.block_idx()
        w = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = tid % 32
        smem = SmemAllocator()
        sW = smem.allocate_tensor(Float32, cute.make_layout((COMBINE_MAX_PARTS, COMBINE_WARPS)), 16)  # a warp's weights
        sMl = smem.allocate_tensor(Float32, cute.make_layout((2, COMBINE_WARPS)), 16)  # its maximum and its sum
        sO = smem.allocate_tensor(Float32, cute.make_layout((4, 32, 4, COMBINE_WARPS)), 16)

        # request, first part, parts: read again for every row, or what is derived from them is kept, and spilled
        sJob = smem.allocate_tensor(Int32, cute.make_layout((4, COMBINE_WARPS)), 16)

        chunk = bx & ((Int32(1) << lc) - 1)
        row0 = ((bx >> lc) * rows_per_warp << (3 - lw)) + (w >> lw)
        # the decode kernel does not write the lengths: this overlaps its tail
        b, p0, n = parts_of(mSeqlens, B, item, parts, fixed, least, bias, s, k, lane)
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        sJob[0, w] = b
        sJob[1, w] = p0
        sJob[2, w] = n
        if n > 1:
            for i in cutlass.range(rows_per_warp, unroll=1):
                r = row0 + (i << (3 - lw))
                if r < mO.shape[1]:
                    self.one_row(
                        mO, mLse, mSinks, mOacc, mLacc, sW, sMl, sO, sJob, has_sinks, r, w, lane, chunk, lw, ls
                    )

    @cute.jit
    def one_row(self, mO, mLse, mSinks, mOacc, mLacc, sW, sMl, sO, sJob, has_sinks, r, w, lane, chunk, lw, ls):
        cute.arch.sync_warp()  # sW is read until the end of the previous row
        p0 = sJob[1, w]
        n = sJob[2, w]
        sub = w & ((Int32(1) << lw) - 1)  # which of the warps of this row
        col = (chunk << (ls + 7)) + lane * 4  # first of this lane's four columns of slice 0
        mine = (n - sub + (Int32(1) << lw) - 1) >> lw  # parts of this warp
        per_slot = mOacc.stride[0]
        # the first four loads (behind the last part: the last one again, a finite value of weight zero)
        rX = cute.make_rmem_tensor((4, 4), Float32)
        rAt = cute.make_rmem_tensor((4,), Int32)
        for u in cutlass.range_constexpr(4):
            i = sub + ((Int32(u) >> ls) << lw)
            rAt[u] = 2 * (p0 + i) * per_slot + r * self.latent + col + (Int32(u) & ((Int32(1) << ls) - 1)) * 128
            at = rAt[u]
            if i == 0:
                at = at + per_slot
            if i >= n:
                at = at - 2 * (i - (n - 1)) * per_slot
            self.load(rX, u, mOacc, at)
        # maximum, weights and their sum over this warp's parts (lanes without a part: -inf, weight zero)
        rounds = (mine + 31) >> 5
        top = -Float32(INF)
        for h in cutlass.range(0, rounds, unroll=1):
            i = sub + ((h * 32 + lane) << lw)
            value = -Float32(INF)
            if i < n:
                value = mLacc[2 * (p0 + i) + (1 if i == 0 else 0), r]
            sW[h * 32 + lane, w] = value
            top = cute.arch.fmax(top, value)
        for x in cutlass.range_constexpr(5):
            top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, offset=1 << x))
        top = cute.arch.fmax(top, Float32(COMBINE_FLOOR))
        tot = Float32(0.0)
        for h in cutlass.range(0, rounds, unroll=1):
            weight = ex2(sW[h * 32 + lane, w] - top)
            sW[h * 32 + lane, w] = weight
            tot = tot + weight
        for x in cutlass.range_constexpr(5):
            tot = tot + cute.arch.shuffle_sync_bfly(tot, offset=1 << x)
        cute.arch.sync_warp()
        rO = cute.make_rmem_tensor((4, 4), Float32)
        rO.fill(0.0)
        step = Int32(4) >> ls
        per_step = 2 * (step << lw) * per_slot
        for t in cutlass.range(0, mine, step, unroll=1):
            for u in cutlass.range_constexpr(4):
                weight = sW[t + (Int32(u) >> ls), w]
                for e in cutlass.range_constexpr(4):
                    rO[e, u] = rO[e, u] + weight * rX[e, u]
            for u in cutlass.range_constexpr(4):
                rAt[u] = rAt[u] + per_step
                if t + step + (Int32(u) >> ls) < mine:
                    self.load(rX, u, mOacc, rAt[u])
        if ls < 2:
            for e in cutlass.range_constexpr(4):
                rO[e, 0] = rO[e, 0] + rO[e, 2]
                rO[e, 1] = rO[e, 1] + rO[e, 3]
        if ls < 1:
            for e in cutlass.range_constexpr(4):
                rO[e, 0] = rO[e, 0] + rO[e, 1]
        slices = Int32(1) << ls
        if lw > 0:
            for j in cutlass.range_constexpr(4):
                if j < slices:
                    cute.autovec_copy(rO[None, j], sO[None, lane, j, w])
            if lane == 0:
                sMl[0, w] = top
                sMl[1, w] = tot
            self.row_barrier(w, lw)
            if sub == 0:
                all_top = top
                for q in cutlass.range(1, Int32(1) << lw, unroll=1):
                    all_top = cute.arch.fmax(all_top, sMl[0, w + q])
                factor = ex2(top - all_top)
                tot = tot * factor
                for j in cutlass.range_constexpr(4):
                    for e in cutlass.range_constexpr(4):
                        rO[e, j] = rO[e, j] * factor
                for q in cutlass.range(1, Int32(1) << lw, unroll=1):
                    factor = ex2(sMl[0, w + q] - all_top)
                    tot = tot + factor * sMl[1, w + q]
                    for j in cutlass.range_constexpr(4):
                        if j < slices:
                            cute.autovec_copy(sO[None, lane, j, w + q], rX[None, j])
                            for e in cutlass.range_constexpr(4):
                                rO[e, j] = rO[e, j] + factor * rX[e, j]
                top = all_top
            self.row_barrier(w, lw)  # sO and sMl may be written again
        if sub == 0:
            b = sJob[0, w]
            heads = mLse.shape[2]
            head = r % heads
            sink = Float32(0.0)
            if has_sinks != 0:
                sink = ex2(mSinks[head] * LOG2E - top)
            inv = cute.arch.rcp_approx(tot + sink) if tot > 0.0 else Float32(0.0)
            rY = cute.make_rmem_tensor((4,), self.dtype)
            dst = mO[b, r, None].iterator + cute.assume(col, divby=4)
            for j in cutlass.range_constexpr(4):
                if j < slices:
                    for e in cutlass.range_constexpr(4):
                        rY[e] = (rO[e, j] * inv).to(self.dtype)
                    cute.autovec_copy(rY, cute.make_tensor(dst + j * 128, rY.layout))
            if lane == 0 and chunk == 0:
                value = (cute.math.log2(tot, fastmath=True) + top) * (1.0 / LOG2E) if tot > 0.0 else -Float32(INF)
                mLse[b, r // heads, head] = value

    @cute.jit
    def load(self, rX, u: cutlass.Constexpr, mOacc, at):
        src = cute.make_tensor(mOacc.iterator + cute.assume(at, divby=4), cute.make_layout(4))
        cute.autovec_copy(src, rX[None, u])

    @cute.jit
    def row_barrier(self, w, lw):
        """Wait for the warps that share this row."""
        cute.arch.barrier(barrier_id=1 + (w >> lw), number_of_threads=Int32(32) << lw)
