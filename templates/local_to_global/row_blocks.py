"""Positions within requests to rows of a paged cache; any arch from sm_80 on.

    g = table[req_id[r], tok / page] * stride_factor + layer_offset + tok % page      page = 2^page_bits
    -1 where tok < 0, the table ends before tok / page, or its entry is negative

WORKSPACE: g = start[req_id[r]] + tok instead. COUNT: also the number of entries of a row that are not -1.

A block takes BATCH x THREADS indices of a row, with COUNT all of them; a thread's BATCH indices are on their way
together, and so are their pages. Products are computed in 64 bits; the host checks that results fit in 31.

From sm_90 on it is launched with PDL, waits for the kernel before it, and lets the one behind it start at once.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
WORKSPACE = False
COUNT = False
THREADS = 256
BATCH = 4
# --- end of constants ---

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import Int32, Int64, const_expr
from cutlass.memory import SmemAllocator

PDL = int(ARCH[3:].rstrip("a")) >= 90


class LocalToGlobal:
    # ---------------------------------------------------------------- host
    @cute.jit
    def __call__(
        self,
        topk: cute.Tensor,
        req_id: cute.Tensor,
        table: cute.Tensor,
        page_bits: Int32,
        stride_factor: Int64,
        layer_offset: Int64,
        out: cute.Tensor,
        count: cute.Tensor,
        stream,
    ):
        self.kernel(topk, req_id, table, page_bits, stride_factor, layer_offset, out, count).launch(
            grid=[out.shape[0], 1 if const_expr(COUNT) else cute.ceil_div(out.shape[1], THREADS * BATCH), 1],
            block=[THREADS, 1, 1],
            stream=stream,
            use_pdl=PDL,
        )

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        mTopk: cute.Tensor,
        mReq: cute.Tensor,
        mTable: cute.Tensor,
        page_bits: Int32,
        stride_factor: Int64,
        layer_offset: Int64,
        mOut: cute.Tensor,
        mCount: cute.Tensor,
    ):
        tid, _, _ = cute.arch.thread_idx()
        r, part, _ = cute.arch.block_idx()
        sSum = SmemAllocator().allocate_tensor(Int32, cute.make_layout((THREADS // 32,)), 16)
        if const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        K = mOut.shape[1]
        request = mReq[r]
        valid = Int32(0)
        end = K if const_expr(COUNT) else cutlass.min(K, (part + 1) * (BATCH * THREADS))
        for first in cutlass.range(part * (BATCH * THREADS) + tid, end, BATCH * THREADS, unroll=1):
            rToken = cute.make_rmem_tensor((BATCH,), Int32)
            rRow = cute.make_rmem_tensor((BATCH,), Int32)
            for u in cutlass.range_constexpr(BATCH):
                i = first + u * THREADS
                rToken[u] = Int32(-1)
                if i < K:
                    rToken[u] = mTopk[r, i]
            line = mTable.iterator + Int64(request) * mTable.stride[0]
            for u in cutlass.range_constexpr(BATCH):
                rRow[u] = Int32(-1)
                if const_expr(WORKSPACE):
                    if rToken[u] >= 0:
                        rRow[u] = line.load()
                else:
                    index = rToken[u] >> page_bits
                    if rToken[u] >= 0 and index < mTable.shape[1]:
                        rRow[u] = (line + index).load()
            for u in cutlass.range_constexpr(BATCH):
                i = first + u * THREADS
                g = Int32(-1)
                if const_expr(WORKSPACE):
                    g = rRow[u] + rToken[u] if rToken[u] >= 0 else g
                else:
                    within = rToken[u] & ((Int32(1) << page_bits) - 1)
                    at = Int64(rRow[u]) * stride_factor + layer_offset + within
                    g = Int32(at) if rRow[u] >= 0 else g
                if i < K:
                    mOut[r, i] = g
                valid = valid + (Int32(1) if g >= 0 else Int32(0))
        if const_expr(COUNT):
            valid = cute.arch.warp_redux_sync(valid, kind="add")
            if tid % 32 == 0:
                sSum[tid // 32] = valid
            cute.arch.sync_threads()
            if tid == 0:
                total = Int32(0)
                for i in cutlass.range_constexpr(THREADS // 32):
                    total = total + sSum[i]
                mCount[r] = total


def fake_args():
    """Stand-ins with the promises of the op: contiguous rows; all sizes dynamic. table: [requests, pages], or
    [requests, 1] with starts."""

    def stride():
        return cute.sym_int64()

    rows, K = cute.sym_int(), cute.sym_int()
    indices = [rt.make_fake_tensor(Int32, (rows, K), (stride(), 1), assumed_align=4) for _ in range(2)]
    return (
        indices[0],
        rt.make_fake_tensor(Int32, (rows,), (1,), assumed_align=4),
        rt.make_fake_tensor(Int32, (cute.sym_int(), cute.sym_int()), (stride(), 1), assumed_align=4),
        Int32(6),
        Int64(64),
        Int64(0),
        indices[1],
        rt.make_fake_tensor(Int32, (rows,), (1,), assumed_align=4),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return LocalToGlobal(), fake_args()
