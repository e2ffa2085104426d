"""A process that dies while it publishes, at every step and at random moments, leaves a whole entry or none."""

import os
import random
import signal
import time

import pytest

from jitmla import trusted
from jitmla.compile import Built, get_or_compile
from jitmla.store import Store

from ..support.keys import KERNELS, SO_BYTES, SOURCE, make_key, publish

KEYS = [make_key(page_size=p) for p in (16, 32, 64, 128)]


def steps_of(action):
    """The names of the fault points that `action` passes, in order."""
    passed = []
    real = trusted.fault_point
    trusted.fault_point = passed.append
    try:
        action()
    finally:
        trusted.fault_point = real
    return passed


def in_child(action):
    """Run `action` in a forked process; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return child


def die_at(step, action):
    """Run `action` in a process that is killed at the n-th fault point that it passes."""

    def child():
        passed = iter(range(step + 1))

        def fault_point(name):
            if next(passed) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        trusted.fault_point = fault_point
        action()

    _, status = os.waitpid(in_child(child), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def corrupt(store, key):
    (store.path(key) / "kernel.so").write_bytes(b"damaged")


def whole_or_none(store, key, seen):
    """The entry, or None; never one that is refused."""
    seen.clear()
    entry = Store(store.root).find(key)
    assert "refuse" not in [event.kind for event in seen]
    assert entry is None or (entry.so_bytes, entry.source) == (SO_BYTES, SOURCE)
    return entry


def recovers(store, key):
    """Whether the next process gets the entry, and nothing is in its way."""
    entry = get_or_compile(key, lambda: SOURCE, store, builder=lambda *a, **k: Built(SO_BYTES, SOURCE, KERNELS, 0.0))
    return entry.path == store.path(key) and store.find(key) == entry


def test_killed_at_every_step_of_a_first_publish(store, seen):
    steps = steps_of(lambda: publish(Store(store.root / "rehearsal"), KEYS[0]))
    assert [s for s in steps if s.startswith("before kernel")] == ["before kernel.py", "before kernel.so"]
    assert steps.index("before manifest.json") > steps.index("before kernel.so") and steps[-1] == "end"
    there = []
    for step in range(len(steps)):
        key = make_key(constants=(("FACTOR", float(step)),))
        die_at(step, lambda key=key: publish(store, key))
        there.append(whole_or_none(store, key, seen) is not None)
        assert recovers(store, key), steps[step]
    assert there == [step in ("renamed", "end") for step in steps]


def test_killed_at_every_step_of_replacing_a_corrupt_entry(store, seen):
    def replace(key):
        publish(store, key)
        corrupt(store, key)
        return lambda: publish(store, key)

    steps = steps_of(replace(KEYS[0]))[:]
    assert "before moving aside" in steps and "moved aside" in steps
    for step in range(len(steps)):
        key = make_key(constants=(("FACTOR", float(step)),))
        die_at(step, replace(key))
        if step > steps.index("before moving aside"):
            whole_or_none(store, key, seen)
        else:
            assert store.find(key) is None
        assert recovers(store, key), steps[step]


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(store, seen, seed):
    choose = random.Random(seed)

    def publish_for_ever():
        while True:
            for key in KEYS:
                publish(store, key)
                os.rename(store.path(key), store.root / "v1" / f"gone-{time.monotonic_ns()}")

    for _ in range(12):
        child = in_child(publish_for_ever)
        time.sleep(choose.uniform(0.0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for key in KEYS:
            whole_or_none(store, key, seen)
    assert all(recovers(store, key) for key in KEYS)


def test_readers_and_writers_that_race_see_whole_entries_only(store, seen):
    """Two processes publish, remove and damage the same entries while this one reads."""

    def churn():
        choose = random.Random(os.getpid())
        while True:
            key = choose.choice(KEYS)
            publish(store, key)
            try:
                os.rename(store.path(key), store.root / "v1" / f"gone-{os.getpid()}-{time.monotonic_ns()}")
            except FileNotFoundError:
                pass

    children = [in_child(churn) for _ in range(2)]
    try:
        found = 0
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            found += whole_or_none(store, random.choice(KEYS), seen) is not None
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert found > 0
    assert all(recovers(store, key) for key in KEYS)
