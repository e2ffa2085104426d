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
def kernels(as_json: output.Json = False) -> None:
    """List the kernels that exist.

    One row for each op, arch and variant, with what each serves."""
    if as_json:
        for row in rows():
            output.json_line(row)
        return
    columns = ("op", "arch", "backend", "template", "variant")
    output.table((*columns, "serves"), [(*(row[c] for c in columns), _serves(row["serves"])) for row in rows()])


def _serves(supports: dict[str, list[Any]]) -> str:
    return " ".join(f"{name}={','.join(str(v).lower() for v in values)}" for name, values in supports.items())
