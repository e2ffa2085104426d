"""Warp-level building blocks for sm_80 and newer: cp.async, ldmatrix and e4m3 conversion as single PTX instructions.

Shared-memory addresses are 32-bit integers (`pointer.toint()`), global ones 64-bit. Rows in shared memory have an odd
number of 16-byte chunks, so that the 8 rows of an ldmatrix lie in different banks without a swizzle.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr


def odd_pitch(nbytes):
    """Bytes from row to row in shared memory for rows of `nbytes`: an odd number of 16-byte chunks."""
    return (-(-nbytes // 16) | 1) * 16


@cute.jit
def cp_async16(dst: Int32, src: Int64, nbytes: Int32):
    """16 bytes to shared memory: the first `nbytes` (0 or 16) from global memory, zeros for the rest."""
    cute.arch.inline_ptx(
        "cp.async.cg.shared.global.L2::128B [{$r0}], [{$r1}], 16, {$r2};", read_only_args=[dst, src, nbytes]
    )


@cute.jit
def ldmatrix4(regs: cute.Tensor, address: Int32, trans: cutlass.Constexpr):
    """Four 8x8 matrices of 16-bit elements into regs[0 .. 3]; lane l gives the address of row l % 8 of matrix l / 8."""
    kind = "trans." if const_expr(trans) else ""
    a, b, c, d = cute.arch.inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4." + kind + "shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32] * 4,
        read_only_args=[address],
    )
    regs[0], regs[1], regs[2], regs[3] = a, b, c, d


@cute.jit
def ldmatrix2(regs: cute.Tensor, address: Int32, trans: cutlass.Constexpr):
    """Two 8x8 matrices into regs[0] and regs[1]; the addresses of lanes 16 to 31 are not used."""
    kind = "trans." if const_expr(trans) else ""
    a, b = cute.arch.inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x2." + kind + "shared.b16 {{$w0}, {$w1}}, [{$r0}];",
        write_only_types=[Int32] * 2,
        read_only_args=[address],
    )
    regs[0], regs[1] = a, b


@cute.jit
def permute_bytes(x: Int32, selector: cutlass.Constexpr):
    return cute.arch.inline_ptx(
        "prmt.b32 {$w0}, {$r0}, 0, {$r1};", write_only_types=[Int32], read_only_args=[x, Int32(selector)]
    )


@cute.jit
def e4m3x2_to_f16x2(x: Int32, high: cutlass.Constexpr, native: cutlass.Constexpr):
    """The two e4m3 numbers in the low (or high) half of x as two fp16. Exact; NaN stays NaN.

    native: the instruction of sm_89 and newer. Without it: the seven bits of exponent and mantissa are shifted to
    their place, which is 2^-8 of the value, also for subnormals; and 480, which e4m3 does not have, is its NaN.
    """
    if const_expr(native):
        half = "hi" if const_expr(high) else "lo"
        return cute.arch.inline_ptx(
            "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, {$r0}; cvt.rn.f16x2.e4m3x2 {$w0}, " + half + "; }",
            write_only_types=[Int32],
            read_only_args=[x],
        )
    wide = permute_bytes(x, 0x3424 if const_expr(high) else 0x1404)  # each number in the upper byte of a half
    magnitude = wide & 0x7F007F00
    nan = ((magnitude + 0x01000100) >> 15) & 0x00010001
    small = ((magnitude >> 1) & 0x3F803F80) | (wide & Int32(-0x7FFF8000))
    scaled = cute.arch.inline_ptx(
        "{ .reg .b32 scale; mov.b32 scale, 0x5C005C00; mul.rn.f16x2 {$w0}, {$r0}, scale; }",
        write_only_types=[Int32],
        read_only_args=[small],
    )
    return scaled | (nan * 0x7C00)


@cute.jit
def f16x2_to_bf16x2(x: Int32):
    """Two fp16 as two bf16; exact for what came from e4m3."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 lo, hi; .reg .f32 a, b; mov.b32 {lo, hi}, {$r0}; cvt.f32.f16 a, lo; cvt.f32.f16 b, hi; "
        "cvt.rn.bf16x2.f32 {$w0}, b, a; }",
        write_only_types=[Int32],
        read_only_args=[x],
    )
