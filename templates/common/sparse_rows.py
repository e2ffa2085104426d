"""What kernels of token-sparse MLA share: their arguments, the lists, and how rows of the cache get into shared memory.

A query token (s_q of them in each request) has a list of `topk` cache rows. For mla_split a query token is a request,
and its length is the part of its list that counts, `TokenLengths`. An entry is the number of a row in the pool,
page * page_size + row of the page; whatever is no row of the pool, and what lies behind the length, is not read. Its row
in shared memory is zero (0 * NaN would be NaN in P V) and its byte in `ok` 0, which makes the score -inf.

Formats of a row:
    v32    656 bytes: 512 e4m3 | 4 float32 scales, powers of two, one for 128 columns | 64 bf16. The latent goes to shared
           memory as fp16: e4m3 to fp16 is one instruction for two values, the scale one multiplication for two, and the
           product is exact while it is at most 65504 and the scale at least 2^-15. The rope columns stay bf16.
    bf16   [latent | rope], 1152 bytes for 512 + 64 columns.
"""

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, const_expr

from common.mla_split import n_blocks

HAS_LENGTHS, WANTS_MAX = 8, 16  # bits of the flags, beside those of mla_combine
V32_BYTES, V32_SCALES, V32_ROPE = 656, 512, 528  # a row, and where its scales and rope columns begin
# not .nc: the compiler moves those in front of the arrive on the full barrier, which then waits for them
ROW_LOAD = "ld.relaxed.cta.global"


def sparse_mla_arguments(row_bytes, latent):
    """Stand-ins for the arguments; the compiled function refuses a call that differs from them. B, s_q and H are the same
    everywhere but in lse and max_logits, which may be dummies."""
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
        Int64(1),  # page_magic
        *[Int32(1)] * 6,  # page_shift, flags, parts, fixed, least, bias
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


@cute.jit
def per_token(x: cute.Tensor):
    """(B, s_q, ...) as ((s_q, B), ...): the first coordinate is the query token."""
    shape = ((x.shape[1], x.shape[0]), *x.shape[2:])
    stride = ((x.stride[1], x.stride[0]), *x.stride[2:])
    return cute.make_tensor(x.iterator, cute.make_layout(shape, stride=stride))


