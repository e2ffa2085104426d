"""DeepGEMM's indexer logits: its signatures, over jitmla.fp8_mqa_logits and jitmla.fp8_paged_mqa_logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidArgument
from ..ops.fp8_mqa_logits import fp8_mqa_logits as ragged
from ..ops.fp8_paged_mqa_logits import fp8_paged_mqa_logits as paged

NEXT_N = 2  # queries of a request that a kernel takes; more are flattened


def fp8_mqa_logits(q: Tensor, kv: tuple[Tensor, Tensor], weights: Tensor, cu_seq_len_k_start: Tensor,
                   cu_seq_len_k_end: Tensor, clean_logits: bool = True, max_seqlen_k: int = 0) -> Tensor:
    """Logits [rows, tokens] float32 (or [rows, max_seqlen_k], compressed), as jitmla.fp8_mqa_logits returns them.

    q: [rows, heads, 128] e4m3; kv: (e4m3 [tokens, 128], float32 [tokens]); weights: float32 [rows, heads].
    """
    return ragged(q, kv[0], kv[1], weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits=clean_logits,
                  max_seqlen_k=max_seqlen_k)


def get_paged_mqa_logits_metadata(context_lens: Tensor, block_kv: int, num_sms: int) -> Tensor:
    """An empty tensor [num_sms + 1, 2] int32 that fp8_paged_mqa_logits does not look at: it divides the work itself, at
    each launch, so nothing of this is stale when lengths change."""
    return torch.empty((num_sms + 1, 2), dtype=torch.int32, device=context_lens.device)


def fp8_paged_mqa_logits(q: Tensor, fused_kv_cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
                         schedule_meta: Tensor | None, max_context_len: int, clean_logits: bool = False) -> Tensor:
    """Logits [requests * next_n, max_context_len] float32.

    q: [requests, next_n, heads, 128] e4m3, any next_n; fused_kv_cache: [pages, 64, 1, 132] bytes; context_lens:
    [requests] or [requests, next_n] int32. schedule_meta is not used. Cells behind a request's length are undefined:
    clean_logits must be False.
    """
    if clean_logits:
        raise InvalidArgument("clean_logits=True", supported="paged logits that are not cleaned",
                              differs="cleaning was asked for", remedy="jitmla.topk_indices looks at valid cells alone")
    requests, next_n, heads, dim = q.shape
    if next_n > NEXT_N:
        if context_lens.dim() == 1:
            draft = torch.arange(next_n, dtype=torch.int32, device=q.device)
            context_lens = (context_lens[:, None] - next_n + draft + 1).clamp_min(0)
        q = q.view(requests * next_n, 1, heads, dim)
        context_lens, block_table = context_lens.flatten(), block_table.repeat_interleave(next_n, 0)
    return paged(q, fused_kv_cache, weights, context_lens, block_table, max_context_len=max_context_len)
