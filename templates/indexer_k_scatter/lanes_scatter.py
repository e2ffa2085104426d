"""Keys of the indexer and their scales into the pages of its cache; any arch from sm_80 on.

    token t with slot s = slot_mapping[t] >= 0:  codes to page s / 64, row s % 64; scale behind the page's 64 rows

Eight lanes move a token's codes, 16 bytes each, and the first one the scale. Negative slots are skipped. Two tokens
with one slot: either of them.

From sm_90 on it is launched with PDL, waits for the kernel before it, and lets the one behind it start at once.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
THREADS = 256
# --- end of constants ---

import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import Float8E4M3FN, Float32, Int64, Uint32, const_expr

from common.fp8_rows import load_words
from common.indexer_page import DIM, fake_cache, store_key

LANES = 8
TOKENS = THREADS // LANES
PDL = int(ARCH[3:].rstrip("a")) >= 90


class IndexerKScatter:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(self, k_fp8: cute.Tensor, k_scale: cute.Tensor, cache: cute.Tensor, slots: cute.Tensor, stream):
        self.kernel(k_fp8, k_scale, cache, slots).launch(
            grid=[cute.ceil_div(slots.shape[0], TOKENS), 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=PDL
        )

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(self, mK: cute.Tensor, mScale: cute.Tensor, mCache: cute.Tensor, mSlots: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = tid % LANES
        t = block * TOKENS + tid // LANES
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        if t < mSlots.shape[0]:
            slot = Int64(mSlots[t])
            codes = load_words(mK.iterator + (Int64(t) * DIM + 16 * lane), 4)
            scale = mScale[t, 0].bitcast(Uint32)
            store_key(mCache, slot, codes, scale, lane)


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
