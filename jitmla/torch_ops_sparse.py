"""`torch.ops.jitmla.*` of sparse MLA: what torch.compile and graph passes see.

    sparse_mla_decode, sparse_mla_prefill           functional: allocate and return (out, lse), (out, max_logits, lse)
    sparse_mla_decode_out, sparse_mla_prefill_out   write what their schemas declare as mutated

As in torch_ops.py: all call the front ends of eager code, which import this module; hence the late imports.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_INPUTS = ("Tensor q, Tensor {kv}, Tensor indices, Tensor? topk_length, Tensor? attn_sink, float sm_scale, str backend")
_DECODE, _PREFILL = _INPUTS.format(kv="k_cache"), _INPUTS.format(kv="kv")
LATENT = 512

_library = torch.library.Library("jitmla", "FRAGMENT")
_library.define(f"sparse_mla_decode({_DECODE}) -> (Tensor, Tensor)")
_library.define(f"sparse_mla_decode_out({_DECODE}, Tensor(a!) out, Tensor(b!) lse) -> ()")
_library.define(f"sparse_mla_prefill({_PREFILL}) -> (Tensor, Tensor, Tensor)")
_library.define(f"sparse_mla_prefill_out({_PREFILL}, Tensor(a!) out) -> (Tensor, Tensor)")


def _decode(q: Tensor, k_cache: Tensor, indices: Tensor, topk_length: Tensor | None, attn_sink: Tensor | None,
            sm_scale: float, backend: str) -> tuple[Tensor, Tensor]:
    from .ops.sparse_mla_decode import sparse_mla_decode
    return sparse_mla_decode(q, k_cache, indices, sm_scale=sm_scale, topk_length=topk_length, attn_sink=attn_sink,
                             return_lse=True, backend=backend)


def _decode_out(q: Tensor, k_cache: Tensor, indices: Tensor, topk_length: Tensor | None, attn_sink: Tensor | None,
                sm_scale: float, backend: str, out: Tensor, lse: Tensor) -> None:
    from .ops.sparse_mla_decode import sparse_mla_decode
    sparse_mla_decode(q, k_cache, indices, sm_scale=sm_scale, topk_length=topk_length, attn_sink=attn_sink, out=out,
                      lse=lse, backend=backend)


def _prefill(q: Tensor, kv: Tensor, indices: Tensor, topk_length: Tensor | None, attn_sink: Tensor | None,
             sm_scale: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    from .ops.sparse_mla_prefill import sparse_mla_prefill
    out, top, lse = sparse_mla_prefill(q, kv, indices, sm_scale=sm_scale, topk_length=topk_length,
                                       attn_sink=attn_sink, backend=backend)
    return out, top, lse


def _prefill_out(q: Tensor, kv: Tensor, indices: Tensor, topk_length: Tensor | None, attn_sink: Tensor | None,
                 sm_scale: float, backend: str, out: Tensor) -> tuple[Tensor, Tensor]:
    from .ops.sparse_mla_prefill import sparse_mla_prefill
    return sparse_mla_prefill(q, kv, indices, sm_scale=sm_scale, topk_length=topk_length, attn_sink=attn_sink, out=out,
                              backend=backend)[1:]


def _fake_decode(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], LATENT), q.new_empty(q.shape[:3], dtype=torch.float32).transpose(1, 2)


def _fake_prefill(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], LATENT), *_fake_prefill_out(q)


def _fake_prefill_out(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[:2], dtype=torch.float32), q.new_empty(q.shape[:2], dtype=torch.float32)


def _fake_decode_out(*_: Any) -> None:
    return None


for _name, _real, _fake in (("sparse_mla_decode", _decode, _fake_decode),
                            ("sparse_mla_decode_out", _decode_out, _fake_decode_out),
                            ("sparse_mla_prefill", _prefill, _fake_prefill),
                            ("sparse_mla_prefill_out", _prefill_out, _fake_prefill_out)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _real, _key)
    torch.library.register_fake(f"jitmla::{_name}", _fake, lib=_library)


def call_decode(q: Tensor, k_cache: Tensor, indices: Tensor, topk_length: Tensor | None, attn_sink: Tensor | None,
                sm_scale: Any, out: Tensor | None, lse: Tensor | None, return_lse: bool, backend: str) -> Any:
    """What jitmla.sparse_mla_decode does while torch.compile traces it."""
    inputs = (q, k_cache, indices, topk_length, attn_sink, sm_scale, backend)
    if out is None and lse is None:
        out, lse = torch.ops.jitmla.sparse_mla_decode(*inputs)
    else:
        like = _fake_decode(q)
        out, lse = like[0] if out is None else out, like[1] if lse is None else lse
        torch.ops.jitmla.sparse_mla_decode_out(*inputs, out, lse)
    return (out, lse) if return_lse else out


def call_prefill(q: Tensor, kv: Tensor, indices: Tensor, topk_length: Tensor | None, attn_sink: Tensor | None,
                 sm_scale: Any, out: Tensor | None, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """What jitmla.sparse_mla_prefill does while torch.compile traces it."""
    inputs = (q, kv, indices, topk_length, attn_sink, sm_scale, backend)
    if out is None:
        return torch.ops.jitmla.sparse_mla_prefill(*inputs)
    return out, *torch.ops.jitmla.sparse_mla_prefill_out(*inputs, out)
