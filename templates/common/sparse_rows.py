"""What kernels of token-sparse MLA share: their arguments, the lists, and how rows of the cache get into shared memory.

A query token (s_q of them in each request) has a list of `topk` cache rows. For mla_split a query token is a request,
and its length is the part of its list that counts, `TokenLengths`. An entry is the number of a row in the pool,
page * page_size + row of the page; whatever is no row of the pool, and what lies behind the length, is not read. Its
row in shared memory is zero (0 * NaN would be NaN in P V) and its byte in `ok` 0, which makes the score -inf.

Formats of a row:
    fp8    656 bytes: 512 e4m3 | 4 float32 scales, powers of two, one for 128 columns | 64 bf16. The latent goes to
           shared memory as fp16: e4m3 to fp16 is one instruction for two values, the scale one multiplication for two,
           and the product is exact while it is at most 65504 and the scale at least 2^-15. The rope columns stay bf16.
    bf16   [latent | rope], 1152 bytes for 512 + 64 columns.
"""

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, const_expr

from common.mla_split import n_blocks
from common.sm90 import copy_async16

HAS_LENGTHS, WANTS_MAX = 8, 16  # bits of the flags, beside those of mla_combine
FP8_BYTES, FP8_SCALES, FP8_ROPE = 656, 512, 528  # a row, and where its scales and rope columns begin
# not .nc: the compiler moves those in front of the arrive on the full barrier, which then waits for them
ROW_LOAD = "ld.relaxed.cta.global"


def sparse_mla_arguments(row_bytes, latent):
    """Stand-ins for the arguments; the compiled function refuses a call that differs from them. B, s_q and H are the
    same everywhere but in lse and max_logits, which may be dummies."""
    batch, s_q, heads = cute.sym_int(), cute.sym_int(), cute.sym_int()

    def tensor(dtype, *shape, align, divisor=1, last=1):
        stride = tuple(cute.sym_int64(divisibility=divisor) for _ in shape[1:]) + (last,)
        return rt.make_fake_tensor(dtype, shape, stride, assumed_align=align)

    n = cute.sym_int
    return (
        tensor(BFloat16, batch, s_q, heads, n(), align=16, divisor=8),  # q
        tensor(Uint8, n(), n(), 1, row_bytes, align=16, divisor=16),  # kv
        tensor(Int32, batch, s_q, n(), align=4),  # indices
        tensor(Int32, n(), align=4),  # lengths
        tensor(Float32, n(), align=4),  # sinks
        tensor(BFloat16, batch, s_q, heads, latent, align=16, divisor=8),  # out
        tensor(Float32, n(), n(), n(), last=cute.sym_int64(), align=4),  # lse
        tensor(Float32, n(), n(), n(), last=cute.sym_int64(), align=4),  # max_logits
        tensor(Float32, n(), align=128),  # workspace
        tensor(Int32, n(), align=4),  # semaphores
        Float32(1.0),  # sm_scale
        *[Int32(1)] * 9,  # page_magic, page_shift, s_q_magic, s_q_shift, flags, parts, fixed, least, bias
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


@cute.jit
def per_token(x: cute.Tensor):
    """(B, s_q, ...) as (B * s_q, ...): the query tokens are evenly spaced."""
    stride = x.stride[1] if x.shape[1] > 1 else x.stride[0]
    if const_expr(len(x.shape) > 3):
        stride = cute.assume(stride, divby=8)
    shape, strides = (x.shape[0] * x.shape[1], *x.shape[2:]), (stride, *x.stride[2:])
    return cute.make_tensor(x.iterator, cute.make_layout(shape, stride=strides))


@cute.jit
def by_head(x: cute.Tensor):
    """(B, s_q, H) as (token, 1, H), the form that the combine writes."""
    x = per_token(x)
    shape, stride = (x.shape[0], 1, x.shape[1]), (x.stride[0], 0, x.stride[1])
    return cute.make_tensor(x.iterator, cute.make_layout(shape, stride=stride))


@cute.jit
def quotient(x, magic, shift):
    """x divided by what magic and shift stand for (jitmla.schedule.divisor), for 0 <= x < 2^31."""
    high = ptx("mul.hi.u32 {$w0}, {$r0}, {$r1};", (x, magic), (Int32,))
    return high >> shift if magic != 0 else x


class TokenLengths:
    """The lengths of the lists as mla_split reads them: lengths[token], of the token's request, at most topk."""

    def __init__(self, lengths, topk, flags, magic, shift):
        """magic, shift: they divide a token by s_q."""
        self.lengths, self.topk, self.flags, self.magic, self.shift = lengths, topk, flags, magic, shift

    @cute.jit
    def __getitem__(self, token):
        n = self.topk
        if (self.flags & HAS_LENGTHS) != 0:
            n = cutlass.min(self.lengths[quotient(token, self.magic, self.shift)], n)
        return n


@cute.jit
def end_of_piece(lengths, sI: cute.Tensor, token):
    """The end block of a query token in a CTA whose interval is sI (mla_split.interval)."""
    end = n_blocks(lengths[token])
    if token == sI[1] and sI[3] > 0:
        end = sI[3]
    return end


class RowAddress:
    """Where a row of the pool lies. magic, shift: they divide a row by the page size; magic 0: the rows are evenly
    spaced, and the pool is one page."""

    def __init__(self, kv, magic, shift):
        self.start, self.rows = kv.iterator.toint(), kv.shape[0] * kv.shape[1]
        self.magic, self.shift, self.page_size = magic, shift, kv.shape[1]
        # in units of 16 bytes: 32 bits
        self.page, self.row = [(Int64(stride) >> 4).to(Int32) for stride in kv.stride[:2]]

    def of(self, row):
        return ptx(
            "{ .reg .u32 p, o; .reg .u64 a; mul.hi.u32 p, {$r0}, {$r1}; shr.u32 p, p, {$r2}; mul.lo.u32 o, p, {$r3};"
            " sub.u32 o, {$r0}, o; mul.wide.u32 a, p, {$r4}; mad.wide.u32 a, o, {$r5}, a; shl.b64 a, a, 4;"
            " add.u64 {$w0}, a, {$r6}; }",
            (row, self.magic, self.shift, self.page_size, self.page, self.row, self.start),
            (Int64,),
        )


def ptx(code, ins, outs=()):
    return cute.arch.inline_ptx(code, write_only_types=list(outs) or None, read_only_args=list(ins))


def load_row16(address, offset, ok):
    """16 bytes as 4 words; zeros, without touching memory, when ok == 0."""
    return ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0;"
        " mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; mov.b32 {$w2}, 0; mov.b32 {$w3}, 0;"
        f" @p {ROW_LOAD}.v4.b32 {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, [{{$r0}}+{offset}]; }}",
        (address, ok),
        (Int32,) * 4,
    )


