"""mla_decode: dense decode over a paged latent cache, with weight absorption."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import dispatch, events, schedule, torch_ops
from ..errors import InvalidArgument, InvalidArgumentType
from ..spec import mla_decode_spec
from ..workspace import scratch
from . import checks, reference

OP = "mla_decode"
MAX_ROWS = 512
MAX_HEADS = 128
MAX_PAGE = 128
PREPARED_MAX = 8192  # call layouts remembered; an engine has a few hundred
HAS_SINKS, WANTS_LSE = 1, 2  # flags of the kernels
REQUIRED = object()  # sm_scale has no default, and leaving it out deserves a better error than Python's

Query = Tensor | tuple[Tensor, Tensor]


@overload
def mla_decode(q: Query, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, kv_lora_rank: int, sm_scale: float,
               causal: bool = ..., sinks: Tensor | None = ..., out: Tensor | None = ..., lse: Tensor | None = ...,
               return_lse: Literal[False] = ..., backend: str = ...) -> Tensor: ...
@overload
def mla_decode(q: Query, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, kv_lora_rank: int, sm_scale: float,
               causal: bool = ..., sinks: Tensor | None = ..., out: Tensor | None = ..., lse: Tensor | None = ...,
               return_lse: Literal[True], backend: str = ...) -> tuple[Tensor, Tensor]: ...


def mla_decode(q: Any, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, kv_lora_rank: int,
               sm_scale: Any = REQUIRED, causal: bool = True, sinks: Tensor | None = None, out: Tensor | None = None,
               lse: Tensor | None = None, return_lse: bool = False, backend: str = "auto") -> Any:
    """Attention of a few new query tokens per request over a paged cache of latent rows (absorbed MLA, one KV head).

    For request b, token i, head h, over the keys j < seq_lens[b] (with `causal`, j <= seq_lens[b] - s_q + i):
    x_j = sm_scale * <q[b,i,h], row_j>, lse = ln sum_j exp(x_j), out = sum_j exp(x_j - lse) * row_j[:kv_lora_rank].
    The formula is that of DeepSeek-V2 (arXiv 2405.04434, section 2.1) with W_UK absorbed into q.

    q: [batch, s_q, heads, kv_lora_rank + qk_rope_head_dim], bf16 or fp16, or the pair (q_nope, q_pe) of its two parts.
        Any strides whose rows are 16-byte aligned; with s_q > 1 the (token, head) rows must be one stride apart.
    kv_cache: [pages, page_size, kv_lora_rank + qk_rope_head_dim], dtype of q. The values are its first kv_lora_rank
        columns. Rows at or behind seq_lens[b] and pages that no request uses are never read (they may hold NaN).
    block_table: [batch, max_pages] int32: the page of each page_size tokens. Entries behind the last page are not read.
    seq_lens: [batch] int32, tokens in the cache, the s_q new ones included. 0 is allowed. Read on the device only.
    sm_scale: factor of the raw dot product. It is never inferred: for DeepSeek-V3 it is 192**-0.5 * mscale**2 = 0.1352,
        not 576**-0.5.
    causal: query token i does not see the s_q - 1 - i last keys.
    sinks: [heads] float32: logits (natural units, not scaled) of one more key with a zero value.
    out: [batch, s_q, heads, kv_lora_rank], dtype of q; written. lse: [batch, s_q, heads] float32, any strides; written
        when given or asked for: natural logarithm, sinks excluded, -inf (and a zero out row) where no key is seen.
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
                                         out, lse, return_lse, backend)
    try:
        q_nope, q_pe = q if type(q) is tuple else (q, q)
        # everything that the checks and the launch depend on, except the addresses
        call = (q_nope.shape, q_nope.stride(), q_nope.dtype, q_nope.device,
                None if q_pe is q_nope else (q_pe.shape, q_pe.stride(), q_pe.dtype, q_pe.device),
                kv_cache.shape, kv_cache.stride(), kv_cache.dtype, kv_cache.device,
                block_table.shape, block_table.stride(), block_table.dtype, block_table.device,
                seq_lens.shape, seq_lens.stride(), seq_lens.dtype, seq_lens.device,
                None if out is None else (out.shape, out.stride(), out.dtype, out.device),
                None if lse is None else (lse.shape, lse.stride(), lse.dtype, lse.device),
                None if sinks is None else (sinks.shape, sinks.stride(), sinks.dtype, sinks.device),
                kv_lora_rank, causal, backend)
        prepared = _prepared.get(call)
    except (AttributeError, TypeError, ValueError):
        prepared = call = None  # not tensors, or not hashable: prepare() says what is wrong
    if (prepared is None or type(sm_scale) is not float or not isfinite(sm_scale)
            or q_nope.requires_grad or q_pe.requires_grad or kv_cache.requires_grad):
        prepared = _prepare(q, kv_cache, block_table, seq_lens, kv_lora_rank, sm_scale, causal, sinks, out, lse,
                            backend)
        if call is not None:
            if len(_prepared) >= PREPARED_MAX:
                _prepared.clear()
            _prepared[call] = prepared
        q_nope, q_pe = q if isinstance(q, (tuple, list)) else (q, q)
    if out is None:
        out = torch.empty(prepared.out_shape, dtype=q_nope.dtype, device=q_nope.device)
    if lse is None:
        lse = torch.empty(prepared.lse_shape, dtype=torch.float32, device=q_nope.device)
    prepared.run(q_nope, q_pe, kv_cache, block_table, seq_lens, sinks, out, lse, sm_scale)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Prepared:
    """A checked call layout: what one combination of shapes, strides, dtypes and options launches."""

    out_shape: tuple[int, int, int, int]
    lse_shape: tuple[int, int, int]
    plan: dispatch.Plan | None  # None: the reference
    causal: bool
    pe_offset: int
    workspace: int = 0
    semaphores: int = 0
    launch: tuple[int, ...] = ()

    def run(self, q: Tensor, q_pe: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
            sinks: Tensor | None, out: Tensor, lse: Tensor, sm_scale: float) -> None:
        if 0 in self.out_shape:
            return
        if self.plan is None:
            rank = self.out_shape[3]
            q_pe = q[..., rank:] if self.pe_offset else q_pe
            reference.mla_decode(q[..., :rank], q_pe, kv_cache, block_table, seq_lens, sm_scale=sm_scale,
                                 causal=self.causal, sinks=sinks, out=out, lse=lse)
            return
        workspace, semaphores = scratch(q.device.index, self.workspace, self.semaphores)
        try:
            self.plan(q, q_pe, kv_cache, block_table, seq_lens, workspace if sinks is None else sinks, out, lse,
                      workspace, semaphores, sm_scale, self.pe_offset,
                      WANTS_LSE if sinks is None else WANTS_LSE | HAS_SINKS, *self.launch)
        except Exception:
            # addresses are not part of the remembered layout; the kernel's own guard refuses a misaligned one
            for name, value in (("q", q), ("q_pe", q_pe), ("kv_cache", kv_cache), ("out", out)):
                checks.aligned(name, value)
            raise


