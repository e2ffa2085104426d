"""What the sparse MLA ops take: every argument check, and which format a cache has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgument
from . import checks

LATENT, ROPE = 512, 64
FP8_BYTES = 656
MAX_HEADS = 128
MAX_ROWS = 2**31 - 1
BYTES = (torch.float8_e4m3fn, torch.uint8, torch.int8)
Q, KV, INDICES = ("[batch, s_q, heads, kv_lora_rank + rope]", "[pages, page_size, 1, row]", "[batch, s_q, topk]")


def format_of(kv: Tensor) -> str:
    """The format of the rows of a cache."""
    return "bf16" if kv.dtype == torch.bfloat16 else "fp8"


def check(q: Any, kv: Any, indices: Any, sm_scale: Any, topk_length: Any, attn_sink: Any, out: Any, lse: Any,
          max_logits: Any = None, op: str = "sparse_mla_decode") -> None:
    """Raise InvalidArgument or InvalidArgumentType unless the op is defined on these (in the shapes of decode)."""
    checks.scale(op, sm_scale)
    checks.tensor("q", q, Q, 4)
    checks.dtype("q", q, [torch.bfloat16])
    checks.contiguous_last("q", q)
    batch, s_q, heads, width = q.shape
    if not 1 <= heads <= MAX_HEADS or width - LATENT not in (0, ROPE):
        raise InvalidArgument(f"q: {checks.describe(q)}", supported=f"1 to {MAX_HEADS} heads of {LATENT} or "
                              f"{LATENT + ROPE} columns", differs=f"it has {heads} heads of {width}",
                              remedy="pass q after absorption (q_nope @ W_UK), joined with its rope part")
    _check_cache(kv, q)
    checks.tensor("indices", indices, INDICES, 3)
    checks.dtype("indices", indices, [torch.int32])
    checks.shape("indices", indices, INDICES, [batch, s_q, indices.shape[2]])
    checks.contiguous_last("indices", indices)
    checks.device("indices", indices, q.device)
    for name, value, dtype, size, layout in (("topk_length", topk_length, torch.int32, batch, "[batch]"),
                                             ("attn_sink", attn_sink, torch.float32, heads, "[heads]")):
        if value is not None:
            checks.tensor(name, value, layout, 1)
            checks.dtype(name, value, [dtype])
            checks.shape(name, value, layout, [size])
            checks.contiguous_last(name, value)
            checks.device(name, value, q.device)
    if out is not None:
        checks.tensor("out", out, "[batch, s_q, heads, kv_lora_rank]", 4)
        checks.dtype("out", out, [q.dtype])
        checks.shape("out", out, "[batch, s_q, heads, kv_lora_rank]", [batch, s_q, heads, LATENT])
        checks.contiguous_last("out", out)
        checks.device("out", out, q.device)
    for name, value in (("lse", lse), ("max_logits", max_logits)):
        if value is not None:
            checks.tensor(name, value, "[batch, heads, s_q]", 3)
            checks.dtype(name, value, [torch.float32])
            checks.shape(name, value, "[batch, heads, s_q]", [batch, heads, s_q])
            checks.device(name, value, q.device)
    checks.no_gradient(op, q=q, kv=kv)


def _check_cache(kv: Any, q: Tensor) -> None:
    checks.tensor("k_cache", kv, KV, 4)
    checks.device("k_cache", kv, q.device)
    checks.dtype("k_cache", kv, [*BYTES, torch.bfloat16])
    row = FP8_BYTES if format_of(kv) == "fp8" else q.shape[3]
    if kv.shape[2] != 1 or kv.shape[3] != row:
        raise InvalidArgument(f"k_cache: {checks.describe(kv)}", supported=f"{KV}, a row of {FP8_BYTES} bytes, or as "
                              f"many bf16 columns as q: [..., 1, {row}]",
                              differs=f"{kv.shape[2]} KV heads" if kv.shape[2] != 1 else f"a row has {kv.shape[3]}",
                              remedy="compare the cache with the format of its rows")
    if format_of(kv) == "fp8" and q.shape[3] != LATENT + ROPE:
        raise InvalidArgument(f"q: {checks.describe(q)}", supported=f"{LATENT + ROPE} columns with rows of "
                              f"{FP8_BYTES} bytes", differs=f"it has {q.shape[3]}", remedy="join q with its rope part")
    checks.contiguous_last("k_cache", kv)
    if kv.shape[1] < 1 or kv.shape[0] * kv.shape[1] > MAX_ROWS:
        raise InvalidArgument(f"k_cache: {checks.describe(kv)}", supported=f"1 to {MAX_ROWS} rows",
                              differs=f"it has {kv.shape[0] * kv.shape[1]}",
                              remedy="indices are 32-bit: split the pool, or pass the pages of one layer")


def check_layout(q: Tensor, kv: Tensor, indices: Tensor, out: Tensor | None) -> None:
    """Raise InvalidArgument unless the kernels can read and write these in place: alignment, and evenly spaced
    tokens."""
    for name, value in (("q", q), ("k_cache", kv), ("out", out)):
        if value is not None:
            checks.aligned(name, value)
    for name, value in (("indices", indices), ("out", out)):
        if value is not None and not even_tokens(value):
            raise InvalidArgument(f"{name} with strides {tuple(value.stride())}",
                                  supported="stride(0) == s_q * stride(1)",
                                  differs="its query tokens are not evenly spaced",
                                  remedy=f"pass {name}.contiguous()")


def even_tokens(value: Tensor) -> bool:
    """Whether the query tokens of [batch, s_q, ...] are one stride apart."""
    batch, s_q = value.shape[:2]
    return batch < 2 or s_q < 2 or value.stride(0) == s_q * value.stride(1)
