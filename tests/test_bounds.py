"""The cache's bounds: what is evicted and what is not, and that nobody who reads is disturbed."""

import os
import shutil
import tempfile
import time

import pytest

from jitmla import bounds, env, layer
from jitmla.errors import InvalidArgument
from jitmla.store import Store

from .support.keys import SO_BYTES, make_key, publish
from .support.tree import snapshot, unprivileged

ROWS = (8, 16, 32, 64, 512)
KEYS = [make_key(rows=rows) for rows in ROWS]


@pytest.fixture
def full(store):
    """A store with all KEYS, used a day apart, the first one least recently; its entries have about one size."""
    for age, key in enumerate(KEYS):
        publish(store, key)
        used_at(store, key, time.time() - (len(KEYS) - age) * bounds.DAY)
    return store


def used_at(store, key, when):
    os.utime(store.root / "v1" / ".used" / key.digest, (when, when))


def size(store):
    return sum(resident.bytes for resident in bounds.residents(store.root))


def left(store):
    return [key.spec["rows"] for key in KEYS if store.path(key).exists()]


@pytest.mark.parametrize("text, expected", [
    ("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), ("10MB", 10**7), ("7", 7), ("0", 0), ("3kib", 3072), ("unlimited", None)])
def test_sizes(text, expected):
    assert bounds.size_of(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1", "1 XB", "GiB"])
def test_what_is_no_size(text):
    with pytest.raises(InvalidArgument, match="it is no size"):
        bounds.size_of(text)


def test_the_least_recently_used_go_first_and_no_more_than_needed(full, seen):
    one = size(full) // len(KEYS)
    evicted = bounds.trim(full.root, 3 * one + 100)
    assert left(full) == [32, 64, 512] and [r.digest for r in evicted] == [k.digest for k in KEYS[:2]]
    assert size(full) <= 3 * one + 100
    told = [e for e in seen if e.kind == "evict"]
    assert [e.fields["key"] for e in told] == [k.digest[:12] for k in KEYS[:2]] and told[0].fields["bytes"] > 4096
    assert bounds.trim(full.root, 3 * one + 100) == [] and bounds.trim(full.root, None) == []


def test_use_keeps_an_entry(full):
    bounds._touched.clear()  # as in a new process
    assert full.find(KEYS[0])
    bounds.trim(full.root, size(full) - 1)
    assert left(full) == [8, 32, 64, 512]


def test_use_is_noted_once_in_a_process_and_not_within_the_hour(full):
    mark = full.root / "v1" / ".used" / KEYS[0].digest
    bounds._touched.clear()
    used_at(full, KEYS[0], time.time() - bounds.HOUR / 2)
    before = snapshot(full.root)
    full.find(KEYS[0])
    assert snapshot(full.root) == before
    used_at(full, KEYS[0], time.time() - 3 * bounds.HOUR)
    before = snapshot(full.root)
    full.find(KEYS[0])
    assert snapshot(full.root) == before
    bounds._touched.clear()
    full.find(KEYS[0])
    assert abs(mark.stat().st_mtime - time.time()) < 60


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("marks", [True, False])
def test_a_cache_whose_use_cannot_be_noted_is_read_all_the_same(key, marks):
    """As one that root made and others read."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        store = Store(os.path.join(folder, "cache"))
        publish(store, key)
        store.root.chmod(0o755)
        used_at(store, key, time.time() - bounds.DAY)
        if not marks:
            shutil.rmtree(store.root / "v1" / ".used")
        bounds._touched.clear()
        before = snapshot(store.root)
        with unprivileged():
            assert store.find(key)
        assert snapshot(store.root) == before


def test_an_entry_without_mark_counts_from_when_it_was_stored(full):
    for key in KEYS:
        (full.root / "v1" / ".used" / key.digest).unlink()
    os.utime(full.path(KEYS[3]), (1, 1))
    bounds.trim(full.root, size(full) - 1)
    assert left(full) == [8, 16, 32, 512]


def test_pinned_entries_stay_however_little_room_there_is(full):
    full.pin(KEYS[0].digest)
    full.pin(KEYS[3].digest)
    bounds.trim(full.root, 0)
    assert left(full) == [8, 64]
    full.pin(KEYS[0].digest, False)
    bounds.trim(full.root, 0)
    assert left(full) == [64]


def test_publishing_trims_to_the_size_of_the_environment_but_keeps_what_it_stored(full, monkeypatch):
    monkeypatch.setenv(env.CACHE_SIZE.name, "1")
    new = make_key(causal=True)
    assert publish(full, new).path.exists() and full.find(new)
    assert left(full) == []
    monkeypatch.setenv(env.CACHE_SIZE.name, "unlimited")
    for key in KEYS:
        publish(full, key)
    assert left(full) == list(ROWS)


def test_a_size_that_is_none_is_an_error_before_anything_is_written(store, key, monkeypatch):
    monkeypatch.setenv(env.CACHE_SIZE.name, "lots")
    with pytest.raises(InvalidArgument, match=env.CACHE_SIZE.name):
        publish(store, key)
    assert not store.root.exists()


@pytest.mark.parametrize("at", ["manifest.json", "kernel.py", "kernel.so"])
def test_a_reader_between_two_files_still_gets_the_whole_entry(full, monkeypatch, at, seen):
    """Everything is evicted, and swept as others do, while it reads."""
    real = layer.read_file

    def evicting(folder, path):
        if path.name == at:
            bounds.trim(full.root, 0)
            bounds.sweep(full.root)
        return real(folder, path)

    monkeypatch.setattr(layer, "read_file", evicting)
    assert full.find(KEYS[0]).so_bytes == SO_BYTES
    assert left(full) == [] and "refuse" not in [e.kind for e in seen]


def test_a_reader_that_sleeps_longer_than_the_grace_finds_none_and_refuses_nothing(full, monkeypatch, seen):
    monkeypatch.setattr(bounds, "GRACE", 0.0)
    real = layer.read_file

    def evicting(folder, path):
        data = real(folder, path)
        bounds.trim(full.root, 0)
        time.sleep(0.02)
        bounds.sweep_staging(full.root)
        return data

    monkeypatch.setattr(layer, "read_file", evicting)
    assert full.find(KEYS[0]) is None and "refuse" not in [e.kind for e in seen]
    monkeypatch.undo()
    assert publish(full, KEYS[0]) and full.find(KEYS[0])


def test_what_was_evicted_is_deleted_after_the_grace(full, monkeypatch):
    bounds.trim(full.root, 0)
    staging = full.root / "v1" / ".staging"
    assert len(list(staging.iterdir())) == len(KEYS)
    bounds.sweep(full.root)
    assert len(list(staging.iterdir())) == len(KEYS)
    for path in staging.iterdir():
        os.utime(path, (time.time() - bounds.GRACE - 1,) * 2)
    bounds.sweep(full.root)
    assert list(staging.iterdir()) == [] and left(full) == []


@pytest.mark.parametrize("years", [-5, 5])
def test_a_clock_that_is_years_off_changes_the_order_not_the_amount(full, monkeypatch, years):
    """Set back, then entries 3 and 1 are used: they count as the latest; set forward: nothing is swept or evicted for
    its age."""
    real = time.time()
    now = real + years * 365 * bounds.DAY
    monkeypatch.setattr(time, "time", lambda: now)
    bounds._touched.clear()
    for number in (3, 1):
        full.find(KEYS[number])
        used_at(full, KEYS[number], now)  # what the disk's clock would have written
    total = size(full)
    bounds.sweep(full.root)
    assert left(full) == list(ROWS)
    bounds.trim(full.root, total)
    assert left(full) == list(ROWS)
    bounds.trim(full.root, total - 1)
    assert len(left(full)) == len(KEYS) - 1
    bounds.trim(full.root, total * 2 // len(KEYS) + 100)
    assert left(full) == [16, 64]


def test_a_clock_set_back_does_not_keep_leftovers_for_ever(store, key):
    publish(store, key)
    staging = store.root / "v1" / ".staging"
    for name, when in (("from the future", time.time() + 10 * bounds.DAY), ("old", time.time() - 2 * bounds.HOUR),
                       ("new", time.time())):
        (staging / name).mkdir()
        os.utime(staging / name, (when, when))
    bounds.sweep_staging(store.root)
    assert os.listdir(staging) == ["new"]


def test_sweeping_takes_old_marks_locks_and_failures_of_entries_that_are_gone(full):
    side = full.root / "v1"
    for name in (".locks", ".failed"):
        (side / name).mkdir(exist_ok=True)
    gone = "0" * 64
    paths = [side / ".used" / gone, side / ".locks" / f"{gone}.lock"]
    for path in paths:
        path.touch()
    (side / ".failed" / gone).mkdir()
    (side / ".failed" / gone / "kernel.py").touch()
    paths.append(side / ".failed" / gone)
    bounds.sweep(full.root)
    assert all(path.exists() for path in paths)
    for path in paths:
        os.utime(path, (1, 1))
    used_at(full, KEYS[0], 1)
    bounds.sweep(full.root)
    assert not any(path.exists() for path in paths)
    assert (side / ".used" / KEYS[0].digest).exists()


def test_eviction_that_fails_is_told_and_the_entry_is_stored_all_the_same(full, monkeypatch, seen):
    monkeypatch.setenv(env.CACHE_SIZE.name, "1")
    monkeypatch.setattr(bounds, "evict", lambda *a: (_ for _ in ()).throw(PermissionError("not allowed")))
    assert publish(full, make_key(causal=True)).path.exists()
    assert [e.fields["what"] for e in seen if e.kind == "degrade"] == ["eviction"]


def test_two_that_evict_at_once(full, monkeypatch):
    there = bounds.residents(full.root)
    bounds.evict(full.root, there[0])
    bounds.evict(full.root, there[0])
    assert len(left(full)) == len(KEYS) - 1


def test_strange_things_among_the_entries_do_not_stop_it(full):
    op = full.path(KEYS[0]).parent
    (op / ("f" * 64)).write_text("a file")
    (op / "README").write_text("a file")
    (full.root / "v1" / "note").write_text("a file")
    bounds.trim(full.root, 0)
    assert left(full) == [] and (op / "README").exists()


def test_bounds_of_a_root_that_is_not_there(tmp_path):
    assert bounds.residents(tmp_path / "none") == [] and bounds.trim(tmp_path / "none", 0) == []
    bounds.sweep(tmp_path / "none")
    assert not (tmp_path / "none").exists() and Store(tmp_path / "none").find(KEYS[0]) is None
