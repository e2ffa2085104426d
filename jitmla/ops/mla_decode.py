"""mla_decode: dense decode over a paged latent cache, with weight absorption."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import dispatch, events, schedule, torch_ops
from ..errors import InvalidArgument
from ..spec import mla_decode_spec
from ..workspace import scratch
from . import checks, reference
from .mla_decode_arguments import DTYPE_NAMES, REQUIRED, check, check_layout, out_dtype, rope_dim

OP = "mla_decode"
PREPARED_MAX = 8192  # call shapes remembered; an engine has a few hundred
HAS_SINKS, WANTS_LSE, COOPERATIVE = 1, 2, 4  # bits of the kernels' flags (templates/common/mla_combine.py)
HAS_Q_DESCALE, HAS_KV_DESCALE = 8, 16  # and of those with an e4m3 cache (templates/common/sm90_e4m3.py)
INF = float("inf")

Query = Tensor | tuple[Tensor, Tensor]
Scale = float | Tensor | None


@overload
def mla_decode(q: Query, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, kv_lora_rank: int, sm_scale: float,
               causal: bool = ..., sinks: Tensor | None = ..., out: Tensor | None = ..., lse: Tensor | None = ...,
               return_lse: Literal[False] = ..., backend: str = ..., q_descale: Scale = ...,
               kv_descale: Scale = ...) -> Tensor: ...
@overload
def mla_decode(q: Query, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, kv_lora_rank: int, sm_scale: float,
               causal: bool = ..., sinks: Tensor | None = ..., out: Tensor | None = ..., lse: Tensor | None = ...,
               return_lse: Literal[True], backend: str = ..., q_descale: Scale = ...,
               kv_descale: Scale = ...) -> tuple[Tensor, Tensor]: ...


def mla_decode(q: Any, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, *, kv_lora_rank: int,
               sm_scale: Any = REQUIRED, causal: bool = True, sinks: Tensor | None = None, out: Tensor | None = None,
               lse: Tensor | None = None, return_lse: bool = False, backend: str = "auto", q_descale: Scale = None,
               kv_descale: Scale = None) -> Any:
    """Attention of a few new query tokens per request over a paged cache of latent rows (absorbed MLA, one KV head).

    For request b, token i, head h, over the keys j < seq_lens[b] (with `causal`, j <= seq_lens[b] - s_q + i):
    x_j = sm_scale * <q[b,i,h], row_j>, lse = ln sum_j exp(x_j), out = sum_j exp(x_j - lse) * row_j[:kv_lora_rank].
    The formula is that of DeepSeek-V2 (arXiv 2405.04434, section 2.1) with W_UK absorbed into q.

    q: [batch, s_q, heads, kv_lora_rank + qk_rope_head_dim], bf16, fp16 or e4m3, or its two parts (q_nope, q_pe).
        Any strides whose rows are 16-byte aligned; with s_q > 1 the (token, head) rows must be one stride apart.
    kv_cache: [pages, page_size, kv_lora_rank + qk_rope_head_dim], dtype of q or e4m3. The values are its first
        kv_lora_rank columns. Rows at or behind seq_lens[b] and pages that no request uses are never read (they may hold NaN).
    block_table: [batch, max_pages] int32: the page of each page_size tokens. Entries behind the last page are not read.
    seq_lens: [batch] int32, tokens in the cache, the s_q new ones included. 0 is allowed. Read on the device only.
    sm_scale: positive factor of the raw dot product. It is never inferred: for DeepSeek-V3 it is
        192**-0.5 * mscale**2 = 0.1352, not 576**-0.5.
    causal: query token i does not see the s_q - 1 - i last keys.
    sinks: [heads] float32: logits (natural units, not scaled) of one more key with a zero value.
    out: [batch, s_q, heads, kv_lora_rank], dtype of q, or bf16 when q is e4m3; written. lse: [batch, s_q, heads] float32, any strides; written
        when given or asked for: natural logarithm, sinks excluded, -inf (and a zero out row) where no key is seen.
    q_descale, kv_descale: what one unit of an e4m3 q or kv_cache stands for (one number each, the rope part included): a
        positive float, or a [1] float32 tensor that is read on the device. Required for e4m3, and for it alone. The
        softmax weights are not quantised.
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
                                         out, lse, return_lse, backend, q_descale, kv_descale)
    try:
        q_nope, q_pe = q if type(q) is tuple else (q, q)
        prepared = _prepared[q_nope.shape, q_nope.dtype, q_nope.get_device(), q_pe is q_nope, q_pe.size(3),
                             kv_cache.size(1), kv_cache.dtype, kv_lora_rank, causal, backend]
        if (type(sm_scale) is not float or not 0.0 < sm_scale < INF or type(kv_lora_rank) is not int
                or q_nope.requires_grad or q_pe.requires_grad or kv_cache.requires_grad):
            prepared = None
    except (KeyError, AttributeError, TypeError, ValueError, IndexError):
        prepared = None
    if prepared is None:
        prepared = _prepare(q, kv_cache, block_table, seq_lens, kv_lora_rank, sm_scale, causal, sinks, out, lse,
                            backend, q_descale, kv_descale)
        q_nope, q_pe = q if isinstance(q, (tuple, list)) else (q, q)
    if out is None:
        out = torch.empty(prepared.out_shape, dtype=prepared.out_dtype, device=q_nope.device)
    if lse is None and return_lse:
        lse = torch.empty(prepared.out_shape[:3], dtype=torch.float32, device=q_nope.device)
    try:
        prepared.run(q_nope, q_pe, kv_cache, block_table, seq_lens, sinks, out, lse, sm_scale, q_descale, kv_descale)
    except Exception:
        # The compiled wrapper refuses a wrong layout before it launches anything; these checks say what is wrong.
        check(q, kv_cache, block_table, seq_lens, kv_lora_rank, sm_scale, sinks, out, lse, q_descale, kv_descale)
        check_layout(q_nope, q_pe, kv_cache, out)
        raise
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class OnGpu:
    """What calls of one shape launch. What may still differ between them is checked by the compiled wrapper (dtype,
    shape, strides, alignment and device of every tensor), and what it cannot check in `run`."""

    out_shape: tuple[int, int, int, int]
    out_dtype: torch.dtype
    function: Callable[..., None]
    device: int
    several_devices: bool
    pe_offset: int
    workspace: int
    semaphores: int
    launch: tuple[int, ...]
    no_lse: Tensor  # stands in where none is wanted; not written
    scaled: tuple[bool, bool]  # q, the cache

    def run(self, q: Tensor, q_pe: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
            sinks: Tensor | None, out: Tensor, lse: Tensor | None, sm_scale: float, q_descale: Scale,
            kv_descale: Scale) -> None:
        if self.out_shape[1] > 1:
            for name, value in (("q", q), ("q_pe", q_pe), ("out", out)):
                checks.uniform_rows(name, value)
        if self.several_devices and torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, q_pe, kv_cache, block_table, seq_lens, sinks, out, lse, sm_scale, q_descale,
                                kv_descale)
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
        if (q_descale is not None, kv_descale is not None) != self.scaled:
            raise ValueError("descale")
        if kv_descale is None:
            self.function(q, q_pe, kv_cache, block_table, seq_lens, sinks, out, lse, workspace, semaphores, sm_scale,
                          self.pe_offset, flags, *self.launch)
        else:
            q_factor, q_descale, on_device = _scale(q_descale, HAS_Q_DESCALE, workspace)
            flags |= on_device
            kv_factor, kv_descale, on_device = _scale(kv_descale, HAS_KV_DESCALE, workspace)
            flags |= on_device
            self.function(q, q_pe, kv_cache, block_table, seq_lens, sinks, out, lse, workspace, semaphores,
                          sm_scale * q_factor * kv_factor, self.pe_offset, flags, *self.launch, q_descale, kv_descale,
                          kv_factor)


