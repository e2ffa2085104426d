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

from .ops.mla_decode_arguments import out_dtype

_INPUTS = ("Tensor q, Tensor? q_pe, Tensor kv_cache, Tensor block_table, Tensor seq_lens, Tensor? sinks, "
           "int kv_lora_rank, float sm_scale, bool causal, str backend")
# a scale is a tensor or a number, which a schema has no type for
_SCALES = "Tensor? q_descale=None, Tensor? kv_descale=None, float? q_factor=None, float? kv_factor=None"

_library = torch.library.Library("jitmla", "DEF")
_library.define(f"mla_decode({_INPUTS}, {_SCALES}) -> (Tensor, Tensor)")
_library.define(f"mla_decode_out({_INPUTS}, Tensor(a!) out, Tensor(b!) lse, {_SCALES}) -> ()")


def _mla_decode(q: Tensor, q_pe: Tensor | None, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
                sinks: Tensor | None, kv_lora_rank: int, sm_scale: float, causal: bool, backend: str, *scales: Any
                ) -> tuple[Tensor, Tensor]:
    from .ops.mla_decode import mla_decode
    return mla_decode(q if q_pe is None else (q, q_pe), kv_cache, block_table, seq_lens, kv_lora_rank=kv_lora_rank,
                      sm_scale=sm_scale, causal=causal, sinks=sinks, return_lse=True, backend=backend,
                      **_descales(*scales))


def _mla_decode_out(q: Tensor, q_pe: Tensor | None, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
                    sinks: Tensor | None, kv_lora_rank: int, sm_scale: float, causal: bool, backend: str, out: Tensor,
                    lse: Tensor, *scales: Any) -> None:
    from .ops.mla_decode import mla_decode
    mla_decode(q if q_pe is None else (q, q_pe), kv_cache, block_table, seq_lens, kv_lora_rank=kv_lora_rank,
               sm_scale=sm_scale, causal=causal, sinks=sinks, out=out, lse=lse, backend=backend, **_descales(*scales))


def _descales(q_descale: Tensor | None = None, kv_descale: Tensor | None = None, q_factor: float | None = None,
              kv_factor: float | None = None) -> dict[str, Any]:
    return {"q_descale": q_factor if q_descale is None else q_descale,
            "kv_descale": kv_factor if kv_descale is None else kv_descale}


def _fake_mla_decode(q: Tensor, q_pe: Tensor | None, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
                     sinks: Tensor | None, kv_lora_rank: int, sm_scale: float, causal: bool, backend: str, *_: Any
                     ) -> tuple[Tensor, Tensor]:
    batch, s_q, heads, _ = q.shape
    return (q.new_empty(batch, s_q, heads, kv_lora_rank, dtype=out_dtype(q)),
            q.new_empty(batch, s_q, heads, dtype=torch.float32))


def _fake_mla_decode_out(*_: Any) -> None:
    return None


for _key in ("CPU", "CUDA"):
    _library.impl("mla_decode", _mla_decode, _key)
    _library.impl("mla_decode_out", _mla_decode_out, _key)
torch.library.register_fake("jitmla::mla_decode", _fake_mla_decode, lib=_library)
torch.library.register_fake("jitmla::mla_decode_out", _fake_mla_decode_out, lib=_library)


def call_mla_decode(q: Any, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, kv_lora_rank: int, sm_scale: Any,
                    causal: bool, sinks: Tensor | None, out: Tensor | None, lse: Tensor | None, return_lse: bool,
                    backend: str, q_descale: float | Tensor | None, kv_descale: float | Tensor | None) -> Any:
    """What jitmla.mla_decode does while torch.compile traces it."""
    q_nope, q_pe = q if isinstance(q, (tuple, list)) else (q, None)
    inputs = (q_nope, q_pe, kv_cache, block_table, seq_lens, sinks, kv_lora_rank, sm_scale, causal, backend)
    given = {"q": q_descale, "kv": kv_descale}
    scales = {f"{name}_{'descale' if isinstance(value, Tensor) else 'factor'}": value for name, value in given.items()}
    if out is None and lse is None:
        out, lse = torch.ops.jitmla.mla_decode(*inputs, **scales)
    else:
        batch, s_q, heads, _ = q_nope.shape
        if out is None:
            out = q_nope.new_empty(batch, s_q, heads, kv_lora_rank, dtype=out_dtype(q_nope))
        if lse is None:
            lse = q_nope.new_empty(batch, s_q, heads, dtype=torch.float32)
        torch.ops.jitmla.mla_decode_out(*inputs, out, lse, **scales)
    return (out, lse) if return_lse else out
