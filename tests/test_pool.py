"""Compiles in forks of one server: the same bytes, for less time, and whatever dies is replaced."""

import os
import signal
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jitmla import compile
from jitmla.errors import CompileFailed, CompileInterrupted
from jitmla.pool import Pool

from .support.processes import PATIENCE, alive, running, wait_until
from .support.tiny import SOURCE as TINY
from .support.tiny import needs_compiler, tiny_key

pytestmark = needs_compiler
NOTE = "import os\nopen({path!r}, 'a').write(f'{{os.getpid()}} {{os.getppid()}}\\n')\n"
HANG = "import subprocess\nsubprocess.run(['sleep', '600'])\n"


@pytest.fixture(autouse=True)
def temporary(monkeypatch, tmp_path):
    """Where failed compiles leave their sources."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture(scope="module")
def shared():
    with Pool() as pool:
        yield pool


@pytest.fixture
def pool():
    with Pool() as pool:
        yield pool


@pytest.fixture
def note(tmp_path):
    """A file in which the sources of `noting` write their process and its parent."""
    return tmp_path / "note"


def noting(note, rest=""):
    return NOTE.format(path=str(note)) + rest + TINY


def processes(note):
    return [tuple(map(int, line.split())) for line in note.read_text().splitlines()]


def noted(note):
    """Whether the compile has written whole lines: the file is there a moment before."""
    return note.exists() and note.read_text().endswith("\n")


def test_the_bytes_are_those_of_a_process_of_its_own(shared):
    alone = compile.build(tiny_key(), TINY)
    for _ in range(2):
        forked = shared.build(tiny_key(), TINY)
        assert forked.so_bytes == alone.so_bytes and forked.kernels == alone.kernels


def test_one_server_and_a_process_for_each_kernel(shared, note):
    with ThreadPoolExecutor(4) as threads:
        built = list(threads.map(lambda _: shared.build(tiny_key(), noting(note)), range(4)))
    assert all(b.so_bytes == built[0].so_bytes for b in built)
    pids, parents = zip(*processes(note), strict=True)
    assert len(set(pids)) == 4 and set(parents) == {shared._server.process.pid}
    assert not any(map(alive, pids))


def test_no_torch_and_no_gpu_there(shared):
    source = "import os, sys\nassert sys.modules['torch'] is None and os.environ['CUDA_VISIBLE_DEVICES'] == ''\n" + TINY
    assert shared.build(tiny_key(), source)


def test_what_a_source_does_to_its_process_does_not_last(shared):
    assert shared.build(tiny_key(), "import cutlass\ncutlass.Float32.left_behind = 1\n" + TINY)
    assert shared.build(tiny_key(), "import cutlass\nassert not hasattr(cutlass.Float32, 'left_behind')\n" + TINY)


def test_a_failure_is_told_as_from_a_process_of_its_own(shared):
    told = []
    for build in (shared.build, compile.build):
        with pytest.raises(CompileFailed) as caught:
            build(tiny_key(), "raise ValueError('no such layout')\n")
        assert type(caught.value) is CompileFailed
        told.append(caught.value.differs.splitlines())
    assert told[0][0] == told[1][0] == "ValueError: no such layout" and told[0][-1] == told[1][-1]


def test_a_crash_takes_one_compile_with_it(shared):
    with pytest.raises(CompileInterrupted, match="signal 11"):
        shared.build(tiny_key(), "import os\nos.kill(os.getpid(), 11)\n")
    server = shared._server
    assert shared.build(tiny_key(), TINY) and shared._server is server


def test_a_compile_that_hangs_is_killed_with_all_it_started(shared, note):
    assert shared.build(tiny_key(), TINY)  # so that the server listens
    with pytest.raises(CompileInterrupted, match="still running after 3 s"):
        shared.build(tiny_key(), noting(note, HANG), timeout=3.0)
    [(pid, _)] = processes(note)
    assert wait_until(lambda: not alive(pid))
    assert shared.build(tiny_key(), TINY)


def test_a_server_that_dies_is_replaced_and_the_compile_done_again(pool, note, seen):
    source = noting(note, f"import time\nif open({str(note)!r}).read().count('\\n') == 1: time.sleep(600)\n")
    with ThreadPoolExecutor(1) as threads:
        built = threads.submit(pool.build, tiny_key(), source)
        assert wait_until(lambda: noted(note))
        first = pool._server.process.pid
        os.kill(first, signal.SIGKILL)
        assert built.result().so_bytes
    (killed, parent), (_, other) = processes(note)
    assert parent == first != other and wait_until(lambda: not alive(killed))
    assert [e.fields["what"] for e in seen if e.kind == "degrade"] == ["compile server"]


def test_without_a_server_each_compile_has_a_process_of_its_own(pool, monkeypatch, seen):
    real = Pool._started

    def broken(self):
        server = real(self)
        server.process.kill()
        server._listener.join()
        return server

    monkeypatch.setattr(Pool, "_started", broken)
    assert pool.build(tiny_key(), TINY).so_bytes
    assert len([e for e in seen if e.kind == "degrade"]) == 2


def test_close_kills_what_is_still_compiled(note):
    pool, errors = Pool(), []

    def work():
        try:
            pool.build(tiny_key(), noting(note, HANG))
        except CompileInterrupted as e:
            errors.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    assert wait_until(lambda: noted(note))
    pool.close()
    thread.join(PATIENCE)
    assert len(errors) == 1
    [(pid, server)] = processes(note)
    assert wait_until(lambda: not alive(pid) and not alive(server))
    with pytest.raises(CompileInterrupted):
        pool.build(tiny_key(), TINY)


def test_all_of_it_dies_with_the_process_that_wants_it(note):
    with running(lambda: Pool().build(tiny_key(), noting(note, HANG))):
        assert wait_until(lambda: noted(note))
    [(pid, server)] = processes(note)
    assert wait_until(lambda: not alive(pid) and not alive(server))


def test_a_pool_that_compiles_nothing_starts_nothing():
    with Pool() as pool:
        assert pool._server is None
