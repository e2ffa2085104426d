"""Argument checks shared by the ops. Each raises an error that names the argument, what it got and what it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import events, registry
from ..errors import InvalidArgument, InvalidArgumentType

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class _Required:
    """Stands for sm_scale where it is not given: it has no default, and that deserves a better error than Python's."""

    def __repr__(self) -> str:
        return "<required>"


REQUIRED: Any = _Required()


def describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def tensor(name: str, value: Any, layout: str, rank: int) -> None:
    if not isinstance(value, Tensor):
        raise InvalidArgumentType(f"{name}: a {type(value).__name__}", supported=f"a tensor {name} {layout}",
                                  differs=f"{name} is not a torch.Tensor",
                                  remedy=f"make it one, for example with torch.as_tensor({name})")
    if value.dim() != rank:
        raise InvalidArgument(f"{name}: {describe(value)}", supported=f"{name} {layout}",
                              differs=f"it has {value.dim()} dimensions, not {rank}",
                              remedy="reshape it without a copy, for example with .view(), .squeeze() or .unsqueeze()")


def dtype(name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if value.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise InvalidArgumentType(f"{name}: {describe(value)}", supported=f"{name} of {names}",
                                  differs=f"its dtype is {str(value.dtype).removeprefix('torch.')}",
                                  remedy=f"convert it: {name}.to({allowed[0]})")


def shape(name: str, value: Tensor, layout: str, expected: Sequence[int], follows: str = "q and kv_lora_rank") -> None:
    if tuple(value.shape) != tuple(expected):
        raise InvalidArgument(f"{name}: {describe(value)}", supported=f"{name} {layout} = {list(expected)}",
                              differs=f"its shape is {list(value.shape)}",
                              remedy=f"pass {name} with that shape; its sizes follow from {follows}")


def device(name: str, value: Tensor, expected: torch.device, of: str = "q") -> None:
    if value.device != expected:
        raise InvalidArgument(f"{name} on {value.device}",
                              supported=f"all tensors on one device; {of} is on {expected}",
                              differs=f"{name} is not there", remedy=f"move it: {name}.to('{expected}')")


def contiguous_last(name: str, value: Tensor) -> None:
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise InvalidArgument(f"{name} with strides {tuple(value.stride())}", supported="a contiguous last dimension",
                              differs=f"its last stride is {value.stride(-1)}", remedy=f"pass {name}.contiguous()")


def aligned(name: str, value: Tensor) -> None:
    """16-byte alignment of the base address and of every stride that is stepped over, as the TMA engine needs."""
    size = value.element_size()
    loose = [s for s, n in zip(value.stride()[:-1], value.shape[:-1], strict=True) if n > 1 and s * size % 16]
    if value.numel() and (value.data_ptr() % 16 or loose):
        raise InvalidArgument(f"{name} at address {value.data_ptr():#x} with strides {tuple(value.stride())}",
                              supported="an address and strides that are multiples of 16 bytes",
                              differs=f"stride {loose[0]} is not" if loose else "the address is not",
                              remedy=f"pass {name}.contiguous(), or pad the rows of the buffer that it is a view of")


def usual_strides(x: Tensor) -> Tensor:
    """x with the strides that its dimensions of size 1 would have in a contiguous tensor. They mean nothing, and
    PyTorch leaves anything there, but the compiled wrappers look at them."""
    strides, following = list(x.stride()), 1
    for i in reversed(range(x.dim())):
        if x.shape[i] == 1:
            strides[i] = following
        following = strides[i] * x.shape[i]
    return x if tuple(strides) == x.stride() else x.as_strided(x.shape, strides)


def uniform_rows(name: str, value: Tensor) -> None:
    """Rows (token, head) of [batch, s_q, heads, width] one stride apart: what a tile of packed rows needs."""
    _, s_q, heads, _ = value.shape
    if s_q > 1 and heads > 1 and value.stride(1) != heads * value.stride(2):
        raise InvalidArgument(f"{name} with strides {tuple(value.stride())}",
                              supported=f"stride(1) == heads * stride(2) when s_q > 1: {heads * value.stride(2)}",
                              differs=f"stride(1) is {value.stride(1)}", remedy=f"pass {name}.contiguous()")


def finite_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgumentType(f"{name}: {type(value).__name__}", supported=f"{name}: a float",
                                  differs=f"{value!r} is not a number", remedy="pass a Python float")
    if not math.isfinite(value):
        raise InvalidArgument(f"{name}={value}", supported="a finite number", differs="it is not finite",
                              remedy=f"look where {name} is computed")
    return float(value)


def scale(op: str, sm_scale: Any) -> None:
    if sm_scale is REQUIRED:
        raise InvalidArgumentType(f"{op} without sm_scale", supported="sm_scale: float, required",
                                  differs="it cannot be inferred: it is (qk_nope_head_dim + qk_rope_head_dim)**-0.5 "
                                  "times any YaRN mscale**2",
                                  remedy="pass it, for example sm_scale=0.1352 for DeepSeek-V3")
    if finite_number("sm_scale", sm_scale) <= 0:
        raise InvalidArgument(f"sm_scale={sm_scale}", supported="a positive number", differs="it is not positive",
                              remedy="look where sm_scale is computed")


def output(name: str, value: Any, shape_: tuple[int, ...], dtype_: torch.dtype, like: Tensor) -> None:
    """An output that the caller may give, for inputs such as `like`."""
    if value is None:
        return
    tensor(name, value, f"{list(shape_)}", len(shape_))
    dtype(name, value, [dtype_])
    shape(name, value, "", shape_, "the inputs")
    contiguous_last(name, value)
    device(name, value, like.device, "the inputs")


def no_gradient(op: str, **tensors: Tensor) -> None:
    """Weights may be parameters, as long as autograd does not record."""
    named = [name for name, value in tensors.items() if value.requires_grad]
    if named and torch.is_grad_enabled():
        raise InvalidArgument(f"{op} on tensors that require a gradient: {named[0]}", supported="inference only",
                              differs="there is no backward", remedy="call it under torch.inference_mode()")


def takes_reference(op: str, backend: Any, tensor: Tensor) -> bool:
    """Whether the reference serves a call on this tensor's device; raises InvalidArgument for a backend that cannot."""
    if backend not in ("auto", "reference") and backend not in registry.backends(op):  # which reads the whole card
        known = ["auto", "reference", *registry.backends(op)]
        raise InvalidArgument(f"backend={backend!r}", supported=", ".join(known), differs="there is no such backend",
                              remedy="see `jitmla kernels`")
    if tensor.device.type == "cuda" or backend == "reference":
        return backend == "reference"
    if backend == "auto":
        return True
    raise InvalidArgument(f"backend={backend!r} on {tensor.device} tensors",
                          supported="CUDA tensors, or backend='reference'", differs=f"they are on {tensor.device}",
                          remedy="move the tensors to the GPU, or use backend='auto'")


def chooses_reference(op: str, backend: Any, tensor: Tensor, named: str | None = None) -> bool:
    """The same; where it does, an event says so and why. named: what the event calls the op, when that is another."""
    if not takes_reference(op, backend, tensor):
        return False
    events.emit("choose", op=named or op, backend="reference", device=str(tensor.device),
                why="asked for" if backend == "reference" else "CPU tensors")
    return True
