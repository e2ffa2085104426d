"""Keys of the indexer and their scales out of the pages of its cache, one request behind the other.

    row i, cu_seq_lens[r] <= i < cu_seq_lens[r + 1], is token i - cu_seq_lens[r] of request r

Eight lanes move a token's codes, 16 bytes each, and the first one the scale; the request is found by bisection. Rows
from cu_seq_lens[R] on, and those of pages with a negative number, are not written.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
THREADS = 256
# --- end of constants ---

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import Float8E4M3FN, Float32, Int32, Int64, Uint32, const_expr

from common.fp8_rows import load_words, store_words
from common.indexer_page import DIM, PAGE, code_address, fake_cache, scale_address

LANES = 8
TOKENS = THREADS // LANES
EACH = 2  # tokens of a lane, whose loads are on their way together
PDL = int(ARCH[3:].rstrip("a")) >= 90


class IndexerKGather:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(
        self,
        cache: cute.Tensor,
        table: cute.Tensor,
        cu_seq_lens: cute.Tensor,
        k_fp8: cute.Tensor,
        k_scale: cute.Tensor,
        stream,
    ):
        self.kernel(cache, table, cu_seq_lens, k_fp8, k_scale).launch(
            grid=[cute.ceil_div(k_fp8.shape[0], TOKENS * EACH), 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=PDL
        )

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self, mCache: cute.Tensor, mTable: cute.Tensor, mStart: cute.Tensor, mK: cute.Tensor, mScale: cute.Tensor
    ):
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = tid % LANES
        requests = mTable.shape[0]
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        total = cutlass.min(mK.shape[0], mStart[requests])
        rows = [(block * EACH + i) * TOKENS + tid // LANES for i in range(EACH)]
        if rows[0] < total:
            found = [self.load(mCache, mTable, mStart, cutlass.min(row, total - 1), requests, lane) for row in rows]
            for i in cutlass.range_constexpr(EACH):
                page, codes, scale = found[i]
                when = page >= 0 and rows[i] < total
                store_words(mK.iterator + (Int64(rows[i]) * DIM + 16 * lane), *codes, when=when)
                store_words(mScale.iterator + rows[i], scale, when=when and lane == 0)

    @cute.jit
    def load(self, mCache, mTable, mStart, row, requests, lane):
        """The page of a row of the result, this lane's codes and the scale; of page 0 where there is none."""
        low = Int32(0)  # the last request that does not start behind the row
        high = requests
        while high - low > 1:
            middle = (low + high) // 2
            behind = mStart[middle] > row
            high = middle if behind else high
            low = low if behind else middle
        token = row - mStart[low]
        index = token // PAGE
        page = mTable[low, index] if index < mTable.shape[1] else Int32(-1)
        offset = token - index * PAGE
        have = cutlass.max(page, 0)
        codes = load_words(code_address(mCache, have, offset) + 16 * lane, 4)
        scale = cute.arch.inline_ptx(
            "ld.global.b32 {$w0}, [{$r0}];",
            write_only_types=[Uint32],
            read_only_args=[scale_address(mCache, have, offset).to_llvm_ptr()],
        )
        return page, codes, scale


def fake_args():
    """Stand-ins with the promises of the op: contiguous rows, pages 16-byte aligned; all sizes dynamic."""
    rows, requests = cute.sym_int(), cute.sym_int()
    return (
        fake_cache(),
        rt.make_fake_tensor(Int32, (requests, cute.sym_int()), (cute.sym_int64(), 1), assumed_align=4),
        rt.make_fake_tensor(Int32, (cute.sym_int(),), (1,), assumed_align=4),
        rt.make_fake_tensor(Float8E4M3FN, (rows, DIM), (DIM, 1), assumed_align=16),
        rt.make_fake_tensor(Float32, (rows,), (1,), assumed_align=16),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return IndexerKGather(), fake_args()
