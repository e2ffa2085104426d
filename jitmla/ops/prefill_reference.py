"""The prefill ops in plain PyTorch: their definition in readable lines, and what runs where there is no GPU.

Computed in float32 and rounded once. These read lengths on the host, so they cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mla_prefill(q: Tensor, k: Tensor, k_pe: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
                sm_scale: float, causal: bool, out: Tensor, lse: Tensor) -> None:
    """Writes the rows of the requests in `out` and `lse`. See jitmla.mla_prefill.

    k: [keys, heads, D], or its first columns with the others in k_pe [keys, heads or 1, ...]."""
    if k_pe is not k:
        k = torch.cat([k, k_pe.expand(-1, k.shape[1], -1)], -1)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        logits = sm_scale * torch.einsum("ihd,jhd->hij", q[q0:q1].float(), k[k0:k1].float())
        if causal:
            last = torch.arange(q1 - q0, device=q.device) + (k1 - k0) - (q1 - q0)  # token i sees keys 0 .. last[i]
            logits = logits.masked_fill(torch.arange(k1 - k0, device=q.device) > last[:, None], float("-inf"))
        row_lse = torch.logsumexp(logits, -1)  # -inf where nothing is seen
        weights = torch.exp(logits - row_lse[..., None].clamp_min(torch.finfo(torch.float32).min))
        out[q0:q1].copy_(torch.einsum("hij,jhd->ihd", weights, v[k0:k1].float()))
        lse[q0:q1].copy_(row_lse.t())


def merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor, lse: Tensor) -> None:
    """Writes out [tokens, heads, v_dim] and lse [tokens, heads]. See jitmla.merge_attn_states."""
    none = torch.tensor(float("-inf"), device=lse_a.device)
    a, b = (torch.where(x == float("inf"), none, x.float()) for x in (lse_a, lse_b))
    total = torch.logaddexp(a, b)  # -inf where both are
    weights = [torch.exp(x - total.clamp_min(torch.finfo(torch.float32).min))[..., None] for x in (a, b)]
    # a state without keys may hold anything
    parts = [torch.where(w > 0, w * x.float(), 0.0) for w, x in zip(weights, (out_a, out_b), strict=True)]
    out.copy_(parts[0] + parts[1])
    lse.copy_(total)


def gather_latent(kv_cache: Tensor, block_table: Tensor, starts: Tensor, cu_rows: Tensor, *, out: Tensor) -> None:
    """Writes the first cu_rows[-1] rows of out [rows, width]. See jitmla.gather_latent."""
    page_size = kv_cache.shape[1]
    bounds = cu_rows.tolist()
    for b, (start, row0, row1) in enumerate(zip(starts.tolist(), bounds, bounds[1:], strict=False)):
        position = start + torch.arange(row1 - row0, device=out.device)
        out[row0:row1] = kv_cache[block_table[b].long()[position // page_size], position % page_size]
