"""Events: counted, logged, handed to subscribers."""

import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

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


def test_a_subscriber_that_fails_is_logged_and_the_others_are_called(caplog):
    seen = []
    leave_a, leave_b = events.subscribe(lambda e: 1 / 0), events.subscribe(seen.append)
    with caplog.at_level(logging.ERROR, logger="jitmla"):
        events.emit("hit", key="k")
    leave_a(), leave_b()
    assert len(seen) == 1 and "ZeroDivisionError" in caplog.text


def test_counting_in_threads_loses_nothing():
    before = events.stats()["wait"]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: [events.emit("wait") for _ in range(200)], range(8)))
    assert events.stats()["wait"] == before + 1600


def test_prometheus_text():
    """Every line is one of the three forms of the format; counters only rise."""
    before = dict(re.findall(r"^(\S+) (\S+)$", events.prometheus(), re.M))
    events.emit("hit", key="k")
    events.emit("compiled", seconds=1.5)
    events.emit("load", ms=250)
    text = events.prometheus()
    assert text.endswith("\n")
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP \w+ .+|TYPE \w+ counter)|\w+(\{\w+="\w+"\})? [0-9.]+', line), line
    after = dict(re.findall(r"^(\S+) (\S+)$", text, re.M))
    rise = {name: round(float(after[name]) - float(before[name]), 6) for name in after}
    assert {name: by for name, by in rise.items() if by} == {
        'jitmla_events_total{kind="hit"}': 1, 'jitmla_events_total{kind="compiled"}': 1,
        'jitmla_events_total{kind="load"}': 1, "jitmla_compile_seconds_total": 1.5, "jitmla_load_seconds_total": 0.25}
    assert {f'jitmla_events_total{{kind="{kind}"}}' for kind in events.LEVELS} < set(after)


@pytest.mark.parametrize("level, lines", [("", 0), ("warning", 1), ("INFO", 2), ("DEBUG", 3)])
def test_jitmla_log(level, lines):
    code = "from jitmla import events; [events.emit(k, key=1) for k in ('hit', 'miss', 'refuse')]"
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": path, "JITMLA_LOG": level})
    assert done.stdout == "" and len(done.stderr.splitlines()) == lines, done.stderr
