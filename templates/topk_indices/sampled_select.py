"""Indices of the K largest of every row, exact and deterministic, with one read of the row; any arch from sm_80 on,
from sm_90 on with clusters.

    row r: the window [start, end) of logits[r]; n = end - start
    n <= K    out[r] = 0, 1, .., n - 1, -1, ..
    n > K     the K positions (relative to start) with the largest values; of equal values the lower positions

+0 equals -0, NaN counts as -infinity, and -infinity is a value like others. What is outside of the window is not
looked at. The order within a row depends on the row alone: the same input gives the same bits.

A cluster of CLUSTER CTAs takes a row; chunks of 128 values go round its warps.

    sample    4096 values spread over the row -> a bound L that about 1.2 to 2 K values reach, rarely fewer than K
    collect   one pass over the row: each warp appends (key, position) of what reaches L to a segment of its own
    gather    CLUSTER > 1: all segments into the first CTA, which goes on alone
    narrow    histogram of 2048 bins of the keys, the bin that holds the Kth, again within it ..., until at most 32
              items are left; those are ranked by value and then position
    emit      what is above the Kth item, in the order of the list: a count per warp, a prefix sum, stores

Rows of up to some thousand values skip the sample and collect all. When the sample misled (fewer than K values reach L,
or a segment overflows: very many equal values, or values ordered against the sample), the first CTA does narrow and
emit on the row itself, some six reads of it.

Keys are the float's bits as unsigned integers in the order of the values. Items are compared as (key, back), where
back = n - 1 - position, so that larger is better for both.

Cannot: values other than float32; rows of 2^31 values.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
ROWS = "windows"
CLUSTER = 1
THREADS = 512
SEGMENT = 384
UNROLL = 4
# --- end of constants ---

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import Float32, Int32, Int64, Uint32, const_expr
from cutlass.memory import SmemAllocator

from common.warp import warp_inclusive_sum

WINDOWS = ROWS == "windows"
PDL = int(ARCH[3:].rstrip("a")) >= 90
WARPS = THREADS // 32
CHUNK = 128  # values that a warp loads at once
SAMPLED = 4096  # values; 4 neighbours at a time
QUADS = SAMPLED // (4 * THREADS)  # of a thread
BINS, DIGIT = 2048, 11
LIST = WARPS * SEGMENT if CLUSTER == 1 else 8192  # items that the last phases can hold
FEW = 32  # items that one warp ranks
LOWEST = 0x007FFFFF  # key of -infinity
NEAR = 1 << 27  # keys below the largest one, 16 octaves, that the sample resolves at once

assert ROWS in ("windows", "lengths")
assert QUADS * 4 * THREADS == SAMPLED and SEGMENT % CHUNK == 0 and BINS % THREADS == 0 and CLUSTER in (1, 2, 4, 8)


@cute.jit
def key_of(x: Float32):
    """The bits of x as an unsigned integer that is ordered as the values are."""
    bits = x.bitcast(Uint32)
    size = bits & Uint32(0x7FFFFFFF)
    negative = bits != size and size != Uint32(0)
    key = ~bits if negative else size | Uint32(0x80000000)
    return Uint32(LOWEST) if size > Uint32(0x7F800000) else key


@cute.jit
def value_of(key: Uint32):
    """The value with this key."""
    positive = key >= Uint32(0x80000000)
    bits = key & Uint32(0x7FFFFFFF) if positive else ~key
    return bits.bitcast(Float32)


@cute.jit
def smear(x: Uint32):
    """The smallest 2^b - 1 that is not below x."""
    return Uint32(0) if x == Uint32(0) else Uint32(0xFFFFFFFF) >> cute.arch.clz(x)


@cute.jit
def lower(a: Uint32, b: Uint32):
    """The smaller one. Not cutlass.min, which takes the signed minimum of a constant and an unsigned integer."""
    return a if a < b else b


@cute.jit
def higher(a: Uint32, b: Uint32):
    return a if a > b else b


@cute.jit
def load16(pointer):
    """16 bytes as four floats, past L1. Relaxed: the load stays where it is written, and the kernel may have been
    started while the logits were still being computed, which ld.global.nc is not made for."""
    return cute.arch.inline_ptx(
        "ld.relaxed.gpu.global.L1::no_allocate.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Float32] * 4,
        read_only_args=[pointer.to_llvm_ptr()],
    )


@cute.jit
def store_item(pointer, bits, position, hit):
    """Store a value's bits, and its position where the positions of the segments are, if `hit`."""
    cute.arch.inline_ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r3}, 0; @p st.shared.b32 [{$r0}], {$r1}; "
        f"@p st.shared.b32 [{{$r0}} + {4 * WARPS * SEGMENT}], {{$r2}}; }}",
        read_only_args=[pointer.to_llvm_ptr(), bits, position, Int32(1) if hit else Int32(0)],
    )


