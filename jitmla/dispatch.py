"""From a Spec to a Plan: the table of loaded kernels, and the one path that a miss takes.

    plan_for(spec, backend, device)
      in the table                     -> Plan
      capturing a CUDA graph           -> MissNotAllowed with the prewarm command
      registry.choose -> Key           -> NoTemplate when nothing serves the Spec
      compile.get_or_compile           -> the store's verified bytes, compiled first if need be
      load.load                        -> a function whose driver module is loaded
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import arch, compile, events, load, registry
from .errors import MissNotAllowed
from .key import Key
from .registry import backends as backends
from .spec import Spec
from .store import Store
from .why import explain as explain


@dataclass(frozen=True)
class Plan:
    """A loaded kernel. Calling it launches on the current stream of the tensors' device, which must be `device`."""

    key: Key
    device: torch.device
    function: Callable[..., Any]

    def __call__(self, *args: Any) -> None:
        if torch.cuda.current_device() == self.device.index:
            self.function(*args)
        else:
            with torch.cuda.device(self.device):
                self.function(*args)


_plans: dict[tuple[Spec, str, torch.device], Plan] = {}


def plan_for(spec: Spec, backend: str, device: torch.device) -> Plan:
    """The Plan that serves `spec` on `device`, compiled and loaded if this process has not done so yet.

    Raises NoTemplate, MissNotAllowed, and what compiling and loading may raise.
    """
    plan = _plans.get((spec, backend, device))
    if plan is None:
        if torch.cuda.is_current_stream_capturing():
            raise _miss_in_capture(spec)
        choice = registry.choose(spec, backend)
        entry = compile.get_or_compile(choice.key, choice.source, Store())
        plan = Plan(choice.key, device, load.load(entry, spec.op, device.index))
        events.emit("choose", op=spec.op, backend=choice.template.backend, template=choice.template.name,
                    variant=choice.variant.name, device=str(device))
        _plans[spec, backend, device] = plan
    return plan


def _miss_in_capture(spec: Spec) -> MissNotAllowed:
    return MissNotAllowed(f"{spec} during CUDA graph capture", supported="kernels that this process has loaded before",
                          differs="this one was not used before, and loading it now would break the capture",
                          remedy=f"call the op once before capturing; to have it on disk: {prewarm_command(spec)}")


def prewarm_command(spec: Spec) -> str:
    """The command line that puts the kernel of `spec` into the cache."""
    facts = " ".join(f"--spec {name}={str(value).lower()}" for name, value in spec if name not in ("op", "arch"))
    return f"jitmla prewarm --op {spec.op} --arch {spec.arch} {facts}"


@functools.cache
def arch_of(device: torch.device) -> str:
    """The arch of the tensors' device (not of the current one); raises UnknownArch."""
    return arch.of_capability(*torch.cuda.get_device_capability(device))


@functools.cache
def sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
