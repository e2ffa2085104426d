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

from . import arch, compile, events, load, pick, registry
from .errors import MissNotAllowed
from .key import Key
from .registry import backends as backends
from .spec import Spec
from .store import Entry, Store


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


_plans: dict[tuple[Spec, str, torch.device, str | None], Plan] = {}


def plan_for(spec: Spec, backend: str, device: torch.device, variant: str | None = None) -> Plan:
    """The Plan that serves `spec` on `device`, compiled and loaded if this process has not done so yet.

    variant: the row that jitmla.pick picked for the call, for ops whose card says `per_call`.
    Raises NoTemplate, MissNotAllowed, and what compiling and loading may raise.
    """
    plan = _plans.get((spec, backend, device, variant))
    if plan is None:
        if torch.cuda.is_current_stream_capturing():
            raise _miss_in_capture(spec)
        store = Store()
        choice = registry.choose(spec, backend, variant)
        plan = _plans[spec, backend, device, variant] = _loaded(
            choice, compile.get_or_compile(choice.key, choice.source, store), device)
        if variant is not None:
            _load_siblings(choice, backend, device, store)
    return plan


def _loaded(choice: registry.Choice, entry: Entry, device: torch.device) -> Plan:
    plan = Plan(choice.key, device, load.load(entry, choice.spec.op, device.index))
    events.emit("choose", op=choice.spec.op, backend=choice.template.backend, template=choice.template.name,
                variant=choice.variant.name, device=str(device))
    return plan


def _load_siblings(chosen: registry.Choice, backend: str, device: torch.device, store: Store) -> None:
    """Load what else calls of this Spec can pick, as far as the cache has it: a later call may be in a graph
    capture."""
    for choice in registry.choices(chosen.spec, backend):
        at = (choice.spec, backend, device, choice.variant.name)
        entry = None if at in _plans else store.find(choice.key)
        if entry is not None:
            _plans[at] = _loaded(choice, entry, device)


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


def explain(spec: Spec, backend: str = "auto", store: Store | None = None, **sizes: int) -> dict[str, Any]:
    """Which template and variant serve `spec` and why, under which Key, and whether the cache holds it.

    sizes: for an op that picks a variant for each call, the sizes of one (the arguments of its rule in jitmla.pick);
    the result then also has `picked`, the reason. `variants` are all that calls of this Spec can reach.
    Raises NoTemplate with the reason when nothing serves it.
    """
    store = store or Store()
    variant, why = pick.pick(spec.op, **sizes) if sizes else (None, None)
    choice = registry.choose(spec, backend, variant)
    passed_over = {t.name: t.misses(spec) for t in registry.templates(spec.op)
                   if backend in ("auto", t.backend) and t.misses(spec)}
    reachable = registry.choices(spec, backend)
    return {"spec": spec.as_dict(), "template": choice.template.name, "variant": choice.variant.name,
            "summary": choice.template.summary, "passed_over": passed_over, **_where(choice, store),
            **({"picked": why} if why else {}),
            **({"variants": {c.variant.name: _where(c, store) for c in reachable}} if len(reachable) > 1 else {})}


def _where(choice: registry.Choice, store: Store) -> dict[str, Any]:
    entry = store.find(choice.key)
    return {"key": entry.key.digest if entry else choice.key.digest if choice.key.toolchain else None,
            "cached": entry is not None, "path": str(entry.path) if entry else None}
