"""FlashMLA's calls (flash_mla, as of April 2026) over jitmla.mla_decode; the sparse ones are in flash_mla_sparse.

What differs: any GPU since Ampere, any page size and head count. There is no schedule to make: the object that
get_mla_metadata returns holds nothing but the shapes that it was first used with, so a stale one cannot give wrong
results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import JitmlaError
from ..ops.mla_decode import mla_decode
from .flash_mla_sparse import Refused, flash_mla_sparse_fwd, sparse_with_kvcache

__all__ = ["flash_mla_sparse_fwd", "flash_mla_with_kvcache", "flash_mla_with_kvcache_fp8", "get_mla_metadata"]


@dataclass
class FlashMLASchedMeta:
    """The shapes of the first call. FlashMLA keeps its schedule here; jitmla's is made by each launch."""

    config: tuple[tuple[str, Any], ...] | None = None


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """(FlashMLASchedMeta, None), whatever the arguments, as FlashMLA's."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
        q: Tensor, k_cache: Tensor, block_table: Tensor | None, cache_seqlens: Tensor | None, head_dim_v: int,
        tile_scheduler_metadata: FlashMLASchedMeta, num_splits: None = None, softmax_scale: float | None = None,
        causal: bool = False, is_fp8_kvcache: bool = False, indices: Tensor | None = None,
        attn_sink: Tensor | None = None, extra_k_cache: Tensor | None = None,
        extra_indices_in_kvcache: Tensor | None = None, topk_length: Tensor | None = None,
        extra_topk_length: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out [batch, s_q, heads, head_dim_v], lse [batch, heads, s_q]): lse in base e, +inf where no key is seen.

    q: [batch, s_q, heads, width]; k_cache: [pages, page_size, 1, width]; softmax_scale: by default width**-0.5, as
    FlashMLA's, which is right for no model with weight absorption: pass it.
    """
    _check_config(tile_scheduler_metadata, num_splits, q, k_cache, causal, is_fp8_kvcache)
    if indices is not None:
        return sparse_with_kvcache(q, k_cache, indices, head_dim_v, softmax_scale, causal, is_fp8_kvcache, attn_sink,
                                   topk_length, extra_k_cache=extra_k_cache, extra_topk_length=extra_topk_length,
                                   extra_indices_in_kvcache=extra_indices_in_kvcache)
    given = {"attn_sink": attn_sink, "extra_k_cache": extra_k_cache, "topk_length": topk_length,
             "extra_indices_in_kvcache": extra_indices_in_kvcache, "extra_topk_length": extra_topk_length}
    if any(value is not None for value in given.values()):
        raise _refused(", ".join(n for n, v in given.items() if v is not None), "dense attention, without them")
    if is_fp8_kvcache:
        raise _refused("is_fp8_kvcache=True with dense attention", "flash_mla_with_kvcache_fp8, which takes the scales")
    return _dense(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal)


def flash_mla_with_kvcache_fp8(
        q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, head_dim_v: int,
        tile_scheduler_metadata: FlashMLASchedMeta, num_splits: None = None, softmax_scale: float | None = None,
        causal: bool = False, descale_q: Tensor | None = None, descale_k: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
    """The same with e4m3 q and k_cache, as in vLLM's FlashMLA; out is bf16. descale_q, descale_k: float32 [1]."""
    _check_config(tile_scheduler_metadata, num_splits, q, k_cache, causal, True)
    return _dense(q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal, q_descale=descale_q,
                  kv_descale=descale_k)


def _dense(q: Tensor, k_cache: Tensor, block_table: Tensor | None, cache_seqlens: Tensor | None, head_dim_v: int,
           softmax_scale: float | None, causal: bool, **scales: Any) -> tuple[Tensor, Tensor]:
    if block_table is None or cache_seqlens is None:
        raise _refused("block_table or cache_seqlens is None", "both, for dense attention")
    if k_cache.dim() != 4 or k_cache.shape[2] != 1:
        raise _refused(f"k_cache {list(k_cache.shape)}", "[pages, page_size, 1, width]: MLA has one KV head")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    batch, s_q, heads, _ = q.shape
    lse = torch.empty(batch, heads, s_q, dtype=torch.float32, device=q.device)
    try:
        out = mla_decode(q, k_cache.squeeze(2), block_table, cache_seqlens, kv_lora_rank=head_dim_v, sm_scale=scale,
                         causal=causal, lse=lse.transpose(1, 2), **scales)
    except JitmlaError as error:
        if isinstance(error, (ValueError, TypeError)):
            raise Refused(error.asked, supported=error.supported, differs=error.differs,
                          remedy=error.remedy) from error
        raise
    return out, lse.nan_to_num_(nan=float("nan"), posinf=float("inf"), neginf=float("inf"))


def _check_config(metadata: FlashMLASchedMeta, num_splits: None, q: Tensor, k_cache: Tensor, causal: bool,
                  is_fp8_kvcache: bool) -> None:
    """As FlashMLA: a metadata object is for calls of one shape."""
    if not isinstance(metadata, FlashMLASchedMeta):
        raise _refused(f"tile_scheduler_metadata: a {type(metadata).__name__}", "what get_mla_metadata returned")
    if num_splits is not None:
        raise _refused("num_splits", "None")
    if q.dim() != 4 or k_cache.dim() != 4:
        raise _refused(f"q of {q.dim()} and k_cache of {k_cache.dim()} dimensions", "4 and 4")
    config = (("batch_size", q.shape[0]), ("seq_len_q", q.shape[1]), ("num_heads_q", q.shape[2]),
              ("page_block_size", k_cache.shape[1]), ("num_heads_k", k_cache.shape[2]), ("causal", causal),
              ("is_fp8_kvcache", is_fp8_kvcache))
    if metadata.config is None:
        metadata.config = config
    for (name, now), (_, first) in zip(config, metadata.config, strict=True):
        if now != first:
            raise _refused(f"{name} = {now} with metadata that was used with {first}", "calls of one shape")


def _refused(asked: str, supported: str) -> Refused:
    return Refused(asked, supported=supported, differs="it is something else",
                   remedy="see jitmla.compat.flash_mla, or call jitmla.mla_decode itself")
