"""`jitmla prewarm`: compile every kernel that will be needed, before it is needed."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer import Option

from .. import arch as arches
from .. import compile, env, events, models, registry, schema, toolchain
from ..errors import CacheUnwritable, InvalidArgument, JitmlaError, SchemaViolation
from ..registry import Choice
from ..spec import Spec
from ..store import LOCKS, Store
from . import output

STOP_SECONDS = 5.0  # for killed compilers to be cleaned up after


@dataclass(frozen=True)
class Outcome:
    """What became of one Key. `status`: "compiled" (here or by another process meanwhile), "hit" or "failed"."""

    choice: Choice
    status: str
    seconds: float
    key: str | None
    error: JitmlaError | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"status": self.status, "seconds": round(self.seconds, 3), "key": self.key, "name": self.choice.key.name,
                "spec": self.choice.spec.as_dict()} | (self.error.as_dict() if self.error else {})


@output.reports_errors
def prewarm(
    arch: Annotated[str, Option(metavar="ARCH", help="GPU architecture, such as sm_90a (H100, H200).")],
    model: Annotated[str | None, Option(metavar="NAME|PATH", help="A known model, or the path of its Hugging Face "
                                        "config.json.")] = None,
    tp: Annotated[int, Option(metavar="N", min=1, help="Ranks that share the model's heads.")] = 1,
    page_size: Annotated[list[int] | None, Option(metavar="N", help="Page size of the engine's cache; repeat it for "
                                                  "several. Default: every size that is served.")] = None,
    max_s_q: Annotated[int | None, Option(metavar="N", min=1, help="Most query tokens per request (1 + draft tokens). "
                                          f"Default: {models.MAX_S_Q}.")] = None,
    dtype: Annotated[str | None, Option(metavar="DTYPE", help="bf16 or fp16. Default: the model's.")] = None,
    op: Annotated[str | None, Option(metavar="OP", help="Instead of --model: one op, described by --spec.")] = None,
    spec: Annotated[list[str] | None, Option(metavar="FIELD=VALUE", help="One field of the Spec; repeat it for all but "
                                             "op and arch (docs/schema.md).")] = None,
    jobs: Annotated[int | None, Option(metavar="N", min=1, help="Kernels to compile at once. Default: the CPU cores "
                                       "that this process may use.")] = None,
    as_json: output.Json = False,
) -> None:
    """Compile every kernel that a model can need.

    Works on a machine with or without a GPU; the kernels are kept on disk. With --json, one object for each
    Key as it is done: status (compiled, hit, failed), seconds, key, name, spec; for a failed one also the error.
    """
    if (model is None) == (op is None):
        raise typer.BadParameter("give either --model, or --op with --spec")
    if op is not None:
        _refuse({"--page-size": page_size, "--dtype": dtype, "--max-s-q": max_s_q}, "belongs to --model")
        choices = _choices([_spec(op, arch, spec or [])])
    else:
        _refuse({"--spec": spec}, "belongs to --op")
        choices = _choices(_reachable(model or "", tp, arch, page_size or models.PAGE_SIZES, max_s_q, dtype))
    outcomes: list[Outcome] = []
    try:
        for outcome in _shown(_outcomes(choices, Store(), jobs or _cores()), len(choices), as_json):
            outcomes.append(outcome)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        if not as_json:
            _summarise(outcomes, len(choices))
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _refuse(options: dict[str, Any], why: str) -> None:
    for name, value in options.items():
        if value:
            raise typer.BadParameter(f"{name} {why}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _reachable(model: str, tp: int, arch: str, page_sizes: Sequence[int], max_s_q: int | None,
               dtype: str | None) -> list[Spec]:
    """Every Spec that serving the model can reach; raises UnknownModel, UnknownArch and InvalidArgument."""
    try:
        return models.specs_for(model, tp=tp, arch=arch, page_sizes=page_sizes, max_s_q=max_s_q or models.MAX_S_Q,
                                dtype=dtype)
    except SchemaViolation as error:
        raise _misput(f"--model {model} with these options", error) from error


def _spec(op: str, arch: str, assignments: list[str]) -> Spec:
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


def _choices(specs: list[Spec]) -> list[Choice]:
    """Who serves each Spec, without repeated Keys; raises NoTemplate."""
    return list({choice.key: choice for spec in specs for choice in registry.choices(spec)}.values())


def _outcomes(choices: list[Choice], store: Store, jobs: int) -> Iterator[Outcome]:
    """What became of each Key, as each is done. Interrupted, it stops the compilers; what is published stays."""
    todo: queue.SimpleQueue[Choice] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
    for choice in choices:
        todo.put(choice)
    stopping = threading.Event()
    # daemons: an interrupted command must not wait for a thread that waits for another process's lock
    workers = [threading.Thread(target=_work, args=(todo, done, store, stopping), daemon=True)
               for _ in range(min(jobs, len(choices)))]
    for worker in workers:
        worker.start()
    try:
        for _ in choices:
            outcome = done.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        stopping.set()
        deadline = time.monotonic() + STOP_SECONDS
        while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
            compile.stop_all()  # again and again: a thread may have been about to start one
            workers[0].join(0.02)
            workers = [worker for worker in workers if worker.is_alive()]


def _work(todo: queue.SimpleQueue[Choice], done: queue.SimpleQueue[Outcome | BaseException], store: Store,
          stopping: threading.Event) -> None:
    try:
        while not stopping.is_set():
            done.put(_one(todo.get_nowait(), store))
    except queue.Empty:
        pass
    except BaseException as error:  # handed to the thread that prints
        done.put(error)


def _one(choice: Choice, store: Store) -> Outcome:
    """Make sure that the Key of `choice` is on disk."""
    start = time.perf_counter()
    built = []

    def build(*args: Any, **options: Any) -> compile.Built:
        built.append(compile.build(*args, **options))
        return built[-1]

    try:
        entry = store.find(choice.key)
        if entry is None:
            toolchain.require_compiler()
            store.side_folder(LOCKS)  # a cache that cannot be written is known before the time is spent
            entry = compile.get_or_compile(choice.key, choice.source, store, builder=build)
        if entry.path is None:
            raise CacheUnwritable(f"to store {choice.key.name} in {store.root}", differs="it was compiled, not stored",
                                  supported="a writable folder with free space",
                                  remedy=f"free space, or name another folder in {env.CACHE_DIR.name}")
    except JitmlaError as error:
        key = choice.key.digest if choice.key.toolchain else None
        return Outcome(choice, "failed", time.perf_counter() - start, key, error)
    return Outcome(choice, "compiled" if built else "hit", time.perf_counter() - start, entry.key.digest)


def _shown(outcomes: Iterator[Outcome], total: int, as_json: bool) -> Iterator[Outcome]:
    """The same outcomes, each printed when it is done: a JSON object on stdout, or a step of a bar on stderr."""
    if as_json:
        for outcome in outcomes:
            output.json_line(outcome.as_dict())
            yield outcome
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  console=Console(stderr=True)) as bar:
        task = bar.add_task("kernels", total=total)
        end = events.subscribe(lambda event: bar.console.print(str(event), markup=False, highlight=False)
                               if event.kind in ("wait", "degrade", "refuse") else None)
        try:
            for outcome in outcomes:
                bar.advance(task)
                yield outcome
        finally:
            end()


def _summarise(outcomes: list[Outcome], total: int) -> None:
    """What the Specs have in common, a table of the rest, each error once, and the sums."""
    specs = [o.choice.spec.as_dict() for o in outcomes]
    shared = output.common(specs)
    output.line(output.facts(shared) + "\n")
    output.table(("status", "seconds", "kernel", "serves", "key"),
                 [(o.status, f"{o.seconds:.1f}", o.choice.key.name,
                   output.facts({name: value for name, value in spec.items() if name not in shared}),
                   (o.key or "")[:output.SHORT]) for o, spec in zip(outcomes, specs, strict=True)])
    output.line("")
    for text in dict.fromkeys(str(o.error) for o in outcomes if o.error):
        output.complain(text)
    counts = {status: sum(o.status == status for o in outcomes) for status in ("compiled", "hit", "failed")}
    counts["not done"] = total - len(outcomes)
    output.line(", ".join(f"{count} {status}" for status, count in counts.items() if count))
