"""The ops in plain PyTorch: their definition in readable lines, and what runs where there is no GPU.

Computed in float32 and rounded once. These read lengths on the host, so they cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


def latent_rows(kv_cache: Tensor, block_table: Tensor, length: int) -> Tensor:
    """The first `length` rows of one request, [length, width], gathered through its row of the block table."""
    page_size = kv_cache.shape[1]
    pages = block_table[: -(-length // page_size)].long()
    return kv_cache[pages].flatten(0, 1)[:length]


def mla_decode(q_nope: Tensor, q_pe: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *,
               sm_scale: float, causal: bool, sinks: Tensor | None, out: Tensor, lse: Tensor,
               cu_seqlens_q: Tensor | None = None, q_descale: Tensor | float = 1.0,
               kv_descale: Tensor | float = 1.0) -> None:
    """Writes `out` [batch, s_q, heads, kv_lora_rank] and `lse` [batch, s_q, heads], or with cu_seqlens_q
    [tokens, heads, ...]. See jitmla.mla_decode."""
    kv_lora_rank = q_nope.shape[-1]
    q = torch.cat([q_nope.float(), q_pe.float()], -1) * q_descale
    starts = None if cu_seqlens_q is None else cu_seqlens_q.tolist()
    for b, length in enumerate(seq_lens.tolist()):
        mine = b if starts is None else slice(starts[b], starts[b + 1])  # its query tokens
        s_q = q[mine].shape[0]
        rows = latent_rows(kv_cache, block_table[b], length).float() * kv_descale
        logits = sm_scale * torch.einsum("ihd,kd->ihk", q[mine], rows)
        if causal:
            last = length - s_q + torch.arange(s_q, device=q.device)  # token i sees keys 0 .. last[i]
            hidden = torch.arange(length, device=q.device) > last[:, None]
            logits = logits.masked_fill(hidden[:, None, :], float("-inf"))
        row_lse = torch.logsumexp(logits, -1)  # -inf where nothing is seen
        # a sink is one more key with a zero value: it takes part in the sum of the weights, not in lse
        total = row_lse if sinks is None else torch.logaddexp(row_lse, sinks.expand_as(row_lse))
        weights = torch.exp(logits - total[..., None].clamp_min(torch.finfo(torch.float32).min))
        out[mine].copy_(torch.einsum("ihk,kd->ihd", weights, rows[:, :kv_lora_rank]))
        lse[mine].copy_(row_lse)
