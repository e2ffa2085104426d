"""`torch.ops.jitmla.*` of prefill: what torch.compile and graph passes see.

    mla_prefill, merge_attn_states                           functional: allocate and return
    mla_prefill_out, merge_attn_states_out, gather_latent_out    write what their schemas declare as mutated

As in torch_ops.py: all call the front ends of eager code, which import this module; hence the late imports. Ops that
are made of these (mla_prefill_absorbed, mla_prefill_cached) are traced through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PREFILL = ("Tensor q, Tensor k, Tensor? k_pe, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
            "SymInt max_seqlen_q, SymInt max_seqlen_k, float sm_scale, bool causal, str backend")
_MERGE = "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str backend"

_library = torch.library.Library("jitmla", "FRAGMENT")
_library.define(f"mla_prefill({_PREFILL}) -> (Tensor, Tensor)")
_library.define(f"mla_prefill_out({_PREFILL}, Tensor(a!) out, Tensor(b!) lse) -> ()")
_library.define(f"merge_attn_states({_MERGE}) -> (Tensor, Tensor)")
_library.define(f"merge_attn_states_out({_MERGE}, Tensor(a!) out, Tensor(b!) lse) -> ()")
_library.define("gather_latent_out(Tensor kv_cache, Tensor block_table, Tensor starts, Tensor cu_rows, str backend, "
                "Tensor(a!) out) -> ()")


def _prefill(q: Tensor, k: Tensor, k_pe: Tensor | None, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
             max_seqlen_q: int, max_seqlen_k: int, sm_scale: float, causal: bool, backend: str
             ) -> tuple[Tensor, Tensor]:
    from .ops.mla_prefill import mla_prefill
    return mla_prefill(q, k if k_pe is None else (k, k_pe), v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_seqlen_q,
                       max_seqlen_k=max_seqlen_k, sm_scale=sm_scale, causal=causal, return_lse=True, backend=backend)


def _prefill_out(q: Tensor, k: Tensor, k_pe: Tensor | None, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                 max_seqlen_q: int, max_seqlen_k: int, sm_scale: float, causal: bool, backend: str, out: Tensor,
                 lse: Tensor) -> None:
    from .ops.mla_prefill import mla_prefill
    mla_prefill(q, k if k_pe is None else (k, k_pe), v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k, sm_scale=sm_scale, causal=causal, out=out, lse=lse, backend=backend)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    from .ops.merge_attn_states import merge_attn_states
    return merge_attn_states(out_a, lse_a, out_b, lse_b, backend=backend)


def _merge_out(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str, out: Tensor, lse: Tensor
               ) -> None:
    from .ops.merge_attn_states import merge_attn_states
    merge_attn_states(out_a, lse_a, out_b, lse_b, out=out, lse=lse, backend=backend)


def _gather_out(kv_cache: Tensor, block_table: Tensor, starts: Tensor, cu_rows: Tensor, backend: str, out: Tensor
                ) -> None:
    from .ops.gather_latent import gather_latent
    gather_latent(kv_cache, block_table, starts, cu_rows, out=out, backend=backend)


def _fake_prefill(q: Tensor, k: Tensor, k_pe: Tensor | None, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                  max_seqlen_q: int, max_seqlen_k: int, sm_scale: float, causal: bool, backend: str
                  ) -> tuple[Tensor, Tensor]:
    return (q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
            q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32).t())


def _fake_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), torch.empty_like(lse_a)


def _fake_out(*_: Any) -> None:
    return None


for _name, _real, _fake in (("mla_prefill", _prefill, _fake_prefill), ("mla_prefill_out", _prefill_out, _fake_out),
                            ("merge_attn_states", _merge, _fake_merge),
                            ("merge_attn_states_out", _merge_out, _fake_out),
                            ("gather_latent_out", _gather_out, _fake_out)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _real, _key)
    torch.library.register_fake(f"jitmla::{_name}", _fake, lib=_library)


def call_mla_prefill(q: Tensor, k: Any, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                     max_seqlen_k: int, sm_scale: Any, causal: bool, out: Tensor | None, lse: Tensor | None,
                     return_lse: bool, backend: str) -> Any:
    """What jitmla.mla_prefill does while torch.compile traces it."""
    k_nope, k_pe = k if isinstance(k, (tuple, list)) else (k, None)
    inputs = (q, k_nope, k_pe, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale, causal, backend)
    if out is None and lse is None:
        out, lse = torch.ops.jitmla.mla_prefill(*inputs)
    else:
        like = _fake_prefill(*inputs)
        out, lse = like[0] if out is None else out, like[1] if lse is None else lse
        torch.ops.jitmla.mla_prefill_out(*inputs, out, lse)
    return (out, lse) if return_lse else out


def call_merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor | None,
                           lse: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """What jitmla.merge_attn_states does while torch.compile traces it."""
    inputs = (out_a, lse_a, out_b, lse_b, backend)
    if out is None and lse is None:
        return torch.ops.jitmla.merge_attn_states(*inputs)
    like = _fake_merge(*inputs)
    out, lse = like[0] if out is None else out, like[1] if lse is None else lse
    torch.ops.jitmla.merge_attn_states_out(*inputs, out, lse)
    return out, lse


def call_gather_latent(kv_cache: Tensor, block_table: Tensor, starts: Tensor, cu_rows: Tensor, out: Tensor,
                       backend: str) -> Tensor:
    """What jitmla.gather_latent does while torch.compile traces it."""
    torch.ops.jitmla.gather_latent_out(kv_cache, block_table, starts, cu_rows, backend, out)
    return out
