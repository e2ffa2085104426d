"""The cached MLA op of TensorRT-LLM's AutoDeploy (PR 12664), to replace `auto_deploy::triton_cached_mla_with_cache`.

Where that one differs, on purpose: all heads are computed, also where no block divides them; offsets into the cache are
64-bit; a token that is padding is not written to the cache, and its output is zero; nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import torch_ops_cached  # noqa: F401  registers the ops
from ..errors import InvalidArgument, InvalidArgumentType
from ..ops.cached_mla import cached_mla
from ..ops.checks import describe

__all__ = ["triton_cached_mla_with_cache"]
COUNTS = 6  # entries of batch_info_host that are read


def triton_cached_mla_with_cache(q_nope: Tensor, q_pe: Tensor, compressed_kv: Tensor, kpe: Tensor,
                                 kv_b_proj_weight: Tensor, batch_info_host: Tensor, seq_len: Tensor, input_pos: Tensor,
                                 slot_idx: Tensor, cu_seqlen: Tensor, mla_cache: Tensor, scale: float | None = None,
                                 kv_lora_rank: int = 512, out: Tensor | None = None) -> Tensor:
    """jitmla.cached_mla with AutoDeploy's metadata.

    q_nope [B, S, N, P], q_pe [B, S, N, r], compressed_kv [B, S, R], kpe [B, S, 1, r], kv_b_proj_weight [N (P + V), R],
    mla_cache [slots, max_seq_len, R + r]: rows are written. B sequences of one token (S = 1), or all tokens one after
    the other, those of prefill, then of extend, then of decode sequences.
    batch_info_host: int32 on the host, from 6 entries on: the numbers of sequences and of tokens of prefill, extend and
        decode. seq_len, input_pos, slot_idx, cu_seqlen: int32 on the device, an entry for each of these sequences.
    scale: None is (P + r)**-0.5.

    Returns [B, S, N, V], or, when out is given, an empty tensor. The same as a traceable op:
    torch.ops.jitmla.cached_mla_with_cache, which declares that it writes mla_cache, and .cached_mla_with_cache_out.
    """
    args = (q_nope, q_pe, compressed_kv, kpe, kv_b_proj_weight, batch_info_host, seq_len, input_pos, slot_idx,
            cu_seqlen, mla_cache, scale, kv_lora_rank)
    if torch.compiler.is_compiling():
        if out is None:
            return torch.ops.jitmla.cached_mla_with_cache(*args)
        torch.ops.jitmla.cached_mla_with_cache_out(*args, out=out)
        return q_nope.new_empty(0)
    result = eager(*args, out=out)
    return result if out is None else q_nope.new_empty(0)


def eager(q_nope: Tensor, q_pe: Tensor, compressed_kv: Tensor, kpe: Tensor, kv_b_proj_weight: Tensor,
          batch_info_host: Tensor, seq_len: Tensor, input_pos: Tensor, slot_idx: Tensor, cu_seqlen: Tensor,
          mla_cache: Tensor, scale: float | None = None, kv_lora_rank: int = 512, out: Tensor | None = None) -> Tensor:
    """`triton_cached_mla_with_cache`, returning what it wrote."""
    try:
        if not batch_info_host.is_cpu or batch_info_host.dtype != torch.int32:
            raise TypeError
        prefill, prefill_tokens, extend, extend_tokens, decode, _ = batch_info_host[:COUNTS].tolist()
    except (AttributeError, TypeError, ValueError) as e:
        raise _bad_counts(batch_info_host) from e
    if kv_lora_rank != compressed_kv.shape[-1]:
        raise InvalidArgument(f"kv_lora_rank={kv_lora_rank}", supported=f"compressed_kv: {describe(compressed_kv)}",
                              differs=f"its last dimension is {compressed_kv.shape[-1]}",
                              remedy="compare it with the model's config")
    if scale is None:
        scale = (q_nope.shape[3] + q_pe.shape[3]) ** -0.5
    return cached_mla(q_nope, q_pe, compressed_kv, kpe, kv_b_proj_weight, mla_cache, seq_len=seq_len,
                      input_pos=input_pos, slot_idx=slot_idx, cu_seqlen=cu_seqlen, num_prefill=prefill + extend,
                      prefill_tokens=prefill_tokens + extend_tokens, num_decode=decode, sm_scale=scale, out=out)


def _bad_counts(value: Any) -> InvalidArgumentType:
    return InvalidArgumentType(
        f"batch_info_host: {describe(value) if isinstance(value, Tensor) else type(value).__name__}",
        supported=f"an int32 tensor on the host with at least {COUNTS} entries: sequences and tokens of prefill, "
        "extend and decode", differs="it is none", remedy="pass the host copy: reading the other one would wait for "
        "the GPU")
