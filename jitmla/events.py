"""One stream of events: what the cache and the dispatcher did, for logs, counters and callbacks.

Kinds: choose (backend or template taken), hit, miss, wait, compile (begins), compiled (with its seconds), publish,
load, evict, freeze, refuse (an entry that does not verify), degrade (something optional could not be done, the call
goes on). Nothing is emitted on a call whose Plan is in memory.
"""

from __future__ import annotations

import collections
import logging
import threading
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
          "wait": logging.INFO, "compile": logging.INFO, "compiled": logging.INFO, "publish": logging.INFO,
          "evict": logging.INFO, "freeze": logging.INFO, "refuse": logging.WARNING, "degrade": logging.WARNING}


@dataclass(frozen=True)
class Event:
    """What `subscribe` hands to its callbacks: a kind of LEVELS, its facts by name, and when it was (time.time())."""

    kind: str
    fields: dict[str, Any]
    time: float = field(default_factory=time.time)

    def __str__(self) -> str:
        return f"{self.kind}: " + " ".join(f"{k}={v}" for k, v in self.fields.items())


_subscribers: list[Callable[[Event], None]] = []
_counts: collections.Counter[str] = collections.Counter()
_seconds: collections.Counter[str] = collections.Counter()  # of the kinds that say how long they took
_guard = threading.Lock()


def emit(kind: str, **fields: Any) -> None:
    """Record one event. `kind` must be one of LEVELS. A callback that fails is logged, and does not stop the others."""
    event = Event(kind, fields)
    level = LEVELS[kind]
    with _guard:
        _counts[kind] += 1
        if kind in ("compiled", "load"):
            _seconds[kind] += fields.get("seconds", fields.get("ms", 0) / 1e3)
    logger.log(level, "%s", event)
    for callback in tuple(_subscribers):
        try:
            callback(event)
        except Exception:  # whatever it is, the call that is served has nothing to do with it
            logger.exception("a subscriber of jitmla's events failed on %s", event)


def subscribe(callback: Callable[[Event], None]) -> Callable[[], None]:
    """Call `callback(event)` for every later event of this process; returns a function that ends it."""
    _subscribers.append(callback)
    return lambda: _subscribers.remove(callback)


def stats() -> dict[str, int]:
    """How many events of each kind this process has seen."""
    return {kind: _counts[kind] for kind in LEVELS}


def prometheus() -> str:
    """The counters in Prometheus' text format, for an exporter to append to its own page."""
    lines = ["# HELP jitmla_events_total What jitmla's kernel cache and dispatcher did in this process.",
             "# TYPE jitmla_events_total counter"]
    lines += [f'jitmla_events_total{{kind="{kind}"}} {count}' for kind, count in stats().items()]
    for kind, name in (("compiled", "compile"), ("load", "load")):
        metric = f"jitmla_{name}_seconds_total"
        lines += [f"# HELP {metric} Time spent in it.", f"# TYPE {metric} counter", f"{metric} {_seconds[kind]:.6f}"]
    return "\n".join(lines) + "\n"
