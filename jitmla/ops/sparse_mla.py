"""What sparse_mla_decode and sparse_mla_prefill share: from checked arguments to a launch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, schedule
from ..spec import sparse_mla_spec
from ..workspace import scratch
from . import checks, sparse_reference
from .sparse_mla_arguments import LATENT, check, check_layout, even_tokens, format_of

OP = "sparse_mla"
# bits of the kernels' flags (templates/common/mla_combine.py, sparse_rows.py)
HAS_SINKS, WANTS_LSE, COOPERATIVE, HAS_LENGTHS, WANTS_MAX = 1, 2, 4, 8, 16


@dataclass(frozen=True)
class OnGpu:
    """What calls of one shape launch. What may still differ between them is checked by the compiled wrapper, and what
    it cannot check in `run`."""

    batch: int
    s_q: int
    heads: int
    function: Callable[..., None]
    device: int
    several_devices: bool
    divisors: tuple[int, int, int, int]  # of a row by the page size, of a token by s_q
    workspace: int
    semaphores: int
    launch: tuple[int, ...]
    unwanted: Tensor  # stands in for lse and max_logits; not written
    no_lengths: Tensor

    def run(self, q: Tensor, kv: Tensor, indices: Tensor, topk_length: Tensor | None, attn_sink: Tensor | None,
            out: Tensor, lse: Tensor | None, max_logits: Tensor | None, sm_scale: float) -> None:
        if self.several_devices and torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, kv, indices, topk_length, attn_sink, out, lse, max_logits, sm_scale)
        if self.s_q > 1:
            if not (even_tokens(indices) and even_tokens(out)):
                raise ValueError("strides")  # `check_layout` says it in full
            for given in (lse, max_logits):
                if given is not None and not even_tokens(given.transpose(1, 2)):
                    return self._run_and_copy(q, kv, indices, topk_length, attn_sink, out, lse, max_logits, sm_scale)
        workspace, semaphores = scratch(self.device, self.workspace, self.semaphores)
        flags = COOPERATIVE
        if attn_sink is None:
            attn_sink = workspace
        else:
            flags |= HAS_SINKS
            if attn_sink.shape[0] != self.heads:
                raise ValueError("attn_sink")  # `check` says it in full
        if topk_length is None:
            topk_length = self.no_lengths
        else:
            flags |= HAS_LENGTHS
            if topk_length.shape[0] != self.batch:
                raise ValueError("topk_length")
        if lse is None:
            lse = self.unwanted
        else:
            flags |= WANTS_LSE
            lse = lse.transpose(1, 2)
            if lse.shape != q.shape[:3]:
                raise ValueError("lse")  # `check` says it
        if max_logits is None:
            max_logits = self.unwanted
        else:
            flags |= WANTS_MAX
            max_logits = max_logits.transpose(1, 2)
        if kv.shape[1] == 1:
            kv = kv.transpose(0, 1)  # one page
        if kv.dtype != torch.uint8:
            kv = kv.view(torch.uint8)
        self.function(q, kv, indices, topk_length, attn_sink, out, lse, max_logits, workspace, semaphores, sm_scale,
                      *self.divisors, flags, *self.launch)

    def _run_and_copy(self, q: Tensor, kv: Tensor, indices: Tensor, topk_length: Tensor | None,
                      attn_sink: Tensor | None, out: Tensor, lse: Tensor | None, max_logits: Tensor | None,
                      sm_scale: float) -> None:
        """For lse whose tokens are not evenly spaced."""
        like = [None if x is None else torch.empty_like(x.transpose(1, 2).contiguous()).transpose(1, 2)
                for x in (lse, max_logits)]
        self.run(q, kv, indices, topk_length, attn_sink, out, like[0], like[1], sm_scale)
        for given, found in zip((lse, max_logits), like, strict=True):
            if given is not None and found is not None:
                given.copy_(found)


class OnReference:
    """A call that the reference serves; every call is checked anew."""

    def run(self, q: Tensor, kv: Tensor, indices: Tensor, topk_length: Tensor | None, attn_sink: Tensor | None,
            out: Tensor, lse: Tensor | None, max_logits: Tensor | None, sm_scale: float) -> None:
        if lse is None:
            lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        sparse_reference.sparse_mla(q, kv, indices, sm_scale=sm_scale, topk_length=topk_length, attn_sink=attn_sink,
                                    out=out, lse=lse, max_logits=max_logits)


class Empty:
    """A call without a query token: nothing to do."""

    def run(self, *_: Any) -> None:
        pass


_prepared = dispatch.Remembered()


def launch(q: Any, kv: Any, indices: Any, sm_scale: Any, topk_length: Any, attn_sink: Any, out: Any, lse: Any,
           max_logits: Any, whole: bool, backend: str) -> Tensor:
    """Write out, and lse and max_logits [batch, heads, s_q] where they are given; returns out, made here if it is None.

    whole: no query token is split, which max_logits needs."""
    try:
        prepared: Any = _prepared[q.shape, q.get_device(), kv.shape, kv.stride(0), kv.dtype, whole, backend]
        if type(sm_scale) is not float or not 0.0 < sm_scale < float("inf") or q.requires_grad:
            prepared = None
    except (KeyError, AttributeError, TypeError):
        prepared = None
    if prepared is None:
        op = "sparse_mla_prefill" if whole else "sparse_mla_decode"
        check(q, kv, indices, sm_scale, topk_length, attn_sink, out, lse, max_logits, op)
        prepared = _prepare(q, kv, indices, out, whole, backend)
    if out is None:
        out = torch.empty((*q.shape[:3], LATENT), dtype=torch.bfloat16, device=q.device)
    try:
        prepared.run(q, kv, indices, topk_length, attn_sink, out, lse, max_logits, sm_scale)
    except Exception:
        # The compiled wrapper refuses a wrong layout before it launches anything; these checks say what is wrong.
        check(q, kv, indices, sm_scale, topk_length, attn_sink, out, lse, max_logits)
        check_layout(q, kv, indices, out)
        raise
    return out


def _prepare(q: Tensor, kv: Tensor, indices: Tensor, out: Tensor | None, whole: bool, backend: Any
             ) -> OnGpu | OnReference | Empty:
    """Choose who serves the call, and remember it when that is a kernel."""
    if checks.chooses_reference(OP, backend, q):
        return OnReference()
    check_layout(q, kv, indices, out)
    batch, s_q, heads, width = q.shape
    spec = sparse_mla_spec(arch=dispatch.arch_of(q.device), kv_format=format_of(kv), kv_lora_rank=LATENT,
                           qk_rope_head_dim=width - LATENT, heads=heads)
    if batch * s_q == 0:
        return Empty()
    sms = dispatch.sm_count(q.device)
    plan = dispatch.plan_for(spec, backend, q.device, tokens=batch * s_q, heads=heads, whole=int(whole), sms=sms)
    launch = schedule.sparse_launch_args(batch * s_q, heads, sms, whole)
    prepared = OnGpu(batch, s_q, heads, plan.function, q.get_device(), torch.cuda.device_count() > 1,
                     (*_page_divisor(kv), *schedule.divisor(s_q)),
                     schedule.workspace_floats(launch.parts, heads, LATENT),
                     schedule.semaphore_count(launch.parts, heads), tuple(launch), *_stand_ins(q.device))
    _prepared[q.shape, q.get_device(), kv.shape, kv.stride(0), kv.dtype, whole, backend] = prepared
    return prepared


def _page_divisor(kv: Tensor) -> tuple[int, int]:
    """What divides a row by the page size; (0, 0) where the rows of the pool are evenly spaced."""
    pages, page_size = kv.shape[:2]
    even = 1 in (pages, page_size) or kv.stride(0) == page_size * kv.stride(1)
    return (0, 0) if even else schedule.divisor(page_size)


@functools.cache
def _stand_ins(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.empty(1, 1, 1, dtype=torch.float32, device=device), torch.empty(1, dtype=torch.int32, device=device)
