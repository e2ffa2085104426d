"""Gather of rows of a paged latent cache into one dense buffer, on any GPU.

    out[cu_rows[b] + i] = row starts[b] + i of request b        i < cu_rows[b + 1] - cu_rows[b]

Rows of out behind cu_rows[batch] are left alone. The host knows an upper bound of the rows only: the rows of out.

Tiling: ROWS rows a block. One warp finds the request and the address of each; then 16 bytes a thread and step, all
threads over all rows of the block, so that rows that 32 lanes do not divide (72 or 40 pieces) leave no lane idle.
"""

# --- constants: replaced when rendered ---
ARCH = "sm_90a"
DTYPE = "bf16"
WIDTH = 576
# --- end of constants ---

import cutlass
import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import BFloat16, Float16, Int32, Int64
from cutlass.memory import SmemAllocator

ELEM = {"bf16": BFloat16, "fp16": Float16}[DTYPE]
PIECE = 8  # elements of 16 bytes
PIECES = WIDTH // PIECE  # of a row
ROWS = 32
THREADS = 256
PDL = int(ARCH[3:].rstrip("a")) >= 90

assert WIDTH % PIECE == 0


class GatherLatent:
    @cute.jit
    def __call__(
        self,
        kv_cache: cute.Tensor,
        block_table: cute.Tensor,
        starts: cute.Tensor,
        cu_rows: cute.Tensor,
        out: cute.Tensor,
        stream,
    ):
        self.kernel(kv_cache, block_table, starts, cu_rows, out).launch(
            grid=[cute.ceil_div(out.shape[0], ROWS), 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=PDL
        )

    @cute.kernel
    def kernel(
        self,
        kv_cache: cute.Tensor,
        block_table: cute.Tensor,
        starts: cute.Tensor,
        cu_rows: cute.Tensor,
        out: cute.Tensor,
    ):
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        smem = SmemAllocator()
        sFrom = smem.allocate_tensor(Int64, cute.make_layout((ROWS,)), 16)  # element offset in the cache, or -1
        if cutlass.const_expr(PDL):
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        first = block * ROWS
        batch = starts.shape[0]
        if tid < ROWS:
            row = first + tid
            offset = Int64(-1)
            if row < out.shape[0] and row < cu_rows[batch]:
                low = Int32(0)  # the last request that begins at or before the row: empty ones are skipped
                high = Int32(batch)
                while high - low > 1:
                    middle = (low + high) // 2
                    inside = cu_rows[middle] <= row
                    low = middle if inside else low
                    high = high if inside else middle
                position = starts[low] + row - cu_rows[low]
                page_size = kv_cache.shape[1]
                column = position // page_size
                page = (block_table.iterator + (Int64(low) * block_table.stride[0] + column)).load()
                within = position - column * page_size
                offset = Int64(page) * kv_cache.stride[0] + Int64(within) * kv_cache.stride[1]
            sFrom[tid] = offset
        cute.arch.sync_threads()
        for i in cutlass.range(tid, ROWS * PIECES, THREADS, unroll=1):
            row = i // PIECES
            column = (i - row * PIECES) * PIECE
            offset = sFrom[row]
            if offset >= 0:
                source = kv_cache.iterator + (offset + column)
                target = out.iterator + (Int64(first + row) * out.stride[0] + column)
                rPiece = cute.make_rmem_tensor((PIECE,), ELEM)
                cute.autovec_copy(cute.make_tensor(source.align(16), cute.make_layout(PIECE)), rPiece)
                cute.autovec_copy(rPiece, cute.make_tensor(target.align(16), cute.make_layout(PIECE)))


def fake_args():
    """kv_cache, block_table, starts, cu_rows, out; stream. All sizes but WIDTH and all outer strides are dynamic."""
    n = cute.sym_int

    def tensor(dtype, *shape, divisor=1, align=4):
        stride = tuple(cute.sym_int64(divisibility=divisor) for _ in shape[1:]) + (1,)
        return rt.make_fake_tensor(dtype, shape, stride, assumed_align=align)

    batch = n()
    return (
        tensor(ELEM, n(), n(), WIDTH, divisor=8, align=16),
        tensor(Int32, batch, n()),
        tensor(Int32, batch),
        tensor(Int32, n()),
        tensor(ELEM, n(), WIDTH, divisor=8, align=16),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def entry():
    """What to compile: the host function and its fake arguments."""
    return GatherLatent(), fake_args()
