"""`torch.ops.jitmla.*` of the ops that write the cache: what torch.compile and graph passes see.

    append_latent               writes rows of kv_cache
    cached_mla                  writes rows of kv_cache; allocates and returns the output
    cached_mla_out              writes rows of kv_cache, and out
    cached_mla_with_cache[_out] the same under AutoDeploy's signature: counts in a tensor on the host

Their schemas declare what they write. As in torch_ops.py: all call the front ends of eager code, which import this
module; hence the late imports.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_APPEND = "Tensor latent, Tensor k_pe, Tensor(a!) kv_cache, Tensor slots, Tensor? kv_scale, str backend"
_INPUTS = "Tensor q_nope, Tensor q_pe, Tensor latent, Tensor k_pe, Tensor kv_b_proj_weight, "
_CACHED = (_INPUTS + "Tensor(a!) kv_cache, Tensor seq_len, Tensor input_pos, Tensor slot_idx, Tensor cu_seqlen, "
           "SymInt num_prefill, SymInt prefill_tokens, SymInt num_decode, float sm_scale, Tensor? kv_scale, "
           "SymInt? max_prefix, str form, str backend")
_AUTODEPLOY = ("Tensor q_nope, Tensor q_pe, Tensor compressed_kv, Tensor kpe, Tensor kv_b_proj_weight, "
               "Tensor batch_info_host, Tensor seq_len, Tensor input_pos, Tensor slot_idx, Tensor cu_seqlen, "
               "Tensor(a!) mla_cache, float? scale=None, int kv_lora_rank=512")

_library = torch.library.Library("jitmla", "FRAGMENT")
_library.define(f"append_latent({_APPEND}) -> ()")
_library.define(f"cached_mla({_CACHED}) -> Tensor")
_library.define(f"cached_mla_out({_CACHED}, Tensor(b!) out) -> ()")
_library.define(f"cached_mla_with_cache({_AUTODEPLOY}) -> Tensor")
_library.define(f"cached_mla_with_cache_out({_AUTODEPLOY}, *, Tensor(b!) out) -> ()")


def _append_latent(latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slots: Tensor, kv_scale: Tensor | None,
                   backend: str) -> None:
    from .ops.append_latent import append_latent
    append_latent(latent, k_pe, kv_cache, slots, kv_scale=kv_scale, backend=backend)


def _cached_mla(q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, weight: Tensor, kv_cache: Tensor,
                seq_len: Tensor, input_pos: Tensor, slot_idx: Tensor, cu_seqlen: Tensor, num_prefill: int,
                prefill_tokens: int, num_decode: int, sm_scale: float, kv_scale: Tensor | None,
                max_prefix: int | None, form: str, backend: str, out: Tensor | None = None) -> Tensor:
    from .ops.cached_mla import cached_mla
    return cached_mla(q_nope, q_pe, latent, k_pe, weight, kv_cache, seq_len=seq_len, input_pos=input_pos,
                      slot_idx=slot_idx, cu_seqlen=cu_seqlen, num_prefill=num_prefill, prefill_tokens=prefill_tokens,
                      num_decode=num_decode, sm_scale=sm_scale, out=out, kv_scale=kv_scale, max_prefix=max_prefix,
                      form=form, backend=backend)


def _cached_mla_out(*args: Any) -> None:
    _cached_mla(*args)


def _with_cache(*args: Any, **options: Any) -> Tensor:
    from .compat.trtllm import eager
    return eager(*args, **options)


def _with_cache_out(*args: Any, **options: Any) -> None:
    _with_cache(*args, **options)


def _fake(q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    batch, s, heads, nope = q_nope.shape
    return q_nope.new_empty(batch, s, heads, weight.shape[0] // heads - nope)


def _fake_nothing(*_: Any, **__: Any) -> None:
    return None


for _name, _real, _faked in (("append_latent", _append_latent, _fake_nothing), ("cached_mla", _cached_mla, _fake),
                             ("cached_mla_out", _cached_mla_out, _fake_nothing),
                             ("cached_mla_with_cache", _with_cache, _fake),
                             ("cached_mla_with_cache_out", _with_cache_out, _fake_nothing)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _real, _key)
    torch.library.register_fake(f"jitmla::{_name}", _faked, lib=_library)


def call_append_latent(*args: Any) -> None:
    """What jitmla.append_latent does while torch.compile traces it."""
    torch.ops.jitmla.append_latent(*args)


def call_cached_mla(q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, weight: Tensor, kv_cache: Tensor,
                    seq_len: Tensor, input_pos: Tensor, slot_idx: Tensor, cu_seqlen: Tensor, num_prefill: int,
                    prefill_tokens: int, num_decode: int, sm_scale: float, kv_scale: Tensor | None,
                    max_prefix: int | None, form: str, out: Tensor | None, backend: str) -> Tensor:
    """What jitmla.cached_mla does while torch.compile traces it."""
    args = (q_nope, q_pe, latent, k_pe, weight, kv_cache, seq_len, input_pos, slot_idx, cu_seqlen, num_prefill,
            prefill_tokens, num_decode, sm_scale, kv_scale, max_prefix, form, backend)
    if out is None:
        return torch.ops.jitmla.cached_mla(*args)
    torch.ops.jitmla.cached_mla_out(*args, out)
    return out
