"""Every template compiles for its arch without spilling, and within what its card promises.

The usual run compiles each variant of each template once (tests/keysets.py says which), so that one more op costs it
seconds. With -m slow: the covering set, which has each value of each constant and each pair of values, and the full
product. The kernels go into a cache for the session, or into the one that JITMLA_TEST_CACHE names, where a later run
finds them.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jitmla import compile, toolchain
from jitmla.errors import JitmlaError
from jitmla.pool import Pool
from jitmla.store import Store

from .keysets import covering_choices, every_choice, usual_choices

pytestmark = pytest.mark.skipif(toolchain.current() is None or toolchain.linker() is None,
                                reason="needs the compiler (CuTe DSL) and a C linker")
USUAL = {choice.key: choice for choice in usual_choices()}
COVERING = {choice.key: choice for choice in covering_choices() if choice.key not in USUAL}
OTHERS = {choice.key: choice for choice in every_choice() if choice.key not in USUAL.keys() | COVERING.keys()}


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
    with Pool() as forks:
        def one(choice):
            try:
                return compile.get_or_compile(choice.key, choice.source, store, builder=forks.build)
            except JitmlaError as e:
                return e

        if "PYTEST_XDIST_WORKER" in os.environ:
            yield one
            return
        asked = [item.callspec.params["choice"] for item in request.session.items if item.path == request.path]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
            waiting = {choice.key: threads.submit(one, choice) for choice in asked}
            yield lambda choice: waiting[choice.key].result()


def name(choice):
    return f"{choice.variant.name} {choice.spec}"


@pytest.mark.parametrize("choice", USUAL.values(), ids=name)
def test_a_kernel_of_each_variant(choice, kernels):
    check(choice, kernels(choice))


@pytest.mark.slow
@pytest.mark.parametrize("choice", COVERING.values(), ids=name)
def test_the_rest_of_the_covering_kernels(choice, kernels):
    check(choice, kernels(choice))


@pytest.mark.slow
@pytest.mark.parametrize("choice", OTHERS.values(), ids=name)
def test_every_other_kernel(choice, kernels):
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
