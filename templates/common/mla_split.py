"""Work split of paged MLA decode. Every CTA computes its own share from the lengths on the device: no metadata kernel,
no host read, so one captured CUDA graph is right for all later lengths. jitmla/schedule.py has the host side,
tests/test_schedule.py a brute-force model.

The unit of work is a block of 64 tokens, whatever the page size; request b has n_blocks(L_b) >= 1 of them. `parts`
CTAs (times the row tiles of a kernel that has several) share the blocks. Two splits, chosen from the lengths:

aligned   every request gets the same number of parts (s = parts // B) or, when B > parts, every part gets
          k = ceil(B / parts) whole requests. A part then has exactly one piece (or k whole requests: no partial
          results, no combine). Best when the lengths are similar.
even      request r costs n_blocks + fixed units and occupies [C_r, C_r + fixed + n_blocks) on a line; part p owns
          [p * share, (p + 1) * share). Best when the lengths differ.

aligned is taken when its slowest part costs at most share + bias (bias: what a second piece in a part and the combine
cost, in blocks; a large negative bias switches aligned off, a large one forces it). least: fewest blocks of a piece.

Slots of partial results: 2p if part p continues a request, 2p + 1 if it starts one that a later part continues.
A request that one part does as a whole has no slot. A partial output is normalised (the softmax over its own blocks),
its log-sum-exp is in base 2 and -inf where a row sees no token. The parts of a split request are p0 .. p0 + n - 1, and
p0 names the request: at most one split request starts in a part. They combine its rows (mla_combine.py); in the aligned
split those of the s parts of a request that have no piece help.

s = parts // B and k = ceil(B / parts) are passed in (no divisions by B here). B >= 1. `lane` is the lane of a whole,
converged warp; every lane gets the answer. Sums of blocks are 32-bit: up to 2^31 blocks in a batch.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr

from common.warp import warp_inclusive_sum

SPLIT_TOKENS = 64  # tokens of a block
SPLIT_SHIFT = 6  # its log2: a shift is one instruction, a division of a signed number six


@cute.jit
def n_blocks(seqlen):
    """Blocks of a request; a request of length 0 has one, in which everything is masked."""
    return cutlass.max((seqlen + (SPLIT_TOKENS - 1)) >> SPLIT_SHIFT, 1)


@cute.jit
def natural_quotient(a: Int32, b: Int32):
    """a // b where a >= 0 and b > 0: half the instructions of a division with signs."""
    return Int32(Uint32(a) // Uint32(b))


@cute.jit
def partials(
    workspace: cute.Tensor, parts: Int32, rows: Int32, latent: cutlass.Constexpr, dtype: cutlass.Constexpr = Float32
):
    """The workspace as (o_acc (2 * parts, rows, latent), lse_acc (2 * parts, rows)), fp32, o_acc of `dtype`. 32-bit
    offsets: 160 parts of 512 rows of 512 columns are 84 million floats."""
    o_acc = cute.make_layout((2 * parts, rows, latent), stride=(rows * latent, latent, 1))
    lse_acc = cute.make_layout((2 * parts, rows), stride=(rows, 1))
    after = workspace.iterator + cute.assume(2 * parts * rows * latent, divby=latent)
    return cute.make_tensor(cute.recast_ptr(workspace.iterator, dtype=dtype), o_acc), cute.make_tensor(after, lse_acc)


@cute.jit
def choose(
    seqlens: cute.Tensor,
    B: Int32,
    parts: Int32,
    fixed: Int32,
    least: Int32,
    bias: Int32,
    s: Int32,
    k: Int32,
    lane: Int32,
):
    """(aligned?, share, blocks of an aligned piece, blocks of the batch) from the sum and the maximum of the blocks."""
    tot = Int32(0)
    top = Int32(1)
    for i0 in cutlass.range(0, B, 128, unroll=1):
        for u in cutlass.range_constexpr(4):  # loads that are under way together
            i = i0 + 32 * u + lane
            n = n_blocks(seqlens[cutlass.min(i, B - 1)])
            tot = tot + (n if i < B else Int32(0))
            top = cutlass.max(top, n)
    tot = cute.arch.warp_redux_sync(tot, kind="add")
    top = cute.arch.warp_redux_sync(top, kind="max")
    share = cutlass.max(natural_quotient(tot + fixed * B + parts - 1, parts), least)
    piece = top
    cost = k * (top + fixed)
    if s > 0:
        piece = cutlass.max(natural_quotient(top + s - 1, s), least)
        if piece > 1:
            piece = piece + (piece & 1)  # the kernels work on pairs of blocks
        cost = piece + fixed
    return cost <= share + bias, share, piece, tot


@cute.jit
def locate(seqlens: cute.Tensor, B: Int32, x0: Int32, x1: Int32, fixed: Int32, lane: Int32):
    """(request, first block) at the cost positions x0 and x1 of the even split, in one scan."""
    base = Int32(0)
    r0 = Int32(0)
    c0 = Int32(0)
    r1 = Int32(0)
    c1 = Int32(0)
    for i0 in cutlass.range(0, B, 32, unroll=1):
        i = i0 + lane
        incl = Int32(0)
        if i < B:
            incl = n_blocks(seqlens[i]) + fixed
        incl = warp_inclusive_sum(incl, lane) + base
        n0 = cute.arch.popc(cute.arch.vote_ballot_sync(i < B and incl <= x0))
        n1 = cute.arch.popc(cute.arch.vote_ballot_sync(i < B and incl <= x1))
        t0 = cute.arch.shuffle_sync(incl, offset=cutlass.max(n0 - 1, 0))
        t1 = cute.arch.shuffle_sync(incl, offset=cutlass.max(n1 - 1, 0))
        c0 = t0 if n0 > 0 else c0
        c1 = t1 if n1 > 0 else c1
        r0 = r0 + n0
        r1 = r1 + n1
        base = cute.arch.shuffle_sync(incl, offset=31)
    j0 = cutlass.max(x0 - c0 - fixed, 0) if r0 < B else Int32(0)
    j1 = cutlass.max(x1 - c1 - fixed, 0) if r1 < B else Int32(0)
    return r0, j0, r1, j1


@cute.jit
def interval(
    seqlens: cute.Tensor,
    B: Int32,
    part: Int32,
    parts: Int32,
    fixed: Int32,
    least: Int32,
    bias: Int32,
    s: Int32,
    k: Int32,
    lane: Int32,
):
    """(r0, r1, j0, j1, blocks of the batch, unit): requests r0 .. r1 inclusive (none when r1 < r0), first block j0 of
    r0, end block j1 of r1, where 0 stands for the end of r1. unit is for `sharing`."""
    r = part * k
    if s > 0:
        r = natural_quotient(part, s)
    own = n_blocks(seqlens[cutlass.min(r, B - 1)])  # on its way together with what `choose` reads
    aligned, share, piece, tot = choose(seqlens, B, parts, fixed, least, bias, s, k, lane)
    r0 = Int32(0)
    r1 = Int32(-1)
    j0 = Int32(0)
    j1 = Int32(0)
    unit = Int32(0)
    if aligned:
        if s > 0:
            j = (part - r * s) * piece
            if r < B:
                unit = -piece
                r0 = r
                r1 = r - 1
                if j < own:
                    r1 = r
                    j0 = j
                    j1 = cutlass.min(j + piece, own)
        else:
            r0 = r
            r1 = cutlass.min(r + k, B) - 1
    else:
        unit = share
        a0, b0, a1, b1 = locate(seqlens, B, part * share, (part + 1) * share, fixed, lane)
        r0 = a0
        j0 = b0
        r1 = a1 - 1 if b1 == 0 else a1  # 0: the interval ends exactly between two requests
        j1 = b1
    return r0, r1, j0, j1, tot, unit


@cute.jit
def sharing(seqlens: cute.Tensor, part: Int32, s: Int32, unit: Int32, r0: Int32, r1: Int32, j0: Int32, j1: Int32):
    """(p0, n, sharers, started): what `part` has to combine, from what `interval` returned (one thread will do).

    p0, n       first part and number of parts of request r0, if this part continues it or (aligned) belongs to it;
                nothing to combine when n < 2
    sharers     so many parts combine it: p0 .. p0 + sharers - 1, of which the first n have a piece
    started     number of parts of request r1, if this part starts it and later ones continue it, else 0. They are the
                sharers too, and the first is this part
    """
    p0 = Int32(0)
    n = Int32(0)
    sharers = Int32(0)
    started = Int32(0)
    if unit < 0:  # aligned, pieces of -unit blocks
        p0 = natural_quotient(part, s) * s
        n = natural_quotient(n_blocks(seqlens[r0]) - unit - 1, -unit)
        sharers = s
    if unit > 0:  # even, a share of `unit`
        if j0 > 0:
            before = natural_quotient(j0 + unit - 1, unit)
            p0 = part - before
            n = before + 1 + natural_quotient(n_blocks(seqlens[r0]) - 1 - j0, unit)
            sharers = n
        if j1 > 0 and (r0 < r1 or j0 == 0):
            started = 2 + natural_quotient(n_blocks(seqlens[r1]) - 1 - j1, unit)
    return p0, n, sharers, started


@cute.jit
def store_interval(
    sI: cute.Tensor,
    seqlens: cute.Tensor,
    B: Int32,
    part: Int32,
    parts: Int32,
    fixed: Int32,
    least: Int32,
    bias: Int32,
    s: Int32,
    k: Int32,
    lane: Int32,
):
    """`interval` to shared memory, by one warp."""
    found = interval(seqlens, B, part, parts, fixed, least, bias, s, k, lane)
    if lane == 0:
        for i in cutlass.range_constexpr(6):
            sI[i] = found[i]


@cute.jit
def store_sharing(sShare: cute.Tensor, sI: cute.Tensor, seqlens: cute.Tensor, part: Int32, s: Int32, lane: Int32):
    """`sharing` of the stored interval to shared memory, then r0 and r1: what MlaCombine.run reads. By one warp."""
    p0, n, sharers, started = sharing(seqlens, part, s, sI[5], sI[0], sI[1], sI[2], sI[3])
    if lane == 0:
        for i, x in enumerate((p0, n, sharers, started, sI[0], sI[1])):
            sShare[i] = x


@cute.jit
def piece_of(seqlens: cute.Tensor, sI: cute.Tensor, req: Int32):
    """(length, first block, end block, has it the whole request) of a request of the part whose interval is sI."""
    seqlen = seqlens[req]
    blocks = n_blocks(seqlen)
    b0 = sI[2] if req == sI[0] else Int32(0)
    b1 = sI[3] if (req == sI[1] and sI[3] > 0) else blocks
    return seqlen, b0, b1, b0 == 0 and b1 == blocks


@cute.jit
def touch_table(
    table: cute.Tensor,
    seqlens: cute.Tensor,
    B: Int32,
    part: Int32,
    s: Int32,
    k: Int32,
    page_size,
    lane: Int32,
):
    """Bring block-table entries that an aligned split will need into the L2 while the lengths are still being read; one
    warp, no effect on results. Touches no entry from ceil(L / page_size) on. page_size: a constant, then those of the
    request's first 65536 tokens; or known at launch, then 1024 from where the part would begin, were the lengths equal.

    It may run before griddepcontrol_wait: a length that is still being written costs a useless prefetch inside the
    table. The load passes by the L1, where a stale line would be found again after the wait.
    """
    r = part * k
    if s > 0:
        r = natural_quotient(part, s)
    if r < B:
        seqlen = cute.arch.load(seqlens.iterator + r, Int32, cop="cg")
        entries = cutlass.min((seqlen + (page_size - 1)) // page_size, table.shape[1])
        row = table[r, None].iterator
        first = Int32(0)
        if const_expr(not isinstance(page_size, int)):
            if s > 0:
                first = entries // s * (part - r * s)
        for i in cutlass.range_constexpr(max(64 // page_size, 1) if isinstance(page_size, int) else 1):
            e = first + (i * 32 + lane) * 32
            if e < entries:
                cute.arch.prefetch((row + e).to_llvm_ptr(), cache_level="L2")
