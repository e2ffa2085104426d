"""One stream of events: what the cache and the dispatcher did, for logs, counters and callbacks.

Kinds: choose (backend or template taken), hit, miss, wait, compile, publish, load, evict, refuse (an entry that does
not verify), degrade (something optional could not be done, the call goes on). Nothing is emitted on a call whose Plan
is in memory.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import env

logger = logging.getLogger("jitmla")
logger.addHandler(logging.NullHandler())
if env.LOG.get():
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(env.LOG.get().upper())

LEVELS = {"choose": logging.DEBUG, "hit": logging.DEBUG, "load": logging.DEBUG, "miss": logging.INFO,
          "wait": logging.INFO, "compile": logging.INFO, "publish": logging.INFO, "evict": logging.INFO,
          "refuse": logging.WARNING, "degrade": logging.WARNING}


@dataclass(frozen=True)
class Event:
    kind: str
    fields: dict[str, Any]
    time: float = field(default_factory=time.time)

    def __str__(self) -> str:
        return f"{self.kind}: " + " ".join(f"{k}={v}" for k, v in self.fields.items())


_subscribers: list[Callable[[Event], None]] = []
_counts: collections.Counter[str] = collections.Counter()


def emit(kind: str, **fields: Any) -> None:
    """Record one event. `kind` must be one of LEVELS."""
    event = Event(kind, fields)
    _counts[kind] += 1
    logger.log(LEVELS[kind], "%s", event)
    for callback in tuple(_subscribers):
        callback(event)


def subscribe(callback: Callable[[Event], None]) -> Callable[[], None]:
    """Call `callback(event)` for every later event of this process; returns a function that ends it."""
    _subscribers.append(callback)
    return lambda: _subscribers.remove(callback)


def stats() -> dict[str, int]:
    """How many events of each kind this process has seen."""
    return {kind: _counts[kind] for kind in LEVELS}
