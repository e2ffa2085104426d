"""What a DSA layer writes before it selects and attends, in one pass over memory; any arch from sm_80 on.

    kv_cache[slots[t]]           = kv_c[t] | k_pe[t] turned           a row as templates/common/latent_pack.py has it
    index_cache[index_slots[t]]  = k_fp8[t], k_scale[t]               with INDEX_KEYS
    q_out[t, h]                  = q_pe[t, h] turned

Pairs (2 i, 2 i + 1) of the 64 columns turn by the angle of the token's position, in float32, and are rounded to bf16
once. Negative slots are skipped, each in its own cache; q is turned all the same.

A token has 1 + ceil(heads / 8) warps, one behind the other over all blocks:

    the first       the rows of both caches: 16 columns of kv_c a lane; k_pe, and the codes of the key, are 16 bytes of
                    each of the lanes 0 .. 7
    the others      8 heads of q each: lane l has columns 8 (l % 8) .. of heads l / 8 and l / 8 + 4

All loads of a warp are issued before the first of its values is worked on.

From sm_90 on it is launched with PDL, waits for the kernel before it, and lets the one behind it start at once.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
ROW = "fp8"
INDEX_KEYS = True
POSITIONS = "i64"
WARPS = 4
# --- end of constants ---

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Int64, Uint8, Uint32, const_expr

from common.fp8_rows import load_words, store_words
from common.indexer_page import DIM, fake_cache, store_key
from common.latent_pack import LATENT, ROPE, ROW_BYTES, load_latent, load_rope, store_latent_row, turned

CVT = int(ARCH[3:].rstrip("a")) >= 89  # has the conversion to e4m3
PDL = int(ARCH[3:].rstrip("a")) >= 90
BYTES = ROW_BYTES[ROW]
HEADS = 8  # of a warp
POSITION = Int32 if POSITIONS == "i32" else Int64

assert POSITIONS in ("i32", "i64")


class DsaAppend:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(
        self,
        q_pe: cute.Tensor,
        q_out: cute.Tensor,
        kv_c: cute.Tensor,
        k_pe: cute.Tensor,
        positions: cute.Tensor,
        cos_sin: cute.Tensor,
        kv_cache: cute.Tensor,
        slots: cute.Tensor,
        k_fp8: cute.Tensor,
        k_scale: cute.Tensor,
        index_cache: cute.Tensor,
        index_slots: cute.Tensor,
        stream,
    ):
        parts = 1 + cute.ceil_div(q_pe.shape[1], HEADS)
        index = (k_fp8, k_scale, index_cache, index_slots)
        self.kernel(q_pe, q_out, kv_c, k_pe, positions, cos_sin, kv_cache, slots, *index, parts).launch(
            grid=[cute.ceil_div(q_pe.shape[0] * parts, WARPS), 1, 1],
            block=[32 * WARPS, 1, 1],
            stream=stream,
            use_pdl=PDL,
        )

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,
        mOut: cute.Tensor,
        mC: cute.Tensor,
        mPe: cute.Tensor,
        mPos: cute.Tensor,
        mCosSin: cute.Tensor,
        mCache: cute.Tensor,
        mSlots: cute.Tensor,
        mK8: cute.Tensor,
        mScale: cute.Tensor,
        mIndex: cute.Tensor,
        mIndexSlots: cute.Tensor,
        parts: Int32,
    ):
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = tid % 32
        unit = block * WARPS + cute.arch.make_warp_uniform(tid // 32)
        t = unit // parts
        part = unit - t * parts
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        if t < mQ.shape[0]:
            position = Int64(mPos[t])
            if part == 0:
                self.rows(mC, mPe, mCosSin, position, mCache, mSlots, mK8, mScale, mIndex, mIndexSlots, t, lane)
            else:
                self.queries(mQ, mOut, mCosSin, position, t, (part - 1) * HEADS, lane)

    @cute.jit
    def angles(self, mCosSin, position, lane):
        """4 cosines and 4 sines, of the pairs of this lane."""
        line = mCosSin.iterator + (position * ROPE + 4 * (lane % 8))
        words = [*load_words(line, 4), *load_words(line + ROPE // 2, 4)]
        return [x.bitcast(Float32) for x in words[:4]], [x.bitcast(Float32) for x in words[4:]]

    @cute.jit
    def rows(self, mC, mPe, mCosSin, position, mCache, mSlots, mK8, mScale, mIndex, mIndexSlots, t, lane):
        slot = Int64(mSlots[t])
        latent = load_latent(mC, t, lane)
        rope = load_rope(mPe, t, lane)
        if const_expr(INDEX_KEYS):
            index_slot = Int64(mIndexSlots[t])
            codes = load_words(mK8.iterator + (Int64(t) * DIM + 16 * (lane % 8)), 4)
            scale = mScale[t, 0].bitcast(Uint32)
        rCos, rSin = self.angles(mCosSin, position, lane)
        if const_expr(INDEX_KEYS):
            store_key(mIndex, index_slot if lane < 8 else Int64(-1), codes, scale, lane)
        store_latent_row(mCache, slot, latent, turned(rope, rCos, rSin), lane, ROW, CVT)

    @cute.jit
    def queries(self, mQ, mOut, mCosSin, position, t, first, lane):
        heads = mQ.shape[1]
        column = 8 * (lane % 8)
        own = [first + lane // 8 + 4 * i for i in range(HEADS // 4)]
        words = []
        for i in cutlass.range_constexpr(HEADS // 4):
            h = cutlass.min(own[i], heads - 1)  # a head behind the last one is read and not stored
            words.append(load_words(mQ.iterator + (Int64(t) * mQ.stride[0] + Int64(h) * mQ.stride[1] + column), 4))
        rCos, rSin = self.angles(mCosSin, position, lane)
        for i in cutlass.range_constexpr(HEADS // 4):
            target = mOut.iterator + (Int64(t) * mOut.stride[0] + Int64(own[i]) * mOut.stride[1] + column)
            store_words(target, *turned(words[i], rCos, rSin), when=own[i] < heads)


def fake_args():
    """Stand-ins with the promises of the op: last strides 1, strides and addresses multiples of 16 bytes. Without
    INDEX_KEYS the last four are not looked at."""

    def stride():
        return cute.sym_int64(divisibility=8)

    T, H = cute.sym_int(), cute.sym_int()
    queries = [
        rt.make_fake_tensor(BFloat16, (T, H, ROPE), (stride(), stride(), 1), assumed_align=16) for _ in range(2)
    ]
    keys = T if INDEX_KEYS else cute.sym_int()
    pool = (cute.sym_int(), cute.sym_int(), 1, BYTES)
    return (
        *queries,
        rt.make_fake_tensor(BFloat16, (T, LATENT), (stride(), 1), assumed_align=16),
        rt.make_fake_tensor(BFloat16, (T, ROPE), (stride(), 1), assumed_align=16),
        rt.make_fake_tensor(POSITION, (T,), (1,), assumed_align=POSITION.width // 8),
        rt.make_fake_tensor(Float32, (cute.sym_int(), ROPE), (ROPE, 1), assumed_align=16),
        rt.make_fake_tensor(
            Uint8, pool, (cute.sym_int64(divisibility=16), BYTES, cute.sym_int64(), 1), assumed_align=16
        ),
        rt.make_fake_tensor(Int64, (T,), (1,), assumed_align=8),
        rt.make_fake_tensor(Float8E4M3FN, (keys, DIM), (DIM, 1), assumed_align=16),
        rt.make_fake_tensor(Float32, (keys, 1), (1, 1), assumed_align=4),
        fake_cache(),
        rt.make_fake_tensor(Int64, (T,), (1,), assumed_align=8),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return DsaAppend(), fake_args()
