"""Device helpers of the sm_90a kernels: swizzled shared-memory layouts, wgmma issue, quad reductions, L2 hints."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32, Int64
from cutlass.cute.nvgpu import warpgroup

LOG2E = 1.4426950408889634
INF = float("inf")
# L2 hints of the TMA instructions (the 64-bit encodings of createpolicy)
EVICT_FIRST, EVICT_NORMAL = 0x12F0000000000000, 0x1000000000000000


def cutlass_dtype(name):
    """The cutlass type of a dtype name."""
    return {"e4m3": Float8E4M3FN, "bf16": BFloat16, "fp16": Float16, "fp32": Float32}[name]


def smem_atom(dtype):
    """The swizzled K-major layout atom of 8 rows and 64 columns: 128 bytes a row, 64 of an 8-bit type."""
    kinds = warpgroup.SmemLayoutAtomKind
    return warpgroup.make_smem_layout_atom(kinds.K_SW128 if dtype.width == 16 else kinds.K_SW64, dtype)


def swz(rows, cols, dtype):
    """Swizzled (rows, cols) layout: tiles of rows x 64 columns, one behind the other."""
    return cute.tile_to_shape(smem_atom(dtype), (rows, cols), order=(0, 1))


@cute.jit
def row_strides(x):
    """Strides of the packed rows and of the requests of a (B, s_q, H, columns) tensor."""
    # the stride of a mode of size 1 may be anything, also none that TMA accepts
    row = x.stride[2] if x.shape[2] > 1 else x.stride[1]
    row = row if x.shape[1] * x.shape[2] > 1 else Int64(64)
    request = x.stride[0] if x.shape[0] > 1 else Int64(64)
    divisor = 128 // x.element_type.width
    return cute.assume(row, divby=divisor), cute.assume(request, divby=divisor)


def copy_async16(shared, shared_offset, address, offset, size, policy=None):
    """cp.async of 16 bytes, of which `size` are read from address + offset; the rest are zeros. policy: an L2 hint."""
    hint, last = ("", "") if policy is None else (".L2::cache_hint", ", {$r3}")
    code = f"cp.async.cg.shared.global{hint} [{{$r0}}+{shared_offset}], [{{$r1}}+{offset}], 16, {{$r2}}{last};"
    cute.arch.inline_ptx(code, read_only_args=[shared, address, size] + ([] if policy is None else [policy]))


@cute.jit
def ex2(x: Float32):
    return cute.math.exp2(x, fastmath=True)


@cute.jit
def quad_max(x: Float32):
    """Maximum over the 4 lanes that share an accumulator row."""
    x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=1))
    return cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=2))


@cute.jit
def quad_sum(x: Float32):
    """Sum over the 4 lanes that share an accumulator row."""
    x = x + cute.arch.shuffle_sync_bfly(x, offset=1)
    return x + cute.arch.shuffle_sync_bfly(x, offset=2)


@cute.jit
def issue(op: cutlass.Constexpr, acc, a, b, zero: cutlass.Constexpr):
    """acc (+)= a b over all k-steps of one tile; `zero`: start from zero.  The caller fences, commits and waits."""
    atom = cute.make_mma_atom(op)
    atom.set(warpgroup.Field.ACCUMULATE, not zero)
    for k in cutlass.range_constexpr(cute.size(a.shape[2])):
        cute.gemm(atom, acc, a[None, None, k], b[None, None, k], acc)
        atom.set(warpgroup.Field.ACCUMULATE, True)