@cute.jit
def store_remote(pointer, rank, value):
    """Store 4 bytes where `pointer` is in the shared memory of CTA `rank` of the cluster."""
    cute.arch.inline_ptx(
        "st.shared::cluster.b32 [{$r0}], {$r1};",
        read_only_args=[cute.arch.map_dsmem_ptr(pointer, rank).to_llvm_ptr(), value],
    )


class TopkIndices:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(self, logits: cute.Tensor, x0: cute.Tensor, x1, out: cute.Tensor, stream):
        self.kernel(logits, x0, x1, out).launch(
            grid=[out.shape[0] * CLUSTER, 1, 1],
            block=[THREADS, 1, 1],
            cluster=[CLUSTER, 1, 1] if CLUSTER > 1 else None,
            stream=stream,
            use_pdl=PDL,
        )

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(self, mX: cute.Tensor, x0: cute.Tensor, x1, mOut: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        bid, _, _ = cute.arch.block_idx()
        w = cute.arch.make_warp_uniform(tid // 32)
        r = bid // CLUSTER
        rank = bid - r * CLUSTER
        smem = SmemAllocator()
        sItems = smem.allocate_tensor(Uint32, cute.make_layout((WARPS * SEGMENT, 2)), 16)
        sKey = sItems[None, 0]  # the values' bits, until the items are gathered
        sPos = cute.make_tensor(cute.recast_ptr(sItems[None, 1].iterator, dtype=Int32), sKey.layout)
        if const_expr(CLUSTER > 1):
            sAllKey = smem.allocate_tensor(Uint32, cute.make_layout((LIST,)), 16)
            sAllPos = smem.allocate_tensor(Int32, cute.make_layout((LIST,)), 16)
        else:
            sAllKey, sAllPos = sKey, sPos
        sHist = smem.allocate_tensor(Int32, cute.make_layout((BINS,)), 16)
        sWarp = smem.allocate_tensor(Int32, cute.make_layout((WARPS, 2)), 16)
        sFound = smem.allocate_tensor(Int32, cute.make_layout((4,)), 16)
        sFewKey = smem.allocate_tensor(Uint32, cute.make_layout((FEW,)), 16)
        sFewBack = smem.allocate_tensor(Uint32, cute.make_layout((FEW,)), 16)
        sShare = smem.allocate_tensor(Int32, cute.make_layout((CLUSTER, 2)), 16)
        sm = (sKey, sPos, sAllKey, sAllPos, sHist, sWarp, sFound, sFewKey, sFewBack, sShare)
        for i in cutlass.range_constexpr(BINS // THREADS):
            sHist[tid + i * THREADS] = 0
        if const_expr(CLUSTER > 1):
            cute.arch.cluster_arrive_relaxed()  # the shared memory of a CTA that has not begun may not be written
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()

        K = mOut.shape[1]
        start = Int32(0)
        end = Int32(0)
        if const_expr(WINDOWS):
            start = cutlass.max(x0[r], 0)
            end = x1[r]
        else:
            end = x0[r // x1] - x1 + r % x1 + 1
        n = cutlass.max(cutlass.min(end, mX.shape[1]) - start, 0)
        if n <= K:
            if rank == 0:
                for i in cutlass.range(tid, K, THREADS, unroll=1):
                    mOut[r, i] = i if i < n else Int32(-1)
            if const_expr(CLUSTER > 1):
                cute.arch.cluster_wait()
        else:
            self.select(sm, mX.iterator + (Int64(r) * mX.stride[0] + start), n, K, mOut, r, rank, tid, w)

    @cute.jit
    def select(self, sm, row, n, K, mOut, r, rank, tid, w):
        sKey, sPos, sAllKey, sAllPos, sHist, sWarp, sFound, sFewKey, sFewBack, sShare = sm
        lane = tid % 32
        # quad v holds values 4 v - shift .. 4 v - shift + 3 of the row and is aligned to 16 bytes
        shift = Int32((row.toint() >> 2) & 3)
        quads = (n + shift + 3) // 4
        chunks = cute.ceil_div(quads, 32)
        first = row - shift
        total = Int32(0)
        bad = Int32(0)
        base = w * SEGMENT
        count = Int32(0)
        place = (first, shift, n, quads)
        rX = cute.make_rmem_tensor((4, UNROLL), Float32)
        self.load_batch(rX, place, rank * WARPS + w, lane)  # on its way while the sample is looked at
        if chunks <= CLUSTER * WARPS * (SEGMENT // CHUNK) and n <= LIST:
            count = self.collect(sKey, True, rX, place, chunks, Float32(0.0), rank, w, lane)
        else:
            bound = self.sample(sm, first, quads, n, K, tid, w)
            bad = Int32(1) if bound <= Uint32(LOWEST) else Int32(0)
            if bad == 0:
                count = self.collect(sKey, False, rX, place, chunks, value_of(bound), rank, w, lane)
        bad = Int32(1) if count > SEGMENT else bad
        before, total, bad = self.block_sum(sWarp, count, bad, w, lane)
        if const_expr(CLUSTER > 1):
            cute.arch.cluster_wait()
            # all CTAs learn all counts; the first one gets all items
            if tid < CLUSTER:
                store_remote(sShare.iterator + 2 * rank, tid, total)
                store_remote(sShare.iterator + (2 * rank + 1), tid, bad)
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
            mine = Int32(0)
            total = Int32(0)
            for i in cutlass.range_constexpr(CLUSTER):
                mine = mine + (sShare[2 * i] if i < rank else Int32(0))
                total = total + sShare[2 * i]
                bad = bad | sShare[2 * i + 1]
            bad = Int32(1) if total > LIST else bad
            if bad == 0:
                for i in cutlass.range(lane, count, 32, unroll=1):
                    at = mine + before + i
                    store_remote(sAllKey.iterator + at, 0, key_of(sKey[base + i].bitcast(Float32)))
                    store_remote(sAllPos.iterator + at, 0, sPos[base + i])
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
            base = total * w // WARPS
            count = total * (w + 1) // WARPS - base
        else:
            for i in cutlass.range(lane, cutlass.min(count, SEGMENT), 32, unroll=1):
                sKey[base + i] = key_of(sKey[base + i].bitcast(Float32))
        bad = Int32(1) if total < K else bad
        if rank == 0:
            if bad == 0:
                self.finish(sm, False, first, shift, n, quads, chunks, base, count, K, mOut, r, tid, w, lane)
            else:
                self.finish(sm, True, first, shift, n, quads, chunks, base, count, K, mOut, r, tid, w, lane)

    @cute.jit
    def block_sum(self, sWarp, count, bad, w, lane):
        """(counts of the warps before, of all warps, whether one is bad); the arguments are the same in a warp."""
        if lane == 0:
            sWarp[w, 0] = count
            sWarp[w, 1] = bad
        cute.arch.sync_threads()
        mine = sWarp[lane % WARPS, 0] if lane < WARPS else Int32(0)
        flag = sWarp[lane % WARPS, 1] if lane < WARPS else Int32(0)
        before = cute.arch.warp_redux_sync(mine if lane < w else Int32(0), kind="add")
        total = cute.arch.warp_redux_sync(mine, kind="add")
        worst = cute.arch.warp_redux_sync(flag, kind="or")
        cute.arch.sync_threads()
        return before, total, worst

    # ---------------------------------------------------------------- sample and collect
    @cute.jit
    def sample(self, sm, first, quads, n, K, tid, w):
        """A key that about 1.2 to 2 K values of the row reach, estimated from values spread over it."""
        sKey, sPos, sAllKey, sAllPos, sHist, sWarp, sFound, sFewKey, sFewBack, sShare = sm
        lane = tid % 32
        rKey = cute.make_rmem_tensor((4 * QUADS,), Uint32)
        rX = cute.make_rmem_tensor((4, QUADS), Float32)
        for u in cutlass.range_constexpr(QUADS):
            # inner quads, which are whole
            v = 1 + Int32((Int64(quads - 2) * (tid + u * THREADS)) // (QUADS * THREADS))
            x = load16(first + 4 * v)
            for c in cutlass.range_constexpr(4):
                rX[c, u] = x[c]
        for u in cutlass.range_constexpr(QUADS):
            for c in cutlass.range_constexpr(4):
                rKey[4 * u + c] = key_of(rX[c, u])
        low = rKey[0]
        high = rKey[0]
        for i in cutlass.range_constexpr(1, 4 * QUADS):
            low = lower(low, rKey[i])
            high = higher(high, rKey[i])
        low = cute.arch.warp_redux_sync(low, kind="umin")
        high = cute.arch.warp_redux_sync(high, kind="umax")
        if lane == 0:
            sWarp[w, 0] = Int32(low)
            sWarp[w, 1] = Int32(high)
        cute.arch.sync_threads()
        low = cute.arch.warp_redux_sync(Uint32(sWarp[lane % WARPS, 0]), kind="umin")
        high = cute.arch.warp_redux_sync(Uint32(sWarp[lane % WARPS, 1]), kind="umax")
        # the Kth of the row is about the expected'th of the sample; five standard deviations on top
        expected = Float32(SAMPLED) * Float32(K) / Float32(n)
        rank = Int32(expected + Float32(5.0) * cute.math.sqrt(expected) + Float32(4.0))
        bound = Uint32(0)
        if rank < SAMPLED:
            enough = rank + rank // 4
            # at first only near the largest one, with all that is further below in the lowest bin
            near = high - lower(high - low, Uint32(NEAR - 1))
            shift = self.digit_shift(smear(high - near))
            for i in cutlass.range_constexpr(4 * QUADS):
                self.bump(sHist, (higher(rKey[i], near) - near) >> shift)
            digit, above, here = self.find(sm, rank, tid, w, lane)
            mask = (Uint32(1) << shift) - 1
            if digit == 0 and near > low:  # further below: all over again
                mask = smear(high - low)
                above = Int32(0)
                here = Int32(SAMPLED)
            else:
                low = near + (Uint32(digit) << shift)
            while mask != Uint32(0) and above + here > enough:
                shift = self.digit_shift(mask)
                for i in cutlass.range_constexpr(4 * QUADS):
                    if rKey[i] - low <= mask:
                        self.bump(sHist, (rKey[i] - low) >> shift)
                digit, more, here = self.find(sm, rank - above, tid, w, lane)
                above = above + more
                low = low + (Uint32(digit) << shift)
                mask = (Uint32(1) << shift) - 1
            bound = low
        return bound

    @cute.jit
    def digit_shift(self, mask):
        """How far to shift what is at most `mask` so that 11 bits are left."""
        bits = 32 - Int32(cute.arch.clz(mask))
        return Uint32(cutlass.max(bits - DIGIT, 0))

    @cute.jit
    def bump(self, sHist, digit):
        cute.arch.atomic_add(sHist.iterator + Int32(digit), Int32(1), sem="relaxed", scope="cta")

    @cute.jit
    def find(self, sm, rank, tid, w, lane):
        """(the bin that holds the rank'th item, counted from the highest bin; items in bins above; items in it). Leaves
        the histogram zero. All threads call it, after their last bump()."""
        sKey, sPos, sAllKey, sAllPos, sHist, sWarp, sFound, sFewKey, sFewBack, sShare = sm
        cute.arch.sync_threads()
        PER = BINS // THREADS
        rBin = cute.make_rmem_tensor((PER,), Int32)
        top = BINS - 1 - tid * PER
        mine = Int32(0)
        for i in cutlass.range_constexpr(PER):
            rBin[i] = sHist[top - i]
            sHist[top - i] = 0
            mine = mine + rBin[i]
        inclusive = warp_inclusive_sum(mine, lane)
        if lane == 31:
            sWarp[w, 0] = inclusive
        cute.arch.sync_threads()
        sums = sWarp[lane % WARPS, 0] if lane < w else Int32(0)
        above = cute.arch.warp_redux_sync(sums, kind="add") + inclusive - mine
        for i in cutlass.range_constexpr(PER):
            if above < rank and rank <= above + rBin[i]:
                sFound[0] = top - i
                sFound[1] = above
                sFound[2] = rBin[i]
            above = above + rBin[i]
        cute.arch.sync_threads()
        return sFound[0], sFound[1], sFound[2]

    @cute.jit
    def load_quad(self, rX, u: cutlass.Constexpr, first, shift, n, quads, v):
        """rX[., u] = the values of quad v; NaN where there are none."""
        if v > 0 and v < quads - 1:
            x = load16(first + 4 * v)
            for c in cutlass.range_constexpr(4):
                rX[c, u] = x[c]
        else:
            for c in cutlass.range_constexpr(4):
                at = 4 * v - shift + c
                rX[c, u] = Float32.nan
                if at >= 0 and at < n:
                    rX[c, u] = (first + (4 * v + c)).load()

    @cute.jit
    def load_batch(self, rX, place, j, lane):
        """rX = the values of this lane in the chunks j, j + step, ..; NaN where there are none."""
        first, shift, n, quads = place
        STEP = CLUSTER * WARPS
        if j > 0 and (j + (UNROLL - 1) * STEP) * 32 + 32 < quads:
            for u in cutlass.range_constexpr(UNROLL):
                x = load16(first + 4 * ((j + u * STEP) * 32 + lane))
                for c in cutlass.range_constexpr(4):
                    rX[c, u] = x[c]
        else:
            for u in cutlass.range_constexpr(UNROLL):
                self.load_quad(rX, u, first, shift, n, quads, (j + u * STEP) * 32 + lane)

    @cute.jit
    def collect(self, sKey, everything: cutlass.Constexpr, rX, place, chunks, bound, rank, w, lane):
        """Append what reaches `bound` to this warp's segment; returns how many that were, also when they did not fit.
        rX: the first batch. The values of a lane in a batch come one behind the other."""
        first, shift, n, quads = place
        STEP = CLUSTER * WARPS
        count = Int32(0)
        for j in cutlass.range(rank * WARPS + w, chunks, STEP * UNROLL, unroll=1):
            at = [4 * ((j + u * STEP) * 32 + lane) - shift for u in range(UNROLL)]
            rHit = cute.make_rmem_tensor((4, UNROLL), Int32)
            mine = Int32(0)
            for u in cutlass.range_constexpr(UNROLL):
                for c in cutlass.range_constexpr(4):
                    if const_expr(everything):
                        rHit[c, u] = Int32(1) if at[u] + c >= 0 and at[u] + c < n else Int32(0)
                    else:
                        rHit[c, u] = Int32(1) if rX[c, u] >= bound else Int32(0)
                    mine = mine + rHit[c, u]
            inclusive = warp_inclusive_sum(mine, lane)
            total = cute.arch.shuffle_sync(inclusive, offset=31)
            if count + total <= SEGMENT:
                slot = w * SEGMENT + count + inclusive - mine
                for u in cutlass.range_constexpr(UNROLL):
                    for c in cutlass.range_constexpr(4):
                        store_item(sKey.iterator + slot, rX[c, u].bitcast(Uint32), at[u] + c, rHit[c, u] != 0)
                        slot = slot + rHit[c, u]
            else:
                count = count + SEGMENT  # too many, whatever comes
            count = count + total
            self.load_batch(rX, place, j + STEP * UNROLL, lane)
        return count

    # ---------------------------------------------------------------- narrow and emit
    @cute.jit
    def finish(
        self, sm, from_row: cutlass.Constexpr, first, shift, n, quads, chunks, base, count, K, mOut, r, tid, w, lane
    ):
        """Find the Kth item, and write the positions of all that are not below it."""
        sKey, sPos, sAllKey, sAllPos, sHist, sWarp, sFound, sFewKey, sFewBack, sShare = sm
        cute.arch.sync_threads()
        source = (first, shift, n, quads, chunks, base, count, w, lane)
        rank = K  # of the item that is looked for, within what is left
        here = n if const_expr(from_row) else Int32(LIST)
        low = Uint32(0)
        mask = Uint32(0xFFFFFFFF)
        if const_expr(not from_row):
            # a tight range makes the first bins small
            least = sAllKey[base + cutlass.min(lane, cutlass.max(count - 1, 0))]
            most = least
            for i in cutlass.range(lane, count, 32, unroll=1):
                key = sAllKey[base + i]
                least = lower(least, key)
                most = higher(most, key)
            least = cute.arch.warp_redux_sync(least, kind="umin")
            most = cute.arch.warp_redux_sync(most, kind="umax")
            if lane == 0:
                sWarp[w, 0] = Int32(least)
                sWarp[w, 1] = Int32(most)
            cute.arch.sync_threads()
            low = cute.arch.warp_redux_sync(Uint32(sWarp[lane % WARPS, 0]), kind="umin")
            mask = smear(cute.arch.warp_redux_sync(Uint32(sWarp[lane % WARPS, 1]), kind="umax") - low)
        back_low = Uint32(0)
        back_mask = Uint32(0xFFFFFFFF)
        while mask != Uint32(0) and here > FEW:
            step = self.digit_shift(mask)
            self.visit(sm, "keys", from_row, source, low, mask, back_low, back_mask, step, Int32(0), mOut, r)
            digit, above, here = self.find(sm, rank, tid, w, lane)
            rank = rank - above
            low = low + (Uint32(digit) << step)
            mask = (Uint32(1) << step) - 1
        if here > FEW and here > rank:  # many equal values, not all of them wanted
            back_mask = smear(Uint32(n - 1))
            while back_mask != Uint32(0) and here > FEW:
                step = self.digit_shift(back_mask)
                self.visit(sm, "backs", from_row, source, low, mask, back_low, back_mask, step, Int32(0), mOut, r)
                digit, above, here = self.find(sm, rank, tid, w, lane)
                rank = rank - above
                back_low = back_low + (Uint32(digit) << step)
                back_mask = (Uint32(1) << step) - 1
        if here <= FEW:
            if tid == 0:
                sFound[3] = 0
            cute.arch.sync_threads()
            self.visit(sm, "few", from_row, source, low, mask, back_low, back_mask, Uint32(0), Int32(0), mOut, r)
            cute.arch.sync_threads()
            # every warp ranks the few items: each lane one of them, against all
            key = sFewKey[lane]
            back = sFewBack[lane]
            better = Int32(0)
            for i in cutlass.range(here, unroll=1):
                other = cute.arch.shuffle_sync(key, offset=i)
                other_back = cute.arch.shuffle_sync(back, offset=i)
                better = better + (Int32(1) if other > key or (other == key and other_back > back) else Int32(0))
            is_it = lane < here and better == rank - 1
            at = 31 - Int32(cute.arch.clz(Uint32(cute.arch.vote_ballot_sync(is_it))))
            low = cute.arch.shuffle_sync(key, offset=at)
            back_low = cute.arch.shuffle_sync(back, offset=at)
        selected = self.visit(
            sm, "count", from_row, source, low, mask, back_low, back_mask, Uint32(0), Int32(0), mOut, r
        )
        before, _, _ = self.block_sum(sWarp, selected, Int32(0), w, lane)
        self.visit(sm, "emit", from_row, source, low, mask, back_low, back_mask, Uint32(0), before, mOut, r)

    @cute.jit
    def visit(
        self, sm, what: cutlass.Constexpr, from_row: cutlass.Constexpr, source, low, mask, back_low, back_mask, step,
        total, mOut, r,
    ):
        """Do `what` with every item of the list, or of the row; returns `total` plus how many were selected."""
        sKey, sPos, sAllKey, sAllPos, sHist, sWarp, sFound, sFewKey, sFewBack, sShare = sm
        first, shift, n, quads, chunks, base, count, w, lane = source
        if const_expr(from_row):
            for j in cutlass.range(w, chunks, WARPS, unroll=1):
                rX = cute.make_rmem_tensor((4, 1), Float32)
                v = j * 32 + lane
                self.load_quad(rX, 0, first, shift, n, quads, v)
                for c in cutlass.range_constexpr(4):
                    at = 4 * v - shift + c
                    total = self.act(sm, what, at >= 0 and at < n, key_of(rX[c, 0]), Uint32(n - 1 - at), n, low, mask,
                                     back_low, back_mask, step, total, lane, mOut, r)
        else:
            for i in cutlass.range(0, count, 32, unroll=1):
                inside = i + lane < count
                at = base + cutlass.min(i + lane, count - 1)
                total = self.act(sm, what, inside, sAllKey[at], Uint32(n - 1 - sAllPos[at]), n, low, mask,
                                 back_low, back_mask, step, total, lane, mOut, r)
        return total

    @cute.jit
    def act(self, sm, what: cutlass.Constexpr, inside, key, back, n, low, mask, back_low, back_mask, step, total, lane,
            mOut, r):
        """keys, backs: count the item in its bin. few: append it to the few that are left. count, emit: the
        selected."""
        sKey, sPos, sAllKey, sAllPos, sHist, sWarp, sFound, sFewKey, sFewBack, sShare = sm
        if const_expr(what in ("keys", "backs", "few")):
            inside = inside and key - low <= mask
            if const_expr(what != "keys"):
                inside = inside and back - back_low <= back_mask
            if inside:
                if const_expr(what == "few"):
                    i = cute.arch.atomic_add(sFound.iterator + 3, Int32(1), sem="relaxed", scope="cta")
                    sFewKey[i] = key
                    sFewBack[i] = back
                else:
                    self.bump(sHist, (key - low if const_expr(what == "keys") else back - back_low) >> step)
        else:
            hit = inside and (key > low or (key == low and back >= back_low))
            votes = Uint32(cute.arch.vote_ballot_sync(hit))
            if const_expr(what == "emit"):
                below = (Uint32(1) << Uint32(lane)) - 1
                if hit:
                    mOut[r, total + Int32(cute.arch.popc(votes & below))] = n - 1 - Int32(back)
            total = total + Int32(cute.arch.popc(votes))
        return total


def fake_args():
    """Stand-ins with the promises of the op: contiguous rows; all sizes and the row stride dynamic."""

    def any_int():
        return cute.sym_int()

    rows = any_int()
    if WINDOWS:
        x0 = rt.make_fake_tensor(Int32, (rows,), (1,), assumed_align=4)
        x1 = x0
    else:
        x0 = rt.make_fake_tensor(Int32, (any_int(),), (cute.sym_int64(),), assumed_align=4)
        x1 = Int32(1)
    return (
        rt.make_fake_tensor(Float32, (rows, any_int()), (cute.sym_int64(), 1), assumed_align=4),
        x0,
        x1,
        rt.make_fake_tensor(Int32, (rows, any_int()), (cute.sym_int64(), 1), assumed_align=4),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return TopkIndices(), fake_args()
