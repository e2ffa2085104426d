"""From the options of a command to the Specs that they ask for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from .. import arch as arches
from .. import models, schema
from ..errors import InvalidArgument, JitmlaError, SchemaViolation
from ..spec import Spec

Uses = Annotated[list[str] | None, Option("--uses", metavar="NAME", help="What the server uses beside mla_decode, "
                                          f"of {', '.join(models.USES)}; repeat it for several.")]


def archs(text: str) -> list[str]:
    """The names in `sm_90a,sm_100a`; raises UnknownArch."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in found:
        arches.check(name)
    return found


def of_model(model: str, tp: int, arch: str, page_sizes: Sequence[int], max_s_q: int | None,
             dtype: str | None, uses: Sequence[str] = ()) -> list[Spec]:
    """Every Spec that serving the model can reach; raises UnknownModel, UnknownArch and InvalidArgument."""
    try:
        return models.specs_for(model, tp=tp, arch=arch, page_sizes=page_sizes, max_s_q=max_s_q or models.MAX_S_Q,
                                dtype=dtype, uses=uses)
    except SchemaViolation as error:
        raise _misput(f"--model {model} with these options", error) from error


def of_assignments(op: str, arch: str, assignments: list[str]) -> Spec:
    """The Spec that --spec options describe; raises InvalidArgument, and UnknownArch."""
    arches.check(arch)
    try:
        fields = schema.spec_fields(op)
        facts: dict[str, Any] = {}
        for assignment in assignments:
            name, _, text = assignment.partition("=")
            facts[name] = _value(fields.get(name, {}), text)
        return Spec.of(op, arch=arch, **facts)
    except SchemaViolation as error:
        raise _misput(f"--op {op} " + " ".join(f"--spec {a}" for a in assignments), error) from error


def of_file(file: Path, archs: list[str]) -> list[Spec]:
    """The Specs in a file (`-`: stdin): JSON lines as `jitmla prewarm --json` prints them, or a list of Specs as JSON
    objects. With `archs`, each of them for each of these archs instead of its own. Raises InvalidArgument."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _not_keys(file, str(error)) from error
    found = []
    for place, item in _items(file, text):
        facts = item.get("spec", item) if isinstance(item, dict) else item
        if not isinstance(facts, dict):
            raise _not_keys(file, f"{place}: {json.dumps(item)[:80]} is no Spec")
        for arch in archs or [facts.get("arch")]:
            try:
                found.append(Spec.from_dict({**facts, "arch": arch}))
            except JitmlaError as error:
                raise _not_keys(file, f"{place}: {error.differs or error.asked}") from error
    return found


def _items(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, JSON value) of everything in the file."""
    if text.lstrip().startswith("["):
        try:
            yield from ((f"item {i}", item) for i, item in enumerate(json.loads(text)))
        except ValueError as error:
            raise _not_keys(file, str(error)) from error
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise _not_keys(file, f"line {number}: {error}") from error


def _not_keys(file: Path, differs: str) -> InvalidArgument:
    return InvalidArgument(f"--keys-from {file}", supported="lines of `jitmla prewarm --json`, or a JSON list of Specs",
                           differs=differs, remedy="docs/schema.md lists the fields of a Spec and their values")


def _misput(asked: str, error: SchemaViolation) -> InvalidArgument:
    """A SchemaViolation as what it is here: a fault of the command line."""
    return InvalidArgument(asked, supported=error.supported or "a value for every field of the Spec, and no other",
                           differs=error.differs, remedy="docs/schema.md lists the fields and their values")


def _value(field: dict[str, Any], text: str) -> Any:
    """`text` as the type that the field of the schema has; as it stands when it does not fit."""
    if field.get("type") == "boolean":
        return {"true": True, "false": False}.get(text, text)
    if field.get("type") == "integer" or any(isinstance(value, int) for value in field.get("enum", ())):
        return int(text) if text.isdecimal() else text
    return text
