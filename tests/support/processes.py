"""Forked processes that tests start, wait for, and end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

PATIENCE = 120.0  # seconds for what must happen at some time: only a test that fails takes that long


def in_child(action):
    """Run `action` in a forked process; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return child


@contextlib.contextmanager
def running(action):
    """Run `action` in a forked process during the block; yields its process id and kills it at the end."""
    child = in_child(action)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


@contextlib.contextmanager
def program(*arguments, env):
    """A Python process during the block, its output in pipes. Afterwards it is dead, and they are closed."""
    with subprocess.Popen([sys.executable, *map(str, arguments)], env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def at_once(count, action, folder):
    """What `action(i)` returns in each of `count` processes that start together; an exception as its text."""
    start = time.monotonic() + 0.1 + count * 0.005
    children = []
    for i in range(count):
        child = os.fork()
        if child == 0:
            try:
                time.sleep(max(start - time.monotonic(), 0))
                result = action(i)
            except BaseException as e:
                result = repr(e)
            (folder / f"result-{i}.json").write_text(json.dumps(result))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [json.loads((folder / f"result-{i}.json").read_text()) for i in range(count)]


def wait_until(condition, seconds=PATIENCE):
    """Whether `condition()` holds before the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def alive(pid):
    """Whether a process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
