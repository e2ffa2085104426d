"""Reads the template cards and chooses who serves a Spec: `choose(spec)` -> Choice, or NoTemplate with the reason.

For most ops a Spec has one Choice. Where a card says `per_call`, several rows serve the same Spec, the host picks one
of them by the sizes of a call (jitmla/pick.py), and `choices(spec)` are all that it may pick.

A card (`templates/<op>/card.toml`) is the one statement of what exists. docs/templates.md describes its fields.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import render, toolchain
from .errors import InvalidTemplate, NoTemplate
from .key import Key
from .resources import TEMPLATES
from .spec import Spec

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


@dataclass(frozen=True)
class Variant:
    """One row of a template's config table."""

    name: str
    when: dict[str, list[Any]]
    constants: dict[str, Any]
    threads: int
    smem_bytes: int
    max_registers: int


@dataclass(frozen=True)
class Template:
    """One template as its card describes it."""

    op: str
    name: str
    summary: str
    backend: str
    archs: list[str]
    options: str
    supports: dict[str, list[Any]]
    equal: list[list[str]]
    from_spec: dict[str, str]
    variants: list[Variant]
    per_call: bool = False

    @property
    def path(self) -> Path:
        return TEMPLATES / self.op / f"{self.name}.py"

    @functools.cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @functools.cached_property
    def digest(self) -> str:
        return render.digest(self.source, read_common, self.name)

    def misses(self, spec: Spec) -> list[str]:
        """Every reason why this template does not serve `spec`; empty when it does."""
        found = [] if spec.arch in self.archs else [f"arch={spec.arch} (has {', '.join(self.archs)})"]
        found += [f"{field}={spec[field]} (has {', '.join(map(str, values))})"
                  for field, values in self.supports.items() if spec[field] not in values]
        found += [f"{a}={spec[a]} with {b}={spec[b]} (needs them equal)" for a, b in self.equal if spec[a] != spec[b]]
        if not found and not self.rows(spec):
            found = ["no row of its config table fits"]
        return found

    def variant(self, spec: Spec) -> Variant | None:
        """The first row of the config table whose conditions hold."""
        return next(iter(self.rows(spec)), None)

    def rows(self, spec: Spec) -> list[Variant]:
        """The rows of the config table whose conditions hold."""
        return [v for v in self.variants if all(spec[f] in values for f, values in v.when.items())]

    def constants(self, spec: Spec, variant: Variant) -> dict[str, Any]:
        return {**{name: spec[field] for name, field in self.from_spec.items()}, **variant.constants}


@dataclass(frozen=True)
class Choice:
    """Who serves a Spec, and with what constants."""

    spec: Spec
    template: Template
    variant: Variant

    @functools.cached_property
    def key(self) -> Key:
        constants = self.template.constants(self.spec, self.variant)
        return Key(self.spec, self.template.name, self.template.digest, self.variant.name,
                   tuple(sorted(constants.items())), toolchain.current(self.template.options))

    def source(self) -> str:
        """The rendered source of `key`."""
        header = (f"jitmla kernel {self.key.name} for {self.spec.arch}\nKey {self.key.digest}\n"
                  f"template {self.template.digest}")
        return render.render(self.template.source, dict(self.key.constants), read_common, header=header,
                             name=self.template.name)


def read_common(module: str) -> str:
    """The text of `templates/common/<module>.py`; raises InvalidTemplate."""
    path = TEMPLATES / "common" / f"{module}.py"
    if not path.is_file():
        raise InvalidTemplate(f"from common.{module} import ...", differs=f"there is no {path}")
    return path.read_text(encoding="utf-8")


@functools.cache
def templates(op: str) -> tuple[Template, ...]:
    """The templates of an op, in the card's order, which is the order of preference."""
    path = TEMPLATES / op / "card.toml"
    try:
        card = tomllib.loads(path.read_text(encoding="utf-8"))
        return tuple(_template(card["op"], t, card.get("per_call", False)) for t in card["template"])
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as e:
        raise InvalidTemplate(f"the card of {op!r}", supported="see docs/templates.md", differs=f"{path}: {e!r}") from e


def _template(op: str, fields: dict[str, Any], per_call: bool = False) -> Template:
    variants = [Variant(**{"when": {}, "constants": {}, **v}) for v in fields.pop("variant")]
    return Template(op=op, variants=variants, per_call=per_call, **{"options": "", "equal": [], **fields})


def ops() -> list[str]:
    """The ops that have a card."""
    return sorted(p.parent.name for p in TEMPLATES.glob("*/card.toml"))


def backends(op: str) -> list[str]:
    """The backend names that templates of `op` go by, without `auto` and `reference`."""
    return list(dict.fromkeys(t.backend for t in templates(op)))


def choose(spec: Spec, backend: str = "auto", variant: str | None = None) -> Choice:
    """The first template (of `backend`, unless that is "auto") that serves `spec`; raises NoTemplate.

    variant: for a card that says `per_call`, the row that was picked for the call.
    This is the only predicate there is: `auto` and a named backend use the same one.
    """
    found = choices(spec, backend)
    if variant is None:
        return found[0]
    for choice in found:
        if choice.variant.name == variant:
            return choice
    raise NoTemplate(f"{spec.op} on backend {backend!r} with variant {variant!r}",
                     supported=", ".join(c.variant.name for c in found), differs="no such row serves this Spec")


def choices(spec: Spec, backend: str = "auto") -> list[Choice]:
    """Everything that calls of `spec` can reach: one Choice, or with `per_call` every row that serves it, of the
    backend of the first template that does. Raises NoTemplate."""
    candidates = [t for t in templates(spec.op) if backend in ("auto", t.backend)]
    serving = [t for t in candidates if not t.misses(spec)]
    if not serving:
        raise _no_template(spec, backend, candidates)
    found = [Choice(spec, t, row) for t in serving if t.backend == serving[0].backend for row in t.rows(spec)]
    return found if serving[0].per_call else found[:1]


def _no_template(spec: Spec, backend: str, candidates: list[Template]) -> NoTemplate:
    required = ", ".join(f"{k}={v}" for k, v in spec if k != "op")
    remedy = "use backend='reference', or see `jitmla kernels` for what exists"
    if not candidates:
        return NoTemplate(f"{spec.op} on backend {backend!r}: {required}", supported=", ".join(backends(spec.op)),
                          differs=f"no template goes by {backend!r}", remedy=remedy)
    nearest = min(candidates, key=lambda t: len(t.misses(spec)))
    has = "; ".join([f"arch: {', '.join(nearest.archs)}"]
                    + [f"{k}: {', '.join(map(str, v))}" for k, v in nearest.supports.items()])
    return NoTemplate(f"{spec.op} on backend {backend!r}: {required}", supported=f"nearest {nearest.name}: {has}",
                      differs="; ".join(nearest.misses(spec)), remedy=remedy)