class TokenLengths:
    """The lengths of the lists as mla_split reads them: lengths[token], of the token's request, at most topk."""

    def __init__(self, lengths, s_q, topk, flags):
        self.lengths, self.s_q, self.topk, self.flags = lengths, s_q, topk, flags

    @cute.jit
    def __getitem__(self, token):
        n = self.topk
        if (self.flags & HAS_LENGTHS) != 0:
            n = cutlass.min(self.lengths[token // self.s_q], n)
        return n


@cute.jit
def end_of_piece(lengths, sI: cute.Tensor, token):
    """The end block of a query token in a CTA whose interval is sI (mla_split.interval)."""
    end = n_blocks(lengths[token])
    if token == sI[1] and sI[3] > 0:
        end = sI[3]
    return end


class RowAddress:
    """Where a row of the pool lies. page_magic and page_shift divide by the page size: row * magic >> shift, exact for
    row < 2^31 (jitmla/schedule.py makes them)."""

    def __init__(self, kv, magic, shift):
        self.start, self.rows = kv.iterator.toint(), kv.shape[0] * kv.shape[1]
        self.page_size, self.page_stride, self.row_stride = kv.shape[1], kv.stride[0], kv.stride[1]
        self.magic, self.shift = magic, shift

    @cute.jit
    def of(self, row):
        page = ((Int64(row) * self.magic) >> Int64(self.shift)).to(Int32)
        return self.start + Int64(page) * self.page_stride + Int64(row - page * self.page_size) * self.row_stride


def ptx(code, ins, outs=()):
    return cute.arch.inline_ptx(code, write_only_types=list(outs) or None, read_only_args=list(ins))


def load_row16(address, offset, ok):
    """16 bytes as 4 words; zeros, without touching memory, when ok == 0."""
    return ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; mov.b32 {$w2}, 0; mov.b32 {$w3}, 0;"
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


def copy_async16(shared, shared_offset, address, offset, size):
    """16 bytes of which `size` are read; the rest are zeros."""
    code = f"cp.async.cg.shared.global [{{$r0}}+{shared_offset}], [{{$r1}}+{offset}], 16, {{$r2}};"
    ptx(code, (shared, address, size))


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
        "{ .reg .b32 x, y; .reg .f32 f, g; shl.b32 x, {$r0}, 16; and.b32 y, {$r0}, 0xffff0000; mov.b32 f, x; mov.b32 g, y;"
        " cvt.rn.f16x2.f32 {$w0}, g, f; }",
        (word,),
        (Int32,),
    )


class RowGather:
    """One warpgroup that gathers blocks of 64 rows into shared memory.

    A block there: latent / 64 tiles of 64 rows x 128 bytes (128-byte swizzle), one behind the other, then or elsewhere a
    rope tile. A thread has four entries of a block, 16 rows apart, and an eighth of each row. v32: `load` fetches its part
    of all four rows into 84 registers, `store` converts them; so the rows of the next block are on their way while the
    block before waits for room. A quarter of a warp stores 2 rows x 4 chunks of 16 bytes, which hits every bank once.
    """

    def __init__(self, fmt, latent, rope, tile_stride):
        """tile_stride: bytes from one tile of a block to the next."""
        assert fmt in ("v32", "bf16") and rope in (0, 64) and (fmt == "bf16" or (latent, rope) == (512, 64))
        self.v32, self.latent, self.rope, self.tile_stride = fmt == "v32", latent, rope, tile_stride

    @cute.jit
    def lanes(self, w, lane):
        """(row within 16, chunk of the latent, chunk of the rope columns) of a thread of warp w of the warpgroup."""
        chunk = lane & 7
        rope_chunk = chunk
        row = w * 4 + (lane >> 3)
        if const_expr(self.v32):
            chunk = (lane & 3) | ((lane >> 1) & 4)
            row = w * 4 + (((lane >> 2) & 1) | ((lane >> 3) & 2))
            rope_chunk = (lane & 3) | ((((lane >> 3) ^ (lane >> 2)) & 1) << 2)
        return row, chunk, rope_chunk

    @cute.jit
    def entries(self, rNext, mList, token, last, at, topk):
        """The entries of one block, unchecked: nothing waits for them here. at: position of this thread's first."""
        for p in cutlass.range_constexpr(4):
            rNext[p] = Int32(-1)
            if token <= last and at + p * 16 < topk:
                rNext[p] = mList[token, at + p * 16]

    @cute.jit
    def check(self, rNext, rRow, p: cutlass.Constexpr, limit, rows):
        """Entry p, or -1 where there is none. limit: entries of the list from this thread's first on."""
        rRow[p] = rNext[p] if rNext[p] >= 0 and rNext[p] < rows and p * 16 < limit else Int32(-1)

    @cute.jit
    def load(self, rX, address, rRow, p: cutlass.Constexpr, chunk, rope_chunk):
        """v32: the thread's part of row p into registers 21 p .. 21 p + 20."""
        ok = Int32(1) if rRow[p] >= 0 else Int32(0)
        base = address.of(cutlass.max(rRow[p], 0))
        for k in cutlass.range_constexpr(4):
            words = load_row16(base + Int64(chunk * 16), k * 128, ok)
            for i in cutlass.range_constexpr(4):
                rX[p * 21 + 4 * k + i] = words[i]
        words = load_row16(base + Int64(rope_chunk * 16), V32_ROPE, ok)
        for i in cutlass.range_constexpr(4):
            rX[p * 21 + 16 + i] = words[i]
        rX[p * 21 + 20] = load_row4(base + Int64((chunk & 3) * 4), V32_SCALES, ok)

    @cute.jit
    def store(self, rX, p: cutlass.Constexpr, even, odd, rope, lane):
        """v32: row p from registers to shared memory. even, odd, rope: where this thread's chunks of row 0 go."""
        scale = half2_of_float(rX[p * 21 + 20])
        for k in cutlass.range_constexpr(4):
            scale_k = cute.arch.shuffle_sync(scale, offset=(lane & 28) | k)
            words = []
            for i in cutlass.range_constexpr(4):
                words += list(dequantised(rX[p * 21 + 4 * k + i], scale_k))
            store_shared16(even, p * 2048 + k * 2 * self.tile_stride, words[:4])
            store_shared16(odd, p * 2048 + k * 2 * self.tile_stride, words[4:])
        store_shared16(rope, p * 2048, [rX[p * 21 + 16 + i] for i in range(4)])

    @cute.jit
    def copy(self, address, rRow, p: cutlass.Constexpr, chunk, to, rope):
        """bf16: row p straight to shared memory. to, rope: where this thread's chunks of row 0 go."""
        size = Int32(16) if rRow[p] >= 0 else Int32(0)
        base = address.of(cutlass.max(rRow[p], 0)) + Int64(chunk * 16)
        for j in cutlass.range_constexpr(self.latent // 64):
            copy_async16(to, p * 2048 + j * self.tile_stride, base, j * 128, size)
        if const_expr(self.rope > 0):
            copy_async16(rope, p * 2048, base, self.latent * 2, size)

    @cute.jit
    def run(self, address, mList, lengths, sI, topk, latent_at, latent_bytes, rope_at, rope_bytes, ok_at, full, empty, w,
            lane, first, step: cutlass.Constexpr):  # fmt: skip
        """Gather the blocks first, first + step, ... of this CTA, each into buffer number % 2, as 128 threads. first: 0 or 1.

        latent_at, rope_at, ok_at: shared addresses of buffer 0; latent_bytes, rope_bytes: to the next buffer (64 for ok).
        full: 4 arrivals a buffer (v32) or 132 (bf16); empty: waited for before a buffer is written.
        """
        last = sI[1]
        row, chunk, rope_chunk = self.lanes(w, lane)
        r7 = row & 7
        at_row = (row >> 3) * 1024 + r7 * 128
        if const_expr(self.v32):
            latent_at = latent_at + at_row + (chunk >> 2) * self.tile_stride
            even = latent_at + ((((chunk & 3) * 2) ^ r7) * 16)
            odd = latent_at + ((((chunk & 3) * 2 + 1) ^ r7) * 16)
            rope = rope_at + at_row + ((rope_chunk ^ r7) * 16)
        else:
            even = latent_at + at_row + ((chunk ^ r7) * 16)
            rope = rope_at + at_row + ((chunk ^ r7) * 16)

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
        if first > 0:
            token, block, end, length = self.following(lengths, sI, token, block, end, length, last)

        rRow = cute.make_rmem_tensor((4,), Int32)
        rNext = cute.make_rmem_tensor((4,), Int32)
        rX = cute.make_rmem_tensor((84,), Int32)
        self.entries(rNext, mList, token, last, block * 64 + row, topk)
        limit = length - block * 64 - row
        for p in cutlass.range_constexpr(4):
            self.check(rNext, rRow, p, limit, address.rows)
        for _ in cutlass.range_constexpr(step):
            token, block, end, length = self.following(lengths, sI, token, block, end, length, last)
        limit = length - block * 64 - row
        self.entries(rNext, mList, token, last, block * 64 + row, topk)
        if const_expr(self.v32):
            for p in cutlass.range_constexpr(4):
                self.load(rX, address, rRow, p, chunk, rope_chunk)
        for number in cutlass.range(first, total, step, unroll=1):
            buffer = number & 1
            cute.arch.mbarrier_wait(empty + buffer, ((number >> 1) & 1) ^ 1)
            for p in cutlass.range_constexpr(4):
                if chunk == 0:
                    store_shared1(ok_at + buffer * 64 + p * 16 + row, Int32(1) if rRow[p] >= 0 else Int32(0))
                if const_expr(self.v32):
                    self.store(
                        rX, p, even + buffer * latent_bytes, odd + buffer * latent_bytes, rope + buffer * rope_bytes, lane
                    )
                else:
                    self.copy(address, rRow, p, chunk, even + buffer * latent_bytes, rope + buffer * rope_bytes)
            if const_expr(self.v32):
                cute.arch.fence_view_async_shared()  # waits for every load of this thread: hence the next ones below
            else:
                cute.arch.cp_async_mbarrier_arrive_noinc(full + buffer)
            cute.arch.sync_warp()
            if lane == 0:
                cute.arch.mbarrier_arrive(full + buffer)
            for p in cutlass.range_constexpr(4):
                self.check(rNext, rRow, p, limit, address.rows)
                if const_expr(self.v32):
                    self.load(rX, address, rRow, p, chunk, rope_chunk)
            for _ in cutlass.range_constexpr(step):
                token, block, end, length = self.following(lengths, sI, token, block, end, length, last)
            limit = length - block * 64 - row
            self.entries(rNext, mList, token, last, block * 64 + row, topk)

    @cute.jit
    def following(self, lengths, sI, token, block, end, length, last):
        """The next block of this CTA: (token, block, end block, length), with token > last behind the last one."""
        block = block + 1
        if block >= end:
            block = Int32(0)
            token = token + 1
            length = Int32(0)
            if token <= last:
                end = end_of_piece(lengths, sI, token)
                length = lengths[token]
        return token, block, end, length
