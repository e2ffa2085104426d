"""Every template compiles for its arch without spilling, and within what its card promises.

The covering set of tests/keysets.py has each (template, variant), each value of each constant, and each pair of values;
the full product takes five times as long and runs with -m slow. No other test compiles these Keys: a template that
breaks fails here, once. The kernels go into a cache for the session, or into the one that JITMLA_TEST_CACHE names,
where a later run finds them.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jitmla import compile, toolchain
from jitmla.errors import JitmlaError
from jitmla.store import Store

from .keysets import covering_choices, every_choice, only_when_asked

pytestmark = pytest.mark.skipif(toolchain.current() is None or toolchain.linker() is None,
                                reason="needs the compiler (CuTe DSL) and a C linker")
COVERED = {choice.key for choice in covering_choices()}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One for all processes of the session."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Store(os.environ.get("JITMLA_TEST_CACHE") or shared / "compiled")


@pytest.fixture(scope="module")
def kernels(store, request):
    """choice -> the entry or the error of its compile. Alone, this process compiles on all cores ahead of the
    tests; beside others (xdist) each compiles what its own tests ask for."""
    def one(choice):
        try:
            return compile.get_or_compile(choice.key, choice.source, store)
        except JitmlaError as e:
            return e

    if "PYTEST_XDIST_WORKER" in os.environ:
        yield one
        return
    asked = [item.callspec.params["choice"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        waiting = {choice.key: pool.submit(one, choice) for choice in asked if choice.key in COVERED}
        yield lambda choice: (waiting.get(choice.key) or pool.submit(one, choice)).result()


def name(choice):
    return f"{choice.variant.name} {choice.spec}"


@pytest.mark.slow
@pytest.mark.parametrize("choice", [c for c in every_choice() if c.key not in COVERED], ids=name)
def test_every_other_kernel(choice, request):
    only_when_asked(request.config)
    check(choice, request.getfixturevalue("kernels")(choice))


@pytest.mark.parametrize("choice", covering_choices(), ids=name)
def test_covering_kernels(choice, kernels):
    check(choice, kernels(choice))


def check(choice, entry):
    if isinstance(entry, JitmlaError):
        raise entry  # wgmma that ptxas serialised is one of these
    assert entry.key == choice.key
    devices = entry.manifest["kernels"]
    assert any(choice.spec.op.title().replace("_", "") in kernel["name"] for kernel in devices)
    for kernel in devices:
        assert max(kernel["spill_bytes"], kernel["stack_bytes"]) <= choice.variant.max_spill_bytes, kernel
        assert kernel["registers"] <= choice.variant.max_registers, kernel
    assert str(Path.home()).encode() not in entry.so_bytes and os.getcwd().encode() not in entry.so_bytes
