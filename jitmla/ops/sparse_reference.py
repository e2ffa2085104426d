"""Sparse MLA in plain PyTorch: its definition in readable lines, and what runs where there is no GPU."""

from __future__ import annotations

import torch
from torch import Tensor

LATENT, TILE, TILES, ROPE_AT = 512, 128, 4, 528
TOKENS_AT_ONCE = 64


def unpack_rows(rows: Tensor) -> Tensor:
    """Rows of 656 bytes, [n, 656] of any 1-byte dtype, as float32 [n, 576]: values times scales, then the rope
    columns."""
    rows = rows.contiguous().view(torch.uint8)
    values = rows[:, :LATENT].contiguous().view(torch.float8_e4m3fn).float().view(-1, TILES, TILE)
    scales = rows[:, LATENT:ROPE_AT].contiguous().view(torch.float32)
    rope = rows[:, ROPE_AT:].contiguous().view(torch.bfloat16).float()
    return torch.cat([(values * scales[..., None]).flatten(1), rope], 1)


def rows_at(kv: Tensor, index: Tensor) -> Tensor:
    """Rows of a pool [pages, page_size, 1, row] by number, in float32."""
    rows = kv[index // kv.shape[1], index % kv.shape[1], 0]
    return rows.float() if kv.dtype == torch.bfloat16 else unpack_rows(rows)


def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, *, sm_scale: float, topk_length: Tensor | None,
               attn_sink: Tensor | None, out: Tensor, lse: Tensor, max_logits: Tensor | None = None) -> None:
    """Writes out [batch, s_q, heads, 512], lse and max_logits [batch, heads, s_q]. See jitmla.sparse_mla_decode.

    No host read: it can be traced, and captured on a GPU. Invalid entries read row 0 and have no weight.
    """
    s_q, topk = indices.shape[1:]
    rows, tokens = kv.shape[0] * kv.shape[1], q.shape[0] * s_q
    flat, results = indices.reshape(tokens, topk), []
    queries = q.reshape(tokens, *q.shape[2:])
    for first in range(0, tokens, TOKENS_AT_ONCE):
        token = torch.arange(first, min(first + TOKENS_AT_ONCE, tokens), device=q.device)
        index = flat[token].long()
        valid = (index >= 0) & (index < rows)
        if topk_length is not None:
            valid &= torch.arange(topk, device=q.device) < topk_length[token // s_q, None]
        found = rows_at(kv, index.where(valid, 0).flatten()) if rows else kv.new_zeros(index.numel(), q.shape[-1],
                                                                                       dtype=torch.float32)
        keys = found.view(*index.shape, q.shape[-1]).masked_fill(~valid[..., None], 0.0)
        logits = sm_scale * torch.einsum("thd,tkd->thk", queries[token].float(), keys)
        logits = logits.masked_fill(~valid[:, None], float("-inf"))
        row_lse = torch.logsumexp(logits, -1)  # -inf where nothing is valid
        total = row_lse if attn_sink is None else torch.logaddexp(row_lse, attn_sink.expand_as(row_lse))
        weights = torch.exp(logits - total[..., None].clamp_min(torch.finfo(torch.float32).min))
        values = torch.einsum("thk,tkd->thd", weights, keys[..., :LATENT])
        top = logits.amax(-1) if topk else row_lse
        results.append((values, row_lse.masked_fill(row_lse == float("-inf"), float("inf")), top))
    if not results:
        return
    values, row_lse, top = (torch.cat(parts) for parts in zip(*results, strict=True))
    out.copy_(values.view(out.shape))
    by_head = (*q.shape[:3],)
    lse.copy_(row_lse.view(by_head).transpose(1, 2))
    if max_logits is not None:
        max_logits.copy_(top.view(by_head).transpose(1, 2))
