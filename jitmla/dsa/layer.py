"""The static half of a DSA layer: sizes, weights and caches, and where the ops find them by key."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import InvalidArgument

_layers: weakref.WeakValueDictionary[str, Layer] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Config:
    """Sizes and constants of a layer; names and defaults are those of DeepSeek-V3.2. heads: of this rank."""

    heads: int
    sm_scale: float  # of q . k, YaRN's factor included: 0.1352 for DeepSeek-V3.2
    q_lora_rank: int | None = 1536  # None: q comes straight from the hidden states
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_heads: int = 64
    index_topk: int = 2048
    index_rope_interleave: bool = False  # pairs (2 i, 2 i + 1) in the indexer too, as the first published code had it
    hadamard: bool = False  # a transform of the indexer's rows: part of the format of its cache
    eps: float = 1e-6
    llama_4_scaling: tuple[float, int] | None = None  # (beta, original maximum position) of q's factor
    max_logits_bytes: int = 512 * 2**20  # of the logits of context tokens at once
    debug: bool = False  # check block tables and slots on the host; not while a graph is captured
    backend: str = "auto"

    def __post_init__(self) -> None:
        if (self.kv_lora_rank, self.qk_rope_head_dim) != (512, 64):
            raise InvalidArgument(f"kv_lora_rank={self.kv_lora_rank}, qk_rope_head_dim={self.qk_rope_head_dim}",
                                  supported="512 and 64", differs="rows of the cache have these sizes",
                                  remedy="models of other widths are not served by jitmla.dsa")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise InvalidArgument(f"q_lora_rank={self.q_lora_rank}", supported="a rank, or None where q has none",
                                  differs="it is neither", remedy="take it from the model's config.json")

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class Weights:
    """Matrices [out, in] in the dtype of the hidden states (bf16). w_uk and w_uv are the two halves of kv_b_proj by
    head.

    kv_a_proj: [q_lora_rank + 512 + 64, hidden], without the first rows where there is no q_lora. q_proj: [heads * 192,
    q_lora_rank or hidden]. w_uk: [heads, 128, 512]. w_uv: [heads, 512, v_head_dim]. index_q_proj: [index_heads * 128,
    q_lora_rank or hidden] and index_kw_proj: [128 + index_heads, hidden] (keys, then weights), with a layer norm of the
    keys; None in a layer that takes the top-k of the layer before.
    """

    kv_a_proj: Tensor
    kv_a_norm: Tensor
    q_proj: Tensor
    w_uk: Tensor
    w_uv: Tensor
    q_a_norm: Tensor | None = None
    index_q_proj: Tensor | None = None
    index_kw_proj: Tensor | None = None
    index_k_norm: Tensor | None = None
    index_k_bias: Tensor | None = None

    def __post_init__(self) -> None:
        indexer = (self.index_q_proj, self.index_kw_proj, self.index_k_norm, self.index_k_bias)
        if len({x is None for x in indexer}) != 1:
            raise InvalidArgument("a part of an indexer", supported="index_q_proj, index_kw_proj, index_k_norm and "
                                  "index_k_bias, or none of them", differs="some are missing",
                                  remedy="give all four, or none where the layer before has selected")


@dataclass(eq=False)
class Layer:
    """A layer that the ops find under `key` for as long as somebody holds it.

    cos_sin: [positions, 64] float32, 32 cosines and 32 sines. kv_cache: [pages, page_size, 1, 656] bytes or [..., 576]
    bf16. index_cache: [pages, 64, 1, 132] uint8, None in a layer without an indexer.
    """

    key: str
    config: Config
    weights: Weights
    cos_sin: Tensor
    kv_cache: Tensor
    index_cache: Tensor | None = None
    has_indexer: bool = field(init=False)

    def __post_init__(self) -> None:
        self.has_indexer = self.weights.index_q_proj is not None
        if self.has_indexer and self.index_cache is None:
            raise InvalidArgument(f"layer {self.key!r} without index_cache", supported="a cache for its indexer",
                                  differs="its weights have an indexer",
                                  remedy="allocate one: uint8 [pages, 64, 1, 132]")
        if (self.weights.q_a_norm is None) != (self.config.q_lora_rank is None):
            raise InvalidArgument(f"layer {self.key!r}: q_lora_rank={self.config.q_lora_rank}",
                                  supported="q_a_norm where there is a q_lora_rank, and only there",
                                  differs=f"q_a_norm is {'missing' if self.weights.q_a_norm is None else 'given'}",
                                  remedy="take both from the model, whose q_lora_rank may be null")
        if self.key in _layers:
            raise InvalidArgument(f"layer {self.key!r}", supported="one layer for each key", differs="there is one",
                                  remedy="drop the other one first, or name this one otherwise")
        _layers[self.key] = self


def layer_of(key: str) -> Layer:
    """The layer of that key; raises InvalidArgument."""
    layer = _layers.get(key)
    if layer is None:
        raise InvalidArgument(f"layer_key={key!r}", supported=", ".join(sorted(_layers)) or "no layer is there",
                              differs="there is no such layer", remedy="make a jitmla.dsa.Layer and keep it")
    return layer