def _scale(descale: Scale, flag: int, dummy: Tensor) -> tuple[float, Tensor, int]:
    """(what the host knows of a scale, the tensor with the rest, the flag of that tensor)."""
    if descale is None:
        return 1.0, dummy, 0
    if isinstance(descale, Tensor):
        if descale.shape != (1,):
            raise ValueError("descale")
        return 1.0, descale, flag
    if not 0.0 < descale < INF:
        raise ValueError("descale")
    return float(descale), dummy, 0


@dataclass(frozen=True)
class OnReference:
    """A call that the reference serves; every call is checked anew."""

    out_shape: tuple[int, int, int, int]
    out_dtype: torch.dtype
    causal: bool
    joined: bool

    def run(self, q: Tensor, q_pe: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
            sinks: Tensor | None, out: Tensor, lse: Tensor | None, sm_scale: float, q_descale: Scale,
            kv_descale: Scale) -> None:
        rank = self.out_shape[3]
        if lse is None:
            lse = torch.empty(self.out_shape[:3], dtype=torch.float32, device=q.device)
        reference.mla_decode(q[..., :rank], q[..., rank:] if self.joined else q_pe, kv_cache, block_table, seq_lens,
                             sm_scale=sm_scale, causal=self.causal, sinks=sinks, out=out, lse=lse,
                             q_descale=1.0 if q_descale is None else q_descale,
                             kv_descale=1.0 if kv_descale is None else kv_descale)