def load_row4(address, offset, ok):
    return ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.b32 {$w0}, 0;"
        f" @p {ROW_LOAD}.b32 {{$w0}}, [{{$r0}}+{offset}]; }}",
        (address, ok),
        (Int32,),
    )


def load_entry(address, offset, ok):
    """An entry of a list; -1 without touching memory when ok == 0."""
    return ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.b32 {$w0}, -1;"
        f" @p ld.global.b32 {{$w0}}, [{{$r0}}+{offset}]; }}",
        (address, ok),
        (Int32,),
    )


def store_shared16(address, offset, words):
    ptx(f"st.shared.v4.b32 [{{$r0}}+{offset}], {{{{$r1}}, {{$r2}}, {{$r3}}, {{$r4}}}};", (address, *words))


def load_shared16(address, offset):
    code = f"ld.shared.v4.b32 {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, [{{$r0}}+{offset}];"
    return ptx(code, (address,), (Int32,) * 4)


def store_shared1(address, value):
    ptx("st.shared.u8 [{$r0}], {$r1};", (address, value))


def load_shared1(address, offset=0):
    return ptx(f"ld.shared.u8 {{$w0}}, [{{$r0}}+{offset}];", (address,), (Int32,))


def load_shared2(address, offset=0):
    return ptx(f"ld.shared.u16 {{$w0}}, [{{$r0}}+{offset}];", (address,), (Int32,))


def dequantised(word, scale2):
    """4 e4m3 of a word times a half2 -> two half2 words."""
    return ptx(
        "{ .reg .b16 a, b; .reg .b32 x, y; mov.b32 {a, b}, {$r0}; cvt.rn.f16x2.e4m3x2 x, a; cvt.rn.f16x2.e4m3x2 y, b;"
        " mul.rn.f16x2 {$w0}, x, {$r1}; mul.rn.f16x2 {$w1}, y, {$r1}; }",
        (word, scale2),
        (Int32, Int32),
    )


def half2_of_float(word):
    """A float32 as fp16, twice."""
    code = "{ .reg .b16 a; .reg .f32 f; mov.b32 f, {$r0}; cvt.rn.f16.f32 a, f; mov.b32 {$w0}, {a, a}; }"
    return ptx(code, (word,), (Int32,))


def half2_of_bf16x2(word):
    return ptx(
        "{ .reg .b32 x, y; .reg .f32 f, g; shl.b32 x, {$r0}, 16; and.b32 y, {$r0}, 0xffff0000;"
        " mov.b32 f, x; mov.b32 g, y; cvt.rn.f16x2.f32 {$w0}, g, f; }",
        (word,),
        (Int32,),
    )


