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

LISTED = "docs/schema.md lists the fields and their values"  # what mends a --spec

Model = Annotated[str | None, Option("--model", metavar="NAME|PATH", help="A known model, or the path of its Hugging "
                                     "Face config.json.")]
Tp = Annotated[int, Option("--tp", metavar="N", min=1, help="Ranks that share the model's heads.")]
PageSize = Annotated[list[int] | None, Option("--page-size", metavar="N", min=1, help="Page size of the engine's "
                                              "cache; repeat it for several. Default: every size that is served.")]
MaxSQ = Annotated[int | None, Option("--max-s-q", metavar="N", min=1, help="Most query tokens per request (1 + draft "
                                     f"tokens). Default: {models.MAX_S_Q}.")]
Dtype = Annotated[str | None, Option("--dtype", metavar="DTYPE", help="bf16 or fp16. Default: the model's.")]
Uses = Annotated[list[str] | None, Option("--uses", metavar="NAME", help="What the server uses beside mla_decode, "
                                          f"of {', '.join(models.USES)}; repeat it for several.")]
Op = Annotated[str | None, Option("--op", metavar="OP", help="Instead of --model: one op, described by --spec.")]
Facts = Annotated[list[str] | None, Option("--spec", metavar="FIELD=VALUE", help="One field of the Spec; repeat it for "
                                           "all but op and arch (docs/schema.md).")]


def archs(text: str) -> list[str]:
    """The names in `sm_90a,sm_100a`; raises UnknownArch."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in found:
        arches.check(name)
    return found


def of_model(model: str, tp: int, arch: str, page_sizes: Sequence[int] | None, max_s_q: int | None,
             dtype: str | None, uses: Sequence[str] | None) -> list[Spec]:
    """Every Spec that serving the model can reach; raises UnknownModel, UnknownArch and InvalidArgument."""
    try:
        return models.specs_for(model, tp=tp, arch=arch, page_sizes=page_sizes or models.PAGE_SIZES,
                                max_s_q=max_s_q or models.MAX_S_Q, dtype=dtype, uses=uses or ())
    except SchemaViolation as error:
        raise _misput(f"--model {model} with these options", error) from error


def command(model: str, tp: int, arch: str, page_sizes: Sequence[int] | None, max_s_q: int | None, dtype: str | None,
            uses: Sequence[str] | None) -> str:
    """What stores every kernel of `of_model`."""
    given = [("model", model), ("tp", tp), ("arch", arch), *(("page-size", n) for n in page_sizes or ()),
             ("max-s-q", max_s_q), ("dtype", dtype), *(("uses", name) for name in uses or ())]
    return "jitmla prewarm " + " ".join(f"--{name} {value}" for name, value in given if value is not None)


def of_assignments(op: str, arch: str, assignments: list[str]) -> Spec:
    """The Spec that --spec options describe; raises InvalidArgument, and UnknownArch."""
    arches.check(arch)
    try:
        fields = schema.spec_fields(op)
        facts: dict[str, Any] = {}
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            if not equals or name not in fields or name in ("op", "arch"):
                raise SchemaViolation(assignment, remedy=LISTED,
                                      supported=", ".join(f"{n}=..." for n in fields if n not in ("op", "arch")),
                                      differs=f"{name!r} has no value" if name in fields and not equals else
                                      f"{op} has no field {name!r} that --spec sets")
            facts[name] = _value(fields[name], text)
        return Spec.of(op, arch=arch, **facts)
    except SchemaViolation as error:
        raise _misput(" ".join([f"--op {op}", *(f"--spec {a}" for a in assignments)]), error) from error


def of_file(file: Path, archs: list[str]) -> list[Spec]:
    """The Specs in a file (`-`: stdin): JSON lines as `jitmla prewarm --json` prints them, or a list of Specs as JSON
    objects. With `archs`, each of them for each of these archs instead of its own. Raises InvalidArgument."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _not_keys(file, str(error), "name a file that holds them, or - for stdin") from error
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


def _not_keys(file: Path, differs: str, remedy: str = "docs/schema.md lists the fields of a Spec and their values"
              ) -> InvalidArgument:
    return InvalidArgument(f"--keys-from {file}", supported="lines of `jitmla prewarm --json`, or a JSON list of Specs",
                           differs=differs, remedy=remedy)


def _misput(asked: str, error: SchemaViolation) -> InvalidArgument:
    """A SchemaViolation as what it is here: a fault of the command line."""
    return InvalidArgument(asked, supported=error.supported or "a value for every field of the Spec, and no other",
                           differs=error.differs, remedy=LISTED)


def _value(field: dict[str, Any], text: str) -> Any:
    """`text` as the type that the field of the schema has; as it stands when it does not fit."""
    if field.get("type") == "boolean":
        return {"true": True, "false": False}.get(text, text)
    if field.get("type") == "integer" or any(isinstance(value, int) for value in field.get("enum", ())):
        return int(text) if text.isdecimal() else text
    return text
