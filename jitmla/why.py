"""Why a Spec is served as it is: the data behind `jitmla.explain` and `jitmla cache explain`."""

from __future__ import annotations

from typing import Any

from . import failures, pick, registry
from .errors import InvalidArgument
from .key import Key, diff
from .spec import Spec
from .store import Store


def explain(spec: Spec, backend: str = "auto", store: Store | None = None, **sizes: int) -> dict[str, Any]:
    """Which template and variant serve `spec` and why, under which Key, and which layer of the cache holds it.

    backend: as in the call. store: a cache other than the one of this process.
    sizes: those of a call, for an op that picks by them (jitmla.pick); without them such an op also has `variants`, all
    that its calls can get. An op of several forms has `form`: the one that calls of these sizes take, and why. On a
    miss: `nearest`, the stored Keys that differ least with the fields that differ, and `failed`, the error of a
    compile that failed before. Raises NoTemplate with the reason when nothing serves it,
    InvalidArgument for sizes that are not those of the op's rule, and CacheUntrusted.
    """
    store = store or Store()
    form = {}
    if spec.op in pick.FORMS:
        form, sizes = {"form": _form(pick.FORMS[spec.op], sizes)}, {}
    choice = registry.choose(spec, backend, sizes)
    by_call = spec.op in pick.RULES and not sizes
    template, variant = choice.template, choice.variant
    entry = store.find(choice.key)
    passed_over = {t.name: t.misses(spec) for t in registry.templates(spec.op)
                   if backend in ("auto", t.backend) and t.misses(spec)}
    known = choice.key.toolchain is not None
    failed = failures.recall(store, choice.key) if entry is None and known else None
    return {"spec": spec.as_dict(), "template": template.name, "variant": variant.name, "summary": template.summary,
            "why": f"by {', '.join(pick.RULES[spec.op].sizes)} of the call" if by_call else choice.why,
            **({"variants": {c.name: c.key.digest if known else None for c in registry.choices(spec, backend)}}
               if by_call else {}),
            **form,
            "supported": {"arch": template.archs, **template.supports, **variant.when}, "passed_over": passed_over,
            "key": entry.key.digest if entry else choice.key.digest if known else None,
            "cached": entry is not None, "path": str(entry.path) if entry else None,
            "layer": str(entry.path.parents[3]) if entry and entry.path else None,
            "nearest": [] if entry else nearest(choice.key, store),
            "failed": failed.as_dict() if failed else None}


def _form(form: pick.Form, sizes: dict[str, int]) -> str:
    """Which one calls of these sizes take, and why."""
    if not sizes:
        return f"by {', '.join(form.sizes)} of the call"
    if set(sizes) != set(form.sizes):
        raise InvalidArgument(f"sizes {', '.join(sizes)}", supported=", ".join(form.sizes),
                              differs=f"not the same: {', '.join(sorted(set(sizes) ^ set(form.sizes)))}",
                              remedy="give all of these, or none")
    return ": ".join(form.best(**sizes))


def nearest(key: Key, store: Store, count: int = 3) -> list[dict[str, Any]]:
    """The stored Keys that differ least from `key`, with the layer that holds each, and what differs: field, wanted,
    stored. Of constants only when nothing else differs: they follow from the rest."""
    wanted = _fields(key)
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for layer in store.layers():
        for listing in layer.entries():
            if listing.key is None or listing.key.spec.op != key.spec.op or listing.digest in found:
                continue
            stored = _fields(listing.key)
            if key.toolchain is None:
                stored.pop("toolchain")
            every = diff(wanted, stored)
            telling = [d for d in every if not d[0].startswith("variant.constants.")] or every
            found[listing.digest] = (len(telling), {
                "key": listing.digest, "layer": str(layer.root),
                "differs": [{"field": f, "wanted": a, "stored": b} for f, a, b in telling]})
    return [row for _, row in sorted(found.values(), key=lambda pair: (pair[0], pair[1]["key"]))[:count]]


def _fields(key: Key) -> dict[str, Any]:
    """`key.as_dict()`, also for a Key without a toolchain."""
    fields = {"spec": key.spec.as_dict(), "template": {"name": key.template, "digest": key.template_digest},
              "variant": {"name": key.variant, "constants": dict(key.constants)}}
    return fields if key.toolchain is None else {**fields, "toolchain": dict(key.toolchain)}
