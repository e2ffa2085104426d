"""Op 1: everything of a DSA layer that treats tokens one by one. No batch, no cache, no host read, no state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import jitmla

from .layer import Layer


def project(layer: Layer, hidden: Tensor, position_ids: Tensor | None) -> tuple[Tensor, ...]:
    """(q, compressed_kv, k_pe, latent_cache), and with an indexer (q_fp8, k_fp8, k_scale, weights):
    jitmla.dsa.torch_ops has their shapes. All tokens are processed, padded ones too. No result shares memory with
    another tensor."""
    c, w = layer.config, layer.weights
    down = F.linear(hidden, w.kv_a_proj)
    rank = c.q_lora_rank or 0
    q_lora, latent, k_pe = down.split([rank, c.kv_lora_rank, c.qk_rope_head_dim], -1)
    base = hidden if w.q_a_norm is None else F.rms_norm(q_lora, (rank,), w.q_a_norm, c.eps)
    q = F.linear(base, w.q_proj)
    compressed = F.rms_norm(latent, (c.kv_lora_rank,), w.kv_a_norm, c.eps)
    k_pe = k_pe.clone(memory_format=torch.contiguous_format)
    found = q, compressed, k_pe, torch.cat([compressed, k_pe], -1)
    if not layer.has_indexer:
        return found
    tokens = hidden.shape[0]
    if position_ids is None:
        position_ids = torch.arange(tokens, device=hidden.device)
    index_q = F.linear(base, w.index_q_proj).view(tokens, c.index_heads, 128)
    key, weight = F.linear(hidden, w.index_kw_proj).split([128, c.index_heads], -1)
    return *found, *jitmla.indexer_prologue(
        index_q, key, weight, w.index_k_norm, w.index_k_bias, position_ids, layer.cos_sin,
        rope_interleave=c.index_rope_interleave, hadamard=c.hadamard, eps=c.eps, backend=c.backend)
