"""One compile per host: a lock for each Key, with the holder's name beside it for those who wait.

A lock saves work and nothing else. Publishing is idempotent, so a lock that is broken, unsupported (some network disks)
or waited for too long costs a second compile, never a wrong entry.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import env
from .errors import InvalidArgument
from .events import emit

WAIT_EVENT_SECONDS = 5.0
POLL_SECONDS = 0.05
TRY_EVERY = 5  # polls: trying the lock takes twenty times as long as looking whether it is needed any more


@contextmanager
def exclusive(folder: Path, name: str, timeout: float | None = None, *, done: Callable[[], bool] = lambda: False,
              **about: Any) -> Iterator[bool]:
    """Hold the lock `name` in `folder` during the block. Yields whether it is held: without it, do the work anyway.

    While another process holds it: an event `wait` at once and every 5 seconds, with `about`, who holds it and for how
    long. When `done()` says that the work was done meanwhile, False: of many that wait, none then waits for the next.
    After `timeout` seconds (JITMLA_LOCK_TIMEOUT), and where locking does not work: an event `degrade`, and False.
    """
    import filelock

    limit = timeout_seconds(env.LOCK_TIMEOUT) if timeout is None else timeout
    lock = filelock.FileLock(folder / f"{name}.lock", mode=0o600)
    holder = folder / f"{name}.holder"
    try:
        held = _acquire(lock, holder, limit, done, about)
        if held:
            holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}))
        elif not done():
            emit("degrade", what="lock", reason=f"held by {describe(holder)}, waited {limit:g} s", **about)
    except (OSError, NotImplementedError) as e:
        held = False
        emit("degrade", what="lock", reason=f"{folder} cannot be locked: {e}", **about)
    try:
        yield held
    finally:
        if held:
            holder.unlink(missing_ok=True)
        lock.release(force=True)


def _acquire(lock: Any, holder: Path, limit: float, done: Callable[[], bool], about: dict[str, Any]) -> bool:
    import filelock

    start = time.monotonic()
    tell = 0.0
    poll = 0
    while True:
        if poll % TRY_EVERY == 0:
            try:
                lock.acquire(timeout=0)
                return True
            except filelock.Timeout:
                pass
        waited = time.monotonic() - start
        if waited >= limit or done():
            return False
        if waited >= tell:
            emit("wait", holder=describe(holder), seconds=round(waited, 1), **about)
            tell = waited + WAIT_EVENT_SECONDS
        time.sleep(min(POLL_SECONDS, limit - waited))
        poll += 1


def describe(holder: Path) -> str:
    """Who holds a lock, for people: `pid 4711 on host a, 12 s`."""
    try:
        who = json.loads(holder.read_text())
        return f"pid {who['pid']} on {who['host']}, {max(time.time() - who['since'], 0):.0f} s"
    except (OSError, ValueError, KeyError, TypeError):  # just taken, just released, or its writer was killed
        return "another process"


def timeout_seconds(variable: env.EnvVar) -> float:
    """The value of a variable that holds seconds; raises InvalidArgument."""
    try:
        seconds = float(variable.get())
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise InvalidArgument(f"{variable.name}={variable.get()}", supported="a number of seconds, 0 or more",
                              differs="it is not one", remedy=f"correct or unset {variable.name}")
    return seconds
