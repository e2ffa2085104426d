"""The arguments of an mla_decode kernel: one signature for all its templates."""

import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import Float32, Int32


def mla_decode_arguments(dtype, latent, rope, page_size):
    """Stand-ins for the arguments. The compiled function refuses a call that differs from them: B, s_q and H are the
    same everywhere but in lse, which may be a dummy; strides of 16-bit tensors are multiples of 8, or the size is 1."""
    batch, s_q, heads = cute.sym_int(), cute.sym_int(), cute.sym_int()

    def tensor(dtype, *shape, align, divisor=1, last=1):
        stride = tuple(cute.sym_int64(divisibility=divisor) for _ in shape[1:]) + (last,)
        return rt.make_fake_tensor(dtype, shape, stride, assumed_align=align)

    n = cute.sym_int
    return (
        tensor(dtype, batch, s_q, heads, n(), align=16, divisor=8),  # q
        tensor(dtype, batch, s_q, heads, n(), align=16, divisor=8),  # q_pe
        tensor(dtype, n(), page_size, latent + rope, align=16, divisor=8),  # kv_cache
        tensor(Int32, batch, n(), align=4),  # block_table
        tensor(Int32, batch, align=4),  # seq_lens
        tensor(Float32, n(), align=4),  # sinks
        tensor(dtype, batch, s_q, heads, latent, align=16, divisor=8),  # out
        tensor(Float32, n(), n(), n(), last=cute.sym_int64(), align=4),  # lse
        tensor(Float32, n(), align=128),  # workspace
        tensor(Int32, n(), align=4),  # semaphores
        Float32(1.0),  # sm_scale
        *[Int32(1)] * 6,  # pe_offset, flags, parts, fixed, least, bias
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )
