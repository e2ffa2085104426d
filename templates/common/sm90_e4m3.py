"""Device helpers for e4m3 operands that reach the tensor cores through registers (sm_90a)."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

HAS_Q_DESCALE, HAS_KV_DESCALE = 8, 16  # bits of the flags, beside those of mla_combine

LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, [{{$r0}} + {}];"
HALVES = """{
.reg .b16 lo, hi;
mov.b32 {lo, hi}, {$r0};
cvt.rn.f16x2.e4m3x2 {$w0}, lo;
cvt.rn.f16x2.e4m3x2 {$w1}, hi;
}"""


@cute.jit
def load_matrices(address: Int32, offset: cutlass.Constexpr, transposed: cutlass.Constexpr):
    """Four 8 x 8 matrices of 16-bit elements, here pairs of bytes; lane 8 i + r has the address of row r of matrix i in
    shared memory. Lane 4 g + l gets of each the elements (g, 2 l) and (g, 2 l + 1), transposed (2 l, g) and (2 l + 1,
    g)."""
    text = LDMATRIX.format(".trans" if transposed else "", offset)
    return cute.arch.inline_ptx(text, write_only_types=[Int32] * 4, read_only_args=[address])


@cute.jit
def store_zeros(address: Int32, offset: cutlass.Constexpr):
    """16 bytes of zeros to shared memory."""
    cute.arch.inline_ptx(
        f"st.shared.v4.b32 [{{$r0}} + {offset}], {{{{$r1}}, {{$r1}}, {{$r1}}, {{$r1}}}};",
        read_only_args=[address, Int32(0)],
    )


@cute.jit
def to_half(x: Int32):
    """Four e4m3 as two pairs of fp16, exactly: bytes 0 and 1, bytes 2 and 3."""
    return cute.arch.inline_ptx(HALVES, write_only_types=[Int32] * 2, read_only_args=[x])


@cute.jit
def transposed_to_half(x: Int32):
    """The same for bytes 0 and 2, bytes 1 and 3."""
    return to_half(cute.arch.prmt(x, Int32(0), Int32(0x3120)))


@cute.jit
def bits_of(x: Float32):
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])


@cute.jit
def of_bits(x: Int32):
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])
