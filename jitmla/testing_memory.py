"""Memory for tests of kernels, here and in an engine's own suite: full of NaN, between guards."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAN_PATTERN = 0x7FC1  # a NaN of bf16 and fp16; repeated, a NaN of fp32
GUARD_BYTES = 1024


@dataclass(frozen=True)
class Guarded:
    """A tensor to write into, full of NaN, inside a buffer whose other bytes must not change."""

    tensor: Tensor
    storage: Tensor  # int16
    inside: Tensor  # bool, like storage

    def intact(self) -> bool:
        """Whether nothing was written outside the tensor: before, behind, or in the padding of its rows."""
        return bool(((self.storage == NAN_PATTERN) | self.inside).all())

    def fill(self) -> None:
        """Poison the tensor again."""
        self.storage.fill_(NAN_PATTERN)


def guarded(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str,
            strides: Sequence[int] | None = None) -> Guarded:
    """A guarded tensor with these strides (in elements; default: contiguous)."""
    size = torch.empty(0, dtype=dtype).element_size()
    strides = list(strides) if strides is not None else [math.prod(shape[i + 1:]) for i in range(len(shape))]
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0
    guard = GUARD_BYTES // size
    storage = torch.full(((extent + 2 * guard) * size // 2 + 2,), NAN_PATTERN, dtype=torch.int16, device=device)
    inside = torch.zeros(storage.shape, dtype=torch.bool, device=device)
    tensor = storage[:storage.numel() * 2 // size * size // 2].view(dtype).as_strided(shape, strides, guard)
    halves = size // 2
    inside.as_strided((*shape, halves), (*(s * halves for s in strides), 1), guard * halves).fill_(True)
    return Guarded(tensor, storage, inside)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[list[Guarded]]:
    """Within it, torch.empty of floating-point tensors on a GPU gives guarded ones, full of NaN; on leaving, their
    guards are checked. Whatever a kernel neither writes nor may read shows up as NaN in the result."""
    made: list[Guarded] = []
    real = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        dtype = options.get("dtype") or torch.get_default_dtype()
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        if torch.device(options.get("device") or "cpu").type != "cuda" or not dtype.is_floating_point or not shape:
            return real(*size, **options)
        made.append(guarded(tuple(shape), dtype, options["device"]))
        return made[-1].tensor

    torch.empty = empty
    try:
        yield made
    finally:
        torch.empty = real
    wrong = [list(g.tensor.shape) for g in made if not g.intact()]
    if wrong:
        raise AssertionError(f"written outside of allocated tensors of shapes {wrong}")
