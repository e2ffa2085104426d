"""Sums over the lanes of a warp. All its lanes must come by, whatever they have to add."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def lanes_sum(x, lanes: cutlass.Constexpr):
    """Sum over groups of neighbouring lanes."""
    for k in cutlass.range_constexpr(lanes.bit_length() - 1):
        x = x + cute.arch.shuffle_sync_bfly(x, offset=1 << k)
    return x


@cute.jit
def warp_inclusive_sum(x, lane):
    """Sum of the 32-bit integers of the lanes 0 .. lane."""
    for k in cutlass.range_constexpr(5):
        # what stands in mask_and_clamp: 0, the whole warp is one segment. A lane without a source gets its own value
        below = cute.arch.shuffle_sync_up(x, offset=1 << k, mask_and_clamp=0)
        x = x + (below if lane >= (1 << k) else Int32(0))
    return x
