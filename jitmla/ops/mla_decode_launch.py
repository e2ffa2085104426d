"""What a call of mla_decode runs once it is prepared: a kernel, the reference, or nothing.

`run` takes what may differ between calls of one shape; what all of them share is in the object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..workspace import scratch
from . import checks, reference
from .mla_decode_arguments import PLAIN, Features, cache_parts

HAS_SINKS, WANTS_LSE, COOPERATIVE = 1, 2, 4  # bits of the kernels' flags (templates/common/mla_combine.py)
HAS_Q_DESCALE, HAS_KV_DESCALE = 8, 16  # and more of those with the `full` arguments


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
            sinks: Tensor | None, out: Tensor, lse: Tensor | None, sm_scale: float,
            features: Features = PLAIN) -> None:
        if self.out_shape[1] > 1:
            for name, value in (("q", q), ("q_pe", q_pe), ("out", out)):
                checks.uniform_rows(name, value)
        if self.several_devices and torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, q_pe, kv_cache, block_table, seq_lens, sinks, out, lse, sm_scale, features)
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
        scales: tuple[Any, ...] = ()
        if features.kv_descale is not None:
            sm_scale, on_device, scales = _scales(sm_scale, features, workspace)
            flags |= on_device
        self.function(q, q_pe, kv_cache, block_table, seq_lens, sinks, out, lse, workspace, semaphores, sm_scale,
                      self.pe_offset, flags, *self.launch, *scales)


def _scales(sm_scale: float, features: Features, dummy: Tensor) -> tuple[float, int, tuple[Tensor, Tensor, float]]:
    """(factor of the logits, bits of the flags, (q_descale, kv_descale, factor of out)): the factors have what the host
    knows, the tensors the rest."""
    v_scale, flags, descales = 1.0, 0, []
    for name, bit in (("q_descale", HAS_Q_DESCALE), ("kv_descale", HAS_KV_DESCALE)):
        value = getattr(features, name)
        if isinstance(value, Tensor):
            flags |= bit
        elif value is not None:
            sm_scale, v_scale = sm_scale * value, v_scale * value if name == "kv_descale" else v_scale
        descales.append(value if isinstance(value, Tensor) else dummy)
    return sm_scale, flags, (*descales, v_scale)


@dataclass(frozen=True)
class OnGpuFull:
    """The same for templates with the `full` arguments."""

    out_shape: tuple[int, ...]
    function: Callable[..., None]
    device: torch.device
    pe_offset: int
    workspace: int
    rows: int
    launch: tuple[int, ...]
    no_lse: Tensor

    def run(self, q: Tensor, q_pe: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
            sinks: Tensor | None, out: Tensor, lse: Tensor | None, sm_scale: float,
            features: Features = PLAIN) -> None:
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self.run(q, q_pe, kv_cache, block_table, seq_lens, sinks, out, lse, sm_scale, features)
        workspace, semaphores = scratch(self.device.index, self.workspace, 1)
        if sinks is not None and sinks.shape[0] != self.out_shape[-2]:
            raise ValueError("sinks")  # `check` says it in full
        if lse is not None and lse.shape != self.out_shape[:-1]:
            raise ValueError("lse")
        flags = (HAS_SINKS if sinks is not None else 0) | (WANTS_LSE if lse is not None else 0)
        sm_scale, on_device, (*descales, v_scale) = _scales(sm_scale, features, workspace)
        flags |= on_device
        lse = self.no_lse if lse is None else lse
        cu_seqlens_q = features.cu_seqlens_q
        if cu_seqlens_q is None:
            cu_seqlens_q = semaphores
        else:
            q, q_pe, out = q.unsqueeze(0), q_pe.unsqueeze(0), out.unsqueeze(0)
            lse = lse if lse is self.no_lse else lse.unsqueeze(0)
        latent, rope = cache_parts(kv_cache)
        self.function(q, q_pe, latent, rope, block_table, seq_lens, cu_seqlens_q, *descales,
                      workspace if sinks is None else sinks, out, lse, workspace, semaphores, sm_scale, v_scale,
                      self.pe_offset, self.out_shape[-1] if latent is rope else 0, flags, self.rows, *self.launch)


@dataclass(frozen=True)
class OnReference:
    """A call that the reference serves; every call is checked anew."""

    out_shape: tuple[int, ...]
    causal: bool
    joined: bool

    def run(self, q: Tensor, q_pe: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
            sinks: Tensor | None, out: Tensor, lse: Tensor | None, sm_scale: float,
            features: Features = PLAIN) -> None:
        rank = self.out_shape[-1]
        if lse is None:
            lse = torch.empty(self.out_shape[:-1], dtype=torch.float32, device=q.device)
        if type(kv_cache) in (tuple, list):
            kv_cache = torch.cat([part.float() for part in kv_cache], -1)
        reference.mla_decode(q[..., :rank], q[..., rank:] if self.joined else q_pe, kv_cache, block_table, seq_lens,
                             sm_scale=sm_scale, causal=self.causal, sinks=sinks, out=out, lse=lse,
                             cu_seqlens_q=features.cu_seqlens_q,
                             q_descale=1.0 if features.q_descale is None else features.q_descale,
                             kv_descale=1.0 if features.kv_descale is None else features.kv_descale)


@dataclass(frozen=True)
class Empty:
    """A call of an empty batch: nothing to do."""

    out_shape: tuple[int, ...]

    def run(self, *_: Any) -> None:
        pass