_prepared: dict[Any, Prepared] = {}


def _prepare(q: Any, kv_cache: Any, block_table: Any, seq_lens: Any, kv_lora_rank: Any, sm_scale: Any, causal: Any,
             sinks: Any, out: Any, lse: Any, backend: Any) -> Prepared:
    """Check every argument, then find the Plan. Runs once per call layout."""
    if sm_scale is REQUIRED:
        raise InvalidArgumentType("mla_decode without sm_scale", supported="sm_scale: float, required",
                                  differs="it cannot be inferred: it is (qk_nope_head_dim + qk_rope_head_dim)**-0.5 "
                                  "times any YaRN mscale**2, and qk_nope_head_dim is not in the tensors",
                                  remedy="pass it, for example sm_scale=0.1352 for DeepSeek-V3")
    checks.finite_number("sm_scale", sm_scale)
    q_nope, q_pe = _check_query(q, kv_lora_rank)
    joined = q_pe is q_nope
    batch, s_q, heads, _ = q_nope.shape
    rope = (q_nope.shape[3] - kv_lora_rank) if joined else q_pe.shape[3]
    _check_cache(kv_cache, block_table, seq_lens, batch, kv_lora_rank + rope, q_nope)
    if sinks is not None:
        checks.tensor("sinks", sinks, "[heads]", 1)
        checks.dtype("sinks", sinks, [torch.float32])
        checks.shape("sinks", sinks, "[heads]", [heads])
        checks.contiguous_last("sinks", sinks)
        checks.device("sinks", sinks, q_nope.device)
    out_shape = (batch, s_q, heads, kv_lora_rank)
    _check_outputs(out, lse, out_shape, q_nope)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q_nope, q_pe, kv_cache)):
        names = [n for n, t in (("q", q_nope), ("q_pe", q_pe), ("kv_cache", kv_cache)) if t.requires_grad]
        raise InvalidArgument(f"mla_decode on tensors that require a gradient: {names[0]}", supported="inference only",
                              differs="there is no backward", remedy="call it under torch.inference_mode()")
    limit_per_row = bool(causal) and s_q > 1
    if _takes_reference(backend, q_nope):
        events.emit("choose", op=OP, backend="reference", device=str(q_nope.device),
                    why="asked for" if backend == "reference" else "CPU tensors")
        return Prepared(out_shape, out_shape[:3], None, limit_per_row, kv_lora_rank if joined else 0)
    for name, value in (("q", q_nope), ("q_pe", q_pe), ("kv_cache", kv_cache), ("out", out)):
        if value is not None:
            checks.aligned(name, value)
    for name, value in (("q", q_nope), ("q_pe", q_pe), ("out", out)):
        if value is not None:
            checks.uniform_rows(name, value)
    spec = mla_decode_spec(arch=dispatch.arch_of(q_nope.device), dtype=checks.DTYPE_NAMES[q_nope.dtype],
                   kv_lora_rank=kv_lora_rank, qk_rope_head_dim=rope, page_size=kv_cache.shape[1], s_q=s_q, heads=heads,
                   causal=bool(causal))
    plan = dispatch.plan_for(spec, backend, q_nope.device) if batch else None
    rows = s_q * heads
    launch = schedule.launch_args(rows, max(batch, 1), dispatch.sm_count(q_nope.device), kv_lora_rank)
    return Prepared(out_shape, out_shape[:3], plan, limit_per_row, kv_lora_rank if joined else 0,
                    schedule.workspace_floats(launch.parts, rows, kv_lora_rank),
                    schedule.semaphore_count(launch.parts, rows), tuple(launch))


