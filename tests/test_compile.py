"""From a Key to an entry: once per host, in a child process that is contained, with errors that say what to do."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from jitmla import _child, bounds, compile, env, toolchain
from jitmla.compile import Built, build, get_or_compile
from jitmla.errors import CacheUntrusted, CompileFailed, CompileInterrupted, ToolchainMissing
from jitmla.store import Store

from .support.keys import KERNELS, SO_BYTES, SOURCE, make_key, publish
from .support.processes import PATIENCE, alive, at_once, running, wait_until
from .support.tiny import SOURCE as TINY
from .support.tiny import needs_compiler, tiny_key
from .support.tree import snapshot

FAILING = 'print("a line of the compiler")\nraise ValueError("no such layout")\n'
HANGING = ("import os, subprocess, time\nchild = subprocess.Popen(['sleep', '600'])\n"
           "open({path!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}\\n')\ntime.sleep(600)\n")


@pytest.fixture(autouse=True)
def temporary(monkeypatch, tmp_path):
    """Where compiles work and failed ones leave their sources."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def kinds(seen):
    return [event.kind for event in seen]


def builder(key, source, store=None):
    return Built(SO_BYTES, source, KERNELS, 0.0)


def never(*args, **kwargs):
    raise AssertionError("this must not be called")


# -------------------------------------------------------------------------------------------- with a fake compiler


def test_a_miss_compiles_and_publishes_then_it_is_a_hit(store, key, seen):
    made = get_or_compile(key, lambda: SOURCE, store, builder=builder)
    assert made.path == store.path(key) and made.so_bytes == SO_BYTES
    assert get_or_compile(key, never, Store(), builder=never) == made
    assert kinds(seen) == ["miss", "compile", "compiled", "publish", "hit"]
    assert all(event.fields["key"] == key.digest[:12] for event in seen)


def test_16_processes_compile_once(store, key, tmp_path):
    def slow(key, source, store=None):
        with open(tmp_path / "compiles", "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return builder(key, source)

    def action(i):
        return get_or_compile(key, lambda: SOURCE, Store(store.root), builder=slow).manifest["digest"]

    assert at_once(16, action, tmp_path) == [key.digest] * 16
    assert len((tmp_path / "compiles").read_text().splitlines()) == 1


def test_16_threads_compile_once(store, key):
    built, entries = [], []

    def slow(key, source, store=None):
        built.append(key)
        time.sleep(0.1)
        return builder(key, source)

    threads = [threading.Thread(target=lambda: entries.append(get_or_compile(key, lambda: SOURCE, store, builder=slow)))
               for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and len(entries) == 16 and all(e == entries[0] for e in entries)


def test_without_working_locks_all_still_get_the_entry(store, key, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError("no locks here")))

    def action(i):
        return get_or_compile(key, lambda: SOURCE, Store(store.root), builder=builder).manifest["digest"]

    assert at_once(8, action, tmp_path) == [key.digest] * 8
    assert len(list(store.entries())) == 1


def test_a_corrupt_entry_is_compiled_again(store, entry, key, seen):
    (entry.path / "kernel.so").write_bytes(b"damaged")
    assert get_or_compile(key, lambda: SOURCE, store, builder=builder).so_bytes == SO_BYTES
    assert kinds(seen) == ["refuse", "miss", "refuse", "compile", "compiled", "publish"]
    assert store.find(key).so_bytes == SO_BYTES


def test_an_untrusted_cache_stops_it(store, entry, key):
    (entry.path / "kernel.so").chmod(0o666)
    before = snapshot(store.root)
    with pytest.raises(CacheUntrusted):
        get_or_compile(key, never, store, builder=never)
    assert snapshot(store.root) == before


def test_an_unwritable_cache_costs_the_storing_only(tmp_path, key, seen):
    (tmp_path / "file").write_text("")
    made = get_or_compile(key, lambda: SOURCE, Store(tmp_path / "file" / "cache"), builder=builder)
    assert made.path is None and made.so_bytes == SO_BYTES and made.manifest["digest"] == key.digest
    assert kinds(seen) == ["miss", "degrade", "compile", "compiled", "degrade"]
    assert [event.fields["what"] for event in seen if event.kind == "degrade"] == ["lock", "store"]


def test_a_failure_is_remembered_and_an_interruption_is_not(store, key):
    calls = []

    def failing(error):
        def attempt(key, source, store=None):
            calls.append(error)
            raise error

        return attempt

    for _ in range(2):
        with pytest.raises(CompileInterrupted):
            get_or_compile(key, lambda: SOURCE, store, builder=failing(CompileInterrupted("killed")))
    assert len(calls) == 2
    with pytest.raises(CompileFailed) as first:
        get_or_compile(key, lambda: SOURCE, store, builder=failing(CompileFailed("to compile", differs="bad layout")))
    with pytest.raises(CompileFailed) as second:
        get_or_compile(key, never, store, builder=never)
    assert str(second.value) == str(first.value) and second.value.as_dict() == first.value.as_dict()
    compile.forget_failures()
    bounds.sweep(store.root, failures=True)
    assert get_or_compile(key, lambda: SOURCE, store, builder=builder)


def test_no_compiler_here(store, seen, monkeypatch):
    monkeypatch.setattr(toolchain, "current", lambda options="": None)
    key = make_key(toolchain=False)
    with pytest.raises(ToolchainMissing, match="not installed here") as caught:
        get_or_compile(key, never, store)
    assert "prewarm" in caught.value.remedy
    publish(store, make_key())
    assert get_or_compile(key, never, store).so_bytes == SO_BYTES
    assert kinds(seen) == ["miss", "publish", "hit"]


def test_no_linker_here(store, key, monkeypatch):
    monkeypatch.setattr(toolchain, "current", lambda options="": key.toolchain)
    monkeypatch.setenv(env.CC.name, "no-such-compiler")
    with pytest.raises(ToolchainMissing, match="no-such-compiler"):
        get_or_compile(key, lambda: SOURCE, store)


# -------------------------------------------------------------------------------------------------- what ptxas says

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kernel_b' for 'sm_90a'
ptxas info    : Function properties for kernel_b
ptxas         .     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 16 bytes cumulative stack size
ptxas info    : Compiling entry function 'kernel_a' for 'sm_90a'
ptxas info    : Function properties for kernel_a
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : Function properties for a_function_that_was_not_inlined
    32 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
"""


def test_what_ptxas_says_about_each_kernel():
    assert _child.kernels_of(PTXAS) == [
        {"name": "kernel_a", "registers": 40, "spill_bytes": 4, "stack_bytes": 32},
        {"name": "kernel_b", "registers": 168, "spill_bytes": 20, "stack_bytes": 16}]


SERIALIZED = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to"


@pytest.mark.parametrize("line", [
    f"ptxas info : (C7510) {SERIALIZED} insufficient register resources for the wgmma pipeline in function 'kernel_b'",
    f"ptxas info : (C7512) {SERIALIZED} the presence of Extern calls in the function 'kernel_b'",
    "ptxas info : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register requirement"])
def test_a_kernel_that_ptxas_slows_down_is_an_error(line):
    with pytest.raises(_child.Failed) as caught:
        _child.kernels_of(PTXAS + line)
    assert line in caught.value.args[0]


@pytest.mark.parametrize("log", ["", "ptxas info : 0 bytes gmem", PTXAS.replace("Used 40 registers", "")])
def test_a_missing_report_is_an_error(log):
    with pytest.raises(_child.Failed, match="did not report"):
        _child.kernels_of(log)


def test_the_log_in_the_compiler_s_remarks():
    yaml = f"--- !Analysis\nArgs:\n  - Remark:      'ptxas output: {PTXAS.replace(chr(39), chr(39) * 2)}'\n...\n"
    assert _child.ptxas_log(yaml * 2) == "ptxas output: " + PTXAS


# ------------------------------------------------------------------------------------------------ the real compiler


@pytest.fixture(scope="module")
def real():
    """The tiny kernel, compiled once for this module."""
    return build(tiny_key(), TINY)


def compiled_again(**changes):
    """The library that a build in a fresh Python gives, with other environment variables."""
    code = ("import sys; from jitmla.compile import build; from tests.support.tiny import SOURCE, tiny_key; "
            "sys.stdout.buffer.write(build(tiny_key(), SOURCE).so_bytes)")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **changes}, capture_output=True, check=True,
                          cwd=Path(__file__).parents[1])
    return done.stdout


@needs_compiler
def test_the_library_does_not_depend_on_folder_process_or_environment(real, tmp_path):
    assert compiled_again(TMPDIR=str(tmp_path), PYTHONHASHSEED="7", CUTE_DSL_LINEINFO="1", CUTE_DSL_ARCH="sm_80",
                          CUTE_DSL_KEEP="ptx", CUDA_VISIBLE_DEVICES="0") == real.so_bytes
    for path in (tmp_path, tempfile.gettempdir(), Path(__file__).parents[1], Path.home()):
        assert str(path).encode() + b"/" not in real.so_bytes
    assert list(tmp_path.glob("jitmla-*")) == []  # nothing is left in TMPDIR


@needs_compiler
def test_the_launcher_runs_on_every_processor_of_the_architecture(real, tmp_path):
    (tmp_path / "kernel.so").write_bytes(real.so_bytes)
    if shutil.which("objdump") is None or toolchain.host() != "linux-x86_64":
        pytest.skip("no objdump for x86-64 here")
    code = subprocess.check_output(["objdump", "-d", "--no-show-raw-insn", tmp_path / "kernel.so"], text=True)
    assert "ret" in code and "%ymm" not in code and "\tv" not in code


@needs_compiler
def test_the_report_comes_from_ptxas(real):
    (kernel,) = real.kernels
    assert kernel["name"].startswith("kernel_cutlass_scale_")
    assert 4 <= kernel["registers"] <= 32 and kernel["spill_bytes"] == kernel["stack_bytes"] == 0


@needs_compiler
def test_16_processes_and_the_real_compiler_once(store, tmp_path):
    key = tiny_key()

    def counted(*args, **kwargs):
        with open(tmp_path / "compiles", "a") as file:
            file.write("one\n")
        return build(*args, **kwargs)

    def action(i):
        return get_or_compile(key, lambda: TINY, Store(store.root), builder=counted).manifest["files"]["kernel.so"]

    results = at_once(16, action, tmp_path)
    assert (tmp_path / "compiles").read_text() == "one\n"
    assert all(result == results[0] and result["bytes"] > 1000 for result in results)


@needs_compiler
def test_a_failing_compile_shows_its_last_lines_its_source_and_fails_at_once_again(store):
    key = tiny_key()
    with pytest.raises(CompileFailed) as caught:
        get_or_compile(key, lambda: FAILING, store)
    text = str(caught.value)
    for part in ("ValueError: no such layout", '|     raise ValueError("no such layout")', key.name):
        assert part in text
    kept = store.root / "v1" / ".failed" / key.digest
    assert (kept / "kernel.py").read_text() == FAILING and str(kept / "kernel.py") in caught.value.remedy
    assert "a line of the compiler" in (kept / "compile.log").read_text()
    assert list(store.entries()) == []
    with pytest.raises(CompileFailed, match="no such layout"):
        get_or_compile(key, never, store, builder=never)


@needs_compiler
def test_without_a_store_the_failed_source_is_kept_elsewhere(temporary):
    with pytest.raises(CompileFailed) as caught:
        build(tiny_key(), FAILING)
    (kept,) = temporary.iterdir()
    assert (kept / "kernel.py").read_text() == FAILING and str(kept) in caught.value.remedy


@needs_compiler
def test_where_the_store_cannot_be_written_the_failed_source_is_kept_elsewhere(temporary, tmp_path, seen):
    (tmp_path / "a file").touch()
    with pytest.raises(CompileFailed) as caught:
        build(tiny_key(), FAILING, Store(tmp_path / "a file"))
    (kept,) = temporary.iterdir()
    assert str(kept / "kernel.py") in caught.value.remedy
    assert [e.fields["what"] for e in seen if e.kind == "degrade"] == ["failed source"]


def test_a_python_that_does_not_know_its_own_path(store, key, monkeypatch):
    monkeypatch.setattr(toolchain, "require_compiler", lambda: None)
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(ToolchainMissing, match="does not know its interpreter"):
        get_or_compile(key, lambda: SOURCE, store)


def test_a_key_without_a_toolchain_is_found_and_not_compiled(store, monkeypatch):
    bare = make_key(toolchain=False)
    monkeypatch.setattr(toolchain, "require_compiler", lambda: None)
    with pytest.raises(ValueError, match="without a toolchain"):
        get_or_compile(bare, never, store, builder=never)
    publish(store, make_key())
    assert get_or_compile(bare, never, store, builder=never).key == make_key()


@needs_compiler
def test_a_hanging_compile_is_killed_with_all_it_started_and_may_be_tried_again(store, tmp_path, monkeypatch):
    source, note = HANGING.format(path=str(tmp_path / "pids")), tmp_path / "pids"
    wait = subprocess.Popen.wait

    def wait_until_it_hangs(child, timeout=None):
        assert timeout is None or wait_until(lambda: note.exists() and note.read_text().endswith("\n"))
        return wait(child, timeout and 0.1)

    with monkeypatch.context() as patched:
        patched.setattr(subprocess.Popen, "wait", wait_until_it_hangs)
        with pytest.raises(CompileInterrupted, match="still running after 100 s") as caught:
            get_or_compile(tiny_key(), lambda: source, store, builder=lambda *a, **k: build(*a, **k, timeout=100.0))
    assert env.COMPILE_TIMEOUT.name in caught.value.remedy
    pids = [int(pid) for pid in note.read_text().split()]
    assert len(pids) == 2 and wait_until(lambda: not any(map(alive, pids)))
    assert get_or_compile(tiny_key(), lambda: TINY, store).path


@needs_compiler
def test_a_compile_dies_with_the_process_that_wants_it(tmp_path):
    note = tmp_path / "pids"
    with running(lambda: build(tiny_key(), HANGING.format(path=str(note)))):
        assert wait_until(lambda: note.exists() and note.read_text().endswith("\n"))
    child = int(note.read_text().split()[0])
    assert wait_until(lambda: not alive(child))
    os.kill(int(note.read_text().split()[1]), 9)


@needs_compiler
def test_stop_all_ends_the_compiles_of_other_threads(tmp_path):
    note, errors = tmp_path / "pids", []

    def work():
        try:
            build(tiny_key(), HANGING.format(path=str(note)))
        except CompileInterrupted as e:
            errors.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    assert wait_until(lambda: note.exists() and note.read_text().endswith("\n"))
    compile.stop_all()
    thread.join(PATIENCE)
    assert len(errors) == 1 and not any(alive(int(pid)) for pid in note.read_text().split())


@needs_compiler
@pytest.mark.parametrize("source, words", [
    ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", "was killed"),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", "signal 11"),
    ("import os\nos._exit(7)\n", "exited with 7")])
def test_a_compiler_that_dies_is_an_interruption(source, words):
    with pytest.raises(CompileInterrupted, match=words):
        build(tiny_key(), source)


@needs_compiler
def test_a_linker_that_fails(monkeypatch):
    monkeypatch.setenv(env.CC.name, "false")
    with pytest.raises(CompileFailed, match="exited with 1") as caught:
        build(tiny_key(), TINY)
    assert env.CC.name in caught.value.remedy


@needs_compiler
@pytest.mark.parametrize("field, value", [("cute_dsl", "1.2.3"), ("cuda", "other")])
def test_a_compiler_that_is_not_the_key_s(field, value):
    wanted = dict(toolchain.current())
    other = {"cuda": "cu13" if wanted["cuda"] == "cu12" else "cu12"}.get(field, value)
    with pytest.raises(CompileFailed, match=f"{field}: the Key says {other}, {wanted[field]} was loaded"):
        build(make_key(toolchain={**wanted, field: other}), TINY)


@needs_compiler
def test_templates_cannot_import_torch():
    with pytest.raises(CompileFailed, match="torch"):
        build(tiny_key(), "import torch\n" + TINY)
