"""mma.sync m16n8k16 with operands in words of two 16-bit values, and the loads and stores that feed it.

The index that a product sums over may be permuted as long as both operands agree. So lane c of a group of four takes
eight values of 32 in one 16-byte load, [8 c, 8 c + 8), and gives words 0 and 1 to the first of two steps of k16, words
2 and 3 to the second one.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Uint32, const_expr


@cute.jit
def load_words(pointer):
    """16 bytes of global memory as four words."""
    return cute.arch.inline_ptx("ld.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
                                write_only_types=[Uint32] * 4, read_only_args=[pointer.to_llvm_ptr()])


@cute.jit
def store_words(pointer, a, b, c, d):
    cute.arch.inline_ptx("st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
                         read_only_args=[pointer.to_llvm_ptr(), a, b, c, d])


@cute.jit
def low_halves(a, b):
    """(first value of a, first value of b) as a word."""
    return cute.arch.inline_ptx("prmt.b32 {$w0}, {$r0}, {$r1}, 0x5410;", write_only_types=[Uint32],
                                read_only_args=[a, b])


@cute.jit
def high_halves(a, b):
    """(second value of a, second value of b) as a word."""
    return cute.arch.inline_ptx("prmt.b32 {$w0}, {$r0}, {$r1}, 0x7632;", write_only_types=[Uint32],
                                read_only_args=[a, b])


@cute.jit
def pack(first, second, dtype: cutlass.Constexpr):
    """Two float32, rounded to dtype ("bf16" or "fp16"), as a word."""
    kind = const_expr("bf16x2" if dtype == "bf16" else "f16x2")
    return cute.arch.inline_ptx("cvt.rn." + kind + ".f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32],
                                read_only_args=[first, second])


@cute.jit
def mma(rC, a0, a1, a2, a3, b0, b1, dtype: cutlass.Constexpr):
    """rC += A B. rC [4]: (row g, columns 2 c and 2 c + 1), then row g + 8; g = lane // 4, c = lane % 4."""
    kind = const_expr("bf16" if dtype == "bf16" else "f16")
    d = cute.arch.inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32." + kind + "." + kind + ".f32 {{$w0}, {$w1}, {$w2}, {$w3}}, "
        "{{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4, read_only_args=[a0, a1, a2, a3, b0, b1, rC[0], rC[1], rC[2], rC[3]])
    for i in cutlass.range_constexpr(4):
        rC[i] = d[i]


@cute.jit
def mma_k32(rC, rA, rB, r: cutlass.Constexpr, dtype: cutlass.Constexpr):
    """rC [4, tiles, row tiles] += row tile r of A times B: both steps of a k32, for every tile of 8 columns.

    rA [4, 2, row tiles]: words of rows g and g + 8. rB [4, tiles]: words of column g of each tile."""
    for s in cutlass.range_constexpr(2):
        for j in cutlass.range_constexpr(cute.size(rB, mode=[1])):
            mma(rC[None, j, r], rA[2 * s, 0, r], rA[2 * s, 1, r], rA[2 * s + 1, 0, r], rA[2 * s + 1, 1, r],
                rB[2 * s, j], rB[2 * s + 1, j], dtype)
