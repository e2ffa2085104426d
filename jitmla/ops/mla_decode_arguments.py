"""What mla_decode takes: every argument check, with errors that name the argument, what it got and what it takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgument, InvalidArgumentType
from . import checks

MAX_ROWS = 512
MAX_HEADS = 128
MAX_PAGE = 128
E4M3 = torch.float8_e4m3fn
DTYPE_NAMES = {**checks.DTYPE_NAMES, E4M3: "e4m3"}


class Features(NamedTuple):
    """What most calls do not use."""

    cu_seqlens_q: Any = None
    max_q_len: Any = None
    q_descale: Any = None
    kv_descale: Any = None
    batch_invariant: Any = False


PLAIN = Features()


def out_dtype(q: Tensor) -> torch.dtype:
    return torch.bfloat16 if q.dtype == E4M3 else q.dtype


def check(q: Any, kv_cache: Any, block_table: Any, seq_lens: Any, kv_lora_rank: Any, sm_scale: Any, sinks: Any,
          out: Any, lse: Any, features: Features = PLAIN) -> tuple[Tensor, Tensor]:
    """Raise InvalidArgument or InvalidArgumentType unless the op is defined on these.

    Returns (q_nope, q_pe), or q twice where it is one tensor."""
    checks.scale("mla_decode", sm_scale)
    compact = features.cu_seqlens_q is not None
    q_nope, q_pe = _check_query(q, kv_lora_rank, features)
    rope = rope_dim(q_nope, q_pe, kv_lora_rank)
    latent, rotated = cache_parts(kv_cache)
    _check_cache(latent, block_table, seq_lens, kv_lora_rank + (0 if latent is not kv_cache else rope), q_nope,
                 None if compact else q_nope.shape[0])
    if latent is not kv_cache:
        _check_rope_part(kv_cache[1], latent, rope)
    _check_features(features, q_nope, latent, seq_lens)
    out_shape = (*q_nope.shape[:-1], kv_lora_rank)
    if sinks is not None:
        checks.tensor("sinks", sinks, "[heads]", 1)
        checks.dtype("sinks", sinks, [torch.float32])
        checks.shape("sinks", sinks, "[heads]", [out_shape[-2]])
        checks.contiguous_last("sinks", sinks)
        checks.device("sinks", sinks, q_nope.device)
    _check_outputs(out, lse, out_shape, q_nope)
    checks.no_gradient("mla_decode", q=q_nope, q_pe=q_pe, kv_cache=latent, kv_cache_pe=rotated)
    return q_nope, q_pe


def cache_parts(kv_cache: Any) -> tuple[Any, Any]:
    """(cache, cache), or the latent and the rope part of a pair."""
    if isinstance(kv_cache, (tuple, list)) and len(kv_cache) == 2:
        return kv_cache[0], kv_cache[1]
    return kv_cache, kv_cache


def _check_rope_part(part: Any, latent: Tensor, rope: int) -> None:
    layout = "[pages, page_size, qk_rope_head_dim]"
    checks.tensor("kv_cache[1]", part, layout, 3)
    checks.device("kv_cache[1]", part, latent.device)
    checks.dtype("kv_cache[1]", part, [latent.dtype])
    checks.shape("kv_cache[1]", part, layout, [*latent.shape[:2], rope])
    checks.contiguous_last("kv_cache[1]", part)


def check_layout(q_nope: Tensor, q_pe: Tensor, kv_cache: Any, out: Tensor | None, uniform: bool = True) -> None:
    """Raise InvalidArgument unless the kernels can read and write these in place: alignment, and for those that need
    it (`uniform`) rows one stride apart."""
    latent, rope = cache_parts(kv_cache)
    for name, value in (("q", q_nope), ("q_pe", q_pe), ("kv_cache", latent), ("kv_cache[1]", rope), ("out", out)):
        if value is not None:
            checks.aligned(name, value)
    for name, value in (("q", q_nope), ("q_pe", q_pe), ("out", out)):
        if value is not None and uniform:
            checks.uniform_rows(name, value)


def rope_dim(q_nope: Tensor, q_pe: Tensor, kv_lora_rank: int) -> int:
    return q_nope.shape[-1] - kv_lora_rank if q_pe is q_nope else q_pe.shape[-1]


def _check_query(q: Any, kv_lora_rank: Any, features: Features) -> tuple[Tensor, Tensor]:
    compact = features.cu_seqlens_q is not None
    lead, rank = ("[tokens, heads, ", 3) if compact else ("[batch, s_q, heads, ", 4)
    layout = lead + "kv_lora_rank + qk_rope_head_dim]"
    if not isinstance(kv_lora_rank, int) or kv_lora_rank not in (64, 128, 256, 512):
        raise InvalidArgument(f"kv_lora_rank={kv_lora_rank!r}", supported="64, 128, 256 or 512",
                              differs="it is none of them",
                              remedy="pass the width of the cached latent, without the rope part")
    if isinstance(q, (tuple, list)):
        if len(q) != 2:
            raise InvalidArgumentType(f"q: a {type(q).__name__} of {len(q)}", supported="a tensor, or (q_nope, q_pe)",
                                      differs="it is not a pair", remedy="pass the two parts, or one tensor of both")
        q_nope, q_pe = q
        checks.tensor("q_nope", q_nope, lead + "kv_lora_rank]", rank)
        checks.tensor("q_pe", q_pe, lead + "qk_rope_head_dim]", rank)
        checks.shape("q_nope", q_nope, lead + "kv_lora_rank]", [*q_nope.shape[:-1], kv_lora_rank])
        checks.shape("q_pe", q_pe, lead + "qk_rope_head_dim]", [*q_nope.shape[:-1], q_pe.shape[-1]])
        checks.device("q_pe", q_pe, q_nope.device)
        checks.dtype("q_pe", q_pe, [q_nope.dtype])
    else:
        q_nope = q_pe = q
        checks.tensor("q", q, layout, rank)
        if q.shape[-1] < kv_lora_rank:
            raise InvalidArgument(f"q: {checks.describe(q)}", supported=layout,
                                  differs=f"its last dimension is smaller than kv_lora_rank = {kv_lora_rank}",
                                  remedy="pass q after absorption (q_nope @ W_UK), or the pair (q_nope, q_pe)")
    checks.dtype("q", q_nope, list(DTYPE_NAMES))
    for name, value in (("q", q_nope), ("q_pe", q_pe)):
        checks.contiguous_last(name, value)
    s_q, heads = _max_q_len(features) if compact else q_nope.shape[1], q_nope.shape[-2]
    if s_q < 1 or not 1 <= heads <= MAX_HEADS or s_q * heads > MAX_ROWS:
        raise InvalidArgument(f"q with s_q = {s_q} and {heads} heads",
                              supported=f"s_q >= 1, 1 to {MAX_HEADS} heads, s_q * heads <= {MAX_ROWS}",
                              differs=f"s_q * heads = {s_q * heads}",
                              remedy="split the query tokens over several calls (longer suffixes are prefill)")
    rope = rope_dim(q_nope, q_pe, kv_lora_rank)
    if rope not in (0, 16, 32, 64):
        name, value = ("q", q_nope) if q_nope is q_pe else ("q_pe", q_pe)
        raise InvalidArgument(f"{name}: {checks.describe(value)}", supported="qk_rope_head_dim 0, 16, 32 or 64",
                              differs=f"with kv_lora_rank = {kv_lora_rank} it is {rope}",
                              remedy=f"compare the last dimension of {name} with the model's config")
    return q_nope, q_pe


def _max_q_len(features: Features) -> int:
    if isinstance(features.max_q_len, bool) or not isinstance(features.max_q_len, int):
        raise InvalidArgumentType(f"max_q_len={features.max_q_len!r}", supported="an int, with cu_seqlens_q",
                                  differs="how many query tokens a request has at most is not in the shapes, and "
                                  "reading cu_seqlens_q on the host would synchronise",
                                  remedy="pass the bound that you know")
    return features.max_q_len


def _check_features(features: Features, q: Tensor, kv_cache: Tensor, seq_lens: Tensor) -> None:
    cu, batch = features.cu_seqlens_q, seq_lens.shape[0]
    if cu is not None:
        checks.tensor("cu_seqlens_q", cu, "[batch + 1]", 1)
        checks.dtype("cu_seqlens_q", cu, [torch.int32])
        checks.shape("cu_seqlens_q", cu, "[batch + 1]", [batch + 1])
        checks.contiguous_last("cu_seqlens_q", cu)
        checks.device("cu_seqlens_q", cu, q.device)
    elif features.max_q_len is not None:
        raise InvalidArgument(f"max_q_len={features.max_q_len} without cu_seqlens_q", supported="both or neither",
                              differs="without cu_seqlens_q every request has q.shape[1] tokens",
                              remedy="leave max_q_len out")
    if not isinstance(features.batch_invariant, bool):
        raise InvalidArgumentType(f"batch_invariant={features.batch_invariant!r}", supported="True or False",
                                  differs="it is no bool", remedy="pass a bool")
    _check_descale("q_descale", features.q_descale, "q", q)
    _check_descale("kv_descale", features.kv_descale, "kv_cache", kv_cache)


def _check_descale(name: str, value: Any, of: str, scaled: Tensor) -> None:
    if (value is not None) != (scaled.dtype == E4M3):
        differs = "an e4m3 tensor is meaningless without its scale" if value is None else f"{of} is not e4m3"
        raise InvalidArgument(f"{name}={'None' if value is None else 'given'} with {of}: {checks.describe(scaled)}",
                              supported=f"{name} for e4m3 {of}, and for no other", differs=differs,
                              remedy=f"pass {name}" if value is None else f"leave {name} out")
    if isinstance(value, Tensor):
        checks.tensor(name, value, "[1]", 1)
        checks.dtype(name, value, [torch.float32])
        checks.shape(name, value, "[1]", [1])
        checks.device(name, value, scaled.device)
    elif value is not None and checks.finite_number(name, value) <= 0:
        raise InvalidArgument(f"{name}={value}", supported="a positive number, or a float32 tensor [1]",
                              differs="it is not positive", remedy=f"look where {name} is computed")


def _check_cache(kv_cache: Any, block_table: Any, seq_lens: Any, width: int, q: Tensor, batch: int | None) -> None:
    layout = "[pages, page_size, kv_lora_rank + qk_rope_head_dim]"
    checks.tensor("kv_cache", kv_cache, layout, 3)
    checks.device("kv_cache", kv_cache, q.device)
    checks.dtype("kv_cache", kv_cache, list(dict.fromkeys([q.dtype, E4M3])))
    checks.shape("kv_cache", kv_cache, layout, [*kv_cache.shape[:2], width])
    checks.contiguous_last("kv_cache", kv_cache)
    checks.tensor("block_table", block_table, "[batch, max_pages]", 2)
    batch = block_table.shape[0] if batch is None else batch
    if kv_cache.shape[1] < 1 or kv_cache.shape[1] > MAX_PAGE and block_table.shape[1] != 1:
        raise InvalidArgument(f"kv_cache: {checks.describe(kv_cache)}",
                              supported=f"page_size 1 to {MAX_PAGE}, or any with one page a request (slots)",
                              differs=f"page_size is {kv_cache.shape[1]}, with {block_table.shape[1]} pages a request",
                              remedy="view the cache with smaller pages, and its block table accordingly")
    checks.dtype("block_table", block_table, [torch.int32])
    checks.shape("block_table", block_table, "[batch, max_pages]", [batch, block_table.shape[1]])
    checks.contiguous_last("block_table", block_table)
    checks.device("block_table", block_table, q.device)
    checks.tensor("seq_lens", seq_lens, "[batch]", 1)
    checks.dtype("seq_lens", seq_lens, [torch.int32])
    checks.shape("seq_lens", seq_lens, "[batch]", [batch])
    checks.contiguous_last("seq_lens", seq_lens)
    checks.device("seq_lens", seq_lens, q.device)


def _check_outputs(out: Any, lse: Any, out_shape: tuple[int, ...], q: Tensor) -> None:
    lead = "[tokens, heads" if len(out_shape) == 3 else "[batch, s_q, heads"
    if out is not None:
        checks.tensor("out", out, lead + ", kv_lora_rank]", len(out_shape))
        checks.dtype("out", out, [out_dtype(q)])
        checks.shape("out", out, lead + ", kv_lora_rank]", out_shape)
        checks.contiguous_last("out", out)
        checks.device("out", out, q.device)
    if lse is not None:
        checks.tensor("lse", lse, lead + "]", len(out_shape) - 1)
        checks.dtype("lse", lse, [torch.float32])
        checks.shape("lse", lse, lead + "]", out_shape[:-1])
        checks.device("lse", lse, q.device)
