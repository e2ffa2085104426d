"""The arguments of an mla_decode kernel: two signatures for all its templates, `plain` and `full` (see the cards)."""

import cutlass.cute as cute
import cutlass.cute.runtime as rt
from cutlass import BFloat16, Float32, Int32


def mla_decode_arguments(dtype, latent, rope, page_size, kv_dtype=None):
    """Stand-ins for the arguments. page_size 0: any, known at launch. The compiled function refuses a call that differs
    from them: B, s_q and H are the same everywhere but in lse, which may be a dummy; strides of q, cache and out are
    multiples of 16 bytes, or the size is 1. With a kv_dtype of its own the cache has scales, and with 8-bit queries out
    is bf16."""
    batch, s_q, heads = cute.sym_int(), cute.sym_int(), cute.sym_int()

    def tensor(dtype, *shape, align, divisor=1, last=1):
        stride = tuple(cute.sym_int64(divisibility=divisor) for _ in shape[1:]) + (last,)
        return rt.make_fake_tensor(dtype, shape, stride, assumed_align=align)

    def wide(dtype, *shape):
        return tensor(dtype, *shape, align=16, divisor=128 // dtype.width)

    n = cute.sym_int
    scales = ()
    if kv_dtype is not None:
        scales = (
            tensor(Float32, n(), align=4),  # q_descale
            tensor(Float32, n(), align=4),  # kv_descale
            Float32(1.0),  # value_scale
        )
    return (
        wide(dtype, batch, s_q, heads, n()),  # q
        wide(dtype, batch, s_q, heads, n()),  # q_pe
        wide(kv_dtype or dtype, n(), page_size or n(), latent + rope),  # kv_cache
        tensor(Int32, batch, n(), align=4),  # block_table
        tensor(Int32, batch, align=4),  # seq_lens
        tensor(Float32, n(), align=4),  # sinks
        wide(BFloat16 if dtype.width == 8 else dtype, batch, s_q, heads, latent),  # out
        tensor(Float32, n(), n(), n(), last=cute.sym_int64(), align=4),  # lse
        tensor(Float32, n(), align=128),  # workspace
        tensor(Int32, n(), align=4),  # semaphores
        Float32(1.0),  # sm_scale
        *[Int32(1)] * 6,  # pe_offset, flags, parts, fixed, least, bias
        *scales,
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def mla_decode_full_arguments(dtype, kv_dtype, out_dtype, latent, page_size, compact, divisor):
    """The same with the e4m3 scales, compact queries, and a rope part of the cache that may be another tensor (its
    columns from kpe_offset on). page_size 0: any, known at launch. compact: q, q_pe, out, lse are (1, tokens, H, ...)
    and the tokens of a request cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1.
    divisor: of the strides of q, q_pe and kv_cache in elements of each (16 bytes)."""
    batch, queries, s_q, heads = cute.sym_int(), cute.sym_int(), cute.sym_int(), cute.sym_int()
    if not compact:
        queries = batch
    n = cute.sym_int

    def tensor(dtype, *shape, align, divisor=1, last=1):
        stride = tuple(cute.sym_int64(divisibility=divisor) for _ in shape[1:]) + (last,)
        return rt.make_fake_tensor(dtype, shape, stride, assumed_align=align)

    q_div, kv_div = divisor
    pages = page_size or cute.sym_int()  # of both
    return (
        tensor(dtype, queries, s_q, heads, n(), align=16, divisor=q_div),  # q
        tensor(dtype, queries, s_q, heads, n(), align=16, divisor=q_div),  # q_pe
        tensor(kv_dtype, n(), pages, n(), align=16, divisor=kv_div),  # kv_cache
        tensor(kv_dtype, n(), pages, n(), align=16, divisor=kv_div),  # kpe_cache
        tensor(Int32, batch, n(), align=4),  # block_table
        tensor(Int32, batch, align=4),  # seq_lens
        tensor(Int32, n(), align=4),  # cu_seqlens_q
        tensor(Float32, n(), align=4),  # q_descale
        tensor(Float32, n(), align=4),  # kv_descale
        tensor(Float32, n(), align=4),  # sinks
        tensor(out_dtype, queries, s_q, heads, latent, align=16, divisor=8),  # out
        tensor(Float32, n(), n(), n(), last=cute.sym_int64(), align=4),  # lse
        tensor(Float32, n(), align=128),  # workspace
        tensor(Int32, n(), align=4),  # semaphores
        *[Float32(1.0)] * 2,  # sm_scale, v_scale
        *[Int32(1)] * 8,  # pe_offset, kpe_offset, flags, rows, parts, fixed, least, bias
        rt.make_fake_stream(use_tvm_ffi_env_stream=True),
    )
