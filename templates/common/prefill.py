"""What the templates of mla_prefill share: the tiles in their order, the softmax, the store, the arguments.

A tile is (request, head, rows of queries). Of each request the last rows, which see most, come first; heads go in
groups, whose keys and values stay in L2 while the tiles of the group are worked on.

Accumulators are flat, in the order of both m16n8 and wgmma: element 4 j + 2 r + e is column 8 j + 2 (lane % 4) + e of
row lane // 4 + 8 r of a warp's 16 rows.
"""

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import Float32, Int32, Int64, const_expr

from common.sm90 import INF, ex2, quad_max, quad_sum
from common.warp import warp_inclusive_sum

LN2 = 0.6931471805599453
M_START = -1.0e30
SLACK = 8.0  # of running maxima, in powers of two: P is at most 2^8, which its 16 bits hold as well as 1
WANTS_LSE = 2  # bit of `flags`, as in mla_decode


@cute.jit
def find(cu_q, x, batch, heads, rows: cutlass.Constexpr, lane):
    """Request of tile x and the first tile of that request; batch if there is no such tile. One warp; all lanes get the
    answer."""
    base = Int32(0)
    b = Int32(0)
    start = Int32(0)
    for i0 in cutlass.range(0, batch, 32, unroll=1):
        i = i0 + lane
        incl = Int32(0)
        if i < batch:
            incl = (cu_q[i + 1] - cu_q[i] + (rows - 1)) // rows * heads
        incl = warp_inclusive_sum(incl, lane) + base
        count = cute.arch.popc(cute.arch.vote_ballot_sync(i < batch and incl <= x))
        top = cute.arch.shuffle_sync(incl, offset=cutlass.max(count - 1, 0))
        start = top if count > 0 else start
        b = b + count
        base = cute.arch.shuffle_sync(incl, offset=31)
    return b, start


@cute.jit
def place(rest, lq, heads, group, rows: cutlass.Constexpr):
    """Head and first query row of tile `rest` of a request with lq query rows."""
    tiles = (lq + (rows - 1)) // rows
    first = rest // (group * tiles) * group
    rest = rest - first * tiles
    heads_here = cutlass.min(group, heads - first)
    i = rest // heads_here
    return first + rest - i * heads_here, (tiles - 1 - i) * rows


