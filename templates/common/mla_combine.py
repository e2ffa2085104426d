"""Combine of split-KV partial results of mla_decode, inside the decode kernel: out = sum_i w_i o_i / sum_i w_i with
w_i = 2^(lse_i - max lse), lse = ln of the sum.

When a CTA has done all its attention work, it arrives on the counter of each split request that it has a piece of (at
most two: one that it continues, one that it starts). Then it waits for the others and combines its share of the rows:

    part p0      pieces ... | arrive | wait for n arrivals | units 0, S, 2S, ...     | leave
    part p0 + 1  pieces ...    | arrive | wait             | units 1, S + 1, ...     | leave
    ...                                                      (S sharers, n <= S of them with a piece)

A unit is 128 columns of one row: one float4 per lane and part, or four fp16. Unit k * 8 S + w * S + i belongs to warp
w of the i-th sharer, so that units spread over the CTAs before they spread over the warps of one. A warp has at most
32 / S + 1 units, and reads the parts of one after the other:

    cp.async   log-sum-exps of all its units, 4 bytes a lane; then 32 float4 of each lane in flight (latent 512)
    weights    a segment of 2^ceil(log2 n) lanes reduces one unit: maximum, sum, sink; weights / sum to shared memory
    sum        4 float4 at a time from the lane's own slots, refilled at once; at the end of a unit store 128 columns

A lane reads back only what it loaded itself, so nothing but the weights crosses lanes and no warp waits for another.

Few units and many parts (one request over the whole GPU) would leave most warps idle and give the others long sums.
Then a team of 2, 4 or 8 warps of a CTA shares one unit: each sums every 2nd, 4th or 8th part, 16 loads at once, and the
first of them adds up what the others leave in shared memory.

The sum over the parts has a fixed order: equal launch arguments and lengths give equal bits.

Counters: one int32 per (first part p0 of a request, row tile), zero before the launch. An arrival and a departure are
both "increment, but n + S - 1 becomes 0" (red.inc): after n arrivals and S departures it is zero again. One waits for
a value >= n; the counter falls back to zero only when everybody has seen that.

Waiting needs the parts of a request to run at the same time. No CTA waits before it has arrived everywhere, so it is
enough that all CTAs of the grid are resident: the grid is at most one CTA per SM. The hazard: two such grids that each
hold some of the SMs (streams of different priority), or fewer SMs than the device reports (green contexts), would make
it wait for ever. COOPERATIVE in the flags makes it a cooperative launch, which the driver refuses rather than start in
part.

Sinks (natural-log logits, one per head) are one more weight without a value; the log-sum-exp leaves them out.

Partial outputs have their columns permuted within each 128, so that a thread of the decode kernel stores its
accumulators as float4: position 4 l + e of 128 holds column column(l, e); with `pairs`, e = 0, 1 and e = 2, 3 are
neighbours.

Cannot: more than 160 parts per request; latent sizes that are no multiple of 128 or above 512.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from common.sm90 import INF, LOG2E, cutlass_dtype, ex2

COMBINE_WARPS = 8
COMBINE_MAX_PARTS = 160  # of one request
COMBINE_ENTRIES = 196  # weights of a warp: 32 + 160, and 3 that are read with the last ones; a multiple of 4
COMBINE_TEAM_LOADS = 16  # float4 of each lane in flight when a team shares a unit
COMBINE_FLOOR = -1.0e30  # stands for the maximum of no weights: finite, so that -inf - maximum is never NaN
HAS_SINKS, WANTS_LSE, COOPERATIVE = 1, 2, 4  # bits of the flags


class MlaCombine:
    def __init__(self, latent, dtype, column, pairs, barrier, teams=True, empty_lse=-INF, partial="fp32"):
        """column, pairs: see above; barrier: a named barrier for the 8 warps; teams: whether warps may share a unit;
        empty_lse: the log-sum-exp of a row without a key; partial: "fp32" or "fp16", what partial outputs are in."""
        assert latent in (128, 256, 512)
        self.partial = cutlass_dtype(partial)
        self.latent, self.dtype, self.column, self.pairs = latent, cutlass_dtype(dtype), column, pairs
        self.barrier, self.teams, self.empty_lse = barrier, teams, empty_lse
        self.log_slices = (latent // 128).bit_length() - 1
        self.ring = latent // 16  # slots of a lane: what it reads when all sharers have a piece

    def area_floats(self):
        """Shared memory that `run` needs, in floats; 16-byte aligned."""
        return COMBINE_WARPS * (128 * self.ring + COMBINE_ENTRIES)

    @cute.jit
    def sync(self):
        cute.arch.barrier(barrier_id=self.barrier, number_of_threads=32 * COMBINE_WARPS)

    @cute.jit
    def run(
        self,
        area: cute.Pointer,
        sShare: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        sinks: cute.Tensor,
        o_acc: cute.Tensor,
        lse_acc: cute.Tensor,
        counters: cute.Tensor,
        flags: Int32,
        heads: Int32,
        part: Int32,
        tile: Int32,
        tiles: Int32,
        row0: Int32,
        rows: Int32,
        tid: Int32,
    ):
        """Everything after the attention work of a CTA, by its 256 math threads.

        area: float pointer to shared memory that nobody uses any more. sShare: (p0, n, sharers, started) as from
        mla_split.sharing, then r0, r1. out (B, R, latent); lse (B, s_q, heads), any strides; o_acc, lse_acc: see
        mla_split.partials. tile of tiles: this CTA's row tile, the rows row0 .. row0 + rows - 1.
        """
        w = cute.arch.make_warp_uniform(tid // 32)
        lane = tid % 32
        self.sync()  # the partial results of all warps are written, and sShare
        if tid == 0:
            continues = sShare[1] > 1 and part - sShare[0] < sShare[1]
            starts = sShare[3] > 1
            if continues or starts:
                cute.arch.fence_acq_rel_gpu()  # with the barrier: releases what the whole CTA has written
            if continues:
                self.count(counters, sShare[0] * tiles + tile, sShare[1] + sShare[2])
            if starts:
                self.count(counters, part * tiles + tile, 2 * sShare[3])
        for i in cutlass.range(2, unroll=1):
            p0 = sShare[0] if i == 0 else part
            n = sShare[1] if i == 0 else sShare[3]
            sharers = sShare[2] if i == 0 else n
            req = sShare[4] if i == 0 else sShare[5]
            if n > 1:
                at = p0 * tiles + tile
                if tid == 0:
                    seen = self.arrivals(counters, at)
                    while seen < n:
                        seen = self.arrivals(counters, at)
                    self.count(counters, at, n + sharers)
                self.sync()
                args = (area, out, lse, sinks, o_acc, lse_acc, flags, heads, req, p0, n)
                first, step = w * sharers + part - p0, COMBINE_WARPS * sharers
                if const_expr(self.teams):
                    log_team = self.team_of(rows << self.log_slices, n, sharers)
                    if log_team > 0:
                        self.shared_unit(*args, sharers, part - p0, log_team, row0, rows, w, lane)
                    else:
                        self.rows(*args, first, step, row0, rows, w, lane)
                else:
                    self.rows(*args, first, step, row0, rows, w, lane)

    @cute.jit
    def count(self, counters: cute.Tensor, at: Int32, total: Int32):
        """Increment a counter, the last of `total` times to 0."""
        cute.arch.inline_ptx(
            "red.relaxed.gpu.global.inc.u32 [{$r0}], {$r1};",
            read_only_args=[(counters.iterator + at).llvm_ptr, total - 1],
        )

    @cute.jit
    def arrivals(self, counters: cute.Tensor, at: Int32):
        return cute.arch.load((counters.iterator + at).llvm_ptr, Int32, sem="acquire", scope="gpu")

    @cute.jit
    def team_of(self, units: Int32, n: Int32, sharers: Int32):
        """log2 of the warps that share a unit: as many as there are for all units, each with 4 parts or more."""
        log_team = Int32(0)
        for x in cutlass.range_constexpr(1, 4):
            if (units << x) <= COMBINE_WARPS * sharers and n >= (4 << x):
                log_team = Int32(x)
        return log_team

    @cute.jit
    def shared_unit(
        self,
        area: cute.Pointer,
        out: cute.Tensor,
        lse: cute.Tensor,
        sinks: cute.Tensor,
        o_acc: cute.Tensor,
        lse_acc: cute.Tensor,
        flags: Int32,
        heads: Int32,
        req: Int32,
        p0: Int32,
        n: Int32,
        sharers: Int32,
        sharer: Int32,
        log_team: Int32,
        row0: Int32,
        rows: Int32,
        w: Int32,
        lane: Int32,
    ):
        """One unit at most for each team of 1 << log_team warps of this CTA, the `sharer`-th of `sharers`. A warp has
        the weights of all parts and sums those that are its own. Called by all 256 threads."""
        log_slices = self.log_slices
        sO = cute.make_tensor(area, cute.make_layout((4, 32, COMBINE_WARPS)))
        sW = cute.make_tensor(
            area + 128 * self.ring * COMBINE_WARPS, cute.make_layout((COMBINE_ENTRIES, COMBINE_WARPS))
        )
        team = Int32(1) << log_team
        member = w & (team - 1)
        unit = (w >> log_team) * sharers + sharer
        units = rows << log_slices
        row = row0 + (unit >> log_slices)
        rO = cute.make_rmem_tensor((4,), Float32)
        rO.fill(0.0)
        self.sync()  # the area may still be read for the request before
        if unit < units:
            rX = cute.make_rmem_tensor((4, COMBINE_TEAM_LOADS), self.partial)
            at = row * self.latent + (unit & ((1 << log_slices) - 1)) * 128 + lane * 4
            self.fetch(rX, o_acc, p0, n, at, member, team)
            for e in cutlass.range(lane, n, 32, unroll=1):
                sW[e, w] = lse_acc[2 * (p0 + e) + (Int32(1) if e == 0 else Int32(0)), row]
            cute.arch.sync_warp()
            wants_lse = Int32(1) if member == 0 else Int32(0)
            self.weights(
                sW, lse, sinks, flags, heads, req, n, Int32(1), unit, Int32(0), row0, w, lane, wants_lse
            )  # fmt: skip
            cute.arch.sync_warp()
            for first in cutlass.range(member, n, COMBINE_TEAM_LOADS << log_team, unroll=1):
                for u in cutlass.range_constexpr(COMBINE_TEAM_LOADS):
                    i = first + (u << log_team)
                    weight = sW[i, w] if i < n else Float32(0.0)
                    for x in cutlass.range_constexpr(4):
                        rO[x] = rO[x] + weight * rX[x, u].to(Float32)
                following = first + (COMBINE_TEAM_LOADS << log_team)
                if following < n:
                    self.fetch(rX, o_acc, p0, n, at, following, team)
            cute.autovec_copy(rO, sO[None, lane, w])
        self.sync()
        if unit < units and member == 0:
            rY = cute.make_rmem_tensor((4,), Float32)
            for other in cutlass.range(1, team, unroll=1):
                cute.autovec_copy(sO[None, lane, w + other], rY)
                for x in cutlass.range_constexpr(4):
                    rO[x] = rO[x] + rY[x]
            self.store(out, req, row, unit & ((1 << log_slices) - 1), rO, lane)

    @cute.jit
    def fetch(self, rX, o_acc: cute.Tensor, p0: Int32, n: Int32, at: Int32, first: Int32, step: Int32):
        """Parts first, first + step, ... of what lies at offset `at` of each; behind the last part the last one."""
        for u in cutlass.range_constexpr(COMBINE_TEAM_LOADS):
            i = cutlass.min(first + u * step, n - 1)
            slot = 2 * (p0 + i) + (Int32(1) if i == 0 else Int32(0))
            src = o_acc.iterator + cute.assume(slot * o_acc.stride[0] + at, divby=4)
            cute.autovec_copy(cute.make_tensor(src, cute.make_layout(4)), rX[None, u])

    @cute.jit
    def rows(
        self,
        area: cute.Pointer,
        out: cute.Tensor,
        lse: cute.Tensor,
        sinks: cute.Tensor,
        o_acc: cute.Tensor,
        lse_acc: cute.Tensor,
        flags: Int32,
        heads: Int32,
        req: Int32,
        p0: Int32,
        n: Int32,
        first: Int32,
        step: Int32,
        row0: Int32,
        rows: Int32,
        w: Int32,
        lane: Int32,
    ):
        """Combine the units first, first + step, ... of the rows row0 .. of a request of parts p0 .. p0 + n - 1."""
        log_slices, ring = self.log_slices, self.ring
        sX = cute.make_tensor(cute.recast_ptr(area, dtype=self.partial), cute.make_layout((4, 32, ring, COMBINE_WARPS)))
        sW = cute.make_tensor(
            area + 128 * ring * COMBINE_WARPS, cute.make_layout((COMBINE_ENTRIES, COMBINE_WARPS))
        )
        units = cutlass.max(((rows << log_slices) - first + step - 1) // step, 0)
        loads = units * n  # of each lane, and so many weights
        slot = o_acc.stride[0]
        # 8 bytes pass through the L1, which has none of them from before: every row is read once
        modes = cpasync.LoadCacheMode
        mode = modes.GLOBAL if const_expr(self.partial.width == 32) else modes.ALWAYS
        get4 = cute.make_copy_atom(
            cpasync.CopyG2SOp(cache_mode=mode), self.partial, num_bits_per_copy=4 * self.partial.width
        )
        get1 = cute.make_copy_atom(cpasync.CopyG2SOp(), Float32, num_bits_per_copy=32)

        cute.arch.sync_warp()  # sW may be read from the request before
        for e in cutlass.range(lane, loads, 32, unroll=1):
            unit = e // n
            i = e - unit * n
            row = row0 + ((first + unit * step) >> log_slices)
            from_slot = 2 * (p0 + i) + (Int32(1) if i == 0 else Int32(0))
            src = cute.make_tensor(lse_acc.iterator + (from_slot * lse_acc.stride[0] + row), cute.make_layout(1))
            cute.copy(get1, src, cute.make_tensor(sW.iterator + (w * COMBINE_ENTRIES + e), cute.make_layout(1)))
        cute.arch.cp_async_commit_group()

        # the next load: part `part` of the unit whose first partial result is at `unit_at`
        part = Int32(0)
        unit_at = (2 * p0 + 1) * slot + row0 * self.latent + first * 128 + lane * 4
        at = unit_at
        for e in cutlass.range(0, ring, 4, unroll=1):
            for u in cutlass.range_constexpr(4):
                if e + u < loads:
                    self.load(get4, o_acc, at, sX[None, lane, e + u, w])
                    part, at, unit_at = self.following(part, at, unit_at, n, slot, step)
            cute.arch.cp_async_commit_group()

        cute.arch.cp_async_wait_group(ring // 4)
        cute.arch.sync_warp()
        self.weights(sW, lse, sinks, flags, heads, req, n, units, first, step, row0, w, lane, Int32(1))
        cute.arch.sync_warp()

        rO = cute.make_rmem_tensor((4,), Float32)
        rX = cute.make_rmem_tensor((4, 4), self.partial)
        rW = cute.make_rmem_tensor((4,), Float32)
        rO.fill(0.0)
        done = Int32(0)  # parts of the unit
        unit = first
        for e in cutlass.range(0, loads, 4, unroll=1):
            cute.arch.cp_async_wait_group(ring // 4 - 1)
            for u in cutlass.range_constexpr(4):
                cute.autovec_copy(sX[None, lane, (e + u) & (ring - 1), w], rX[None, u])
            at_weight = cute.assume(w * COMBINE_ENTRIES + e, divby=4)
            cute.autovec_copy(cute.make_tensor(sW.iterator + at_weight, cute.make_layout(4)), rW)
            for u in cutlass.range_constexpr(4):
                for x in cutlass.range_constexpr(4):
                    rO[x] = rO[x] + rW[u] * rX[x, u].to(Float32)
                done = done + 1
                if done == n:
                    if e + u < loads:  # what is added after the last unit is garbage
                        self.store(out, req, row0 + (unit >> log_slices), unit & ((1 << log_slices) - 1), rO, lane)
                    rO.fill(0.0)
                    done = Int32(0)
                    unit = unit + step
            if e + ring < loads:
                for u in cutlass.range_constexpr(4):
                    if e + ring + u < loads:
                        self.load(get4, o_acc, at, sX[None, lane, (e + u) & (ring - 1), w])
                        part, at, unit_at = self.following(part, at, unit_at, n, slot, step)
            cute.arch.cp_async_commit_group()

    @cute.jit
    def load(self, atom, o_acc: cute.Tensor, at: Int32, dst: cute.Tensor):
        src = cute.make_tensor(o_acc.iterator + cute.assume(at, divby=4), cute.make_layout(4))
        cute.copy(atom, src, dst)

    @cute.jit
    def following(self, part: Int32, at: Int32, unit_at: Int32, n: Int32, slot: Int32, step: Int32):
        """(part, its address, that of the unit's first part) of the load that follows: next part or next unit."""
        at = at + (slot if part == 0 else 2 * slot)  # slots 2 p0 + 1, 2 p0 + 2, 2 p0 + 4, ...
        part = part + 1
        if part == n:
            part = Int32(0)
            unit_at = unit_at + step * 128
            at = unit_at
        return part, at, unit_at

    @cute.jit
    def weights(
        self,
        sW: cute.Tensor,
        lse: cute.Tensor,
        sinks: cute.Tensor,
        flags: Int32,
        heads: Int32,
        req: Int32,
        n: Int32,
        units: Int32,
        first: Int32,
        step: Int32,
        row0: Int32,
        w: Int32,
        lane: Int32,
        wants_lse: Int32,
    ):
        """Log-sum-exps to weights, divided by their sum; if wanted, lse of the rows whose first unit this warp has."""
        log_slices = self.log_slices
        log_seg = Int32(0)
        for x in cutlass.range_constexpr(5):
            log_seg = log_seg + (Int32(1) if n > (1 << x) else Int32(0))
        seg = Int32(1) << log_seg
        sub = lane & (seg - 1)
        for unit0 in cutlass.range(0, units, 32 >> log_seg, unroll=1):
            unit = unit0 + (lane >> log_seg)
            end = (unit + 1) * n if unit < units else Int32(0)
            top = -Float32(INF)
            for e in cutlass.range(unit * n + sub, end, seg, unroll=1):
                top = cute.arch.fmax(top, sW[e, w])
            for x in cutlass.range(log_seg, unroll=1):
                top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, offset=Int32(1) << x))
            top = cute.arch.fmax(top, Float32(COMBINE_FLOOR))
            total = Float32(0.0)
            for e in cutlass.range(unit * n + sub, end, seg, unroll=1):
                weight = ex2(sW[e, w] - top)
                sW[e, w] = weight
                total = total + weight
            for x in cutlass.range(log_seg, unroll=1):
                total = total + cute.arch.shuffle_sync_bfly(total, offset=Int32(1) << x)
            if unit < units:
                at = first + unit * step
                row = row0 + (at >> log_slices)
                sink = Float32(0.0)
                if (flags & HAS_SINKS) != 0:
                    sink = ex2(sinks[row % heads] * LOG2E - top)
                inv = cute.arch.rcp_approx(total + sink) if total > 0.0 else Float32(0.0)
                for e in cutlass.range(unit * n + sub, end, seg, unroll=1):
                    sW[e, w] = sW[e, w] * inv
                if (flags & WANTS_LSE) != 0 and wants_lse != 0 and sub == 0 and (at & ((1 << log_slices) - 1)) == 0:
                    value = (cute.math.log2(total, fastmath=True) + top) * (1.0 / LOG2E)
                    lse[req, row // heads, row % heads] = value if total > 0.0 else Float32(self.empty_lse)

    @cute.jit
    def store(self, out: cute.Tensor, req: Int32, row: Int32, part: Int32, rO: cute.Tensor, lane: Int32):
        """This lane's four columns of a unit."""
        dst = out[req, row, None].iterator + cute.assume(part * 128, divby=128)
        if const_expr(self.pairs):
            rY = cute.make_rmem_tensor((2,), self.dtype)
            for h in cutlass.range_constexpr(2):
                rY[0] = rO[2 * h].to(self.dtype)
                rY[1] = rO[2 * h + 1].to(self.dtype)
                col = cute.assume(self.column(lane, 2 * h), divby=2)
                cute.autovec_copy(rY, cute.make_tensor(dst + col, rY.layout))
        else:
            for e in cutlass.range_constexpr(4):
                (dst + self.column(lane, e)).store(rO[e].to(self.dtype))
