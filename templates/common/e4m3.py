"""Conversion to e4m3 on every arch."""

import cutlass
import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float32, Int32, Uint32, const_expr

E4M3_MAX = 448.0


@cute.jit
def e4m3_code(x: Float32):
    """x as e4m3 where there is no instruction for it: rounded to nearest even, saturated, NaN kept."""
    size = cute.arch.fmin(cute.math.absf(x), Float32(E4M3_MAX))
    bits = size.bitcast(Int32)
    # normal: round at bit 20 and move the exponent bias from 127 to 7; below 2^-6 the sum with 2^14 rounds at 2^-9
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size + Float32(16384.0)).bitcast(Int32) - 0x46800000
    code = small if bits < 0x3C800000 else normal
    raw = x.bitcast(Int32)
    code = Int32(0x7F) if (raw & 0x7FFFFFFF) > 0x7F800000 else code
    return code | ((raw >> 24) & 0x80)


@cute.jit
def store_e4m3(rY, rQ, native: cutlass.Constexpr):
    """rY, float32, into rQ, e4m3, saturated. native: the arch (sm_89 or newer) has an instruction for it."""
    if const_expr(native):
        rQ.store(rY.load().to(Float8E4M3FN))
    else:
        rWords = cute.recast_tensor(rQ, Uint32)
        for w in cutlass.range_constexpr(cute.size(rWords)):
            word = e4m3_code(rY[4 * w])
            for i in cutlass.range_constexpr(1, 4):
                word = word | (e4m3_code(rY[4 * w + i]) << (8 * i))
            rWords[w] = word.to(Uint32)
