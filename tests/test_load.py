"""From verified bytes to a function: what is loaded is what was verified, once, on the right device."""

import dataclasses
import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jitmla import compile, env, load, toolchain
from jitmla.errors import LoadFailed, ToolchainMissing
from jitmla.store import Store

from .support.keys import make_key, publish
from .support.tiny import SOURCE as TINY
from .support.tiny import needs_compiler, tiny_key

OP = "mla_decode"


def runtime_missing():
    try:
        toolchain.runtime_library()
    except ToolchainMissing:
        return True
    return False


needs_runtime = pytest.mark.skipif(runtime_missing(), reason="the DSL's runtime library is not here")


@pytest.fixture(scope="module")
def c_library(tmp_path_factory):
    """The bytes of a library whose functions can be called without a GPU."""
    if toolchain.linker() is None:
        pytest.skip("no C compiler")
    out = tmp_path_factory.mktemp("c") / "ffi.so"
    source = Path(__file__).parent / "support" / "ffi.c"
    subprocess.run([toolchain.linker(), "-shared", "-fPIC", "-nostdlib", "-o", out, source], check=True)
    return out.read_bytes()


@pytest.fixture
def callable_entry(store, key, c_library, monkeypatch):
    monkeypatch.setattr(load, "_modules", {})
    monkeypatch.setattr(load, "_ready", set())
    return publish(store, key, so_bytes=c_library)


@pytest.fixture
def device(monkeypatch):
    """A device of compute capability 9.0, and what was asked of its driver."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    asked = []
    monkeypatch.setattr(load, "_load_into_driver", lambda library, index: asked.append((library, index)))
    return asked


@needs_runtime
def test_what_is_published_can_be_found_loaded_and_called(store, key, callable_entry, seen):
    function = load.load(store.find(key), OP)
    assert function(40, 2) == 42 and function(1) == -1
    assert [event.kind for event in seen] == ["hit", "load"]


@needs_runtime
def test_the_same_bytes_are_loaded_once(store, key, callable_entry, seen):
    first = load.load(callable_entry, OP)
    second = load.load(Store(store.root).find(key), OP)
    assert first(1, 2) == second(1, 2) == 3
    assert [event.kind for event in seen].count("load") == 1 and len(load._modules) == 1


@needs_runtime
def test_other_bytes_under_another_key_are_another_module(store, callable_entry, c_library):
    other = publish(store, make_key(page_size=16), so_bytes=c_library + b"\0")
    assert load.load(callable_entry, OP + "_cuda_load")() == 1
    assert load.load(other, OP + "_cuda_load")() == 1  # its own counter
    assert load.load(callable_entry, OP + "_cuda_load")() == 2


@needs_runtime
def test_what_happens_to_the_files_after_they_were_verified_does_not_matter(store, callable_entry):
    (callable_entry.path / "kernel.so").write_bytes(b"exchanged")
    shutil.rmtree(store.root)
    assert load.load(callable_entry, OP)(2, 3) == 5


@needs_runtime
def test_the_memory_that_is_loaded_is_sealed_and_leaves_no_file(callable_entry, monkeypatch, tmp_path):
    tvm_ffi = pytest.importorskip("tvm_ffi")
    real, looked = tvm_ffi.load_module, []

    def look(path):
        fd = os.open(path, os.O_RDWR)
        looked.append(fcntl.fcntl(fd, fcntl.F_GET_SEALS))
        with pytest.raises(PermissionError):
            os.write(fd, b"other code")
        os.close(fd)
        return real(path)

    monkeypatch.setattr(tvm_ffi, "load_module", look)
    monkeypatch.setattr(load, "_memory_disk", lambda: str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    descriptors = len(os.listdir("/proc/self/fd"))
    assert load.load(callable_entry, OP)(1, 1) == 2
    assert looked == [load.SEALS]
    assert os.listdir(tmp_path / "temporary") == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert f"memfd:jitmla_{OP}_{callable_entry.key.digest[:12]}" in Path("/proc/self/maps").read_text()


@needs_runtime
def test_a_function_that_is_not_there(callable_entry):
    with pytest.raises(LoadFailed, match="no function 'another'"):
        load.load(callable_entry, "another")


@needs_runtime
def test_bytes_that_are_no_library(store, key):
    with pytest.raises(LoadFailed, match=key.digest[:12]):
        load.load(publish(store, key, so_bytes=b"\x7fELF, but no more"), OP)


@needs_runtime
def test_on_a_device_the_kernels_are_loaded_into_the_driver_once(callable_entry, device):
    for _ in range(2):
        assert load.load(callable_entry, OP, 0)(1, 2) == 3
    load.load(callable_entry, OP, 1)
    assert device == [(1, 0), (2, 1)]


def test_an_entry_for_another_arch_is_refused(callable_entry, device):
    with pytest.raises(LoadFailed, match="it is for sm_100a, and cuda:0 is sm_90a"):
        load.load(dataclasses.replace(callable_entry, key=make_key(arch="sm_100a")), OP, 0)
    assert load._modules == {} and device == []


@pytest.mark.parametrize("named", ["/no/such/file.so", __file__])
def test_a_runtime_library_that_is_not_one(callable_entry, monkeypatch, named):
    monkeypatch.setenv(env.CUTE_RUNTIME.name, named)
    load.runtime.cache_clear()
    try:
        with pytest.raises(ToolchainMissing, match=named):
            load.load(callable_entry, OP)
    finally:
        load.runtime.cache_clear()


def test_without_tvm_ffi(callable_entry, monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    with pytest.raises(ToolchainMissing, match="tvm_ffi"):
        load.load(callable_entry, OP)


@needs_compiler
@needs_runtime
def test_a_real_kernel_is_compiled_stored_and_loaded_without_a_gpu(store, python_env):
    key = tiny_key()
    compile.get_or_compile(key, lambda: TINY, store)
    function = load.load(Store().find(key), OP)
    with pytest.raises(TypeError, match="Expects 2 parameters"):
        function()
    # and in a process that never imports the compiler
    code = ("import sys; from jitmla.load import load; from jitmla.store import Store; "
            "from tests.support.tiny import tiny_key; load(Store().find(tiny_key()), 'mla_decode'); "
            "print('cutlass' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], env=python_env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@needs_compiler
@needs_runtime
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="has a GPU driver")
def test_loading_into_a_driver_that_is_not_there_is_an_error(store):
    entry = compile.get_or_compile(tiny_key(), lambda: TINY, store)
    with pytest.raises(RuntimeError, match="cudaError"):
        load.load(entry, OP + load.LOAD_SUFFIX)()


@needs_compiler
@needs_runtime
def test_a_warm_find_and_load_takes_less_than_a_millisecond(store, monkeypatch):
    key = tiny_key()
    load.load(compile.get_or_compile(key, lambda: TINY, store), OP)  # the runtime library is in the process
    times = []
    for _ in range(50):
        monkeypatch.setattr(load, "_modules", {})
        start = time.process_time()
        load.load(store.find(key), OP)
        times.append(time.process_time() - start)
    assert min(times) < 1e-3


@pytest.mark.gpu
@needs_compiler
def test_the_first_call_of_a_process_may_be_inside_a_graph_capture(store, python_env):
    compile.get_or_compile(tiny_key(), lambda: TINY, store)
    said = subprocess.check_output([sys.executable, "-m", "tests.support.first_call"], text=True,
                                   env={**python_env, "JITMLA_CACHE_DIR": str(store.root)})
    assert said.splitlines() == ["in the driver before the call: True", "captured, replayed, right: True"]
