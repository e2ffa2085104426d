"""What the fp8_bmm templates share: the signature, and how TMA sees its tensors."""

import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32


def outer_last(x):
    """[G, rows, cols] as (rows, cols, G): the order of a TMA tensor map."""
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 2, 0]))


def fake_args():
    """a, a_scale, b, b_scale, out; ctas; early; stream. All sizes and outer strides are dynamic."""

    def any_int(divisor=1):
        return cute.sym_int(divisibility=divisor)

    def tensor(dtype, shape, divisor):
        strides = (cute.sym_int64(divisibility=divisor), cute.sym_int64(divisibility=divisor), 1)
        return rt.make_fake_tensor(dtype, shape, strides, assumed_align=16)

    G, M, N, K = any_int(), any_int(), any_int(128), any_int(128)
    scales = (G, any_int(), any_int())
    return (
        tensor(Float8E4M3FN, (G, M, K), 16),
        tensor(Float32, (G, any_int(), any_int()), 4),
        tensor(Float8E4M3FN, (G, N, K), 16),
        rt.make_fake_compact_tensor(Float32, scales, stride_order=(2, 1, 0), assumed_align=4),
        tensor(BFloat16, (G, M, N), 8),
        Int32(1),
        Int32(0),
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )
