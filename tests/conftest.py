"""What every test has: a kernel cache of its own, no remembered failures, and the marker `gpu`."""

import json
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from jitmla import bounds, compile, events, layers, registry, toolchain
from jitmla.bench.report import commit_here
from jitmla.store import Store

from .support.keys import make_key, publish

REPOSITORY = Path(__file__).parents[1]


FIGURES = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--figures", metavar="FILE", help="write the figures of the budget tests to FILE as well")


def pytest_sessionfinish(session):
    """Beside the figures: what was measured, on what, and how busy that was."""
    file = session.config.getoption("--figures")
    if file:
        machine = {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[1],
                   "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
                   "toolchain": toolchain.current()}
        command = shlex.join(["python", "-m", "pytest", *session.config.invocation_params.args])
        document = {"commit": commit_here(), "command": command, "machine": machine,
                    "figures": session.config.stash[FIGURES]}
        Path(file).write_text(json.dumps(document, indent=1) + "\n")


@pytest.fixture
def figure(request, capsys):
    """Holds a promise to its figure, and notes it: figure(promise, value, limit, unit)."""
    def hold(promise, value, limit, unit):
        request.config.stash[FIGURES].append({"promise": promise, "value": round(value, 3), "limit": limit,
                                              "unit": unit})
        with capsys.disabled():
            print(f"\n{promise}: {value:.2f} {unit}, at most {limit:g}")
        assert value <= limit

    return hold


def pytest_configure(config):
    config.stash[FIGURES] = []
    # a shell without job control has Ctrl-C ignored in what it starts in the background, and tests press it
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "gpu: needs a CUDA device; uses the cache that JITMLA_CACHE_DIR names")


def pytest_collection_modifyitems(config, items):
    """Tests marked `slow` run when -m of the command line names them, and when they are asked for by their own name."""
    if "slow" in config.option.markexpr.replace("not slow", "") or any("::" in name for name in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture
def without_portable(monkeypatch):
    """As if the portable template, which serves whatever a call can make, did not exist."""
    each = registry.each_template
    monkeypatch.setattr(registry, "each_template", lambda op: (t for t in each(op) if t.backend != "portable"))


@pytest.fixture
def card_of_x(monkeypatch, tmp_path):
    """Makes op x the only one: (text of its card, None for none) -> path of the card."""
    def write(text):
        monkeypatch.setattr(registry, "TEMPLATES", tmp_path)
        path = tmp_path / "x" / "card.toml"
        path.parent.mkdir()
        if text is not None:
            path.write_text(text)
        return path

    yield write
    registry._tables.cache_clear(), registry._template.cache_clear()


@pytest.fixture(autouse=True)
def cache_dir(request, monkeypatch, tmp_path):
    """The root of this test's cache: private, except for gpu tests, which may be given a prewarmed one."""
    if request.node.get_closest_marker("gpu") and os.environ.get("JITMLA_CACHE_DIR"):
        yield Path(os.environ["JITMLA_CACHE_DIR"])
        return
    monkeypatch.setenv("JITMLA_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    compile.forget_failures()
    bounds._touched.clear()
    layers._told.clear()
    layers.installed.cache_clear()


@pytest.fixture
def store(cache_dir):
    return Store()


@pytest.fixture
def key():
    return make_key()


@pytest.fixture
def entry(store, key):
    """A published entry of `key`, whose library is arbitrary bytes."""
    return publish(store, key)


@pytest.fixture
def in_memory(cache_dir, monkeypatch):
    """For tests that replace thousands of entries: their cache lies in memory, if the machine has such a disk. To be
    named before `store`."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        monkeypatch.setenv("JITMLA_CACHE_DIR", os.path.join(folder, "cache"))
        yield


@pytest.fixture
def seen():
    """The events of this test, as a list of events.Event."""
    happened = []
    stop = events.subscribe(happened.append)
    yield happened
    stop()


@pytest.fixture
def python_env(cache_dir):
    """The environment for a Python subprocess that imports jitmla and tests."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])}