def _takes_reference(backend: Any, q: Tensor) -> bool:
    if backend not in ("auto", "reference", *dispatch.backends(OP)):
        raise InvalidArgument(f"backend={backend!r}",
                              supported=", ".join(["auto", "reference", *dispatch.backends(OP)]),
                              differs="there is no such backend", remedy="see `jitmla kernels`")
    if q.device.type == "cuda" or backend == "reference":
        return backend == "reference"
    if backend == "auto":
        return True
    raise InvalidArgument(f"backend={backend!r} on {q.device} tensors",
                          supported="CUDA tensors, or backend='reference'", differs=f"q is on {q.device}",
                          remedy="move the tensors to the GPU, or use backend='auto'")


def _check_query(q: Any, kv_lora_rank: Any) -> tuple[Tensor, Tensor]:
    layout = "[batch, s_q, heads, kv_lora_rank + qk_rope_head_dim]"
    if not isinstance(kv_lora_rank, int) or kv_lora_rank not in (64, 128, 256, 512):
        raise InvalidArgument(f"kv_lora_rank={kv_lora_rank!r}", supported="64, 128, 256 or 512",
                              differs="it is none of them",
                              remedy="pass the width of the cached latent, without the rope part")
    if isinstance(q, (tuple, list)):
        if len(q) != 2:
            raise InvalidArgumentType(f"q: a {type(q).__name__} of {len(q)}", supported="a tensor, or (q_nope, q_pe)",
                                      differs="it is not a pair", remedy="pass the two parts, or one tensor of both")
        q_nope, q_pe = q
        checks.tensor("q_nope", q_nope, "[batch, s_q, heads, kv_lora_rank]", 4)
        checks.tensor("q_pe", q_pe, "[batch, s_q, heads, qk_rope_head_dim]", 4)
        checks.shape("q_nope", q_nope, "[batch, s_q, heads, kv_lora_rank]", [*q_nope.shape[:3], kv_lora_rank])
        checks.shape("q_pe", q_pe, "[batch, s_q, heads, qk_rope_head_dim]", [*q_nope.shape[:3], q_pe.shape[3]])
        checks.device("q_pe", q_pe, q_nope.device)
        checks.dtype("q_pe", q_pe, [q_nope.dtype])
    else:
        q_nope = q_pe = q
        checks.tensor("q", q, layout, 4)
        if q.shape[3] < kv_lora_rank:
            raise InvalidArgument(f"q: {checks.describe(q)}", supported=layout,
                                  differs=f"its last dimension is smaller than kv_lora_rank = {kv_lora_rank}",
                                  remedy="pass q after absorption (q_nope @ W_UK), or the pair (q_nope, q_pe)")
    checks.dtype("q", q_nope, list(checks.DTYPE_NAMES))
    for name, value in (("q", q_nope), ("q_pe", q_pe)):
        checks.contiguous_last(name, value)
    _, s_q, heads, _ = q_nope.shape
    if s_q < 1 or not 1 <= heads <= MAX_HEADS or s_q * heads > MAX_ROWS:
        raise InvalidArgument(f"q with s_q = {s_q} and {heads} heads",
                              supported=f"s_q >= 1, 1 to {MAX_HEADS} heads, s_q * heads <= {MAX_ROWS}",
                              differs=f"s_q * heads = {s_q * heads}",
                              remedy="split the query tokens over several calls (longer suffixes are prefill)")
    rope = (q_nope.shape[3] - kv_lora_rank) if q_nope is q_pe else q_pe.shape[3]
    if rope not in (0, 16, 32, 64):
        name, value = ("q", q_nope) if q_nope is q_pe else ("q_pe", q_pe)
        raise InvalidArgument(f"{name}: {checks.describe(value)}", supported="qk_rope_head_dim 0, 16, 32 or 64",
                              differs=f"with kv_lora_rank = {kv_lora_rank} it is {rope}",
                              remedy=f"compare the last dimension of {name} with the model's config")
    return q_nope, q_pe


