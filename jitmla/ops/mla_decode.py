"""mla_decode: dense decode over a paged latent cache, with weight absorption."""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import dispatch, registry, schedule, torch_ops
from ..errors import InvalidArgument
from ..spec import mla_decode_spec
from . import checks
from .mla_decode_arguments import (
    DTYPE_NAMES,
    PLAIN,
    Features,
    cache_parts,
    check,
    check_layout,
    out_dtype,
    rope_dim,
)
from .mla_decode_launch import Empty, OnGpu, OnGpuFull, OnReference

OP = "mla_decode"
INF = float("inf")

Query = Tensor | tuple[Tensor, Tensor]


@overload
def mla_decode(q: Query, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, kv_lora_rank: int, sm_scale: float,
               causal: bool = ..., sinks: Tensor | None = ..., out: Tensor | None = ..., lse: Tensor | None = ...,
               return_lse: Literal[False] = ..., cu_seqlens_q: Tensor | None = ..., max_q_len: int | None = ...,
               q_descale: Tensor | float | None = ..., kv_descale: Tensor | float | None = ...,
               batch_invariant: bool = ..., backend: str = ...) -> Tensor: ...
@overload
def mla_decode(q: Query, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, kv_lora_rank: int, sm_scale: float,
               causal: bool = ..., sinks: Tensor | None = ..., out: Tensor | None = ..., lse: Tensor | None = ...,
               return_lse: Literal[True], cu_seqlens_q: Tensor | None = ..., max_q_len: int | None = ...,
               q_descale: Tensor | float | None = ..., kv_descale: Tensor | float | None = ...,
               batch_invariant: bool = ..., backend: str = ...) -> tuple[Tensor, Tensor]: ...


