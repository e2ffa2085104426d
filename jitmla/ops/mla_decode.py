"""mla_decode: dense decode over a paged latent cache, with weight absorption."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import dispatch, events, schedule, torch_ops
from ..spec import mla_decode_spec
from ..workspace import scratch
from . import checks, reference
from .mla_decode_arguments import REQUIRED, check, check_layout, rope_dim

OP = "mla_decode"
HAS_SINKS, WANTS_LSE, COOPERATIVE = 1, 2, 4  # bits of the kernels' flags (templates/common/mla_combine.py)
INF = float("inf")

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
    sm_scale: positive factor of the raw dot product. It is never inferred: for DeepSeek-V3 it is
        192**-0.5 * mscale**2 = 0.1352, not 576**-0.5.
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
        prepared = _prepared[q_nope.shape, q_nope.dtype, q_nope.get_device(), q_pe is q_nope, q_pe.size(3),
                             kv_cache.size(1), kv_lora_rank, causal, backend]
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
        check_layout(q_nope, q_pe, kv_cache, out)
        raise
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class OnGpu:
    """What calls of one shape launch. What may still differ between them is checked by the compiled wrapper (dtype,
    shape, strides, alignment and device of every tensor), and what it cannot check in `run`."""

    out_shape: tuple[int, int, int, int]
    function: Callable[..., None]
    device: int
    several_devices: bool
    pe_offset: int
    workspace: int
    semaphores: int
    launch: tuple[int, ...]
    no_lse: Tensor  # stands in where none is wanted; not written

    def run(self, q: Tensor, q_pe: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
            sinks: Tensor | None, out: Tensor, lse: Tensor | None, sm_scale: float) -> None:
        if self.out_shape[1] > 1:
            for name, value in (("q", q), ("q_pe", q_pe), ("out", out)):
                checks.uniform_rows(name, value)
        if self.several_devices and torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, q_pe, kv_cache, block_table, seq_lens, sinks, out, lse, sm_scale)
        workspace, semaphores = scratch(self.device, self.workspace, self.semaphores)
        flags = COOPERATIVE
        if sinks is None:
            sinks = workspace
        else:
            flags |= HAS_SINKS
            if sinks.shape[0] != self.out_shape[2]:
                raise ValueError("sinks")  # `check` says it in full
        if lse is None:
            lse = self.no_lse
        else:
            flags |= WANTS_LSE
            if lse.shape != self.out_shape[:3]:
                raise ValueError("lse")
        self.function(q, q_pe, kv_cache, block_table, seq_lens, sinks, out, lse, workspace, semaphores, sm_scale,
                      self.pe_offset, flags, *self.launch)


@dataclass(frozen=True)
class OnReference:
    """A call that the reference serves; every call is checked anew."""

    out_shape: tuple[int, int, int, int]
    causal: bool
    joined: bool

    def run(self, q: Tensor, q_pe: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
            sinks: Tensor | None, out: Tensor, lse: Tensor | None, sm_scale: float) -> None:
        rank = self.out_shape[3]
        if lse is None:
            lse = torch.empty(self.out_shape[:3], dtype=torch.float32, device=q.device)
        reference.mla_decode(q[..., :rank], q[..., rank:] if self.joined else q_pe, kv_cache, block_table, seq_lens,
                             sm_scale=sm_scale, causal=self.causal, sinks=sinks, out=out, lse=lse)


@dataclass(frozen=True)
class Empty:
    """A call of an empty batch: nothing to do."""

    out_shape: tuple[int, int, int, int]

    def run(self, *_: Any) -> None:
        pass


_prepared = dispatch.Remembered()


def _prepare(q: Any, kv_cache: Any, block_table: Any, seq_lens: Any, kv_lora_rank: Any, sm_scale: Any, causal: Any,
             sinks: Any, out: Any, lse: Any, backend: Any) -> OnGpu | OnReference | Empty:
    """Check every argument, choose who serves the call, and remember it when that is a kernel."""
    q_nope, q_pe = check(q, kv_cache, block_table, seq_lens, kv_lora_rank, sm_scale, sinks, out, lse)
    joined = q_pe is q_nope
    batch, s_q, heads, _ = q_nope.shape
    out_shape = (batch, s_q, heads, int(kv_lora_rank))
    if checks.takes_reference(OP, backend, q_nope):
        events.emit("choose", op=OP, backend="reference", device=str(q_nope.device),
                    why="asked for" if backend == "reference" else "CPU tensors")
        return OnReference(out_shape, bool(causal) and s_q > 1, joined)
    check_layout(q_nope, q_pe, kv_cache, out)
    spec = mla_decode_spec(arch=dispatch.arch_of(q_nope.device), dtype=checks.DTYPE_NAMES[q_nope.dtype],
                           kv_lora_rank=kv_lora_rank, qk_rope_head_dim=rope_dim(q_nope, q_pe, kv_lora_rank),
                           page_size=kv_cache.shape[1], s_q=s_q, heads=heads, causal=bool(causal))
    if batch == 0:
        return Empty(out_shape)
    device = q_nope.device
    plan = dispatch.plan_for(spec, backend, device)
    launch = schedule.launch_args(s_q * heads, batch, dispatch.sm_count(device), kv_lora_rank)
    prepared = OnGpu(out_shape, plan.function, q_nope.get_device(),
                     torch.cuda.device_count() > 1, kv_lora_rank if joined else 0,
                     schedule.workspace_floats(launch.parts, s_q * heads, kv_lora_rank),
                     schedule.semaphore_count(launch.parts, s_q * heads), tuple(launch), _no_lse(device))
    _prepared[q_nope.shape, q_nope.dtype, q_nope.get_device(), joined, q_pe.size(3), kv_cache.size(1), kv_lora_rank,
              causal, backend] = prepared
    return prepared


@functools.cache
def _no_lse(device: torch.device) -> Tensor:
    return torch.empty(1, 1, 1, dtype=torch.float32, device=device)
