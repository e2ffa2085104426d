"""What comes before mla_prefill when cached_mla takes new tokens in the MHA form; any arch from sm_80 on.

    kv_cache[slot, position] = [latent[token] | k_pe[token]]
    rows[i] = that row, as the cache has it         i: among the new tokens alone, without the gaps between sequences
    q[token, n] = [q_nope[token, n] | q_pe[token, n]]          zeros at a place without a token of these sequences
    cu_q, cu_k                                      the requests of mla_prefill

Each sequence is two requests: its tokens with their keys, and the gap up to the next sequence, which has no keys, so
that mla_prefill makes it zero. A sequence without a slot has no keys either. What `rows` has behind the last key is not
read.

CTA: a place for a token; THREADS threads copy its queries, 16 bytes each, warp 0 its row. One more CTA: the offsets.
Tokens at or behind the end of a slot are not written; offsets into the cache are 64-bit.

From sm_90 on it is launched with PDL, waits for the kernel before it, and lets the one behind it start at once.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
DTYPE = "bf16"
NOPE = 64
LATENT = 256
ROPE = 64
E4M3_CACHE = False
THREADS = 128
# --- end of constants ---

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from common.cached_rows import cache_row, has_slot, last_sequence, token_row
from common.latent_rows import load_row, row_registers, store_cached, store_row
from common.register_mma import load_words, store_words
from common.warp import lanes_sum, warp_inclusive_sum
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32, Int32, Int64, Uint32, const_expr

VALUE = BFloat16 if DTYPE == "bf16" else Float16
CACHE = Float8E4M3FN if E4M3_CACHE else VALUE
PDL = int(ARCH[3:].rstrip("a")) >= 90
CVT = int(ARCH[3:].rstrip("a")) >= 89  # has the conversions of e4m3
WIDTH = NOPE + ROPE

assert NOPE % 8 == 0 and ROPE % 8 == 0 and THREADS % 32 == 0


class CachedMlaPack:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(self, q_nope: cute.Tensor, q_pe: cute.Tensor, latent: cute.Tensor, k_pe: cute.Tensor,
                 kv_cache: cute.Tensor, scale: cute.Tensor, seq_len: cute.Tensor, input_pos: cute.Tensor,
                 slot_idx: cute.Tensor, start: cute.Tensor, q: cute.Tensor, rows: cute.Tensor, cu_q: cute.Tensor,
                 cu_k: cute.Tensor, stream):
        self.kernel(q_nope, q_pe, latent, k_pe, kv_cache, scale, seq_len, input_pos, slot_idx, start, q, rows, cu_q,
                    cu_k).launch(grid=[q.shape[0] + 1, 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=PDL)

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(self, mQNope: cute.Tensor, mQPe: cute.Tensor, mLatent: cute.Tensor, mKPe: cute.Tensor,
               mCache: cute.Tensor, mScale: cute.Tensor, mSeqLen: cute.Tensor, mPos: cute.Tensor, mSlot: cute.Tensor,
               mStart: cute.Tensor, mQ: cute.Tensor, mRows: cute.Tensor, mCuQ: cute.Tensor, mCuK: cute.Tensor):
        token, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        lane = tid % 32
        sequences = mCuQ.shape[0] // 2
        if token == mQ.shape[0]:
            if tid < 32:
                self.offsets(lane, sequences, mCache, mSeqLen, mPos, mSlot, mStart, mQ, mCuQ, mCuK)
        else:
            sequence = last_sequence(token, sequences, mStart)
            index = token - mStart[sequence]
            mine = index >= 0 and index < mSeqLen[sequence]
            self.queries(token, mine, tid, mQNope, mQPe, mQ)
            if mine:
                if tid < 32:
                    self.row(token, sequence, index, lane, mLatent, mKPe, mCache, mScale, mSeqLen, mPos, mSlot, mRows)

    @cute.jit
    def keys(self, sequence, mCache: cute.Tensor, mSeqLen: cute.Tensor, mPos: cute.Tensor, mSlot: cute.Tensor):
        """New keys of a sequence."""
        count = cutlass.max(mSeqLen[sequence], 0)
        return count if has_slot(mSlot[sequence], mPos[sequence], mCache) else Int32(0)

    @cute.jit
    def offsets(self, lane, sequences, mCache: cute.Tensor, mSeqLen: cute.Tensor, mPos: cute.Tensor,
                mSlot: cute.Tensor, mStart: cute.Tensor, mQ: cute.Tensor, mCuQ: cute.Tensor, mCuK: cute.Tensor):
        """Where the requests begin among tokens and keys. One warp."""
        base = Int32(0)
        for i0 in cutlass.range(0, sequences, 32, unroll=1):
            i = i0 + lane
            mine = Int32(0)
            if i < sequences:
                mine = self.keys(i, mCache, mSeqLen, mPos, mSlot)
            upto = warp_inclusive_sum(mine, lane) + base
            base = cute.arch.shuffle_sync(upto, offset=31)
            if i < sequences:
                begin = mStart[i]
                mCuQ[2 * i] = begin
                mCuQ[2 * i + 1] = cutlass.min(begin + cutlass.max(mSeqLen[i], 0), mQ.shape[0])
                mCuK[2 * i] = upto - mine
                mCuK[2 * i + 1] = upto

    @cute.jit
    def queries(self, token, mine, tid, mQNope: cute.Tensor, mQPe: cute.Tensor, mQ: cute.Tensor):
        """Zeros unless the token is one of these sequences: mla_prefill moves the running maxima of 16 rows together,
        so that what is behind a sequence has an effect on how its last rows are rounded."""
        target = mQ.iterator + Int64(token) * mQ.stride[0]
        for mPart, width, column in ((mQNope, NOPE, 0), (mQPe, ROPE, NOPE)):
            source = token_row(mPart, token)
            pieces = const_expr(width // 8)
            for i in cutlass.range(tid, mQ.shape[1] * pieces, THREADS, unroll=4):
                n, at = i // pieces, i % pieces * 8
                a, b, c, d = Uint32(0), Uint32(0), Uint32(0), Uint32(0)
                if mine:
                    a, b, c, d = load_words(source + (Int64(n) * mPart.stride[2] + at))
                store_words(target + (n * WIDTH + column + at), a, b, c, d)

    @cute.jit
    def row(self, token, sequence, index, lane, mLatent: cute.Tensor, mKPe: cute.Tensor, mCache: cute.Tensor,
            mScale: cute.Tensor, mSeqLen: cute.Tensor, mPos: cute.Tensor, mSlot: cute.Tensor, mRows: cute.Tensor):
        """To the cache, and behind the rows of the sequences before. One warp."""
        slot, position0 = mSlot[sequence], mPos[sequence]
        if has_slot(slot, position0, mCache):
            before = Int32(0)
            for i in cutlass.range(lane, sequence, 32, unroll=1):
                before = before + self.keys(i, mCache, mSeqLen, mPos, mSlot)
            before = lanes_sum(before, 32)
            rLatent, rPe = row_registers(LATENT, VALUE), row_registers(ROPE, VALUE)
            load_row(token_row(mLatent, token), rLatent, lane, LATENT)
            load_row(token_row(mKPe, token), rPe, lane, ROPE)
            position = position0 + index
            if position < mCache.shape[1]:
                store_cached(rLatent, rPe, cache_row(slot, position, mCache), lane, LATENT, ROPE, mScale, E4M3_CACHE,
                             CVT, True)
            if before + index < mRows.shape[0]:
                target = mRows.iterator + Int64(before + index) * (LATENT + ROPE)
                store_row(rLatent, target, lane, LATENT, 16)
                store_row(rPe, target + LATENT, lane, ROPE, 16)


def fake_args():
    """Stand-ins with the promises of the op: last stride 1, other strides of 16-bit tensors multiples of 16 bytes."""
    n = cute.sym_int
    batch, s, heads = n(), n(), n()

    def tensor(dtype, *shape, align=16, divisor=8):
        return rt.make_fake_tensor(dtype, shape, tuple(cute.sym_int64(divisibility=divisor) for _ in shape[1:]) + (1,),
                                   assumed_align=align)

    def packed(*shape):
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size if isinstance(size, int) else cute.sym_int64(divisibility=8))
        return rt.make_fake_tensor(VALUE, shape, tuple(strides), assumed_align=16)

    def ints(*shape):
        return tensor(Int32, *shape, align=4, divisor=1)

    return (
        tensor(VALUE, batch, s, heads, NOPE),  # q_nope
        tensor(VALUE, batch, s, heads, ROPE),  # q_pe
        tensor(VALUE, batch, s, LATENT),  # latent
        tensor(VALUE, batch, s, 1, ROPE),  # k_pe
        tensor(CACHE, n(), n(), LATENT + ROPE),  # kv_cache
        rt.make_fake_tensor(Float32, (1,), (1,), assumed_align=4),  # scale
        ints(n()), ints(n()), ints(n()), ints(n()),  # seq_len, input_pos, slot_idx, start
        packed(n(), heads, WIDTH),  # q
        packed(n(), LATENT + ROPE),  # rows
        ints(n()), ints(n()),  # cu_q, cu_k
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return CachedMlaPack(), fake_args()
