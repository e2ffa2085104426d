"""What mla_prefill, merge_attn_states and gather_latent take: every argument check. They run when a call of a new kind
is prepared, and when a compiled kernel's own guards refused a call, to say what is wrong with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgument, InvalidArgumentType
from . import checks

MAX_HEADS = 128
KEYS = "[keys, heads, qk_head_dim], or the pair (k_nope [keys, heads, ...], k_pe [keys, heads or 1, ...])"
TYPES = (torch.bfloat16, torch.float16)


def check_prefill(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
                  sm_scale: Any, out: Any, lse: Any) -> tuple[Tensor, Tensor]:
    """Raise InvalidArgument or InvalidArgumentType unless mla_prefill is defined on these.

    Returns (k_nope, k_pe), or k twice where it is one tensor."""
    checks.scale("mla_prefill", sm_scale)
    checks.tensor("q", q, "[tokens, heads, qk_head_dim]", 3)
    checks.dtype("q", q, TYPES)
    tokens, heads, _ = q.shape
    if not 1 <= heads <= MAX_HEADS:
        raise InvalidArgument(f"q: {checks.describe(q)}", supported=f"1 to {MAX_HEADS} heads", differs=f"{heads} heads",
                              remedy="split the heads over several calls")
    k_nope, k_pe = _check_keys(k, q)
    checks.tensor("v", v, "[keys, heads, v_head_dim]", 3)
    checks.shape("v", v, "[keys, heads, v_head_dim]", [k_nope.shape[0], heads, v.shape[2]], "k")
    for name, value in (("q", q), ("k", k_nope), ("k_pe", k_pe), ("v", v)):
        checks.dtype(name, value, [q.dtype])
        checks.contiguous_last(name, value)
        checks.device(name, value, q.device)
    checks.tensor("cu_seqlens_q", cu_seqlens_q, "[batch + 1]", 1)
    for name, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_offsets(name, value, q.device)
        checks.shape(name, value, "[batch + 1]", cu_seqlens_q.shape, "cu_seqlens_q")
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        check_count(name, value)
    checks.output("out", out, (tokens, heads, v.shape[2]), q.dtype, q)
    check_lse("lse", lse, (tokens, heads), q)
    checks.no_gradient("mla_prefill", q=q, k=k_nope, k_pe=k_pe, v=v)
    return k_nope, k_pe


def check_prefill_layout(q: Tensor, k: Tensor, k_pe: Tensor, v: Tensor, out: Tensor | None) -> None:
    """Raise InvalidArgument unless the kernels can read and write these in place."""
    for name, value in (("q", q), ("k", k), ("k_pe", k_pe), ("v", v), ("out", out)):
        if value is not None and value.numel():
            checks.aligned(name, value)


def _check_keys(k: Any, q: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(k, Tensor):
        checks.tensor("k", k, KEYS, 3)
        checks.shape("k", k, KEYS, [k.shape[0], *q.shape[1:]], "q")
        return k, k
    if not isinstance(k, (tuple, list)) or len(k) != 2:
        raise InvalidArgumentType(f"k: a {type(k).__name__}", supported=f"k {KEYS}", differs="it is neither of both",
                                  remedy="pass one tensor, or (k_nope, k_pe)")
    k_nope, k_pe = k
    checks.tensor("k_nope", k_nope, "[keys, heads, qk_nope_head_dim]", 3)
    checks.tensor("k_pe", k_pe, "[keys, heads or 1, qk_rope_head_dim]", 3)
    keys, heads, width = k_nope.shape[0], q.shape[1], q.shape[2] - k_nope.shape[2]
    checks.shape("k_nope", k_nope, "[keys, heads, qk_nope_head_dim]", [keys, heads, k_nope.shape[2]], "q")
    if k_pe.shape != (keys, heads, width) and k_pe.shape != (keys, 1, width):
        raise InvalidArgument(f"k_pe: {checks.describe(k_pe)}",
                              supported=f"[keys, heads or 1, qk_rope_head_dim] = {[keys, heads, width]} or "
                              f"{[keys, 1, width]}", differs=f"its shape is {list(k_pe.shape)}",
                              remedy="k_nope and k_pe together are as wide as q; all heads share k_pe, or each has one")
    return k_nope, k_pe


def check_merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any, lse: Any) -> None:
    """Raise InvalidArgument or InvalidArgumentType unless merge_attn_states is defined on these."""
    layout = "[tokens, heads, v_head_dim]"
    checks.tensor("out_a", out_a, layout, 3)
    checks.dtype("out_a", out_a, [*TYPES, torch.float32])
    checks.contiguous_last("out_a", out_a)
    checks.tensor("out_b", out_b, layout, 3)
    checks.dtype("out_b", out_b, TYPES)
    checks.shape("out_b", out_b, layout, out_a.shape, "out_a")
    checks.contiguous_last("out_b", out_b)
    if out_a.dtype not in (torch.float32, out_b.dtype):
        raise InvalidArgumentType(f"out_a: {checks.describe(out_a)}", supported=f"float32 or {out_b.dtype}, as out_b",
                                  differs=f"it is {out_a.dtype}",
                                  remedy="keep partial results in float32, or in the dtype of the last one")
    checks.device("out_b", out_b, out_a.device, "out_a")
    for name, value in (("lse_a", lse_a), ("lse_b", lse_b)):
        checks.tensor(name, value, "[tokens, heads]", 2)
        check_lse(name, value, tuple(out_a.shape[:2]), out_a)
    checks.output("out", out, tuple(out_a.shape), out_a.dtype, out_a)
    check_lse("lse", lse, tuple(out_a.shape[:2]), out_a)
    checks.no_gradient("merge_attn_states", out_a=out_a, out_b=out_b)


def check_gather(kv_cache: Any, block_table: Any, starts: Any, cu_rows: Any, out: Any) -> None:
    """Raise InvalidArgument or InvalidArgumentType unless gather_latent is defined on these."""
    checks.tensor("kv_cache", kv_cache, "[pages, page_size, width]", 3)
    checks.dtype("kv_cache", kv_cache, TYPES)
    checks.contiguous_last("kv_cache", kv_cache)
    checks.tensor("block_table", block_table, "[batch, max_pages]", 2)
    checks.dtype("block_table", block_table, [torch.int32])
    checks.contiguous_last("block_table", block_table)
    checks.device("block_table", block_table, kv_cache.device, "kv_cache")
    batch = block_table.shape[0]
    check_offsets("starts", starts, kv_cache.device)
    checks.shape("starts", starts, "[batch]", [batch], "block_table")
    check_offsets("cu_rows", cu_rows, kv_cache.device)
    checks.shape("cu_rows", cu_rows, "[batch + 1]", [batch + 1], "block_table")
    checks.tensor("out", out, "[rows, width]", 2)
    checks.output("out", out, (out.shape[0], kv_cache.shape[2]), kv_cache.dtype, kv_cache)


def check_offsets(name: str, value: Any, device: torch.device) -> None:
    checks.tensor(name, value, "[batch + 1]", 1)
    checks.dtype(name, value, [torch.int32])
    checks.contiguous_last(name, value)
    checks.device(name, value, device)
    if value.shape[0] < 1:
        raise InvalidArgument(f"{name}: {checks.describe(value)}", supported="at least one entry",
                              differs="it is empty", remedy="even an empty batch has cu_seqlens = [0]")


def check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgumentType(f"{name}={value!r}", supported="an integer, known on the host",
                                  differs=f"a {type(value).__name__}",
                                  remedy="pass an upper bound of the lengths as a Python int")
    if value < 0:
        raise InvalidArgument(f"{name}={value}", supported="not negative", differs="it is negative",
                              remedy=f"pass an upper bound of the lengths as {name}")


def check_lse(name: str, value: Any, shape: tuple[int, ...], like: Tensor) -> None:
    if value is None:
        return
    checks.tensor(name, value, "[tokens, heads]", 2)
    checks.dtype(name, value, [torch.float32])
    checks.shape(name, value, "[tokens, heads]", shape, "the inputs")
    checks.device(name, value, like.device, "the inputs")
