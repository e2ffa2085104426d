"""What comes after the attention of cached_mla; any arch from sm_80 on.

    out[token, n] = o_lat[row, n] W_V[n]^T          W_V[n] = weight[n (P + V) + P : (n + 1) (P + V)], [V, R]

CTA (32 output columns of a head, every n-th block of ROWS rows); its warps have a part of R each, keep that part of the
weight in registers, and add up through shared memory.
Operands come straight from global memory: for one k32 step lane (g, c) loads columns [8 c, 8 c + 8) of

    A: o_lat rows g, g + 8, ..                    B: W_V rows 8 (g // 2) + 2 j + g % 2, for tile j of 8 of the 32

so that a lane holds 8 neighbouring output columns of each of its rows. Rows without a token store nothing.

With PREFIX in the flags o_lat is the attention to what was cached before, and out has that to the new tokens; their
log-sum-exps, lse_prefix [row, n] and lse [token, n], say how they are weighted. Rows without a prefix (-inf) stay as
they are, and blocks of such rows are left out.

From sm_90 on it is launched with PDL, waits for the kernel before it, and lets the one behind it start at once.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
DTYPE = "bf16"
LATENT = 256
ROWS = 32
WARPS = 4
CTAS = 1056
# --- end of constants ---

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from common.cached_rows import PREFIX, locate, token_row
from common.latent_rows import piece_at
from common.register_mma import load_words, mma_k32, pack, store_words
from common.sm90 import INF, LOG2E, ex2
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint32, const_expr
from cutlass.memory import SmemAllocator

VALUE = BFloat16 if DTYPE == "bf16" else Float16
PDL = int(ARCH[3:].rstrip("a")) >= 90
COLUMNS = 32  # of the output that a CTA makes
PART = LATENT // WARPS  # of R, of a warp
ROW_TILES = ROWS // 16
STEPS = PART // 32
PADDED = COLUMNS + 4  # floats from one row of a partial sum to the next: rows of a warp's store lie in other banks

assert ROWS <= 32 and ROWS % 16 == 0 and PART % 32 == 0 and ROWS * 4 % (32 * WARPS) == 0


class CachedMlaProject:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(self, o_lat: cute.Tensor, weight: cute.Tensor, seq_len: cute.Tensor, start: cute.Tensor,
                 lse_prefix: cute.Tensor, lse: cute.Tensor, out: cute.Tensor, tile0: Int32, first: Int32,
                 sequences: Int32, flags: Int32, stream):
        rows = o_lat.shape[0] * o_lat.shape[1]
        parts = out.shape[2] * (out.shape[3] // COLUMNS)
        self.kernel(o_lat, weight, seq_len, start, lse_prefix, lse, out, tile0, first, sequences, flags).launch(
            grid=[parts, cutlass.min(cute.ceil_div(rows, ROWS), cute.ceil_div(CTAS, parts)), 1],
            block=[32 * WARPS, 1, 1], stream=stream, use_pdl=PDL)

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(self, mO: cute.Tensor, mW: cute.Tensor, mSeqLen: cute.Tensor, mStart: cute.Tensor,
               mLsePrefix: cute.Tensor, mLse: cute.Tensor, mOut: cute.Tensor, tile0: Int32, first: Int32,
               sequences: Int32, flags: Int32):
        part, row_block, _ = cute.arch.block_idx()
        _, row_parts, _ = cute.arch.grid_dim()
        tid, _, _ = cute.arch.thread_idx()
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        lane = tid % 32
        chunks = mOut.shape[3] // COLUMNS
        head, column = part // chunks, part % chunks * COLUMNS
        rows = mO.shape[0] * mO.shape[1]
        row0 = row_block * ROWS
        wanted = (flags & PREFIX) == 0
        if not wanted:
            row = row0
            while row < rows:
                wanted = wanted or self.any_prefix(row, rows, head, lane, mLsePrefix)
                row += ROWS * row_parts
        if wanted:
            self.all_rows(row0, row_parts, rows, head, column, tid, tile0, first, sequences, flags, mO, mW, mSeqLen,
                          mStart, mLsePrefix, mLse, mOut)

    @cute.jit
    def any_prefix(self, row0, rows, head, lane, mLsePrefix: cute.Tensor):
        """Whether a row of the block has one."""
        row = cutlass.min(row0 + lane % ROWS, rows - 1)
        tile = mLsePrefix.shape[1]
        return cute.arch.vote_any_sync(mLsePrefix[row // tile, row % tile, head] > -Float32(INF))

    @cute.jit
    def all_rows(self, row0, row_parts, rows, head, column, tid, tile0, first, sequences, flags, mO: cute.Tensor,
                 mW: cute.Tensor, mSeqLen: cute.Tensor, mStart: cute.Tensor, mLsePrefix: cute.Tensor,
                 mLse: cute.Tensor, mOut: cute.Tensor):
        """Every row_parts-th block of rows from row0 on, for COLUMNS columns of a head."""
        lane = tid % 32
        w = cute.arch.make_warp_uniform(tid // 32)
        g, c = lane // 4, lane % 4
        tile = mO.shape[1]
        value_dim = mOut.shape[3]
        nope = mW.shape[0] // mOut.shape[2] - value_dim
        weights = mW.iterator + (Int64(head * (nope + value_dim) + nope + column + g // 2 * 8 + g % 2) * mW.stride[0]
                                 + (w * PART + 8 * c))
        rB = cute.make_rmem_tensor((4, 4, STEPS), Uint32)  # word, tile, step
        for kk in cutlass.range_constexpr(STEPS):
            for j in cutlass.range_constexpr(4):
                words = load_words(weights + (Int64(2 * j) * mW.stride[0] + 32 * kk))
                for i in cutlass.range_constexpr(4):
                    rB[i, j, kk] = words[i]
        smem = SmemAllocator()
        sSum = smem.allocate_tensor(Float32, cute.make_layout((PADDED, ROWS, WARPS)), 16)
        while row0 < rows:
            wanted = (flags & PREFIX) == 0
            if not wanted:
                wanted = self.any_prefix(row0, rows, head, lane, mLsePrefix)
            if wanted:
                self.partial(row0, rows, head, w, lane, rB, sSum, mO)
                cute.arch.sync_threads()
                for step in cutlass.range_constexpr(ROWS * 4 // (32 * WARPS)):
                    r = (tid + 32 * WARPS * step) // 4
                    if row0 + r < rows:
                        token, _, _, _, _ = locate(row0 + r, tile0, tile, first, sequences,
                                                   mOut.shape[0] * mOut.shape[1], flags, mSeqLen, mStart)
                        if token >= 0:
                            before, after = Float32(0.0), Float32(1.0)  # weights of what out has, and of this
                            if (flags & PREFIX) != 0:
                                before, after = merge_weights(mLse[token, head],
                                                              mLsePrefix[(row0 + r) // tile, (row0 + r) % tile, head])
                            self.store(token, head, column, r, 8 * c, before, after, sSum, mOut)
                cute.arch.sync_threads()
            row0 += ROWS * row_parts

    @cute.jit
    def partial(self, row0, rows, head, w, lane, rB, sSum: cute.Tensor, mO: cute.Tensor):
        """The warp's part of the sum for a block of rows, into shared memory."""
        g, c = lane // 4, lane % 4
        rC = cute.make_rmem_tensor((4, 4, ROW_TILES), Float32)
        rC.fill(0.0)
        rA = cute.make_rmem_tensor((4, 2, ROW_TILES, STEPS), Uint32)
        for kk in cutlass.range_constexpr(STEPS):
            for r in cutlass.range_constexpr(ROW_TILES):
                for h in cutlass.range_constexpr(2):
                    row = cutlass.min(row0 + 16 * r + 8 * h + g, rows - 1)
                    words = load_words(mO.iterator + (Int64(row) * mO.stride[1]
                                                      + (head * LATENT + w * PART + 32 * kk + 8 * c)))
                    for i in cutlass.range_constexpr(4):
                        rA[i, h, r, kk] = words[i]
        for kk in cutlass.range_constexpr(STEPS):
            mma_k32(rC, rA[None, None, None, kk], rB[None, None, kk], 0, DTYPE)
            if const_expr(ROW_TILES > 1):
                if rows - row0 > 16:  # the first 16 rows are not all
                    mma_k32(rC, rA[None, None, None, kk], rB[None, None, kk], 1, DTYPE)
        for r in cutlass.range_constexpr(ROW_TILES):
            for h in cutlass.range_constexpr(2):
                for j in cutlass.range_constexpr(4):
                    for e in cutlass.range_constexpr(2):
                        sSum[8 * c + 2 * j + e, 16 * r + 8 * h + g, w] = rC[2 * h + e, j, r]

    @cute.jit
    def store(self, token, head, column, r, at, before, after, sSum: cute.Tensor, mOut: cute.Tensor):
        """Eight columns of a row: the sum over the warps, times `after`, and what was there times `before`."""
        rY = cute.make_rmem_tensor((8,), Float32)
        rY.fill(0.0)
        for v in cutlass.range_constexpr(WARPS):
            for i in cutlass.range_constexpr(8):
                rY[i] = rY[i] + sSum[at + i, r, v]
        target = token_row(mOut, token) + (Int64(head) * mOut.stride[2] + (column + at))
        if after < 1.0:
            rOld = cute.make_rmem_tensor((8,), VALUE)
            cute.autovec_copy(piece_at(target.align(16)), rOld)
            for i in cutlass.range_constexpr(8):
                rY[i] = rY[i] * after + rOld[i].to(Float32) * before
        if after > 0.0:
            store_words(target, *[pack(rY[2 * i], rY[2 * i + 1], DTYPE) for i in range(4)])


