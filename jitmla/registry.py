"""Reads the template cards and chooses who serves a Spec: `choose(spec)` -> Choice, or NoTemplate with the reason.

Most Specs have one Choice. Ops with a rule (jitmla.pick) have one for each call: `choose(spec, sizes=...)`, and
`choices(spec)` are all that their calls can get. Tunings go before the card and the rule, for both.

A card (`templates/<op>/card.toml`) is the one statement of what exists. docs/templates.md describes its fields.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import card, pick, render, schema, toolchain, tune
from .errors import InvalidTemplate, NoTemplate
from .events import emit
from .key import Key
from .resources import TEMPLATES
from .spec import Spec

CARD = "card.toml"
TABLE = "\n[[template]]\n"  # begins a template in a card


@dataclass(frozen=True)
class Variant:
    """One row of a template's config table."""

    name: str
    when: dict[str, list[Any]]
    constants: dict[str, Any]
    threads: int
    smem_bytes: int
    max_registers: int
    max_spill_bytes: int = 0


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
    arguments: str = "plain"

    @property
    def path(self) -> Path:
        return TEMPLATES / self.op / f"{self.name}.py"

    @functools.cached_property
    def source(self) -> str:
        return self.path.read_bytes().decode()  # the fastest way to read a text

    @functools.cached_property
    def digest(self) -> str:
        return render.digest(self.source, read_common, self.name)

    def misses(self, spec: Spec) -> list[str]:
        """Every reason why this template does not serve `spec`; empty when it does."""
        found = [] if spec.arch in self.archs else [f"arch={spec.arch} (has {', '.join(self.archs)})"]
        found += [f"{field}={spec[field]} (has {', '.join(map(str, values))})"
                  for field, values in self.supports.items() if spec[field] not in values]
        found += [f"{name}={spec[name]} (has {field['default']})"
                  for name, field in schema.spec_fields(spec.op).items()
                  if "default" in field and name not in self.supports and spec[name] != field["default"]]
        found += [f"{a}={spec[a]} with {b}={spec[b]} (needs them equal)" for a, b, *other in self.equal
                  if spec[a] != spec[b] and spec[a] not in other]
        if not found and self.variant(spec) is None:
            found = ["no row of its config table fits"]
        return found

    def variant(self, spec: Spec) -> Variant | None:
        """The first row of the config table whose conditions hold."""
        return next(iter(self.fitting(spec)), None)

    def fitting(self, spec: Spec) -> list[Variant]:
        """Every row of the config table whose conditions hold."""
        return [v for v in self.variants if all(spec[f] in values for f, values in v.when.items())]

    def constants(self, spec: Spec, variant: Variant) -> dict[str, Any]:
        return {**{name: spec[field] for name, field in self.from_spec.items()}, **variant.constants}


@dataclass(frozen=True)
class Choice:
    """Who serves a Spec, and with what constants."""

    spec: Spec
    template: Template
    variant: Variant
    why: str = field(default="the first in the card", compare=False)

    @property
    def name(self) -> str:
        """As tunings and the rules of jitmla.pick have it."""
        return f"{self.template.name}/{self.variant.name}"

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
    try:
        return path.read_bytes().decode()
    except FileNotFoundError as e:
        raise InvalidTemplate(f"from common.{module} import ...", supported="the modules of templates/common",
                              differs=f"there is no {path}",
                              remedy="correct the import, or add the module") from e


def templates(op: str) -> tuple[Template, ...]:
    """The templates of an op, in the card's order, which is the order of preference; raises InvalidTemplate."""
    return tuple(each_template(op))


def each_template(op: str) -> Iterator[Template]:
    """The same one by one, each read when it is asked for: a whole card can take a sixth of the time that a new process
    has for its first kernel."""
    try:
        yield from (_template(op, number) for number in range(len(_tables(op))))
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise InvalidTemplate(f"the card of {op!r}", supported="see docs/templates.md",
                              differs=f"{TEMPLATES / op / CARD}: {e!r}", remedy="correct the card") from e


@functools.cache
def _tables(op: str) -> list[str]:
    """The text of each template in a card."""
    text = (TEMPLATES / op / CARD).read_bytes().decode()
    head, *tables = text.split(TABLE)
    if not tables or list(card.loads(head)) != ["op"]:
        raise ValueError(f"not an op and behind it its templates, each after a line {TABLE.strip()}")
    return tables


@functools.cache
def _template(op: str, number: int) -> Template:
    tables = _tables(op)
    try:
        (fields,) = card.loads(TABLE + tables[number])["template"]
    except card.TOMLDecodeError:
        card.loads((TEMPLATES / op / CARD).read_bytes().decode())  # which says the line
        raise
    variants = [Variant(**{"when": {}, "constants": {}, **v}) for v in fields.pop("variant")]
    return Template(op=op, variants=variants, **{"options": "", "equal": [], **fields})


def ops() -> list[str]:
    """The ops that have a card."""
    return sorted(p.parent.name for p in TEMPLATES.glob(f"*/{CARD}"))


def backends(op: str) -> list[str]:
    """The backend names that templates of `op` go by, without `auto` and `reference`."""
    return list(dict.fromkeys(t.backend for t in templates(op)))


def candidates(spec: Spec, backend: str = "auto") -> list[Choice]:
    """Every template and variant (of `backend`, unless that is "auto") that can serve `spec`, in the cards' order."""
    return list(_candidates(spec, backend))


def _candidates(spec: Spec, backend: str) -> Iterator[Choice]:
    return (Choice(spec, template, variant) for template in each_template(spec.op)
            if backend in ("auto", template.backend) and not template.misses(spec)
            for variant in template.fitting(spec))


def choose(spec: Spec, backend: str = "auto", sizes: Mapping[str, int] | None = None) -> Choice:
    """Who serves `spec`: the tuned candidate, else what the rule says, else the first one; raises NoTemplate.

    sizes: those of a call, for an op with a rule in jitmla.pick; raises InvalidArgument when they are not its sizes.
    This is the only predicate there is: `auto` and a named backend use the same one.
    """
    serving = _candidates(spec, backend)
    first = next(serving, None)
    if first is None:
        raise _no_template(spec, backend, [t for t in templates(spec.op) if backend in ("auto", t.backend)])
    tuned = tune.pick(spec, sizes or {})
    if tuned is None and not sizes:
        return first
    found = [first, *serving]
    if sizes:
        fitting = pick.fitting(spec.op, [c.name for c in found], sizes)
        found = [c for c in found if c.name in fitting]
    for choice in found:
        if choice.name == tuned:
            return replace(choice, why="tuned")
    if tuned is not None and backend == "auto":
        emit("degrade", what="tuned variant", reason=f"{tuned} does not serve it", spec=str(spec))
    if not sizes:
        return first
    found = [c for c in found if c.template.backend == first.template.backend]
    best, why = pick.best(spec.op, [c.name for c in found], sizes)
    return next(replace(c, why=why) for c in found if c.name == best)


def choices(spec: Spec, backend: str = "auto") -> list[Choice]:
    """Everything that calls of `spec` can get: one Choice, or with a rule each candidate of the same backend. Raises
    NoTemplate."""
    chosen = choose(spec, backend)
    if spec.op not in pick.RULES:
        return [chosen]
    served = [c for c in candidates(spec, backend) if c.template.backend == chosen.template.backend]
    names = pick.among(spec.op, [c.name for c in served])
    return [c for c in served if c.name in names]


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
