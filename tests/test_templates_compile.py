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

from jitmla import compile, registry, toolchain
from jitmla.errors import JitmlaError
from jitmla.store import Store

from .keysets import covering, only_when_asked, product

pytestmark = pytest.mark.skipif(toolchain.current() is None or toolchain.linker() is None,
                                reason="needs the compiler (CuTe DSL) and a C linker")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One for all processes of the session."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Store(os.environ.get("JITMLA_TEST_CACHE") or shared / "compiled")


@pytest.fixture(scope="module")
def kernels(store, request):
    """spec -> (choice, the entry or the error of its compile). Alone, this process compiles on all cores ahead of the
    tests; beside others (xdist) each compiles what its own tests ask for."""
    def one(spec):
        choice = registry.choose(spec)
        try:
            return choice, compile.get_or_compile(choice.key, choice.source, store)
        except JitmlaError as e:
            return choice, e

    if "PYTEST_XDIST_WORKER" in os.environ:
        yield one
        return
    asked = [item.callspec.params["spec"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        waiting = {spec: pool.submit(one, spec) for spec in asked if spec in covering()}
        yield lambda spec: (waiting.get(spec) or pool.submit(one, spec)).result()


@pytest.mark.slow
@pytest.mark.parametrize("spec", [s for s in product() if s not in covering()], ids=str)
def test_every_other_kernel(spec, request):
    only_when_asked(request.config)
    check(*request.getfixturevalue("kernels")(spec))


@pytest.mark.parametrize("spec", covering(), ids=str)
def test_covering_kernels(spec, kernels):
    check(*kernels(spec))


def check(choice, entry):
    if isinstance(entry, JitmlaError):
        raise entry  # wgmma that ptxas serialised is one of these
    assert entry.key == choice.key
    devices = entry.manifest["kernels"]
    assert any("MlaDecode" in kernel["name"] for kernel in devices)
    for kernel in devices:
        assert (kernel["spill_bytes"], kernel["stack_bytes"]) == (0, 0), kernel
        assert kernel["registers"] <= choice.variant.max_registers, kernel
    assert str(Path.home()).encode() not in entry.so_bytes and os.getcwd().encode() not in entry.so_bytes