@cute.jit
def mask(S, limit, token, lane):
    """-inf where the key is not visible. limit: visible keys of this lane's two rows."""
    d0 = limit[0] - token - (lane % 4) * 2
    d1 = limit[1] - token - (lane % 4) * 2
    for i in cutlass.range_constexpr(cute.size(S)):
        d = d0 if const_expr((i // 2) % 2 == 0) else d1
        S[i] = S[i] if (i // 4) * 8 + i % 2 < d else -Float32(INF)


@cute.jit
def move(S, m, L, scale, c):
    """The running maxima m of a lane's two rows, with the scores of one more block; scale: the factors of what was
    summed up before, also in L."""
    columns = cute.size(S) // 4
    for r in cutlass.range_constexpr(2):
        a = cute.arch.fmax(S[2 * r], S[2 * r + 1])
        b = cute.arch.fmax(S[4 + 2 * r], S[4 + 2 * r + 1])
        for j in cutlass.range_constexpr(2, columns, 2):
            a = cute.arch.fmax(a, cute.arch.fmax(S[4 * j + 2 * r], S[4 * j + 2 * r + 1]))
            b = cute.arch.fmax(b, cute.arch.fmax(S[4 * j + 4 + 2 * r], S[4 * j + 4 + 2 * r + 1]))
        new = cute.arch.fmax(m[r], quad_max(cute.arch.fmax(a, b)) * c)
        scale[r] = ex2(m[r] - new)
        m[r] = new
        L[r] = L[r] * scale[r]


@cute.jit
def exceeds(S, m, inverse):
    """Whether, in this warp, a score is so much larger than its row's running maximum that P would exceed 2^SLACK.
    inverse: 1 / c.

    Compared as integers, which order positive numbers in the same way, because there is an instruction for the largest
    of three. If the limit itself is not positive, the answer is yes."""
    columns = cute.size(S) // 4
    limit = cute.make_rmem_tensor((2,), Float32)
    for r in cutlass.range_constexpr(2):
        limit[r] = (m[r] + SLACK) * inverse
    bits, limit_bits = cute.recast_tensor(S, Int32), cute.recast_tensor(limit, Int32)
    top = [Int32(0), Int32(0)]
    for j in cutlass.range_constexpr(columns):
        for r in cutlass.range_constexpr(2):
            top[r] = cutlass.max(top[r], cutlass.max(bits[4 * j + 2 * r], bits[4 * j + 2 * r + 1]))
    return cute.arch.vote_any_sync(top[0] > limit_bits[0] or top[1] > limit_bits[1])


@cute.jit
def exponentials(S, m, L, c):
    """S <- 2^(S c - m); L: sums of this lane's columns."""
    for r in cutlass.range_constexpr(2):
        a = Float32(0.0)
        b = Float32(0.0)
        for j in cutlass.range_constexpr(cute.size(S) // 4):
            S[4 * j + 2 * r] = ex2(S[4 * j + 2 * r] * c - m[r])
            S[4 * j + 2 * r + 1] = ex2(S[4 * j + 2 * r + 1] * c - m[r])
            a = a + S[4 * j + 2 * r]
            b = b + S[4 * j + 2 * r + 1]
        L[r] = L[r] + (a + b)


@cute.jit
def softmax(S, m, L, scale, c, inverse):
    """S <- 2^(S c - m) of one more block. Returns whether this warp moved its running maxima m: then scale has the
    factors of what was summed up before.

    They move only when they must, so that the other blocks, almost all, need neither the maxima, nor their reduction
    over the quad, nor a rescale of O."""
    moved = exceeds(S, m, inverse)
    if moved:
        move(S, m, L, scale, c)
    exponentials(S, m, L, c)
    return moved


@cute.jit
def rescale(O, scale, moved):
    if moved:
        for e in cutlass.range_constexpr(cute.size(O)):
            O[e] = O[e] * scale[(e // 2) % 2]


@cute.jit
def store_rows(O, m, L, out, lse, flags, q0, row, lq, head, lane, dtype: cutlass.Constexpr):
    """O / L, and the log-sum-exp if it is wanted, of rows `row` and `row` + 8 of a request: 16-byte stores, after 4 x 4
    transposes inside each quad."""
    width = cute.size(O) // 4 * 8
    quad = lane % 4
    for r in cutlass.range_constexpr(2):
        total = quad_sum(L[r])
        inverse = cute.arch.rcp_approx(total) if total > 0.0 else Float32(0.0)
        here = row + 8 * r
        token = Int64(q0 + here)
        if quad == 0 and here < lq and (flags & WANTS_LSE) != 0:
            value = (m[r] + cute.math.log2(total, fastmath=True)) * LN2 if total > 0.0 else -Float32(INF)
            (lse.iterator + (token * lse.stride[0] + head * lse.stride[1])).store(value)
        rOut = cute.make_rmem_tensor((width // 4,), dtype)
        for j in cutlass.range_constexpr(width // 8):
            rOut[2 * j] = (O[4 * j + 2 * r] * inverse).to(dtype)
            rOut[2 * j + 1] = (O[4 * j + 2 * r + 1] * inverse).to(dtype)
        x = cute.recast_tensor(rOut, Int32)  # x[j]: columns 8 j + 2 quad and the next one
        for g in cutlass.range_constexpr(width // 32):
            for bit in cutlass.range_constexpr(2):
                high = (quad >> bit) & 1
                for i in cutlass.range_constexpr(4):
                    if const_expr((i >> bit) & 1 == 0):
                        a = 4 * g + i
                        b = a + (1 << bit)
                        sent = x[a] if high == 1 else x[b]
                        got = cute.arch.shuffle_sync_bfly(sent, offset=1 << bit)
                        new_a = got if high == 1 else x[a]
                        new_b = x[b] if high == 1 else got
                        x[a] = new_a
                        x[b] = new_b
        if here < lq:
            to = out.iterator + (token * out.stride[0] + head * out.stride[1] + quad * 8)
            for g in cutlass.range_constexpr(width // 32):
                piece = cute.make_tensor(rOut.iterator + 8 * g, cute.make_layout(8))
                cute.autovec_copy(piece, cute.make_tensor((to + 32 * g).align(16), cute.make_layout(8)))


def prefill_arguments(dtype, q_dim, v_dim):
    """Fake arguments of __call__: q, k, k_pe, v, cu_q, cu_k, out, lse, counters, sm_scale, pe_offset, flags, group,
    ctas, stream. All sizes but q_dim and v_dim and all outer strides are dynamic."""
    n = cute.sym_int
    tokens, keys, heads, batch1 = n(), n(), n(), n()

    def tensor(kind, *shape, divisor=8, align=16, last=1):
        stride = tuple(cute.sym_int64(divisibility=divisor) for _ in shape[1:]) + (last,)
        return rt.make_fake_tensor(kind, shape, stride, assumed_align=align)

    return (
        tensor(dtype, tokens, heads, q_dim),
        tensor(dtype, keys, heads, n()),
        tensor(dtype, keys, n(), n()),
        tensor(dtype, keys, heads, v_dim),
        tensor(Int32, batch1, align=4),
        tensor(Int32, batch1, align=4),
        tensor(dtype, tokens, heads, v_dim),
        tensor(Float32, n(), n(), divisor=1, align=4, last=cute.sym_int64()),
        tensor(Int32, n(), align=4),
        Float32(1.0),
        *[Int32(1)] * 4,
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )
