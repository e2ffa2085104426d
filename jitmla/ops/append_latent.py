"""append_latent: new latent rows into a paged or slot cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_cached as torch_ops
from ..errors import InvalidArgument
from ..spec import append_latent_spec
from . import cached_reference, checks
from .cached_mla_arguments import E4M3, check_kv_scale

OP = "append_latent"
SLOT_NAMES = {torch.int32: "i32", torch.int64: "i64"}
MAX_ROWS = 2**31
RANKS, ROPES = (64, 128, 256, 512), (16, 32, 64)


def append_latent(latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slots: Tensor, *, kv_scale: Tensor | None = None,
                  backend: str = "auto") -> None:
    """Write the latent rows of new tokens into their places in the cache.

    kv_cache[slots[t] // page_size, slots[t] % page_size] = [latent[t] | k_pe[t]], or in an e4m3 cache that divided by
    kv_scale, in float32, rounded once and saturated. Slots that are negative or behind the cache write nothing, which
    is what padded tokens of a CUDA graph need. Two tokens must not have the same slot.

    latent: [tokens, kv_lora_rank], bf16 or fp16: the compressed keys and values, after their norm.
    k_pe: [tokens, qk_rope_head_dim], dtype of latent: the rope part of the key, rotated. Rows of both 16-byte aligned.
    kv_cache: [pages, page_size, kv_lora_rank + qk_rope_head_dim], dtype of latent or float8_e4m3fn; written. A slot
        cache has max_seq_len as its page_size, any size; the slot of a token is then slot * max_seq_len + position.
    slots: [tokens] int32 or int64, contiguous.
    kv_scale: [1] float32, of an e4m3 cache only, and required there: a row is about kv_scale times what is stored. On
        the device, like all else, so that no call waits for it.
    backend: "auto", a backend of `jitmla kernels` ("portable"), or "reference".

    No host synchronisation; may be captured in a CUDA graph. Offsets are 64-bit.

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_append_latent(latent, k_pe, kv_cache, slots, kv_scale, backend)
    try:
        prepared = _prepared[latent.shape[1], k_pe.shape[1], latent.dtype, latent.get_device(), kv_cache.dtype,
                             kv_cache.shape, slots.dtype, backend]
        if (kv_cache.requires_grad or latent.requires_grad or k_pe.requires_grad or latent.shape[0] == 0
                or (kv_scale is None) == prepared.quantises):
            prepared = None
    except (KeyError, AttributeError, TypeError, IndexError):
        prepared = None
    if prepared is None:
        prepared = _prepare(latent, k_pe, kv_cache, slots, kv_scale, backend)
        if prepared is None:
            return
    try:
        prepared.run(latent, k_pe, kv_cache, slots, kv_scale)
    except Exception:
        # The compiled wrapper refuses a wrong layout before it launches anything; these checks say what is wrong.
        _check(latent, k_pe, kv_cache, slots, kv_scale)
        _check_layout(latent, k_pe, kv_cache)
        raise


@dataclass(frozen=True)
class Append:
    """What calls of one kind launch."""

    function: Callable[..., None]
    device: int
    several_devices: bool
    quantises: bool
    no_scale: Tensor  # stands in where there is none; not read

    def run(self, latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slots: Tensor, kv_scale: Tensor | None) -> None:
        if self.several_devices and torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.run(latent, k_pe, kv_cache, slots, kv_scale)
        self.function(latent, k_pe, kv_cache, slots, self.no_scale if kv_scale is None else kv_scale)


_prepared = dispatch.Remembered()


def _prepare(latent: Any, k_pe: Any, kv_cache: Any, slots: Any, kv_scale: Any, backend: Any) -> Append | None:
    """Check every argument, choose who serves the call, and remember it; None where the work is done already."""
    _check(latent, k_pe, kv_cache, slots, kv_scale)
    if checks.chooses_reference(OP, backend, latent):
        cached_reference.append_latent(latent, k_pe, kv_cache, slots, kv_scale)
        return None
    _check_layout(latent, k_pe, kv_cache)
    device, quantises = latent.device, kv_cache.dtype == E4M3
    spec = append_latent_spec(arch=dispatch.arch_of(device), dtype=checks.DTYPE_NAMES[latent.dtype],
                              e4m3_cache=quantises, slots=SLOT_NAMES[slots.dtype], kv_lora_rank=latent.shape[1],
                              qk_rope_head_dim=k_pe.shape[1])
    if latent.shape[0] == 0:
        return None
    prepared = Append(dispatch.plan_for(spec, backend, device).function, latent.get_device(),
                      torch.cuda.device_count() > 1, quantises,
                      torch.ones(1, dtype=torch.float32, device=device))
    _prepared[latent.shape[1], k_pe.shape[1], latent.dtype, latent.get_device(), kv_cache.dtype, kv_cache.shape,
              slots.dtype, backend] = prepared
    return prepared


def _check(latent: Any, k_pe: Any, kv_cache: Any, slots: Any, kv_scale: Any) -> None:
    """Raise InvalidArgument or InvalidArgumentType unless the op is defined on these."""
    checks.tensor("latent", latent, "[tokens, kv_lora_rank]", 2)
    checks.dtype("latent", latent, list(checks.DTYPE_NAMES))
    tokens, rank = latent.shape
    _check_width("latent", latent, RANKS)
    checks.tensor("k_pe", k_pe, "[tokens, qk_rope_head_dim]", 2)
    checks.dtype("k_pe", k_pe, [latent.dtype])
    checks.shape("k_pe", k_pe, "[tokens, qk_rope_head_dim]", [tokens, k_pe.shape[1]], "latent")
    _check_width("k_pe", k_pe, ROPES)
    layout = "[pages, page_size, kv_lora_rank + qk_rope_head_dim]"
    checks.tensor("kv_cache", kv_cache, layout, 3)
    checks.dtype("kv_cache", kv_cache, [latent.dtype, E4M3])
    checks.shape("kv_cache", kv_cache, layout, [*kv_cache.shape[:2], rank + k_pe.shape[1]], "latent and k_pe")
    if kv_cache.shape[0] * kv_cache.shape[1] >= MAX_ROWS:
        raise InvalidArgument(f"kv_cache: {checks.describe(kv_cache)}", supported=f"fewer than {MAX_ROWS} rows",
                              differs=f"it has {kv_cache.shape[0] * kv_cache.shape[1]}",
                              remedy="divide the cache into several tensors")
    checks.tensor("slots", slots, "[tokens]", 1)
    checks.dtype("slots", slots, list(SLOT_NAMES))
    checks.shape("slots", slots, "[tokens]", [tokens], "latent")
    check_kv_scale(kv_scale, kv_cache, latent)
    for name, value in (("latent", latent), ("k_pe", k_pe), ("kv_cache", kv_cache), ("slots", slots)):
        checks.contiguous_last(name, value)
        checks.device(name, value, latent.device, "latent")
    checks.no_gradient("append_latent", latent=latent, k_pe=k_pe, kv_cache=kv_cache)


def _check_width(name: str, value: Tensor, widths: tuple[int, ...]) -> None:
    if value.shape[1] not in widths:
        raise InvalidArgument(f"{name}: {checks.describe(value)}", differs=f"its width is {value.shape[1]}",
                              supported=f"a width of {', '.join(map(str, widths))}",
                              remedy="compare it with kv_lora_rank and qk_rope_head_dim of the model")


def _check_layout(latent: Tensor, k_pe: Tensor, kv_cache: Tensor) -> None:
    """Raise InvalidArgument unless the kernels can read and write these in place."""
    checks.aligned("latent", latent)
    checks.aligned("k_pe", k_pe)
    checks.aligned("kv_cache", kv_cache)
