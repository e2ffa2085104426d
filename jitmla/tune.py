"""What was measured to be best, apart from binaries: which variant serves a Spec, and with what launch arguments.

A tunings file is JSON that a person can diff: the GPU it was measured on, and one line for each choice, with median,
spread and date. `jitmla tune` writes one. Nothing here measures: a choice is an input, and the same on all ranks that
were given the same tunings. Without any, the order of the card and the rules of jitmla.schedule decide.

    variants   apply to every Spec of the arch they were measured on, so that a machine without a GPU lists those Keys;
               of an op that picks by the sizes of a call (jitmla.pick), where these are in the ranges under `sizes`
    launches   apply on a GPU of the same name and number of multiprocessors
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from . import env, misses
from .errors import InvalidArgument, InvalidTunings
from .events import emit
from .resources import TUNINGS
from .spec import Spec

FORMAT = 1
OFF = "off"  # as a value of JITMLA_TUNINGS: the ones that come with jitmla are not used either
ARGUMENTS = ("parts", "fixed", "least", "bias")  # of a Launch, those that are tuned
Rule = TypeVar("Rule", bound=Callable[..., Any])

_documents: list[dict[str, Any]] | None = None  # None: not asked for yet
_explicit = False  # the caller or the environment named them
_variants: dict[tuple[str, tuple[tuple[str, Any], ...]], list[tuple[dict[str, list[int]], str]]] = {}
_launches: dict[tuple[int, int], list[dict[str, Any]]] = {}  # (multiprocessors, latent) -> entries, of adopted GPUs
_adopted: dict[tuple[str, int], None] = {}  # (name, multiprocessors) of the GPUs of this process
changed: list[Callable[[], None]] = []  # called after another choice of tunings


def use_tunings(source: str | os.PathLike[str] | Mapping[str, Any] | Iterable[Mapping[str, Any]] | None) -> None:
    """Take these tunings from now on. source: a file, its content as a dict, a list of such dicts (`tunings()` of
    another rank), {} for none at all, or None for the default (JITMLA_TUNINGS, else the ones that come with jitmla).

    Call it before anything is warmed or captured: a captured graph keeps what it was captured with.
    Raises InvalidTunings; InvalidArgument after `jitmla.freeze()`.
    """
    global _documents, _explicit
    if misses.frozen():
        raise InvalidArgument("use_tunings after jitmla.freeze()", supported="tunings that are set before warming",
                              differs="the kernels are chosen", remedy="call use_tunings first, then warm, then freeze")
    if source is None:
        found, explicit = _default()
    elif isinstance(source, (str, os.PathLike)):
        found, explicit = [_read(Path(source))], True
    else:
        documents = [source] if isinstance(source, Mapping) else list(source)
        found, explicit = [_checked(dict(d), "the tunings") for d in documents if d], True
    first, _documents, _explicit = _documents is None, found, explicit
    _variants.clear()
    for document in found:
        for entry in document["variants"]:
            at = document["gpu"]["arch"], _facts(entry["spec"])
            _variants.setdefault(at, []).append((entry.get("sizes", {}), entry["variant"]))
    _launches.clear()
    for gpu in _adopted:
        _adopt(*gpu)
    for callback in () if first else changed:  # before, nobody has chosen anything
        callback()


def tunings() -> list[dict[str, Any]]:
    """The tunings in use, as `use_tunings` takes them: broadcast this from one rank to the others."""
    if _documents is None:
        use_tunings(None)
    return list(_documents or ())


def pick(spec: Spec, sizes: Mapping[str, int] = MappingProxyType({})) -> str | None:
    """The tuned choice for `spec` and these sizes of a call, as "template/variant", or None. The first entry counts."""
    tunings()
    for ranges, variant in _variants.get((spec.arch, _facts(spec.as_dict())), ()):
        if all(name in sizes and low <= sizes[name] <= high for name, (low, high) in ranges.items()):
            return variant
    return None


def naming(spec: Spec, variant: str) -> dict[str, Any]:
    """Tunings by which `spec` runs this variant whatever the sizes of a call: for measuring it, and for tests."""
    return {"format": FORMAT, "gpu": {"name": "any", "arch": spec.arch, "sms": 1}, "launches": [],
            "variants": [{"spec": dict(_facts(spec.as_dict())), "variant": variant}]}


def adopt(gpu: str, sms: int) -> None:
    """Use the launch arguments that were measured on this kind of GPU."""
    tunings()
    if (gpu, sms) not in _adopted:
        _adopted[gpu, sms] = None
        _adopt(gpu, sms)


def _adopt(gpu: str, sms: int) -> None:
    fitting = [d for d in _documents or () if (d["gpu"]["name"], d["gpu"]["sms"]) == (gpu, sms)]
    for document in fitting:
        for entry in document["launches"]:
            _launches.setdefault((sms, entry["kv_lora_rank"]), []).append(entry)
    if _explicit and _documents and not fitting:
        measured = ", ".join(f"{d['gpu']['name']} ({d['gpu']['sms']} multiprocessors)" for d in _documents)
        emit("degrade", what="tuned launch arguments", reason=f"measured on {measured}; this is {gpu} ({sms})")


def tuned(rule: Rule) -> Rule:
    """Decorates a rule (rows, batch, sms, latent, tile_rows) -> Launch: what was measured replaces what the rule says,
    unless the row tiles are not the usual ones."""

    @functools.wraps(rule)
    def launch_args(rows: int, batch: int, sms: int, latent: int = 512, tile_rows: int = 0) -> Any:
        launch = rule(rows, batch, sms, latent, tile_rows)
        for entry in () if tile_rows else _launches.get((sms, latent), ()):
            if entry["rows"][0] <= rows <= entry["rows"][1] and entry["batch"][0] <= batch <= entry["batch"][1]:
                return launch._replace(**entry["launch"])
        return launch

    return launch_args  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------- documents


def _default() -> tuple[list[dict[str, Any]], bool]:
    named = env.TUNINGS.get()
    if named == OFF:
        return [], True
    return ([_read(Path(named))], True) if named else ([_read(TUNINGS / name) for name in _shipped()], False)


def _shipped() -> list[str]:
    return sorted(name for name in os.listdir(TUNINGS) if name.endswith(".json"))


def _read(path: Path) -> dict[str, Any]:
    try:
        return _checked(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as e:
        if isinstance(e, InvalidTunings):
            raise
        raise _invalid(str(path), str(e)) from e


def _facts(spec: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((name, value) for name, value in spec.items() if name != "arch"))


def _invalid(where: str, differs: str) -> InvalidTunings:
    return InvalidTunings(where, supported="tunings as `jitmla tune` writes them", differs=differs,
                          remedy=f"measure again with `jitmla tune`, or set {env.TUNINGS.name}={OFF}")


def _checked(document: Any, where: str) -> dict[str, Any]:
    """The document, if a kernel can be launched with all it says; raises InvalidTunings."""
    try:
        if document["format"] != FORMAT:
            raise ValueError(f"format is {document['format']!r}, this version reads {FORMAT}")
        sms = document["gpu"]["sms"]
        if not (isinstance(document["gpu"]["name"], str) and isinstance(document["gpu"]["arch"], str) and sms >= 1):
            raise ValueError("gpu needs name, arch and sms")
        for entry in document["variants"]:
            if not isinstance(entry["spec"]["op"], str) or len(entry["variant"].split("/")) != 2:
                raise ValueError(f"not a choice of a variant: {entry}")
            if not all(len(r) == 2 and type(r[0]) is type(r[1]) is int and r[0] <= r[1]
                       for r in entry.get("sizes", {}).values()):
                raise ValueError(f"not ranges of sizes: {entry}")
        for entry in document["launches"]:
            _check_launch(entry, sms)
        return document
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise _invalid(where, f"{e.args[0]!r} is missing" if isinstance(e, KeyError) else str(e)) from e


def _check_launch(entry: Mapping[str, Any], sms: int) -> None:
    """Raise ValueError unless the numbers are such as the rule of jitmla.schedule could give."""
    from .schedule import MAX_PARTS, TILE_ROWS

    launch = entry["launch"]
    ranges = [entry["rows"], entry["batch"]]
    numbers = [*launch.values(), *(n for pair in ranges for n in pair), entry["kv_lora_rank"]]
    if not all(type(n) is int for n in numbers) or any(len(r) != 2 or not 1 <= r[0] <= r[1] for r in ranges):
        raise ValueError(f"not a choice of launch arguments: {entry}")
    tiles = -(-entry["rows"][1] // TILE_ROWS)
    least = {"parts": 1, "fixed": 0, "least": 1, "bias": 0}
    if not set(launch) <= set(ARGUMENTS) or any(value < least[name] for name, value in launch.items()):
        raise ValueError(f"launch arguments out of range: {launch}")
    if launch.get("parts", 1) > min(MAX_PARTS, max(1, sms // tiles)):
        raise ValueError(f"parts={launch['parts']} for {tiles} row tiles on {sms} multiprocessors")