@cute.jit
def merge_weights(a, b):
    """(e^a, e^b) / (e^a + e^b) of two log-sum-exps; b is the weight of nothing where it is -inf."""
    after = Float32(0.0)
    if b > -Float32(INF):
        after = 1.0 / (1.0 + ex2((a - b) * LOG2E))
    return 1.0 - after, after


def fake_args():
    """Stand-ins with the promises of the op: last stride 1, other strides of 16-bit tensors multiples of 16 bytes."""
    n = cute.sym_int
    heads = n()

    def stride(divisor=8):
        return cute.sym_int64(divisibility=divisor)

    return (
        rt.make_fake_tensor(VALUE, (n(), n(), heads, LATENT), (stride(), stride(), LATENT, 1), assumed_align=16),
        rt.make_fake_tensor(VALUE, (n(), LATENT), (stride(), 1), assumed_align=16),  # weight
        rt.make_fake_tensor(Int32, (n(),), (1,), assumed_align=4),  # seq_len
        rt.make_fake_tensor(Int32, (n(),), (1,), assumed_align=4),  # start
        rt.make_fake_tensor(Float32, (n(), n(), n()), (stride(1), stride(1), 1), assumed_align=4),  # lse_prefix
        rt.make_fake_tensor(Float32, (n(), n()), (stride(1), stride(1)), assumed_align=4),  # lse
        rt.make_fake_tensor(VALUE, (n(), n(), heads, n(divisibility=COLUMNS)), (stride(), stride(), stride(), 1),
                            assumed_align=16),  # out
        *[Int32(1)] * 4,  # tile0, first, sequences, flags
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return CachedMlaProject(), fake_args()
