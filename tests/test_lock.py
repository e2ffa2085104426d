"""The lock: it saves compiles, says whom one waits for, and is never in the way."""

import errno
import fcntl
import json
import os
import signal
import threading
import time

import pytest

from jitmla import env, events, lock
from jitmla.errors import InvalidArgument

from .support.processes import PATIENCE, alive, at_once, running, wait_until


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def hold(folder):
    """Holds the lock until a file `enough` is there."""
    def action():
        with lock.exclusive(folder, "k"):
            wait_until((folder / "enough").exists, 600.0)

    return action


def held(folder):
    """Waits until another process holds the lock, and has said so."""
    assert wait_until(lambda: lock.describe(folder / "k.holder") != "another process")


def test_one_at_a_time(folder):
    def action(i):
        with lock.exclusive(folder, "k", timeout=PATIENCE) as mine:
            start = time.monotonic()
            time.sleep(0.02)
            return mine, start, time.monotonic()

    spans = sorted(span for mine, *span in at_once(8, action, folder) if mine)
    assert len(spans) == 8
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))


def test_other_names_do_not_wait(folder, seen):
    with running(hold(folder)):
        held(folder)
        with lock.exclusive(folder, "another") as mine:
            assert mine
    assert seen == []


def test_a_waiter_says_who_holds_it_and_for_how_long(folder, seen, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_EVENT_SECONDS", 0.1)
    end = events.subscribe(lambda event: len(seen) == 3 and (folder / "enough").touch())
    with running(hold(folder)) as holder:
        held(folder)
        with lock.exclusive(folder, "k", op="mla_decode") as mine:
            assert mine
            assert json.loads((folder / "k.holder").read_text())["pid"] == os.getpid()
    end()
    assert len(seen) >= 3 and {event.kind for event in seen} == {"wait"}
    assert f"pid {holder} on " in seen[0].fields["holder"] and seen[0].fields["op"] == "mla_decode"
    seconds = [event.fields["seconds"] for event in seen]
    assert seconds == sorted(seconds) and seconds[-1] >= 0.2
    assert not (folder / "k.holder").exists()


def test_who_waits_for_what_is_done_meanwhile_goes_on_at_once(folder, seen):
    """All of them, and not one after the other: the lock is still held."""
    with running(hold(folder)) as holder:
        held(folder)
        threading.Timer(0.3, (folder / "done").touch).start()
        start = time.monotonic()
        with lock.exclusive(folder, "k", done=(folder / "done").exists) as mine:
            assert not mine and time.monotonic() - start >= 0.2
        assert alive(holder)
    assert [event.kind for event in seen] == ["wait"]


def test_after_the_time_is_over_one_goes_on_without_it(folder, seen, monkeypatch):
    monkeypatch.setenv(env.LOCK_TIMEOUT.name, "0.2")
    with running(hold(folder)) as holder:
        held(folder)
        start = time.monotonic()
        with lock.exclusive(folder, "k") as mine:
            assert not mine
        assert time.monotonic() - start >= 0.2
        assert (folder / "k.holder").exists()
    assert seen[-1].kind == "degrade" and f"pid {holder}" in seen[-1].fields["reason"]


def test_a_killed_holder_frees_it(folder, seen):
    with running(hold(folder)) as holder:
        held(folder)
        os.kill(holder, signal.SIGKILL)
        with lock.exclusive(folder, "k") as mine:
            assert mine
    assert not alive(holder)


def test_it_is_released_when_the_work_fails(folder):
    with pytest.raises(ZeroDivisionError), lock.exclusive(folder, "k"):
        raise ZeroDivisionError
    with lock.exclusive(folder, "k", timeout=0.0) as mine:
        assert mine


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO, errno.EROFS])
def test_where_nothing_can_be_locked_one_goes_on_without_it(folder, seen, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock.exclusive(folder, "k") as mine:
        assert not mine
    assert [event.kind for event in seen] == ["degrade"] and os.strerror(number) in seen[0].fields["reason"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": 1, "host": "h", "since": "x"}'])
def test_whatever_the_holder_s_note_says_it_can_be_described(folder, text):
    (folder / "k.holder").write_text(text)
    assert lock.describe(folder / "k.holder") == "another process"


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_seconds_must_be_seconds(monkeypatch, text):
    monkeypatch.setenv(env.LOCK_TIMEOUT.name, text)
    with pytest.raises(InvalidArgument, match=f"{env.LOCK_TIMEOUT.name}={text}"):
        lock.timeout_seconds(env.LOCK_TIMEOUT)
