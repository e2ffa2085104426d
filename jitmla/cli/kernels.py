"""`jitmla kernels`: what exists, read from the template cards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from typer import Argument, Option

from .. import arch as arches
from .. import registry
from ..errors import InvalidArgument
from . import output


def rows(op: str | None, arch: str | None) -> Iterator[tuple[registry.Template, registry.Variant, list[str]]]:
    """(template, variant, its archs) of `op` or of all ops, on `arch` or on all; raises InvalidArgument and
    UnknownArch."""
    if op not in (None, *registry.ops()):
        raise InvalidArgument(f"the kernels of {op!r}", supported=", ".join(registry.ops()),
                              differs="there is no such op", remedy="`jitmla kernels` lists the kernels of all")
    wanted = arches.NAMES if arch is None else (arches.check(arch),)
    for each in registry.ops() if op is None else [op]:
        for template in registry.templates(each):
            for variant in template.variants:
                archs = [a for a in template.archs if a in variant.when.get("arch", wanted) and a in wanted]
                if archs:
                    yield template, variant, archs


@output.reports_errors
def kernels(
    op: Annotated[str | None, Argument(metavar="[OP]", help="Only those of this op.", show_default=False)] = None,
    arch: Annotated[str | None, Option(metavar="ARCH", help="Only those for this GPU architecture, such as sm_90a.")
                    ] = None,
    as_json: output.Json = False,
) -> None:
    """List the kernels that exist.

    One row for each variant, in order of preference, with what it serves; with --json one for each arch as well."""
    found = list(rows(op, arch))
    if as_json:
        for template, variant, archs in found:
            for each in archs:
                output.json_line({"op": template.op, "arch": each, "backend": template.backend,
                                  "template": template.name, "variant": variant.name,
                                  "serves": _serves(template, variant), "threads": variant.threads,
                                  "smem_bytes": variant.smem_bytes, "summary": template.summary})
        return
    if not found:
        output.line(f"no kernels{f' of {op}' if op else ''} for {arch}")
        return
    output.table(("op", "backend", "template", "variant", "arch", "serves"),
                 [(t.op, t.backend, t.name, v.name, ",".join(archs),
                   " ".join(f"{name}={','.join(str(value).lower() for value in values)}"
                            for name, values in _serves(t, v).items())) for t, v, archs in found])


def _serves(template: registry.Template, variant: registry.Variant) -> dict[str, list[Any]]:
    return {name: values for name, values in {**template.supports, **variant.when}.items() if name != "arch"}
