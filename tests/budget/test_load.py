"""What verifying and loading may take, in process time, so that a busy machine does not count."""

import subprocess
import sys
import time

import pytest

from jitmla import bounds, compile, load
from jitmla.store import Store

from ..support.keys import KERNELS, SOURCE, make_key
from ..support.tiny import SOURCE as TINY
from ..support.tiny import needs_compiler, tiny_key

SIZE = 216_000  # bytes of kernel.so of mla_decode for sm_90a
OP = "mla_decode"


@pytest.fixture(scope="module")
def library():
    """The tiny kernel's library, made as long as a real one; what follows an ELF file is not looked at."""
    made = compile.build(tiny_key(), TINY).so_bytes
    return made + bytes(SIZE - len(made))


@pytest.fixture
def filled(store, library):
    """64 entries whose libraries differ, so that none is taken for another."""
    keys = [make_key(constants=(("NUMBER", float(i)),)) for i in range(64)]
    for i, key in enumerate(keys):
        store.publish(key, SOURCE * 60, library + bytes([i]), KERNELS)
    load.runtime(), load._tvm_ffi()  # once in a process, whatever is loaded
    bounds._touched.clear()
    return keys


def boot(store, keys):
    """Milliseconds of process time to verify and load each of the entries."""
    times = []
    for key in keys:
        start = time.process_time()
        load.load(store.find(key), OP)
        times.append((time.process_time() - start) * 1e3)
    return times


@needs_compiler
@pytest.mark.budget
def test_one_entry_in_a_millisecond_and_64_in_a_tenth_of_a_second(filled, store, figure):
    rounds = []
    for _ in range(5):  # the best of five: other work on the machine's cores slows this one down
        load._modules.clear()
        rounds.append(boot(Store(store.root), filled))
    median, total = min(sorted(times)[32] for times in rounds), min(map(sum, rounds))
    figure(f"verify and load one entry of {SIZE // 1000} kB (median of 64)", median, 1, "ms of a core")
    figure("verify and load 64 entries", total, 100, "ms of a core")


@needs_compiler
@pytest.mark.budget
def test_64_entries_from_a_layer(filled, store, tmp_path):
    assert sum(boot(Store(tmp_path / "empty", [Store(store.root).user]), filled)) <= 100.0


@pytest.mark.budget
def test_the_first_find_of_a_process_imports_no_more_than_it_needs(store, python_env):
    """Neither jsonschema, which is slow, nor what only a miss or a bundle needs."""
    store.publish(make_key(), SOURCE, bytes(SIZE), KERNELS)
    late = ("jsonschema", "filelock", "tarfile", "typer", "jitmla.bundle", "jitmla.failures")
    code = ("import sys, time\nfrom jitmla.store import Store\nfrom tests.support.keys import make_key\n"
            "key = make_key(); key.digest\nstart = time.process_time()\nassert Store().find(key)\n"
            f"print((time.process_time() - start) * 1e3, *[m for m in {late} if m in sys.modules])")
    runs = [subprocess.run([sys.executable, "-S", "-c", code], env=python_env, capture_output=True, text=True,
                           check=True).stdout.split() for _ in range(5)]
    assert all(run[1:] == [] for run in runs), runs
    assert min(float(run[0]) for run in runs) <= 1.5
