"""`torch.ops.jitmla.*`: what torch.compile and graph passes see. Importing this module registers the ops.

    mla_decode      functional: allocates and returns (out, lse)
    mla_decode_out  writes out and lse, which its schema declares as mutated

Both call the same front end as eager code; the fakes state shapes and dtypes only. The front end imports this module,
so that the ops exist wherever it does; hence the late imports of the front end here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_INPUTS = ("Tensor q, Tensor? q_pe, Tensor kv_cache, Tensor block_table, Tensor seq_lens, Tensor? sinks, "
           "int kv_lora_rank, float sm_scale, bool causal, str backend")

_FEATURES = ("Tensor? kpe_cache=None, Tensor? cu_seqlens_q=None, SymInt? max_q_len=None, Tensor? q_descale=None, "
             "Tensor? kv_descale=None, float? q_scale=None, float? kv_scale=None, bool batch_invariant=False")

_library = torch.library.Library("jitmla", "DEF")
_library.define(f"mla_decode({_INPUTS}, {_FEATURES}) -> (Tensor, Tensor)")
_library.define(f"mla_decode_out({_INPUTS}, Tensor(a!) out, Tensor(b!) lse, {_FEATURES}) -> ()")


def _mla_decode(q: Tensor, q_pe: Tensor | None, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
                sinks: Tensor | None, kv_lora_rank: int, sm_scale: float, causal: bool, backend: str, *features: Any
                ) -> tuple[Tensor, Tensor]:
    from .ops.mla_decode import mla_decode
    cache, named = _named(kv_cache, *features)
    return mla_decode(q if q_pe is None else (q, q_pe), cache, block_table, seq_lens, kv_lora_rank=kv_lora_rank,
                      sm_scale=sm_scale, causal=causal, sinks=sinks, return_lse=True, backend=backend, **named)


def _named(kv_cache: Tensor, kpe_cache: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
           max_q_len: int | None = None, q_descale: Tensor | None = None,
           kv_descale: Tensor | None = None, q_scale: float | None = None, kv_scale: float | None = None,
           batch_invariant: bool = False) -> tuple[Any, dict[str, Any]]:
    """(the cache as mla_decode takes it, keyword arguments)."""
    named = {"cu_seqlens_q": cu_seqlens_q, "max_q_len": max_q_len, "batch_invariant": batch_invariant,
             "q_descale": q_scale if q_descale is None else q_descale,
             "kv_descale": kv_scale if kv_descale is None else kv_descale}
    return kv_cache if kpe_cache is None else (kv_cache, kpe_cache), named


def _mla_decode_out(q: Tensor, q_pe: Tensor | None, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
                    sinks: Tensor | None, kv_lora_rank: int, sm_scale: float, causal: bool, backend: str, out: Tensor,
                    lse: Tensor, *features: Any) -> None:
    from .ops.mla_decode import mla_decode
    cache, named = _named(kv_cache, *features)
    mla_decode(q if q_pe is None else (q, q_pe), cache, block_table, seq_lens, kv_lora_rank=kv_lora_rank,
               sm_scale=sm_scale, causal=causal, sinks=sinks, out=out, lse=lse, backend=backend, **named)


def _fake_mla_decode(q: Tensor, q_pe: Tensor | None, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
                     sinks: Tensor | None, kv_lora_rank: int, sm_scale: float, causal: bool, backend: str,
                     *_: Any) -> tuple[Tensor, Tensor]:
    return _new_out(q, kv_lora_rank), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _new_out(q: Tensor, kv_lora_rank: int) -> Tensor:
    dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    return q.new_empty((*q.shape[:-1], kv_lora_rank), dtype=dtype)


def _fake_mla_decode_out(*_: Any) -> None:
    return None


for _key in ("CPU", "CUDA"):
    _library.impl("mla_decode", _mla_decode, _key)
    _library.impl("mla_decode_out", _mla_decode_out, _key)
torch.library.register_fake("jitmla::mla_decode", _fake_mla_decode, lib=_library)
torch.library.register_fake("jitmla::mla_decode_out", _fake_mla_decode_out, lib=_library)


def call_mla_decode(q: Any, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, kv_lora_rank: int, sm_scale: Any,
                    causal: bool, sinks: Tensor | None, out: Tensor | None, lse: Tensor | None, return_lse: bool,
                    backend: str, features: Any) -> Any:
    """What jitmla.mla_decode does while torch.compile traces it."""
    q_nope, q_pe = q if isinstance(q, (tuple, list)) else (q, None)
    kv_cache, kpe_cache = kv_cache if isinstance(kv_cache, (tuple, list)) else (kv_cache, None)
    inputs = (q_nope, q_pe, kv_cache, block_table, seq_lens, sinks, kv_lora_rank, sm_scale, causal, backend)
    tensors = [x if isinstance(x, Tensor) else None for x in (features.q_descale, features.kv_descale)]
    numbers = [None if isinstance(x, Tensor) else x for x in (features.q_descale, features.kv_descale)]
    more = (kpe_cache, features.cu_seqlens_q, features.max_q_len, *tensors, *numbers, features.batch_invariant)
    if out is None and lse is None:
        out, lse = torch.ops.jitmla.mla_decode(*inputs, *more)
    else:
        if out is None:
            out = _new_out(q_nope, kv_lora_rank)
        if lse is None:
            lse = q_nope.new_empty(q_nope.shape[:-1], dtype=torch.float32)
        torch.ops.jitmla.mla_decode_out(*inputs, out, lse, *more)
    return (out, lse) if return_lse else out
