"""Every template compiles for its arch without spilling, and within what its card promises.

The covering set of tests/keysets.py has each (template, variant), each value of each constant, and each pair of values;
the full product takes tens of minutes and is marked slow. No other test compiles these Keys: a template that
breaks fails here, once. The kernels are compiled into a cache for the session, or into the one that JITMLA_TEST_CACHE
names, where a later run finds them.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jitmla import compile, registry, toolchain
from jitmla.errors import JitmlaError
from jitmla.store import Store

from .keysets import covering, o_proj_covering, o_proj_product, product

pytestmark = pytest.mark.skipif(toolchain.current() is None or toolchain.linker() is None,
                                reason="needs the compiler (CuTe DSL) and a C linker")
KERNELS = {"mla_decode": "MlaDecode", "inv_rope_fp8_quant": "InvRopeFp8Quant", "fp8_bmm": "Fp8Bmm"}
JOBS = min(4, os.cpu_count() or 1)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """choice -> it, and the entry or the error of its compile; JOBS children at a time."""
    store = Store(os.environ.get("JITMLA_TEST_CACHE") or tmp_path_factory.mktemp("cache"))

    def one(choice):
        try:
            return choice, compile.get_or_compile(choice.key, choice.source, store)
        except JitmlaError as e:
            return choice, e

    with ThreadPoolExecutor(JOBS) as pool:
        waiting = {choice.key: pool.submit(one, choice) for choice in
                   [*map(registry.choose, covering()), *o_proj_covering(), *elsewhere()]}
        yield lambda choice: (waiting.get(choice.key) or pool.submit(one, choice)).result()


def elsewhere():
    """The smallest and the largest variant of the quantisation on an arch without and with the conversion to e4m3, and
    on one behind Hopper; the other archs are marked slow."""
    return [c for c in o_proj_product(["sm_80", "sm_89", "sm_100a"]) if c.variant.name in ("t4h1", "t8h8")
            and dict(c.spec)["scale_mode"] != "raw_f32" and c.spec["neox"] == (c.variant.name == "t8h8")
            and (c.spec["positions"] == "i32") == (c.spec["scale_mode"] == "ue8m0_i32")]


def name(choice):
    return f"{choice.variant.name} {choice.spec}"


@pytest.mark.slow
@pytest.mark.parametrize("choice", [*map(registry.choose, product()), *o_proj_product()], ids=name)
def test_every_kernel(choice, kernels):
    check(*kernels(choice))


@pytest.mark.parametrize("spec", covering(), ids=str)
def test_covering_kernels(spec, kernels):
    check(*kernels(registry.choose(spec)))


@pytest.mark.parametrize("choice", o_proj_covering(), ids=name)
def test_covering_kernels_of_the_output_path(choice, kernels):
    check(*kernels(choice))


@pytest.mark.parametrize("choice", elsewhere(), ids=name)
def test_quantisation_on_other_archs(choice, kernels):
    check(*kernels(choice))


def check(choice, entry):
    if isinstance(entry, JitmlaError):
        raise entry  # wgmma that ptxas serialised is one of these
    assert entry.key == choice.key
    devices = entry.manifest["kernels"]
    assert any(KERNELS[choice.spec.op] in kernel["name"] for kernel in devices)
    for kernel in devices:
        assert (kernel["spill_bytes"], kernel["stack_bytes"]) == (0, 0), kernel
        # four blocks of the combine are to fit on an SM
        limit = 64 if "MlaCombine" in kernel["name"] else choice.variant.max_registers
        assert kernel["registers"] <= limit, kernel
    assert str(Path.home()).encode() not in entry.so_bytes and os.getcwd().encode() not in entry.so_bytes
