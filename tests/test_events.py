"""Events: counted, logged, handed to subscribers."""

import logging
import os
import subprocess
import sys

import pytest

from jitmla import events


def test_counts():
    before = events.stats()
    assert set(before) == set(events.LEVELS)
    events.emit("hit", key="k")
    events.emit("hit", key="k")
    after = events.stats()
    assert after.pop("hit") == before.pop("hit") + 2
    assert after == before


def test_subscribers_in_order_and_until_they_leave():
    seen = []
    leave_a = events.subscribe(lambda e: seen.append(("a", e)))
    leave_b = events.subscribe(lambda e: seen.append(("b", e)))
    events.emit("compile", key="k", seconds=1)
    assert [name for name, _ in seen] == ["a", "b"]
    assert seen[0][1].kind == "compile" and seen[0][1].fields == {"key": "k", "seconds": 1} and seen[0][1].time > 0
    leave_a()
    events.emit("publish", key="k")
    leave_b()
    events.emit("publish", key="k")
    assert [name for name, _ in seen] == ["a", "b", "b"]


def test_a_subscriber_may_leave_while_it_is_called():
    seen = []

    def once(event):
        seen.append(event)
        leave()

    leave = events.subscribe(once)
    leave_other = events.subscribe(seen.append)
    events.emit("miss")
    events.emit("miss")
    leave_other()
    assert len(seen) == 3


def test_unknown_kinds_are_a_mistake_of_the_caller():
    before = events.stats()
    with pytest.raises(KeyError):
        events.emit("hitt")
    assert events.stats() == before


@pytest.mark.parametrize("kind", events.LEVELS)
def test_logged_at_the_level_of_its_kind(kind, caplog):
    with caplog.at_level(logging.DEBUG, logger="jitmla"):
        events.emit(kind, key="abc", ms=3)
    (record,) = caplog.records
    assert record.levelno == events.LEVELS[kind] and record.getMessage() == f"{kind}: key=abc ms=3"


def test_what_goes_wrong_is_a_warning():
    warnings = {kind for kind, level in events.LEVELS.items() if level >= logging.WARNING}
    assert warnings == {"refuse", "degrade"}


@pytest.mark.parametrize("level, lines", [("", 0), ("warning", 1), ("INFO", 2), ("DEBUG", 3)])
def test_jitmla_log(level, lines):
    code = "from jitmla import events; [events.emit(k, key=1) for k in ('hit', 'miss', 'refuse')]"
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": path, "JITMLA_LOG": level})
    assert done.stdout == "" and len(done.stderr.splitlines()) == lines, done.stderr
