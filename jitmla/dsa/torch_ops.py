"""The ops of a DSA layer: `torch.ops.jitmla.*`. T is the padded number of tokens of a pass.

    mla_dsa_proj            q [T, heads * 192] bf16; compressed_kv [T, 512], k_pe [T, 64], latent_cache [T, 576] bf16;
                            q_fp8 [T, index_heads, 128], k_fp8 [T, 128] e4m3; k_scale [T, 1], weights [T, index_heads]
                            float32
    mla_proj                the first four, for a layer that takes the top-k of the layer before
    mla_dsa_attn_inplace    writes output [T, heads * v_head_dim]; in the caches and batch.topk it writes what no graph
                            sees

layer_key names a jitmla.dsa.Layer; the batch is that of jitmla.dsa.forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import attend as _attend
from . import batch, project
from .layer import layer_of

_library = torch.library.Library("jitmla", "FRAGMENT")
_INPUTS = "Tensor hidden, Tensor? position_ids, str layer_key"
_library.define(f"mla_dsa_proj({_INPUTS}) -> ({', '.join(['Tensor'] * 8)})")
_library.define(f"mla_proj({_INPUTS}) -> ({', '.join(['Tensor'] * 4)})")
_library.define("mla_dsa_attn_inplace(Tensor q, Tensor compressed_kv, Tensor k_pe, Tensor latent_cache, "
                "Tensor[] indexer_intermediates, Tensor? position_ids, str layer_key, Tensor(a!) output) -> ()")


def _proj(hidden: Tensor, position_ids: Tensor | None, layer_key: str) -> tuple[Tensor, ...]:
    return project.project(layer_of(layer_key), hidden, position_ids)


def _attn(q: Tensor, compressed_kv: Tensor, k_pe: Tensor, latent_cache: Tensor, indexer_intermediates: list[Tensor],
          position_ids: Tensor | None, layer_key: str, output: Tensor) -> None:
    _attend.attend(layer_of(layer_key), batch.current(), q, compressed_kv, k_pe, indexer_intermediates, position_ids,
                   output)


def _fake_plain(hidden: Tensor, position_ids: Tensor | None, layer_key: str) -> tuple[Tensor, ...]:
    c, tokens = layer_of(layer_key).config, hidden.shape[0]
    widths = c.heads * c.qk_head_dim, c.kv_lora_rank, c.qk_rope_head_dim, c.kv_lora_rank + c.qk_rope_head_dim
    return tuple(hidden.new_empty(tokens, width) for width in widths)


def _fake_proj(hidden: Tensor, position_ids: Tensor | None, layer_key: str) -> tuple[Tensor, ...]:
    c, tokens = layer_of(layer_key).config, hidden.shape[0]
    return (*_fake_plain(hidden, position_ids, layer_key),
            hidden.new_empty(tokens, c.index_heads, 128, dtype=torch.float8_e4m3fn),
            hidden.new_empty(tokens, 128, dtype=torch.float8_e4m3fn), hidden.new_empty(tokens, 1, dtype=torch.float32),
            hidden.new_empty(tokens, c.index_heads, dtype=torch.float32))


def _fake_attn(*_: Any) -> None:
    return None


for _name, _real, _fake in (("mla_dsa_proj", _proj, _fake_proj), ("mla_proj", _proj, _fake_plain),
                            ("mla_dsa_attn_inplace", _attn, _fake_attn)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _real, _key)
    torch.library.register_fake(f"jitmla::{_name}", _fake, lib=_library)
