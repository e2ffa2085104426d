"""Quantising rows of bf16 to e4m3: packed loads and stores, reductions over groups of lanes, scales.

    raw_f32     scale = max(amax, 1e-4) / 448
    pow2_f32    the smallest power of two that is not below it, from the bits
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Uint32, const_expr

from common.e4m3 import store_e4m3

AMAX_FLOOR = 1e-4


@cute.jit
def load_words(pointer, words: cutlass.Constexpr):
    """`words` words of 4 bytes (2 or 4) at an address that is a multiple of their size."""
    if const_expr(words == 4):
        return cute.arch.inline_ptx(
            "ld.global.nc.L1::no_allocate.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
            write_only_types=[Uint32] * 4,
            read_only_args=[pointer.to_llvm_ptr()],
        )
    return cute.arch.inline_ptx(
        "ld.global.nc.L1::no_allocate.v2.b32 {{$w0}, {$w1}}, [{$r0}];",
        write_only_types=[Uint32] * 2,
        read_only_args=[pointer.to_llvm_ptr()],
    )


@cute.jit
def store_words(pointer, *words):
    """2 or 4 words of 4 bytes."""
    if const_expr(len(words) == 4):
        cute.arch.inline_ptx(
            "st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
            read_only_args=[pointer.to_llvm_ptr(), *words],
        )
    else:
        cute.arch.inline_ptx(
            "st.global.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[pointer.to_llvm_ptr(), *words]
        )


@cute.jit
def unpack(rX, at: cutlass.Constexpr, words):
    """rX[at ..] = the packed bf16 of `words`, two each."""
    for j in cutlass.range_constexpr(len(words)):
        rX[at + 2 * j] = (words[j] << 16).bitcast(Float32)
        rX[at + 2 * j + 1] = (words[j] & Uint32(0xFFFF0000)).bitcast(Float32)


@cute.jit
def round_bf16(x: Float32):
    return Float32(BFloat16(x))


@cute.jit
def lanes_sum(x, lanes: cutlass.Constexpr):
    """Sum over groups of neighbouring lanes."""
    for k in cutlass.range_constexpr(lanes.bit_length() - 1):
        x = x + cute.arch.shuffle_sync_bfly(x, offset=1 << k)
    return x


@cute.jit
def lanes_amax(rX, lanes: cutlass.Constexpr):
    """Largest magnitude in rX over groups of neighbouring lanes."""
    top = cute.math.absf(rX[0])
    for i in cutlass.range_constexpr(1, cute.size(rX)):
        top = cute.arch.fmax(top, cute.math.absf(rX[i]))
    for k in cutlass.range_constexpr(lanes.bit_length() - 1):
        top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, offset=1 << k))
    return top


@cute.jit
def power_of_two(x: Float32):
    """Biased exponent of the smallest power of two that is not below x > 0."""
    bits = x.bitcast(Int32)
    return (bits >> 23) + (Int32(1) if (bits & 0x7FFFFF) != 0 else Int32(0))


@cute.jit
def quantise(rX, ratio, pow2: cutlass.Constexpr, native: cutlass.Constexpr):
    """(rX / scale as words of four e4m3, scale); ratio: amax / 448, with its floor. native: the arch converts to
    e4m3."""
    n = cute.size(rX)
    rY = cute.make_rmem_tensor((n,), Float32)
    rOut = cute.make_rmem_tensor((n,), Float8E4M3FN)
    scale = ratio
    if const_expr(pow2):
        biased = power_of_two(ratio)
        scale = (biased << 23).bitcast(Float32)
        inverse = ((254 - biased) << 23).bitcast(Float32)
        for i in cutlass.range_constexpr(n):
            rY[i] = rX[i] * inverse
    else:
        for i in cutlass.range_constexpr(n):
            rY[i] = rX[i] / ratio
    store_e4m3(rY, rOut, native)
    rWords = cute.recast_tensor(rOut, Uint32)
    return [rWords[j] for j in range(n // 4)], scale
