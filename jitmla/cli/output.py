"""How the command prints: JSON objects for scripts, tables for people, the four parts of an error for both."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import typer

from ..errors import MISPUT, JitmlaError

Command = TypeVar("Command", bound=Callable[..., Any])

SHORT = 12  # digits of a digest that people see
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line, for scripts.")]


def line(text: str) -> None:
    """One line of a result."""
    print(text, flush=True)


def complain(text: str) -> None:
    """An error, on stderr."""
    print(f"jitmla: {text}", file=sys.stderr, flush=True)


def json_line(value: Any) -> None:
    """One JSON object on one line of stdout."""
    line(json.dumps(value))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout. Cells fold when the terminal is narrow; in a pipe each row is one line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        grid.add_row(*(Text(cell, overflow="fold") for cell in row))
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(grid)
        return
    wide = Console(highlight=False, width=10_000)
    with wide.capture() as captured:
        wide.print(grid)
    for text in captured.get().splitlines():
        line(text.rstrip())


def facts(values: Mapping[str, Any]) -> str:
    """`dtype=bf16 page_size=64 causal=false`: the form that --spec takes."""
    return " ".join(f"{name}={str(value).lower()}" for name, value in values.items())


def common(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields that have one value in all rows."""
    first = rows[0] if rows else {}
    return {name: value for name, value in first.items() if all(row.get(name) == value for row in rows)}


def reports_errors(command: Command) -> Command:
    """A command whose JitmlaErrors end as text on stderr (with --json as an object on stdout) and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except JitmlaError as error:
            if options.get("as_json"):
                json_line(error.as_dict())
            else:
                complain(str(error))
            raise typer.Exit(2 if isinstance(error, MISPUT) else 1) from error

    return run  # type: ignore[return-value]
