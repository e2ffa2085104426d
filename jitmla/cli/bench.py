"""`jitmla bench`: hands its arguments to jitmla.bench, which needs torch and is imported only then."""

from __future__ import annotations

import typer


def bench(context: typer.Context) -> None:
    """Measure the kernels on this GPU."""
    from ..bench.__main__ import main
    raise typer.Exit(main(context.args))