def mla_decode(q: Any, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, kv_lora_rank: int,
               sm_scale: float = checks.REQUIRED, causal: bool = True, sinks: Tensor | None = None,
               out: Tensor | None = None, lse: Tensor | None = None, return_lse: bool = False,
               cu_seqlens_q: Tensor | None = None, max_q_len: int | None = None, q_descale: Any = None,
               kv_descale: Any = None, batch_invariant: bool = False, backend: str = "auto") -> Any:
    """Attention of a few new query tokens per request over a paged cache of latent rows (absorbed MLA, one KV head).

    For request b, token i, head h, over the keys j < seq_lens[b] (with `causal`, j <= seq_lens[b] - s_q + i):
    x_j = sm_scale * <q[b,i,h], row_j>, lse = ln sum_j exp(x_j), out = sum_j exp(x_j - lse) * row_j[:kv_lora_rank].
    The formula is that of DeepSeek-V2 (arXiv 2405.04434, section 2.1) with W_UK absorbed into q.

    q: [batch, s_q, heads, kv_lora_rank + qk_rope_head_dim], bf16, fp16 or e4m3, or the pair (q_nope, q_pe).
        Any strides whose rows are 16-byte aligned; the sm90 kernels want the (token, head) rows one stride apart.
    kv_cache: [pages, page_size, kv_lora_rank + qk_rope_head_dim], dtype of q, or e4m3. The values are its first
        kv_lora_rank columns. Rows at or behind seq_lens[b] and pages that no request uses are never read (they may hold
        NaN). page_size is 1 to 128, or anything where each request has one page (a slot cache). Or the pair of its two
        parts, which may be tensors of their own.
    block_table: [batch, max_pages] int32: the page of each page_size tokens. Entries behind the last page are not read.
    seq_lens: [batch] int32, tokens in the cache, the s_q new ones included. 0 is allowed. Read on the device only.
    sm_scale: positive factor of the raw dot product. It is never inferred: for DeepSeek-V3 it is
        192**-0.5 * mscale**2 = 0.1352, not 576**-0.5.
    causal: query token i does not see the s_q - 1 - i last keys.
    sinks: [heads] float32: logits (natural units, not scaled) of one more key with a zero value.
    out: [batch, s_q, heads, kv_lora_rank], dtype of q (bf16 when that is e4m3); written.
    lse: [batch, s_q, heads] float32, any strides; written when given or asked for: natural logarithm, sinks excluded,
        -inf (and a zero out row) where no key is seen.
    cu_seqlens_q: [batch + 1] int32: q, out and lse are [tokens, heads, ...], and the query tokens of request b are
        cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1, at most max_q_len of them. Rows behind the last are not written.
    q_descale, kv_descale: what an e4m3 q or cache is to be multiplied by: a positive float, or a float32 tensor [1]
        that is read on the device.
    batch_invariant: split requests into pieces of 2048 tokens whatever else is in the batch: equal requests get equal
        bits. The workspace grows with the width of the block table.
    backend: "auto", a backend of `jitmla kernels` such as "sm90", or "reference". A named one is strict; auto takes the
        reference on CPU tensors and says so in an event.

    Returns out, or (out, lse) with return_lse. On a GPU: no host synchronisation, no plan() call, and a CUDA graph
    captured once stays right for all later lengths. The first use of a Key compiles it or loads it from the cache,
    which raises MissNotAllowed during graph capture.

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_mla_decode(q, kv_cache, block_table, seq_lens, kv_lora_rank, sm_scale, causal, sinks,
                                         out, lse, return_lse, backend,
                                         Features(cu_seqlens_q, max_q_len, q_descale, kv_descale, batch_invariant))
    if (cu_seqlens_q is not None or kv_descale is not None or batch_invariant is not False or q_descale is not None
            or max_q_len is not None or type(kv_cache) in (tuple, list)):
        return _with_features(q, kv_cache, block_table, seq_lens, kv_lora_rank, sm_scale, causal, sinks, out, lse,
                              return_lse, backend,
                              Features(cu_seqlens_q, max_q_len, q_descale, kv_descale, batch_invariant))
    try:
        q_nope, q_pe = q if type(q) is tuple else (q, q)
        prepared = _prepared[q_nope.shape, q_nope.dtype, q_nope.get_device(), q_pe is q_nope, q_pe.size(3),
                             kv_cache.size(1), (block_table.size(1) * kv_cache.size(1) - 1).bit_length(), kv_lora_rank,
                             causal, backend]
        if (type(sm_scale) is not float or not 0.0 < sm_scale < INF or type(kv_lora_rank) is not int
                or q_nope.requires_grad or q_pe.requires_grad or kv_cache.requires_grad):
            prepared = None
    except (KeyError, AttributeError, TypeError, ValueError, IndexError):
        prepared = None
    if prepared is None:
        prepared = _prepare(q, kv_cache, block_table, seq_lens, kv_lora_rank, sm_scale, causal, sinks, out, lse,
                            backend)
        q_nope, q_pe = q if isinstance(q, (tuple, list)) else (q, q)
    if out is None:
        out = torch.empty(prepared.out_shape, dtype=q_nope.dtype, device=q_nope.device)
    if lse is None and return_lse:
        lse = torch.empty(prepared.out_shape[:3], dtype=torch.float32, device=q_nope.device)
    try:
        prepared.run(q_nope, q_pe, kv_cache, block_table, seq_lens, sinks, out, lse, sm_scale)
    except Exception:
        # The compiled wrapper refuses a wrong layout before it launches anything; these checks say what is wrong.
        check(q, kv_cache, block_table, seq_lens, kv_lora_rank, sm_scale, sinks, out, lse)
        check_layout(q_nope, q_pe, kv_cache, out, isinstance(prepared, OnGpu))
        raise
    return (out, lse) if return_lse else out


def _with_features(q: Any, kv_cache: Any, block_table: Any, seq_lens: Any, kv_lora_rank: Any, sm_scale: Any,
                   causal: Any, sinks: Any, out: Any, lse: Any, return_lse: bool, backend: Any,
                   features: Features) -> Any:
    """mla_decode for calls with any of the features: every call is checked, which takes a few us more."""
    q_nope, q_pe = check(q, kv_cache, block_table, seq_lens, kv_lora_rank, sm_scale, sinks, out, lse, features)
    latent, _ = cache_parts(kv_cache)
    at = (q_nope.shape, q_nope.dtype, q_nope.get_device(), q_pe is q_nope, q_pe.shape[-1], latent.shape[1],
          kv_lora_rank, causal, backend, latent.dtype, latent is kv_cache, block_table.shape,
          features.cu_seqlens_q is None, features.max_q_len, features.batch_invariant)
    prepared = _prepared.get(at)
    if prepared is None:
        prepared = _prepare(q, kv_cache, block_table, seq_lens, kv_lora_rank, sm_scale, causal, sinks, out, lse,
                            backend, features, at)
    if isinstance(prepared, (OnGpu, OnGpuFull)):
        check_layout(q_nope, q_pe, kv_cache, out, isinstance(prepared, OnGpu))
    if out is None:
        out = torch.empty(prepared.out_shape, dtype=out_dtype(q_nope), device=q_nope.device)
    if lse is None and return_lse:
        lse = torch.empty(prepared.out_shape[:-1], dtype=torch.float32, device=q_nope.device)
    prepared.run(q_nope, q_pe, kv_cache, block_table, seq_lens, sinks, out, lse, sm_scale, features)
    return (out, lse) if return_lse else out


_prepared = dispatch.Remembered()


def _prepare(q: Any, kv_cache: Any, block_table: Any, seq_lens: Any, kv_lora_rank: Any, sm_scale: Any, causal: Any,
             sinks: Any, out: Any, lse: Any, backend: Any, features: Features = PLAIN, at: Any = None
             ) -> OnGpu | OnGpuFull | OnReference | Empty:
    """Check every argument, choose who serves the call, and remember it (as `at`) when that is a kernel."""
    q_nope, q_pe = check(q, kv_cache, block_table, seq_lens, kv_lora_rank, sm_scale, sinks, out, lse, features)
    joined, compact = q_pe is q_nope, features.cu_seqlens_q is not None
    batch, s_q, heads = seq_lens.shape[0], features.max_q_len if compact else q_nope.shape[1], q_nope.shape[-2]
    out_shape = (*q_nope.shape[:-1], int(kv_lora_rank))
    if checks.chooses_reference(OP, backend, q_nope):
        return OnReference(out_shape, bool(causal) and s_q > 1, joined)
    latent, _ = cache_parts(kv_cache)
    spec = mla_decode_spec(arch=dispatch.arch_of(q_nope.device), dtype=DTYPE_NAMES[q_nope.dtype],
                           kv_dtype=DTYPE_NAMES[latent.dtype], split_cache=latent is not kv_cache,
                           kv_lora_rank=kv_lora_rank, qk_rope_head_dim=rope_dim(q_nope, q_pe, kv_lora_rank),
                           page_size=latent.shape[1], s_q=s_q, heads=heads, causal=bool(causal), compact=compact,
                           batch_invariant=features.batch_invariant)
    full = registry.choose(spec, backend).template.arguments == "full"
    check_layout(q_nope, q_pe, kv_cache, out, not full)
    if batch == 0:
        return Empty(out_shape)
    device, rows, sms = q_nope.device, s_q * heads, dispatch.sm_count(q_nope.device)
    width, bits = latent.shape[1] * block_table.shape[1], _bits(block_table, latent)
    plan = dispatch.plan_for(spec, backend, device, rows=rows, batch=batch, tokens=1 << bits, sms=sms)
    at = at or (q_nope.shape, q_nope.dtype, q_nope.get_device(), joined, q_pe.size(3), latent.shape[1], bits,
                kv_lora_rank, causal, backend)
    if full:
        return _remember(at, _full(plan, features, out_shape, batch, rows, joined, width))
    tile = schedule.unusual_tile(rows, dict(plan.key.constants).get("ROWS", schedule.TILE_ROWS))
    launch = schedule.launch_args(rows, batch, sms, kv_lora_rank, tile)
    prepared = OnGpu(out_shape, plan.function, q_nope.get_device(),
                     torch.cuda.device_count() > 1, kv_lora_rank if joined else 0,
                     schedule.workspace_floats(launch.parts, rows, kv_lora_rank),
                     schedule.semaphore_count(launch.parts, rows, tile), tuple(launch), _no_lse(device))
    return _remember(at, prepared)


def _bits(block_table: Tensor, latent: Tensor) -> int:
    """log2 of the tokens that the block table has room for, rounded up: all that the host knows of the lengths."""
    return (block_table.shape[1] * latent.shape[1] - 1).bit_length()


def _remember(at: Any, prepared: OnGpu | OnGpuFull) -> OnGpu | OnGpuFull:
    _prepared[at] = prepared
    return prepared


def _full(plan: dispatch.Plan, features: Features, out_shape: tuple[int, ...], batch: int, rows: int, joined: bool,
          max_tokens: int) -> OnGpuFull:
    """max_tokens: of a request, by the width of the block table."""
    rank = out_shape[-1]
    launch = schedule.gather_launch(rows, batch, dispatch.sm_count(plan.device), dict(plan.key.constants)["TILE_ROWS"])
    slots = schedule.invariant_slots(batch, max_tokens) if features.batch_invariant else 0
    floats = schedule.workspace_floats(launch.parts, rows, rank, slots)
    if floats >= 1 << 31:
        raise InvalidArgument(f"batch_invariant=True with {batch} requests of up to {max_tokens} tokens",
                              supported="a workspace below 8 GiB", differs=f"it would need {floats * 4 >> 30} GiB, "
                              f"{schedule.INVARIANT_TOKENS} tokens of each of {rows} rows at a time",
                              remedy="pass a block table that is no wider than the longest request needs")
    return OnGpuFull(out_shape, plan.function, plan.device, rank if joined else 0, floats, rows, tuple(launch),
                     _no_lse(plan.device))


@functools.cache
def _no_lse(device: torch.device) -> Tensor:
    return torch.empty(1, 1, 1, dtype=torch.float32, device=device)