@dataclass(frozen=True)
class Empty:
    """A call of an empty batch: nothing to do."""

    out_shape: tuple[int, int, int, int]
    out_dtype: torch.dtype

    def run(self, *_: Any) -> None:
        pass


_prepared: dict[Any, OnGpu] = {}


def _prepare(q: Any, kv_cache: Any, block_table: Any, seq_lens: Any, kv_lora_rank: Any, sm_scale: Any, causal: Any,
             sinks: Any, out: Any, lse: Any, backend: Any, q_descale: Any, kv_descale: Any
             ) -> OnGpu | OnReference | Empty:
    """Check every argument, choose who serves the call, and remember it when that is a kernel."""
    q_nope, q_pe = check(q, kv_cache, block_table, seq_lens, kv_lora_rank, sm_scale, sinks, out, lse, q_descale,
                         kv_descale)
    joined = q_pe is q_nope
    batch, s_q, heads, _ = q_nope.shape
    out_shape, result = (batch, s_q, heads, int(kv_lora_rank)), out_dtype(q_nope)
    if _takes_reference(backend, q_nope):
        events.emit("choose", op=OP, backend="reference", device=str(q_nope.device),
                    why="asked for" if backend == "reference" else "CPU tensors")
        return OnReference(out_shape, result, bool(causal) and s_q > 1, joined)
    check_layout(q_nope, q_pe, kv_cache, out)
    spec = mla_decode_spec(arch=dispatch.arch_of(q_nope.device), dtype=DTYPE_NAMES[q_nope.dtype],
                           kv_dtype=DTYPE_NAMES[kv_cache.dtype], kv_lora_rank=kv_lora_rank, qk_rope_head_dim=rope_dim(q_nope, q_pe, kv_lora_rank),
                           page_size=kv_cache.shape[1], s_q=s_q, heads=heads, causal=bool(causal))
    if batch == 0:
        return Empty(out_shape, result)
    device = q_nope.device
    plan = dispatch.plan_for(spec, backend, device)
    launch = schedule.launch_args(s_q * heads, batch, dispatch.sm_count(device), kv_lora_rank)
    prepared = OnGpu(out_shape, result, plan.function, q_nope.get_device(),
                     torch.cuda.device_count() > 1, kv_lora_rank if joined else 0,
                     schedule.workspace_floats(launch.parts, s_q * heads, kv_lora_rank),
                     schedule.semaphore_count(launch.parts, s_q * heads), tuple(launch), _no_lse(device),
                     (q_descale is not None, kv_descale is not None))
    if len(_prepared) >= PREPARED_MAX:
        _prepared.clear()
    _prepared[q_nope.shape, q_nope.dtype, q_nope.get_device(), joined, q_pe.size(3), kv_cache.size(1),
              kv_cache.dtype, kv_lora_rank, causal, backend] = prepared
    return prepared


@functools.cache
def _no_lse(device: torch.device) -> Tensor:
    return torch.empty(1, 1, 1, dtype=torch.float32, device=device)


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
