"""Quantising rows of bf16 to e4m3: packed loads and stores, reductions over groups of lanes, scales.

    raw_f32     scale = max(amax, 1e-4) / 448
    pow2_f32    the smallest power of two that is not below it

Values stay packed, two bf16 a word, as long as nothing needs float32: they are compared, and multiplied by a power of
two, two at a time.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Uint32, const_expr

from common.e4m3 import E4M3_MAX, store_e4m3

AMAX_FLOOR = 1e-4
LEAST_SCALE = 105  # biased exponent of the smallest power of two that is not below AMAX_FLOOR / 448
MAGNITUDES = 0x7FFF7FFF


@cute.jit
def load_words(pointer, words: cutlass.Constexpr):
    """`words` words of 4 bytes (2 or 4) at an address that is a multiple of their size. Relaxed loads stay where they
    are written, so that many are on their way at once; the compiler moves others to where their values are used. Nor
    may they be ld.global.nc: the kernel can have been started while the one before it was still writing."""
    if const_expr(words == 4):
        return cute.arch.inline_ptx(
            "ld.relaxed.gpu.global.L1::no_allocate.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
            write_only_types=[Uint32] * 4,
            read_only_args=[pointer.to_llvm_ptr()],
        )
    return cute.arch.inline_ptx(
        "ld.relaxed.gpu.global.L1::no_allocate.v2.b32 {{$w0}, {$w1}}, [{$r0}];",
        write_only_types=[Uint32] * 2,
        read_only_args=[pointer.to_llvm_ptr()],
    )


@cute.jit
def load_value(pointer, dtype: cutlass.Constexpr):
    """A float32 or bf16 as float32, by a relaxed load."""
    if const_expr(dtype is BFloat16):
        code = "{ .reg .b16 zero, half; mov.b16 zero, 0; ld.relaxed.gpu.global.b16 half, [{$r0}]; "
        code += "mov.b32 {$w0}, {zero, half}; }"
    else:
        code = "ld.relaxed.gpu.global.b32 {$w0}, [{$r0}];"
    word = cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[pointer.to_llvm_ptr()])
    return word.bitcast(Float32)


@cute.jit
def store_words(pointer, *words, when=True):
    """1, 2 or 4 words of 4 bytes, `when` it holds. By a predicate: into a branch the loads of the words would be moved
    as well, behind the one that decides."""
    n = len(words)
    values = ", ".join(f"{{$r{i + 1}}}" for i in range(n))
    suffix = {1: "b32", 2: "v2.b32", 4: "v4.b32"}[n]
    values = values if n == 1 else "{" + values + "}"
    if const_expr(when is True):
        cute.arch.inline_ptx(f"st.global.{suffix} [{{$r0}}], {values};", read_only_args=[pointer.to_llvm_ptr(), *words])
    else:
        cute.arch.inline_ptx(
            f"{{ .reg .pred p; setp.ne.s32 p, {{$r{n + 1}}}, 0; @p st.global.{suffix} [{{$r0}}], {values}; }}",
            read_only_args=[pointer.to_llvm_ptr(), *words, Int32(1) if when else Int32(0)],
        )


@cute.jit
def unpack(rX, at: cutlass.Constexpr, words):
    """rX[at ..] = the packed bf16 of `words`, two each."""
    for j in cutlass.range_constexpr(len(words)):
        rX[at + 2 * j] = low_half(words[j])
        rX[at + 2 * j + 1] = high_half(words[j])


@cute.jit
def low_half(word):
    return (word << 16).bitcast(Float32)


@cute.jit
def high_half(word):
    return (word & Uint32(0xFFFF0000)).bitcast(Float32)


@cute.jit
def pack(low: Float32, high: Float32):
    """Both rounded to bf16, in one word."""
    return cute.arch.inline_ptx(
        "cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[low, high]
    )


@cute.jit
def round_bf16(x: Float32):
    return Float32(BFloat16(x))


@cute.jit
def max2(a, b):
    """The larger ones of two pairs of bf16; a NaN is not the larger one."""
    return cute.arch.inline_ptx("max.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


@cute.jit
def largest(words):
    """A pair whose larger one is the largest magnitude in `words`."""
    top = words[0] & Uint32(MAGNITUDES)
    for i in cutlass.range_constexpr(1, len(words)):
        top = max2(top, words[i] & Uint32(MAGNITUDES))
    return top


@cute.jit
def lanes_amax(a, b, lanes: cutlass.Constexpr):
    """The largest magnitudes of two rows over groups of neighbouring lanes, from what largest() has found of each."""
    lows = cute.arch.inline_ptx(
        "prmt.b32 {$w0}, {$r0}, {$r1}, 0x5410;", write_only_types=[Uint32], read_only_args=[a, b]
    )
    highs = cute.arch.inline_ptx(
        "prmt.b32 {$w0}, {$r0}, {$r1}, 0x7632;", write_only_types=[Uint32], read_only_args=[a, b]
    )
    top = max2(lows, highs)
    for k in cutlass.range_constexpr(lanes.bit_length() - 1):
        top = max2(top, cute.arch.shuffle_sync_bfly(top, offset=1 << k))
    return low_half(top), high_half(top)


@cute.jit
def pow2_exponent(amax: Float32, least: cutlass.Constexpr):
    """Biased exponent of the smallest power of two p for which amax <= 448 p, but at least `least`. 448 is 1.75 * 2^8:
    the sum carries into the exponent where the mantissa is above 1.75."""
    return cutlass.max(((amax.bitcast(Int32) + 0x1FFFFF) >> 23) - 8, least)


@cute.jit
def quantise(words, amax: Float32, pow2: cutlass.Constexpr, native: cutlass.Constexpr,
             least: cutlass.Constexpr = LEAST_SCALE):
    """(the packed bf16 of `words` over their scale, as words of four e4m3; the scale). amax: their largest magnitude,
    itself one of bf16. native: the arch converts to e4m3."""
    n = 2 * len(words)
    rX = cute.make_rmem_tensor((n,), Float32)
    rOut = cute.make_rmem_tensor((n,), Float8E4M3FN)
    if const_expr(pow2):
        biased = pow2_exponent(amax, least)
        scale = (biased << 23).bitcast(Float32)
        inverse = Uint32((254 - biased) << 7) * Uint32(0x00010001)
        for j in cutlass.range_constexpr(len(words)):
            word = cute.arch.inline_ptx(  # exact, and -0 stays
                "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 {$w0}, {$r0}, {$r1}, zero; }",
                write_only_types=[Uint32],
                read_only_args=[words[j], inverse],
            )
            unpack(rX, 2 * j, [word])
    else:
        scale = cute.arch.fmax(amax, Float32(AMAX_FLOOR)) / Float32(E4M3_MAX)
        unpack(rX, 0, words)
        for i in cutlass.range_constexpr(n):
            rX[i] = rX[i] / scale
    store_e4m3(rX, rOut, native)
    rWords = cute.recast_tensor(rOut, Uint32)
    return [rWords[j] for j in range(n // 4)], scale
