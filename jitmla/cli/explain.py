"""`jitmla cache explain`: who serves a request, which layer holds the kernel, and what differs when none does."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer import Option

from .. import why
from ..errors import NoTemplate
from ..spec import Spec
from ..store import Store
from . import output, requests


@output.reports_errors
def explain(
    arch: Annotated[str, Option(metavar="ARCH", help="GPU architecture, such as sm_90a (H100, H200).")],
    model: requests.Model = None,
    tp: requests.Tp = 1,
    page_size: requests.PageSize = None,
    max_s_q: requests.MaxSQ = None,
    dtype: requests.Dtype = None,
    uses: requests.Uses = None,
    op: requests.Op = None,
    spec: requests.Facts = None,
    backend: Annotated[str, Option(metavar="NAME", help="As in the call.")] = "auto",
    as_json: output.Json = False,
) -> None:
    """Explain why a request is a hit or a miss.

    Says which template and variant serve it and why, which layer of the cache holds the kernel, and on a miss which
    stored Keys come nearest, field by field. With --model, a line for each kernel that is stored, and at the end what
    stores the others. Exit code 1 when something is not stored, or not served."""
    if (model is None) == (op is None):
        raise typer.BadParameter("give either --model, or --op with --spec")
    asked = (model or "", tp, arch, page_size, max_s_q, dtype, uses)
    specs = [requests.of_assignments(op, arch, spec or [])] if op is not None else requests.of_model(*asked)
    store = Store()
    told: set[str | None] = set()
    missing = unserved = False
    for each in specs:
        try:
            found = why.explain(each, backend, store)
        except NoTemplate as error:
            if model is None:
                raise
            unserved = True
            output.json_line(error.as_dict()) if as_json else output.line(f"{error}\n")
            continue
        missing |= not found["cached"]
        if as_json:
            output.json_line(found)
        elif not found["cached"] or model is None:
            _tell(each, found)
        elif found["key"] not in told:  # several Specs may share a Key
            output.line(f"stored {found['key'][:output.SHORT]} {found['template']}, {found['variant']}, in "
                        f"{found['layer']}: {output.facts(found['spec'])}")
        told.add(found["key"])
    if missing and model is not None and not as_json:
        output.line(f"to store all that is missing: {requests.command(*asked)}")
    if missing or unserved:
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
