"""append_latent and cached_mla in plain PyTorch: their definition in readable lines, and what runs without a GPU.

Computed in float32 and rounded once. cached_mla reads its metadata on the host: it cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0


def append_latent(latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slots: Tensor, kv_scale: Tensor | None) -> None:
    """Writes rows of `kv_cache`. See jitmla.append_latent."""
    pages, page_size, _ = kv_cache.shape
    written = (slots >= 0) & (slots < pages * page_size)
    rows = as_stored(torch.cat([latent, k_pe], -1)[written], kv_scale)
    where = slots[written].long()
    if kv_scale is not None:  # torch cannot assign e4m3 to places
        rows, kv_cache = rows.view(torch.uint8), kv_cache.view(torch.uint8)
    kv_cache[where // page_size, where % page_size] = rows


def as_stored(rows: Tensor, kv_scale: Tensor | None) -> Tensor:
    """What a cache has of these rows."""
    if kv_scale is None:
        return rows
    return (rows.float() / kv_scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def cached_mla(q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, weight: Tensor, kv_cache: Tensor, *,
               seq_len: Tensor, input_pos: Tensor, slot_idx: Tensor, start: Tensor, sequences: int, sm_scale: float,
               out: Tensor, kv_scale: Tensor | None = None) -> None:
    """Writes `out` and rows of `kv_cache`; all but the latter two with tokens in front. See jitmla.cached_mla."""
    tokens, heads, nope = q_nope.shape
    rank = latent.shape[1]
    w = weight.float().view(heads, -1, rank)
    w_k, w_v = w[:, :nope], w[:, nope:]
    out.zero_()
    metadata = torch.stack([x[:sequences] for x in (seq_len, input_pos, slot_idx, start)]).tolist()
    for length, position, slot, begin in zip(*metadata, strict=True):
        length = min(length, kv_cache.shape[1] - position, tokens - begin)
        if length <= 0 or position < 0 or not 0 <= slot < kv_cache.shape[0]:
            continue
        new, end = slice(begin, begin + length), position + length
        kv_cache[slot, position:end] = as_stored(torch.cat([latent[new], k_pe[new]], -1), kv_scale)
        rows = kv_cache[slot, :end].float() * (1.0 if kv_scale is None else kv_scale)
        q = torch.cat([torch.einsum("thp,hpr->thr", q_nope[new].float(), w_k), q_pe[new].float()], -1)
        logits = sm_scale * torch.einsum("thd,kd->thk", q, rows)
        seen = torch.arange(end, device=q.device) <= position + torch.arange(length, device=q.device)[:, None]
        weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
        out[new] = torch.einsum("thk,kr,hvr->thv", weights, rows[:, :rank], w_v).to(out.dtype)
