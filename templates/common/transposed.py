"""What kernels share that compute S^T = K Q^T and O^T = V^T P^T: query rows (or heads) are columns of the accumulators.

Element 4 j + 2 p + e of a thread is row 16 warp + lane // 4 + 8 p and column 8 j + 2 (lane % 4) + e.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr


@cute.jit
def over_tokens(x: Float32, is_max: cutlass.Constexpr):
    """Maximum or sum over the 8 lanes that hold the same query rows (lane % 4)."""
    for k in cutlass.range_constexpr(3):
        y = cute.arch.shuffle_sync_bfly(x, offset=4 << k)
        x = cute.arch.fmax(x, y) if const_expr(is_max) else x + y
    return x


@cute.jit
def row_of(h: cutlass.Constexpr, lane):
    """The query row that a thread holds as its h-th."""
    return (h // 2) * 8 + (lane % 4) * 2 + h % 2
