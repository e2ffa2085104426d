"""`jitmla prewarm`: compile every kernel that will be needed, before it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from .. import events, tune
from ..prewarm import Outcome, choices, cores, run
from ..spec import Spec
from ..store import Store
from . import output, requests

UNSERVED = 3  # exit code: all that can be compiled is on disk, but no template serves the rest
STATUSES = ("compiled", "hit", "failed", "unserved")


@output.reports_errors
def prewarm(
    arch: Annotated[str | None, Option(metavar="ARCH[,ARCH...]", help="GPU architectures, such as sm_90a (H100, H200)."
                                       )] = None,
    model: requests.Model = None,
    tp: requests.Tp = 1,
    page_size: requests.PageSize = None,
    max_s_q: requests.MaxSQ = None,
    dtype: requests.Dtype = None,
    uses: requests.Uses = None,
    op: requests.Op = None,
    spec: requests.Facts = None,
    keys_from: Annotated[Path | None, Option(metavar="FILE", help="Instead of --model: what an earlier run printed "
                                             "with --json, or a JSON list of Specs; - is stdin. --arch replaces theirs."
                                             )] = None,
    tunings: Annotated[Path | None, Option(metavar="FILE", help="Choose variants as this file of `jitmla tune` says."
                                           )] = None,
    jobs: Annotated[int | None, Option(metavar="N", min=1, help="Kernels to compile at once. Default: the CPU cores "
                                       "that this process may use.")] = None,
    as_json: output.Json = False,
) -> None:
    """Compile every kernel that a model can need.

    Works on a machine with or without a GPU; the kernels are kept on disk. Interrupted, it keeps what is done, and goes
    on from there when started again. With --json, one object for each Key as it is done: status (compiled, hit, failed,
    unserved), seconds, key, name, spec; for a failed or unserved one also the error.

    Exit codes: 0 all on disk; 1 a compile failed; 2 nothing of this can be served; 3 some of it cannot, the rest is on
    disk; 130 interrupted.
    """
    if sum(given is not None for given in (model, op, keys_from)) != 1:
        raise typer.BadParameter("give one of --model, --op with --spec, and --keys-from")
    if arch is None and keys_from is None:
        raise typer.BadParameter("--arch is missing")
    if model is None:
        _refuse({"--page-size": page_size, "--dtype": dtype, "--max-s-q": max_s_q, "--uses": uses},
                "belongs to --model")
    if op is None:
        _refuse({"--spec": spec}, "belongs to --op")
    if tunings is not None:
        tune.use_tunings(tunings)
    archs = requests.archs(arch) if arch is not None else []
    specs: list[Spec] = []
    if keys_from is not None:
        specs = requests.of_file(keys_from, archs)
    for name in archs if keys_from is None else ():
        specs += ([requests.of_assignments(op, name, spec or [])] if op is not None else
                  requests.of_model(model or "", tp, name, page_size, max_s_q, dtype, uses))
    wanted, unserved = choices(specs)
    if unserved and not wanted and unserved[0].error:
        raise unserved[0].error
    outcomes: list[Outcome] = []
    total = len(wanted) + len(unserved)
    try:
        with _shown(total, as_json) as show:
            def each(outcome: Outcome) -> None:
                outcomes.append(outcome)
                show(outcome)

            for outcome in unserved:
                each(outcome)
            run(wanted, Store(), jobs or cores(), each)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        if not as_json:
            _summarise(outcomes, total)
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)
    if unserved:
        raise typer.Exit(UNSERVED)


def _refuse(options: dict[str, Any], why: str) -> None:
    for name, value in options.items():
        if value:
            raise typer.BadParameter(f"{name} {why}")


@contextmanager
def _shown(total: int, as_json: bool) -> Iterator[Callable[[Outcome], None]]:
    """What shows an outcome when it is done: as a JSON object on stdout, or as a step of a bar on stderr."""
    if as_json:
        yield lambda outcome: output.json_line(outcome.as_dict())
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  console=Console(stderr=True)) as bar:
        task = bar.add_task("kernels", total=total)
        end = events.subscribe(lambda event: bar.console.print(str(event), markup=False, highlight=False)
                               if event.kind in ("wait", "degrade", "refuse") else None)
        try:
            yield lambda outcome: bar.advance(task)
        finally:
            end()


def _summarise(outcomes: list[Outcome], total: int) -> None:
    """What the Specs have in common, a table of the rest, each error once, and the sums."""
    specs = [o.spec.as_dict() for o in outcomes]
    shared = output.common(specs)
    output.line(output.facts(shared) + "\n")
    output.table(("status", "seconds", "kernel", "serves", "key"),
                 [(o.status, f"{o.seconds:.1f}", o.name or "-",
                   output.facts({name: value for name, value in spec.items() if name not in shared}),
                   (o.key or "")[:output.SHORT]) for o, spec in zip(outcomes, specs, strict=True)])
    output.line("")
    for text in dict.fromkeys(str(o.error) for o in outcomes if o.error):
        output.complain(text)
    counts = {status: sum(o.status == status for o in outcomes) for status in STATUSES}
    counts["not done"] = total - len(outcomes)
    output.line(", ".join(f"{count} {status}" for status, count in counts.items() if count))