class RowGather:
    """One warpgroup that gathers blocks of 64 rows into shared memory.

    A block there: latent / 64 tiles of 64 rows x 128 bytes (128-byte swizzle), one behind the other, then or elsewhere
    a rope tile. A thread has four entries of a block, 16 rows apart, and an eighth of each row. fp8: `load` fetches
    its part of all four rows into 84 registers, `store` converts them; so the rows of the next block are on their way
    while the block before waits for room. Once the first two are stored, their successors are loaded while the
    others are converted; a warp-wide barrier on both sides keeps the compiler from moving those loads to the end, and
    the readers have the fence of the async proxy, in which a gathering thread would wait for them. A quarter of a warp
    stores 2 rows x 4 chunks of 16 bytes, which hits every bank once.
    """

    EARLY = 2  # rows that are loaded again before all four are stored

    def __init__(self, fmt, latent, rope, tile_stride):
        """tile_stride: bytes from one tile of a block to the next."""
        assert fmt in ("fp8", "bf16") and rope in (0, 64) and (fmt == "bf16" or (latent, rope) == (512, 64))
        self.fp8, self.latent, self.rope, self.tile_stride = fmt == "fp8", latent, rope, tile_stride

    @cute.jit
    def lanes(self, w, lane):
        """(row within 16, chunk of the latent, chunk of the rope columns) of a thread of warp w of the warpgroup."""
        chunk = lane & 7
        rope_chunk = chunk
        row = w * 4 + (lane >> 3)
        if const_expr(self.fp8):
            chunk = (lane & 3) | ((lane >> 1) & 4)
            row = w * 4 + (((lane >> 2) & 1) | ((lane >> 3) & 2))
            rope_chunk = (lane & 3) | ((((lane >> 3) ^ (lane >> 2)) & 1) << 2)
        return row, chunk, rope_chunk

    @cute.jit
    def entries(self, rNext, list_at, at, length):
        """The entries of one block, unchecked: nothing waits for them here. list_at: address of the token's list; at:
        position of this thread's first. What lies behind the length is -1."""
        address = list_at + Int64(at) * 4
        for p in cutlass.range_constexpr(4):
            rNext[p] = load_entry(address, p * 64, Int32(1) if p * 16 < length - at else Int32(0))

    @cute.jit
    def load(self, rX, address, found, p: cutlass.Constexpr, chunk, rope_chunk):
        """fp8: the thread's part of row p, number `found`, into registers 21 p .. 21 p + 20."""
        ok = Int32(1) if found >= 0 else Int32(0)
        base = address.of(cutlass.max(found, 0))
        for k in cutlass.range_constexpr(4):
            words = load_row16(base + Int64(chunk * 16), k * 128, ok)
            for i in cutlass.range_constexpr(4):
                rX[p * 21 + 4 * k + i] = words[i]
        words = load_row16(base + Int64(rope_chunk * 16), FP8_ROPE, ok)
        for i in cutlass.range_constexpr(4):
            rX[p * 21 + 16 + i] = words[i]
        rX[p * 21 + 20] = load_row4(base + Int64((chunk & 3) * 4), FP8_SCALES, ok)

    @cute.jit
    def store(self, rX, p: cutlass.Constexpr, to, odd, rope, lane):
        """fp8: row p from registers to shared memory. to and odd, rope: where this thread's chunks of row 0 go."""
        scale = half2_of_float(rX[p * 21 + 20])
        for k in cutlass.range_constexpr(4):
            scale_k = cute.arch.shuffle_sync(scale, offset=(lane & 28) | k)
            words = []
            for i in cutlass.range_constexpr(4):
                words += list(dequantised(rX[p * 21 + 4 * k + i], scale_k))
            store_shared16(to, p * 2048 + k * 2 * self.tile_stride, words[:4])
            store_shared16(odd, p * 2048 + k * 2 * self.tile_stride, words[4:])
        store_shared16(rope, p * 2048, [rX[p * 21 + 16 + i] for i in range(4)])

    @cute.jit
    def copy(self, address, found, p: cutlass.Constexpr, chunk, to, rope):
        """bf16: row p, number `found`, straight to shared memory. to, rope: where this thread's chunks of row 0 go."""
        size = Int32(16) if found >= 0 else Int32(0)
        base = address.of(cutlass.max(found, 0)) + Int64(chunk * 16)
        for j in cutlass.range_constexpr(self.latent // 64):
            copy_async16(to, p * 2048 + j * self.tile_stride, base, j * 128, size)
        if const_expr(self.rope > 0):
            copy_async16(rope, p * 2048, base, self.latent * 2, size)

    @cute.jit
    def run(self, address, mList, lengths, sI, latent_at, latent_bytes, rope_at, rope_bytes, ok_at, full, empty, w,
            lane, first, step: cutlass.Constexpr):  # fmt: skip
        """Gather the blocks first, first + step, ... of this CTA, each into buffer number % 2, as 128 threads. first:
        0 or 1.

        latent_at, rope_at, ok_at: shared addresses of buffer 0; latent_bytes, rope_bytes: to the next buffer (64 for
        ok). full: 4 arrivals a buffer (fp8) or 132 (bf16); empty: waited for before a buffer is written.
        """
        last = sI[1]
        row, chunk, rope_chunk = self.lanes(w, lane)
        at_row = (row >> 3) * 1024 + (row & 7) * 128
        rope = rope_at + at_row + ((rope_chunk ^ (row & 7)) * 16)
        if const_expr(self.fp8):
            latent_at = latent_at + at_row + (chunk >> 2) * self.tile_stride
            to = latent_at + ((((chunk & 3) * 2) ^ (row & 7)) * 16)
            odd = latent_at + ((((chunk & 3) * 2 + 1) ^ (row & 7)) * 16)
        else:
            to = latent_at + at_row + ((chunk ^ (row & 7)) * 16)

        total = Int32(0)
        for token in cutlass.range(sI[0], last + 1, unroll=1):
            first_block = sI[2] if token == sI[0] else Int32(0)
            total = total + end_of_piece(lengths, sI, token) - first_block
        token = sI[0]
        block = sI[2]
        end = Int32(0)
        length = Int32(0)
        if token <= last:
            end = end_of_piece(lengths, sI, token)
            length = lengths[token]
        list_at = mList[token, None].iterator.toint()
        if first > 0:
            token, block, end, length, list_at = self.following(
                mList, lengths, sI, token, block, end, length, list_at, last
            )

        rNext = cute.make_rmem_tensor((4,), Int32)
        rRow = cute.make_rmem_tensor((4,), Int32)
        rX = cute.make_rmem_tensor((84,), Int32)  # fp8
        self.entries(rNext, list_at, block * 64 + row, length)
        for p in cutlass.range_constexpr(4):
            self.fetch(rX, rRow, rNext, address, p, chunk, rope_chunk)
        for _ in cutlass.range_constexpr(step):
            token, block, end, length, list_at = self.following(
                mList, lengths, sI, token, block, end, length, list_at, last
            )
        self.entries(rNext, list_at, block * 64 + row, length)
        for number in cutlass.range(first, total, step, unroll=1):
            buffer = number & 1
            cute.arch.mbarrier_wait(empty + buffer, ((number >> 1) & 1) ^ 1)
            for p in cutlass.range_constexpr(4):
                if chunk == 0:
                    store_shared1(ok_at + buffer * 64 + p * 16 + row, Int32(1) if rRow[p] >= 0 else Int32(0))
                if const_expr(self.fp8):
                    latent = buffer * latent_bytes
                    self.store(rX, p, to + latent, odd + latent, rope + buffer * rope_bytes, lane)
                    if const_expr(p < self.EARLY):
                        cute.arch.sync_warp()
                        self.fetch(rX, rRow, rNext, address, p, chunk, rope_chunk)
                        cute.arch.sync_warp()
                else:
                    self.copy(address, rRow[p], p, chunk, to + buffer * latent_bytes, rope + buffer * rope_bytes)
            if const_expr(not self.fp8):
                cute.arch.cp_async_mbarrier_arrive_noinc(full + buffer)
            cute.arch.sync_warp()
            if lane == 0:
                cute.arch.mbarrier_arrive(full + buffer)
            for p in cutlass.range_constexpr(self.EARLY if self.fp8 else 0, 4):
                self.fetch(rX, rRow, rNext, address, p, chunk, rope_chunk)
            for _ in cutlass.range_constexpr(step):
                token, block, end, length, list_at = self.following(
                    mList, lengths, sI, token, block, end, length, list_at, last
                )
            self.entries(rNext, list_at, block * 64 + row, length)

    @cute.jit
    def fetch(self, rX, rRow, rNext, address, p: cutlass.Constexpr, chunk, rope_chunk):
        """Check the entry of row p of a block; fp8: and load the row."""
        rRow[p] = rNext[p] if rNext[p] >= 0 and rNext[p] < address.rows else Int32(-1)
        if const_expr(self.fp8):
            self.load(rX, address, rRow[p], p, chunk, rope_chunk)

    @cute.jit
    def following(self, mList, lengths, sI, token, block, end, length, list_at, last):
        """The next block of this CTA: (token, block, end block, length, address of the list), with token > last behind
        the last one."""
        block = block + 1
        if block >= end:
            block = Int32(0)
            token = token + 1
            length = Int32(0)
            if token <= last:
                end = end_of_piece(lengths, sI, token)
                length = lengths[token]
                list_at = mList[token, None].iterator.toint()
        return token, block, end, length, list_at
