"""From a Spec to a Plan: the table of loaded kernels, and the one path that a miss takes.

    plan_for(spec, backend, device)
      in the table                     -> Plan
      registry.choose                  -> NoTemplate when nothing serves the Spec
      loaded under another name        -> Plan
      frozen, or capturing a graph     -> MissNotAllowed with the difference and the prewarm command
      compile.get_or_compile           -> the store's verified bytes, compiled first if need be
      load.load                        -> a function whose driver module is loaded

`warm` takes that path for a list of Keys before serving begins, `freeze` ends it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from . import OPS, arch, compile, events, load, misses, prewarm, registry, schema, tune
from .errors import InvalidArgument
from .key import Key
from .misses import prewarm_command as prewarm_command
from .registry import Choice
from .registry import backends as backends
from .spec import Spec
from .store import Entry, Store
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


class Remembered(dict[Any, Any]):
    """What calls of an op do, by what of their arguments decides it. Bounded, and emptied by `forget`."""

    MOST = 8192  # an engine has a few hundred

    def __init__(self) -> None:
        super().__init__()
        _remembered.append(self)

    def __setitem__(self, call: Any, value: Any) -> None:
        if len(self) >= self.MOST:
            self.clear()
        super().__setitem__(call, value)


_remembered: list[Remembered] = []
_plans: dict[tuple[Spec, str, torch.device], Plan] = {}  # by what a call asks
_loaded: dict[tuple[Spec, str, torch.device], Plan] = {}  # the same ones by Spec, "template/variant" and device


def plan_for(spec: Spec, backend: str, device: torch.device, **sizes: int) -> Plan:
    """The Plan that serves `spec` on `device`, compiled and loaded if this process has not done so yet.

    sizes: those of the call, for an op that picks by them (jitmla.pick); the first such call also loads what later ones
    can get, as far as the cache has it: they may be in a graph capture.
    Raises NoTemplate, MissNotAllowed, and what compiling and loading may raise.
    """
    plan = None if sizes else _plans.get((spec, backend, device))
    if plan is None:
        choice = registry.choose(spec, backend, sizes)
        plan = _loaded.get((spec, choice.name, device))
        if plan is None:
            if torch.cuda.is_current_stream_capturing():
                raise misses.not_loaded(spec, "during CUDA graph capture", _specs_on(device),
                                        "call the op once before capturing, or jitmla.warm its Key")
            if misses.policy() == "error":
                raise misses.not_loaded(spec, misses.reason(), _specs_on(device), "jitmla.warm its Key before serving")
            plan = _load(choice, _entry(choice), device)
            if sizes:
                _load_siblings(choice, backend, device)
        if not sizes:
            _plans[spec, backend, device] = plan
    return plan


def _load_siblings(chosen: Choice, backend: str, device: torch.device) -> None:
    store = Store()
    for choice in registry.choices(chosen.spec, backend):
        entry = None if (choice.spec, choice.name, device) in _loaded else store.find(choice.key)
        if entry is not None:
            _load(choice, entry, device)


def _entry(choice: Choice) -> Entry:
    """From the cache, or compiled where that is allowed."""
    store = Store()
    if misses.policy() == "compile":
        return compile.get_or_compile(choice.key, choice.source, store)
    entry = store.find(choice.key)
    if entry is None:
        raise misses.not_stored(choice.spec, str(store.root))
    return entry


def _load(choice: Choice, entry: Entry, device: torch.device) -> Plan:
    plan = Plan(entry.key, device, load.load(entry, choice.spec.op, device.index))
    events.emit("choose", op=choice.spec.op, backend=choice.template.backend, template=choice.template.name,
                variant=choice.variant.name, device=str(device))
    _loaded[choice.spec, choice.name, device] = plan
    return plan


def _specs_on(device: torch.device) -> list[Spec]:
    return [spec for spec, _, where in _loaded if where == device]


def warm(keys: Iterable[Key], device: torch.device | str | int | None = None, jobs: int | None = None) -> None:
    """Have the kernels of `keys` (of `jitmla.keys_for`) loaded in the driver of `device`, by default the current one,
    so that the first call of each finds nothing left to do, inside a CUDA graph capture included.

    What the cache lacks is compiled, `jobs` at once, unless JITMLA_ON_MISS forbids it. Raises InvalidArgument for a Key
    that is not the choice here, MissNotAllowed, and what compiling and loading may raise.
    """
    where, store = _device(device), Store()
    chosen = {key: _choice_of(key) for key in keys}
    todo = {key: choice for key, choice in chosen.items() if (choice.spec, choice.name, where) not in _loaded}
    if todo and misses.frozen():
        raise misses.not_loaded(next(iter(todo)).spec, misses.reason(), _specs_on(where), "warm first, then freeze")
    sm_count(where)
    lacking = []
    for key, choice in todo.items():
        entry = store.find(key)
        if entry is None:
            lacking.append(choice)
        else:
            _load(choice, entry, where)
    if lacking and misses.policy() != "compile":
        raise misses.not_stored(lacking[0].spec, str(store.root))

    def take(outcome: prewarm.Outcome) -> None:
        if outcome.error:
            raise outcome.error
        _load(outcome.choice, outcome.entry, where)

    prewarm.run(lacking, store, jobs or prewarm.cores(), take, must_store=False)
    for choice in chosen.values():
        for backend in ("auto", choice.template.backend):
            if registry.choose(choice.spec, backend).name == choice.name:
                _plans[choice.spec, backend, where] = _loaded[choice.spec, choice.name, where]


def freeze() -> None:
    """From now on use what is loaded and nothing else, for the life of this process: no compile, no dlopen, no driver
    load, no access to the file system. A call whose kernel is not loaded raises MissNotAllowed.
    """
    for op in OPS:
        importlib.import_module(f"{__package__}.ops.{op}")
    for op in registry.ops():
        registry.templates(op)  # so that even a miss reads no file
    schema.document(), tune.tunings()
    misses.set_frozen(True)
    events.emit("freeze", kernels=len(_loaded))


def forget() -> None:
    """Have every call choose anew. What is loaded stays loaded."""
    _plans.clear()
    for calls in _remembered:
        calls.clear()


tune.changed.append(forget)


def _choice_of(key: Key) -> Choice:
    """The Choice behind a Key; raises InvalidArgument unless the same is chosen here."""
    found = registry.choices(key.spec)
    for choice in found:
        if choice.key.same_but_toolchain(key):
            return choice
    raise InvalidArgument(f"to warm {key.name} for {key.spec}",
                          supported=f"the choice here: {' or '.join(choice.key.name for choice in found)}",
                          differs="its template, variant or tunings are others than here",
                          remedy="make the Keys where they are warmed, with the same version and tunings")


def _device(device: torch.device | str | int | None) -> torch.device:
    """With its index."""
    found = torch.device("cuda" if device is None else f"cuda:{device}" if isinstance(device, int) else device)
    if found.type != "cuda":
        raise InvalidArgument(f"device={device!r}", supported="a CUDA device", differs=f"it is a {found.type} device",
                              remedy="the reference on CPU tensors needs no kernel")
    if not torch.cuda.is_available():
        raise InvalidArgument(f"kernels on {found}", supported="a machine with an NVIDIA GPU and a CUDA build of torch",
                              differs="torch.cuda.is_available() is false",
                              remedy="`jitmla doctor` says what is missing; `jitmla prewarm` needs no GPU")
    return found if found.index is not None else torch.device("cuda", torch.cuda.current_device())


@functools.cache
def arch_of(device: torch.device) -> str:
    """The arch of the tensors' device (not of the current one); raises UnknownArch."""
    return arch.of_capability(*torch.cuda.get_device_capability(device))


@functools.cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of the device. From here on, launch arguments tuned on its kind are used."""
    properties = torch.cuda.get_device_properties(device)
    tune.adopt(properties.name, properties.multi_processor_count)
    return properties.multi_processor_count

