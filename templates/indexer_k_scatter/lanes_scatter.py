"""Keys of the indexer and their scales into the pages of its cache.

    token t with slot s = slot_mapping[t] >= 0:  codes to page s / 64, row s % 64; scale behind the page's 64 rows

Eight lanes move a token's codes, 16 bytes each, and the first one the scale. Negative slots are skipped. Two tokens
with
one slot: either of them.
"""

# --- constants: replaced when rendered ---
THREADS = 256
# --- end of constants ---

import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import Float8E4M3FN, Float32, Int32, Int64, Uint32

from common.fp8_rows import load_words, store_words
from common.indexer_page import DIM, PAGE, code_address, fake_cache, scale_address

LANES = 8
TOKENS = THREADS // LANES


class IndexerKScatter:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(self, k_fp8: cute.Tensor, k_scale: cute.Tensor, cache: cute.Tensor, slots: cute.Tensor, stream):
        self.kernel(k_fp8, k_scale, cache, slots).launch(
            grid=[cute.ceil_div(slots.shape[0], TOKENS), 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True
        )

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(self, mK: cute.Tensor, mScale: cute.Tensor, mCache: cute.Tensor, mSlots: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = tid % LANES
        t = block * TOKENS + tid // LANES
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if t < mSlots.shape[0]:
            slot = Int64(mSlots[t])
            codes = load_words(mK.iterator + (Int64(t) * DIM + 16 * lane), 4)
            scale = mScale[t, 0].bitcast(Uint32)
            if slot >= 0:
                page = slot // PAGE
                offset = Int32(slot - page * PAGE)
                store_words(code_address(mCache, page, offset) + 16 * lane, *codes)
                if lane == 0:
                    cute.arch.inline_ptx(
                        "st.global.b32 [{$r0}], {$r1};",
                        read_only_args=[scale_address(mCache, page, offset).to_llvm_ptr(), scale],
                    )


def fake_args():
    """Stand-ins with the promises of the op: contiguous rows, pages 16-byte aligned; all sizes dynamic."""
    rows = cute.sym_int()
    return (
        rt.make_fake_tensor(Float8E4M3FN, (rows, DIM), (DIM, 1), assumed_align=16),
        rt.make_fake_tensor(Float32, (rows, 1), (1, 1), assumed_align=4),
        fake_cache(),
        rt.make_fake_tensor(Int64, (cute.sym_int(),), (1,), assumed_align=8),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return IndexerKScatter(), fake_args()