def _check_cache(kv_cache: Any, block_table: Any, seq_lens: Any, batch: int, width: int, q: Tensor) -> None:
    layout = "[pages, page_size, kv_lora_rank + qk_rope_head_dim]"
    checks.tensor("kv_cache", kv_cache, layout, 3)
    checks.device("kv_cache", kv_cache, q.device)
    checks.dtype("kv_cache", kv_cache, [q.dtype])
    checks.shape("kv_cache", kv_cache, layout, [*kv_cache.shape[:2], width])
    checks.contiguous_last("kv_cache", kv_cache)
    if not 1 <= kv_cache.shape[1] <= MAX_PAGE:
        raise InvalidArgument(f"kv_cache: {checks.describe(kv_cache)}", supported=f"page_size 1 to {MAX_PAGE}",
                              differs=f"page_size is {kv_cache.shape[1]}",
                              remedy="view the cache with smaller pages, and its block table accordingly")
    checks.tensor("block_table", block_table, "[batch, max_pages]", 2)
    checks.dtype("block_table", block_table, [torch.int32])
    checks.shape("block_table", block_table, "[batch, max_pages]", [batch, block_table.shape[1]])
    checks.contiguous_last("block_table", block_table)
    checks.device("block_table", block_table, q.device)
    checks.tensor("seq_lens", seq_lens, "[batch]", 1)
    checks.dtype("seq_lens", seq_lens, [torch.int32])
    checks.shape("seq_lens", seq_lens, "[batch]", [batch])
    checks.contiguous_last("seq_lens", seq_lens)
    checks.device("seq_lens", seq_lens, q.device)


def _check_outputs(out: Any, lse: Any, out_shape: tuple[int, int, int, int], q: Tensor) -> None:
    if out is not None:
        checks.tensor("out", out, "[batch, s_q, heads, kv_lora_rank]", 4)
        checks.dtype("out", out, [q.dtype])
        checks.shape("out", out, "[batch, s_q, heads, kv_lora_rank]", out_shape)
        checks.contiguous_last("out", out)
        checks.device("out", out, q.device)
    if lse is not None:
        checks.tensor("lse", lse, "[batch, s_q, heads]", 3)
        checks.dtype("lse", lse, [torch.float32])
        checks.shape("lse", lse, "[batch, s_q, heads]", out_shape[:3])
        checks.device("lse", lse, q.device)
