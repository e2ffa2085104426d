"""`jitmla kernels`: what exists, read from the template cards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import registry
from . import output


def rows() -> Iterator[dict[str, Any]]:
    """One row for each op, arch and variant."""
    for op in registry.ops():
        for template in registry.templates(op):
            for arch in template.archs:
                for variant in template.variants:
                    yield {"op": op, "arch": arch, "backend": template.backend, "template": template.name,
                           "variant": variant.name, "serves": {**template.supports, **variant.when},
                           "threads": variant.threads, "smem_bytes": variant.smem_bytes, "summary": template.summary}


@output.reports_errors
def kernels(as_json: bool = output.JSON) -> None:
    """List the kernels that exist: op, arch, variant, and what each serves."""
    if as_json:
        for row in rows():
            output.json_line(row)
        return
    output.table(("op", "arch", "backend", "template", "variant", "serves"),
                 [(r["op"], r["arch"], r["backend"], r["template"], r["variant"], _serves(r["serves"])) for r in rows()])


def _serves(supports: dict[str, list[Any]]) -> str:
    return " ".join(f"{name}={','.join(str(v).lower() for v in values)}" for name, values in supports.items())
