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

_library = torch.library.Library("jitmla", "DEF")
_library.define(f"mla_decode({_INPUTS}) -> (Tensor, Tensor)")
_library.define(f"mla_decode_out({_INPUTS}, Tensor(a!) out, Tensor(b!) lse) -> ()")


def _mla_decode(q: Tensor, q_pe: Tensor | None, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
                sinks: Tensor | None, kv_lora_rank: int, sm_scale: float, causal: bool, backend: str
                ) -> tuple[Tensor, Tensor]:
    from .ops.mla_decode import mla_decode
    return mla_decode(q if q_pe is None else (q, q_pe), kv_cache, block_table, seq_lens, kv_lora_rank=kv_lora_rank,
                      sm_scale=sm_scale, causal=causal, sinks=sinks, return_lse=True, backend=backend)


def _mla_decode_out(q: Tensor, q_pe: Tensor | None, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
                    sinks: Tensor | None, kv_lora_rank: int, sm_scale: float, causal: bool, backend: str, out: Tensor,
                    lse: Tensor) -> None:
    from .ops.mla_decode import mla_decode
    mla_decode(q if q_pe is None else (q, q_pe), kv_cache, block_table, seq_lens, kv_lora_rank=kv_lora_rank,
               sm_scale=sm_scale, causal=causal, sinks=sinks, out=out, lse=lse, backend=backend)


def _fake_mla_decode(q: Tensor, q_pe: Tensor | None, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
                     sinks: Tensor | None, kv_lora_rank: int, sm_scale: float, causal: bool, backend: str
                     ) -> tuple[Tensor, Tensor]:
    batch, s_q, heads, _ = q.shape
    return (q.new_empty(batch, s_q, heads, kv_lora_rank),
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
                    backend: str) -> Any:
    """What jitmla.mla_decode does while torch.compile traces it."""
    q_nope, q_pe = q if isinstance(q, (tuple, list)) else (q, None)
    inputs = (q_nope, q_pe, kv_cache, block_table, seq_lens, sinks, kv_lora_rank, sm_scale, causal, backend)
    if out is None and lse is None:
        out, lse = torch.ops.jitmla.mla_decode(*inputs)
    else:
        batch, s_q, heads, _ = q_nope.shape
        if out is None:
            out = q_nope.new_empty(batch, s_q, heads, kv_lora_rank)
        if lse is None:
            lse = q_nope.new_empty(batch, s_q, heads, dtype=torch.float32)
        torch.ops.jitmla.mla_decode_out(*inputs, out, lse)
    return (out, lse) if return_lse else out
