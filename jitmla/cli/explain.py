"""`jitmla cache explain`: who serves a request, which layer holds the kernel, and what differs when none does."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer import Option

from .. import models, why
from ..spec import Spec
from ..store import Store
from . import output, requests


@output.reports_errors
def explain(
    arch: Annotated[str, Option(metavar="ARCH", help="GPU architecture, such as sm_90a (H100, H200).")],
    model: Annotated[str | None, Option(metavar="NAME|PATH", help="A known model, or the path of its config.json: "
                                        "every Spec that it can reach.")] = None,
    tp: Annotated[int, Option(metavar="N", min=1, help="Ranks that share the model's heads.")] = 1,
    op: Annotated[str | None, Option(metavar="OP", help="Instead of --model: one op, described by --spec.")] = None,
    spec: Annotated[list[str] | None, Option(metavar="FIELD=VALUE", help="One field of the Spec; repeat it for all but "
                                             "op and arch (docs/schema.md).")] = None,
    backend: Annotated[str, Option(metavar="NAME", help="As in the call.")] = "auto",
    as_json: output.Json = False,
) -> None:
    """Explain why a request is a hit or a miss.

    Says which template and variant serve it and why, which layer of the cache holds the kernel, and on a miss which
    stored Keys come nearest, field by field. With --model, what is stored takes a line. Exit code 1 when something is
    not stored."""
    if (model is None) == (op is None):
        raise typer.BadParameter("give either --model, or --op with --spec")
    specs = ([requests.of_assignments(op, arch, spec or [])] if op is not None
             else requests.of_model(model or "", tp, arch, models.PAGE_SIZES, None, None))
    store = Store()
    told: set[str | None] = set()
    missing = False
    for each in specs:
        found = why.explain(each, backend, store)
        missing |= not found["cached"]
        if as_json:
            output.json_line(found)
        elif found["cached"] and model is not None:
            if found["key"] not in told:  # several Specs may share a Key
                output.line(f"stored {found['key'][:output.SHORT]} {found['template']}, {found['variant']}, in "
                            f"{found['layer']}: {output.facts(found['spec'])}")
        else:
            _tell(each, found)
        told.add(found["key"])
    if missing:
        raise typer.Exit(1)


def _tell(spec: Spec, found: dict[str, Any]) -> None:
    key = (found["key"] or "unknown without a compiler")[:output.SHORT * 3]
    rows = [("spec", str(spec)), ("served by", f"{found['template']}, variant {found['variant']}: {found['summary']}"),
            ("supports", "; ".join(f"{n}: {', '.join(map(str, v))}" for n, v in found["supported"].items()))]
    rows += [("form", found["form"])] if "form" in found else []
    rows += [("passed over", f"{name}: {'; '.join(why_not)}") for name, why_not in found["passed_over"].items()]
    rows += [("key", key), ("stored in", found["layer"] or "no layer")]
    rows += [("nearest", f"{near['key'][:output.SHORT]} in {near['layer']}: " + "; ".join(
        f"{d['field']}: {d['wanted']} wanted, {d['stored']} stored" for d in near["differs"]))
        for near in found["nearest"]]
    if found["failed"]:
        rows.append(("failed", found["failed"]["differs"]))
    if not found["cached"]:
        facts = " ".join(f"--spec {n}={str(v).lower()}" for n, v in spec if n not in ("op", "arch"))
        rows.append(("to store it", f"jitmla prewarm --op {spec.op} --arch {spec.arch} {facts}"))
    for name, text in rows:
        output.line(f"{name:<12} {text}")
    output.line("")
