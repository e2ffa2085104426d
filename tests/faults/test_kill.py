"""A process that dies while it changes the cache, at every step or at any moment, leaves a whole entry or none."""

import os
import random
import shutil
import signal
import time

from jitmla import bounds, bundle, trusted
from jitmla.compile import Built, get_or_compile
from jitmla.store import Store

from ..support.keys import KERNELS, SO_BYTES, SOURCE, make_key, publish
from ..support.processes import in_child

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


def test_killed_at_300_random_moments(in_memory, store, seen):
    """While it publishes, reads, pins, and evicts to a size that holds two entries."""
    choose = random.Random(5)

    def work_for_ever():
        mine = random.Random(os.getpid())
        while True:
            key = mine.choice(KEYS)
            publish(store, key)
            store.find(key)
            if mine.random() < 0.1:
                store.pin(key.digest, mine.random() < 0.3)
            bounds.trim(store.root, mine.choice((0, 15_000)))
            bounds.sweep(store.root)

    found = 0
    for _ in range(300):
        child = in_child(work_for_ever)
        time.sleep(choose.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found += sum(whole_or_none(store, key, seen) is not None for key in KEYS)
    assert found > 50
    assert all(recovers(store, key) for key in KEYS)
    staging = store.root / "v1" / ".staging"
    for path in staging.iterdir():
        os.utime(path, (time.time() - 2 * bounds.STALE_SECONDS,) * 2)
    bounds.sweep(store.root)
    assert list(staging.iterdir()) == []


def test_killed_at_every_step_of_an_eviction(store, seen):
    def fill():
        for key in KEYS:
            publish(store, key)

    def evict():
        bounds.trim(store.root, 0)
        bounds.sweep(store.root)

    bounds_grace, bounds.GRACE = bounds.GRACE, -1.0
    try:
        fill()
        steps = steps_of(evict)
        assert steps.count("before evicting") == steps.count("evicted") == steps.count("before sweeping") == len(KEYS)
        for step in range(len(steps)):
            fill()
            die_at(step, evict)
            there = [whole_or_none(store, key, seen) is not None for key in KEYS]
            assert there.count(False) == min(steps[:step + 1].count("evicted"), len(KEYS)), steps[step]
            assert all(recovers(store, key) for key in KEYS)
            evict()
            assert list((store.root / "v1" / ".staging").iterdir()) == []
    finally:
        bounds.GRACE = bounds_grace


def test_killed_at_every_step_of_an_import(store, seen, tmp_path):
    """Some of the entries are there, each of them whole; importing again brings the rest."""
    source = Store(tmp_path / "source")
    bundle.write(tmp_path / "bundle", [publish(source, key) for key in KEYS[:2]])

    def load():
        for _ in bundle.load(tmp_path / "bundle", Store(store.root)):
            pass

    steps = steps_of(lambda: list(bundle.load(tmp_path / "bundle", Store(tmp_path / "rehearsal"))))
    assert steps.count("renamed") == 2
    for step in range(len(steps)):
        die_at(step, load)
        there = [whole_or_none(store, key, seen) is not None for key in KEYS[:2]]
        assert there.count(True) == steps[:step + 1].count("renamed")
        load()
        assert all(store.find(key) for key in KEYS[:2])
        shutil.rmtree(store.root)


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
