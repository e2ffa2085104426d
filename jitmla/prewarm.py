"""Kernels on disk before they are needed: many at once, each compiled in a fork of one server (jitmla.pool)."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from . import compile, env, registry, toolchain
from .errors import CacheUnwritable, JitmlaError, NoTemplate
from .events import emit
from .pool import Pool
from .registry import Choice
from .spec import Spec
from .store import LOCKS, Entry, Store

STOP_SECONDS = 5.0  # for killed compilers to be cleaned up after
# A signal that arrives when a thread is about to sleep on a lock does not wake it: CPython looks for signals before it
# hands the interpreter to another thread, which takes a while on a busy machine. Ctrl-C is then seen this much later.
WAKE_SECONDS = 0.1


@dataclass(frozen=True)
class Outcome:
    """What became of one Spec. `status`: "compiled" (here), "hit" (in the cache, or compiled by another process
    meanwhile), "failed", or "unserved": no template serves it, and there is no Choice."""

    spec: Spec
    status: str
    seconds: float = 0.0
    choice: Choice | None = None
    entry: Entry | None = None
    error: JitmlaError | None = None

    @property
    def key(self) -> str | None:
        if self.entry is not None:
            return self.entry.key.digest
        return self.choice.key.digest if self.choice is not None and self.choice.key.toolchain else None

    @property
    def name(self) -> str | None:
        return self.choice.key.name if self.choice is not None else None

    def as_dict(self) -> dict[str, Any]:
        return {"status": self.status, "seconds": round(self.seconds, 3), "key": self.key, "name": self.name,
                "spec": self.spec.as_dict()} | (self.error.as_dict() if self.error else {})


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choices(specs: Iterable[Spec]) -> tuple[list[Choice], list[Outcome]]:
    """All that calls of these Specs can get, without repeated Keys, and the Specs that nobody serves."""
    chosen: dict[Any, Choice] = {}
    unserved = []
    for spec in dict.fromkeys(specs):
        try:
            chosen.update((choice.key, choice) for choice in registry.choices(spec))
        except NoTemplate as error:
            unserved.append(Outcome(spec, "unserved", error=error))
    return list(chosen.values()), unserved


def run(wanted: list[Choice], store: Store, jobs: int, each: Callable[[Outcome], None] = lambda outcome: None, *,
        must_store: bool = True) -> list[Outcome]:
    """What became of each Key, in the order in which they are done. Interrupted, it stops the compilers; what is
    published stays.

    each: called with an outcome as soon as it is there, in this thread; what it raises ends the run.
    must_store: a kernel that is compiled and cannot be stored counts as failed.
    """
    todo: queue.SimpleQueue[Choice] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
    for choice in wanted:
        todo.put(choice)
    stopping, pool = threading.Event(), Pool()
    # daemons: an interrupted command must not wait for a thread that waits for another process's lock
    workers = [threading.Thread(target=_work, args=(todo, done, store, pool, stopping, must_store), daemon=True)
               for _ in range(min(jobs, len(wanted)))]
    outcomes = []
    try:
        for worker in workers:
            worker.start()
        while len(outcomes) < len(wanted):
            try:
                outcome = done.get(timeout=WAKE_SECONDS)
            except queue.Empty:
                continue
            if isinstance(outcome, BaseException):
                raise outcome
            outcomes.append(outcome)
            each(outcome)
    finally:
        stopping.set()
        pool.close()
        deadline = time.monotonic() + STOP_SECONDS
        while (alive := [worker for worker in workers if worker.is_alive()]) and time.monotonic() < deadline:
            compile.stop_all()  # again and again: a thread may have been about to start one
            alive[0].join(0.02)
    return outcomes


def _work(todo: queue.SimpleQueue[Choice], done: queue.SimpleQueue[Outcome | BaseException], store: Store, pool: Pool,
          stopping: threading.Event, must_store: bool) -> None:
    try:
        while not stopping.is_set():
            done.put(_one(todo.get_nowait(), store, pool, must_store))
    except queue.Empty:
        pass
    except BaseException as error:  # handed to the thread that reads the outcomes
        done.put(error)


def _pin(store: Store, entry: Entry) -> None:
    """Keep an entry from being evicted; where that cannot be noted, nothing is evicted either."""
    try:
        store.pin(entry.key.digest)
    except CacheUnwritable as e:
        emit("degrade", what="pin", op=entry.key.spec.op, key=entry.key.digest[:12], reason=e.differs)


def _one(choice: Choice, store: Store, pool: Pool, must_store: bool) -> Outcome:
    """Make sure that the Key of `choice` is on disk."""
    start = time.perf_counter()
    built = []

    def build(*args: Any, **options: Any) -> compile.Built:
        built.append(pool.build(*args, **options))
        return built[-1]

    try:
        entry = store.find(choice.key)
        if entry is None:
            toolchain.require_compiler()
            if must_store:
                store.side_folder(LOCKS)  # a cache that cannot be written is known before the time is spent
            entry = compile.get_or_compile(choice.key, choice.source, store, builder=build)
        if entry.path is None and must_store:
            raise CacheUnwritable(f"to store {choice.key.name} in {store.root}", differs="it was compiled, not stored",
                                  supported="a writable folder with free space",
                                  remedy=f"free space, or name another folder in {env.CACHE_DIR.name}")
        if must_store and entry.path == store.path(entry.key):
            _pin(store, entry)
    except JitmlaError as error:
        return Outcome(choice.spec, "failed", time.perf_counter() - start, choice, error=error)
    return Outcome(choice.spec, "compiled" if built else "hit", time.perf_counter() - start, choice, entry)
