"""What comes before the attention of cached_mla, in one launch; any arch from sm_80 on.

    q_lat[row, n] = q_nope[token, n] W_K[n]         W_K[n] = weight[n (P + V) : n (P + V) + P], [P, R]
    kv_cache[slot, position] = [latent[token] | k_pe[token]]
    seq_lens[tile], block_table[tile]               lengths and pages of each tile, for mla_decode
    pe[row] = q_pe[token]                           where rows are not tokens

With PREFIX in the flags the rows are to see what was cached before this call only: nothing is appended, the lengths are
those of the prefixes, and blocks of rows without one are left out of q_lat, which nobody reads then.

Two kinds of CTAs. The first ones copy: a warp a query row (of its tile, when the row has no token). The others
multiply: CTA (every n-th block of ROWS rows, head, WARPS x 64 columns), a warp 64 columns, by mma.sync with operands
straight from global memory. W_K is used as it lies, no copy of it exists; a warp keeps its part in registers for all
its row blocks, unless P is so large that it would not fit. For one k32 step lane (g, c) loads

    A: q rows g, g + 8, ..  columns [8 c, 8 c + 8)            B: W_K rows 8 c .. 8 c + 7, columns [8 g, 8 g + 8)

B rows are interleaved in pairs (prmt), so that tile j of 8 columns has the columns 8 g' + j. A lane then holds 16
neighbouring columns of each of its rows, and stores them in two pieces of 16 bytes.

Rows without a token become zeros in q_lat and pe. Tokens at or behind the end of a slot are not written, and slots that
do not exist neither written nor read (length 0). Offsets into the cache are 64-bit.

From sm_90 on it is launched with PDL, waits for the kernel before it, and lets the one behind it start at once.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
DTYPE = "bf16"
NOPE = 64
LATENT = 256
ROPE = 64
E4M3_CACHE = False
ROWS = 32
WARPS = 2
CTAS = 1056
# --- end of constants ---

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from common.cached_rows import COPY_PE, PREFIX, cache_row, has_slot, locate, token_row
from common.latent_rows import load_row, row_registers, store_cached
from common.register_mma import high_halves, load_words, low_halves, mma_k32, pack, store_words
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32, Int32, Int64, Uint32, const_expr

VALUE = BFloat16 if DTYPE == "bf16" else Float16
CACHE = Float8E4M3FN if E4M3_CACHE else VALUE
PDL = int(ARCH[3:].rstrip("a")) >= 90
CVT = int(ARCH[3:].rstrip("a")) >= 89  # has the conversion to e4m3
COLUMNS = 64  # of q_lat that a warp makes
CHUNKS = LATENT // (COLUMNS * WARPS)
ROW_TILES = ROWS // 16
STEPS = NOPE // 32
KEEP = NOPE <= 128  # of the weight in registers: 32 of them a step

assert ROWS <= 32 and ROWS % 16 == 0 and NOPE % 32 == 0 and LATENT % (COLUMNS * WARPS) == 0 and ROPE % 8 == 0


class CachedMlaAbsorb:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(self, q_nope: cute.Tensor, q_pe: cute.Tensor, latent: cute.Tensor, k_pe: cute.Tensor,
                 weight: cute.Tensor, kv_cache: cute.Tensor, scale: cute.Tensor, seq_len: cute.Tensor,
                 input_pos: cute.Tensor, slot_idx: cute.Tensor, start: cute.Tensor, q_lat: cute.Tensor, pe: cute.Tensor,
                 seq_lens: cute.Tensor, block_table: cute.Tensor, tile0: Int32, first: Int32, sequences: Int32,
                 page_size: Int32, pages_of_slot: Int32, flags: Int32, stream):
        rows = q_lat.shape[0] * q_lat.shape[1]
        copies = cute.ceil_div(rows, WARPS)
        parts = q_nope.shape[2] * CHUNKS
        row_parts = cutlass.min(cute.ceil_div(rows, ROWS), cute.ceil_div(CTAS, parts))
        self.kernel(q_nope, q_pe, latent, k_pe, weight, kv_cache, scale, seq_len, input_pos, slot_idx, start, q_lat, pe,
                    seq_lens, block_table, tile0, first, sequences, page_size, pages_of_slot, flags, copies,
                    row_parts).launch(
            grid=[copies + parts * row_parts, 1, 1], block=[32 * WARPS, 1, 1], stream=stream, use_pdl=PDL)

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(self, mQ: cute.Tensor, mPe: cute.Tensor, mLatent: cute.Tensor, mKPe: cute.Tensor, mW: cute.Tensor,
               mCache: cute.Tensor, mScale: cute.Tensor, mSeqLen: cute.Tensor, mPos: cute.Tensor, mSlot: cute.Tensor,
               mStart: cute.Tensor, mQLat: cute.Tensor, mPeOut: cute.Tensor, mLengths: cute.Tensor,
               mTable: cute.Tensor, tile0: Int32, first: Int32, sequences: Int32, page_size: Int32,
               pages_of_slot: Int32, flags: Int32, copies: Int32, row_parts: Int32):
        block, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        lane = tid % 32
        w = cute.arch.make_warp_uniform(tid // 32)
        tile = mQLat.shape[1]
        rows = mQLat.shape[0] * tile
        tokens = mQ.shape[0] * mQ.shape[1]
        if block < copies:
            row = block * WARPS + w
            if row < rows:
                token, sequence, index, count, begin = locate(row, tile0, tile, first, sequences, tokens, flags,
                                                              mSeqLen, mStart)
                self.copy(row, tile, token, sequence, index, count, begin, page_size, pages_of_slot, flags, lane,
                          mPe, mLatent, mKPe, mCache, mScale, mPos, mSlot, mPeOut, mLengths, mTable)
        else:
            part = block - copies
            row0 = (part // CHUNKS) // mQ.shape[2] * ROWS
            wanted = (flags & PREFIX) == 0
            if not wanted:
                row = row0
                while row < rows:
                    wanted = wanted or self.any_prefix(row, tile0, tile, rows, tokens, first, sequences, flags, lane,
                                                       mSeqLen, mPos, mStart)
                    row += ROWS * row_parts
            if wanted:
                self.all_rows(part, row0, row_parts, rows, tokens, tile0, tile, first, sequences, flags, lane, w, mQ,
                              mW, mSeqLen, mPos, mStart, mQLat)

    @cute.jit
    def any_prefix(self, row0, tile0, tile, rows, tokens, first, sequences, flags, lane, mSeqLen: cute.Tensor,
                   mPos: cute.Tensor, mStart: cute.Tensor):
        """Whether a token of the block of rows has one."""
        token, sequence, _, _, _ = locate(cutlass.min(row0 + lane % ROWS, rows - 1), tile0, tile, first, sequences,
                                          tokens, flags, mSeqLen, mStart)
        return cute.arch.vote_any_sync(token >= 0 and mPos[sequence] > 0)

    @cute.jit
    def all_rows(self, part, row0, row_parts, rows, tokens, tile0, tile, first, sequences, flags, lane, w,
                 mQ: cute.Tensor, mW: cute.Tensor, mSeqLen: cute.Tensor, mPos: cute.Tensor, mStart: cute.Tensor,
                 mQLat: cute.Tensor):
        """Every row_parts-th block of rows from row0 on, for a head and the warp's columns."""
        chunk = part % CHUNKS
        head = (part // CHUNKS) % mQ.shape[2]
        column = (chunk * WARPS + w) * COLUMNS
        value_dim = mW.shape[0] // mQ.shape[2] - NOPE
        weights = mW.iterator + (Int64(head * (NOPE + value_dim) + 8 * (lane % 4)) * mW.stride[0]
                                 + (column + lane // 4 * 8))
        rB = cute.make_rmem_tensor((4, 8, STEPS if const_expr(KEEP) else 1), Uint32)  # pair of rows, tile, step
        if const_expr(KEEP):
            for kk in cutlass.range_constexpr(STEPS):
                self.load_weights(rB[None, None, kk], weights, kk, mW)
        while row0 < rows:
            wanted = (flags & PREFIX) == 0
            if not wanted:
                wanted = self.any_prefix(row0, tile0, tile, rows, tokens, first, sequences, flags, lane, mSeqLen, mPos,
                                         mStart)
            if wanted:
                token, _, _, _, _ = locate(cutlass.min(row0 + lane, rows - 1), tile0, tile, first, sequences, tokens,
                                           flags, mSeqLen, mStart)
                self.multiply(row0, rows, token, head, column, lane, rB, weights, mQ, mW, mQLat)
            row0 += ROWS * row_parts

    @cute.jit
    def copy(self, row, tile, token, sequence, index, count, begin, page_size, pages_of_slot, flags, lane,
             mPe: cute.Tensor, mLatent: cute.Tensor, mKPe: cute.Tensor, mCache: cute.Tensor, mScale: cute.Tensor,
             mPos: cute.Tensor, mSlot: cute.Tensor, mPeOut: cute.Tensor, mLengths: cute.Tensor, mTable: cute.Tensor):
        position0 = mPos[sequence]
        slot = mSlot[sequence]
        most = mCache.shape[1]
        exists = has_slot(slot, position0, mCache)
        appends = (flags & PREFIX) == 0
        if token >= 0 and appends:
            position = position0 + index
            if exists and position < most:
                rLatent = row_registers(LATENT, VALUE)
                load_row(token_row(mLatent, token), rLatent, lane, LATENT)
                rPe = row_registers(ROPE, VALUE)
                load_row(token_row(mKPe, token), rPe, lane, ROPE)
                store_cached(rLatent, rPe, cache_row(slot, position, mCache), lane, LATENT, ROPE, mScale, E4M3_CACHE,
                             CVT, False)
        k = row // tile
        u = row % tile
        length = Int32(0)
        if count > 0 and exists:
            length = cutlass.min(position0 + (begin + count if appends else 0), most)
        if u == tile - 1 and lane == 0:
            mLengths[k] = length
        pages = (length + page_size - 1) // page_size
        j = u * 32 + lane
        while j < pages:
            mTable[k, j] = slot * pages_of_slot + j
            j += 32 * tile
        if (flags & COPY_PE) != 0 and (appends or length > 0):
            self.copy_pe(k, u, token, lane, mPe, mPeOut)

    @cute.jit
    def copy_pe(self, k, u, token, lane, mPe: cute.Tensor, mPeOut: cute.Tensor):
        """All heads of a row, 16 bytes a lane."""
        source = token_row(mPe, token)
        target = mPeOut.iterator + (Int64(k) * mPeOut.stride[0] + Int64(u) * mPeOut.stride[1])
        pieces = mPe.shape[2] * (ROPE // 8)
        i = lane
        while i < pieces:
            n, at = i // (ROPE // 8), i % (ROPE // 8) * 8
            a, b, c, d = Uint32(0), Uint32(0), Uint32(0), Uint32(0)
            if token >= 0:
                a, b, c, d = load_words(source + (Int64(n) * mPe.stride[2] + at))
            store_words(target + (Int64(n) * mPeOut.stride[2] + at), a, b, c, d)
            i += 32

    @cute.jit
    def load_weights(self, rB, weights, kk, mW: cute.Tensor):
        """The B operand of a k32 step: eight rows of eight columns, interleaved in pairs of rows."""
        rW = cute.make_rmem_tensor((4, 8), Uint32)  # word, row
        for j in cutlass.range_constexpr(8):
            words = load_words(weights + Int64(32 * kk + j) * mW.stride[0])
            for i in cutlass.range_constexpr(4):
                rW[i, j] = words[i]
        for j in cutlass.range_constexpr(8):
            for i in cutlass.range_constexpr(4):
                halves = const_expr(high_halves if j % 2 else low_halves)
                rB[i, j] = halves(rW[j // 2, 2 * i], rW[j // 2, 2 * i + 1])

    @cute.jit
    def multiply(self, row0, rows, token, head, column, lane, rB, weights, mQ: cute.Tensor, mW: cute.Tensor,
                 mQLat: cute.Tensor):
        """One block of rows. token: that of row row0 + lane."""
        g, c = lane // 4, lane % 4
        rC = cute.make_rmem_tensor((4, 8, ROW_TILES), Float32)
        rC.fill(0.0)
        if const_expr(KEEP):
            for kk in cutlass.range_constexpr(STEPS):
                self.step(kk, rC, rB[None, None, kk], row0, rows, token, head, g, c, mQ)
        else:
            for kk in cutlass.range(STEPS, unroll=1):
                self.load_weights(rB[None, None, 0], weights, kk, mW)
                self.step(kk, rC, rB[None, None, 0], row0, rows, token, head, g, c, mQ)
        for r in cutlass.range_constexpr(ROW_TILES):
            for h in cutlass.range_constexpr(2):
                row = row0 + 16 * r + 8 * h + g
                if row < rows:
                    target = mQLat.iterator + (Int64(row) * mQLat.stride[1] + (head * LATENT + column + 16 * c))
                    for e in cutlass.range_constexpr(2):
                        store_words(target + 8 * e, *[pack(rC[2 * h + e, 2 * i, r], rC[2 * h + e, 2 * i + 1, r], DTYPE)
                                                      for i in range(4)])

    @cute.jit
    def step(self, kk, rC, rB, row0, rows, token, head, g, c, mQ: cute.Tensor):
        """A k32 step of all row tiles."""
        rA = cute.make_rmem_tensor((4, 2, ROW_TILES), Uint32)
        for r in cutlass.range_constexpr(ROW_TILES):
            for h in cutlass.range_constexpr(2):
                mine = cute.arch.shuffle_sync(token, 16 * r + 8 * h + g)
                words = load_words(token_row(mQ, cutlass.max(mine, 0))
                                   + (Int64(head) * mQ.stride[2] + (32 * kk + 8 * c)))
                for i in cutlass.range_constexpr(4):
                    rA[i, h, r] = words[i] if mine >= 0 else Uint32(0)
        mma_k32(rC, rA, rB, 0, DTYPE)
        if const_expr(ROW_TILES > 1):
            if rows - row0 > 16:  # the first 16 rows are not all
                mma_k32(rC, rA, rB, 1, DTYPE)


def fake_args():
    """Stand-ins with the promises of the op: last stride 1, other strides of 16-bit tensors multiples of 16 bytes."""
    n = cute.sym_int
    batch, s, heads, tiles, tile = n(), n(), n(), n(), n()

    def tensor(dtype, *shape, align=16, divisor=8):
        return rt.make_fake_tensor(dtype, shape, tuple(cute.sym_int64(divisibility=divisor) for _ in shape[1:]) + (1,),
                                   assumed_align=align)

    def ints(*shape):
        return tensor(Int32, *shape, align=4, divisor=1)

    return (
        tensor(VALUE, batch, s, heads, NOPE),  # q_nope
        tensor(VALUE, batch, s, heads, ROPE),  # q_pe
        tensor(VALUE, batch, s, LATENT),  # latent
        tensor(VALUE, batch, s, 1, ROPE),  # k_pe
        tensor(VALUE, n(), LATENT),  # weight
        tensor(CACHE, n(), n(), LATENT + ROPE),  # kv_cache
        rt.make_fake_tensor(Float32, (1,), (1,), assumed_align=4),  # scale
        ints(n()), ints(n()), ints(n()), ints(n()),  # seq_len, input_pos, slot_idx, start
        rt.make_fake_tensor(VALUE, (tiles, tile, heads, LATENT),
                            (cute.sym_int64(divisibility=8), cute.sym_int64(divisibility=8), LATENT, 1),
                            assumed_align=16),  # q_lat
        tensor(VALUE, tiles, tile, heads, ROPE),  # pe
        ints(tiles), ints(tiles, n()),  # seq_lens, block_table
        *[Int32(1)] * 6,  # tile0, first, sequences, page_size, pages_of_slot, flags
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return CachedMlaAbsorb(), fake_args()
