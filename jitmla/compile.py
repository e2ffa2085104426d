"""From a Key to an entry: find it, or compile it once on this host in a child process without a GPU, and publish it.

The compiler runs in a process of its own: it cannot run in two threads, is slow to import, may crash, and must not
touch the GPU of the process that asks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import env, failures, lock, toolchain
from .errors import CacheUnwritable, CompileFailed, CompileInterrupted, ToolchainMissing
from .events import emit
from .key import Key
from .store import FAILED, LOCKS, Entry, Store, manifest_of

REQUEST, RESULT, SOURCE, LIBRARY = "request.json", "result.json", "kernel.py", "kernel.so"  # as in _child.py
LOG = "compile.log"
LAST_LINES = 12
COLOR = re.compile(r"\x1b\[[0-9;]*m")
COMPILER_SETTINGS = ("CUTE_DSL_", "CUTE_EXPERIMENTAL_DSL_")


@dataclass(frozen=True)
class Built:
    """What a compile gives. `kernels`: what ptxas reported for each device function, as in the manifest."""

    so_bytes: bytes
    source: str
    kernels: list[dict[str, Any]]
    seconds: float


_failed: dict[str, CompileFailed] = {}  # Key digest -> how its compile failed in this process
_children: set[subprocess.Popen[bytes]] = set()  # those that run now, in any thread


def get_or_compile(key: Key, source_of: Callable[[], str], store: Store | None = None, *,
                   builder: Callable[..., Built] | None = None) -> Entry:
    """The entry of `key`: from the store, or compiled from `source_of()` and published.

    Of N processes that miss at once, one compiles and the others wait for it. When the store cannot be written, the
    entry is returned without being stored (`path` is None). A compile that failed is not tried again in this process,
    nor, where the source is at fault, in another one.
    Raises CacheUntrusted, ToolchainMissing and CompileFailed.
    """
    store = store or Store()
    entry = store.find(key)
    if entry is not None:
        return entry
    if key.toolchain is None:
        emit("miss", op=key.spec.op, spec=str(key.spec))
        toolchain.require_compiler()
        raise ValueError(f"{key.name}: a Key made without a toolchain cannot be compiled; make it again")
    emit("miss", op=key.spec.op, key=key.digest[:12], spec=str(key.spec))
    _raise_remembered(key, store)
    with _locked(store, key):
        entry = store.find(key)
        if entry is not None:
            return entry
        _raise_remembered(key, store)
        emit("compile", op=key.spec.op, key=key.digest[:12], kernel=key.name, arch=key.spec.arch)
        try:
            built = (builder or build)(key, source_of(), store=store)
        except CompileInterrupted:
            raise
        except CompileFailed as e:
            _failed[key.digest] = e
            if e.lasting:
                failures.remember(store, key, e)
            raise
        emit("compiled", op=key.spec.op, key=key.digest[:12], kernel=key.name, seconds=round(built.seconds, 2))
        try:
            return store.publish(key, built.source, built.so_bytes, built.kernels)
        except CacheUnwritable as e:
            emit("degrade", what="store", op=key.spec.op, key=key.digest[:12], reason=e.differs)
    manifest = manifest_of(key, built.source, built.so_bytes, built.kernels)
    return Entry(key, built.source, built.so_bytes, manifest, None)


def build(key: Key, source: str, store: Store | None = None, timeout: float | None = None, *,
          run: Callable[[Path, float], int | None] | None = None) -> Built:
    """Compile `source` in a child process. `timeout`: seconds, else JITMLA_COMPILE_TIMEOUT. `run`: instead of
    `run_child`, what starts that process.

    Raises ToolchainMissing; CompileFailed with the last lines that the compiler printed, the source being kept, in the
    store if one is given; CompileInterrupted when the child was killed or ran out of time.
    """
    toolchain.require_compiler()
    limit = lock.timeout_seconds(env.COMPILE_TIMEOUT) if timeout is None else timeout
    with _work_folder() as folder:
        (folder / SOURCE).write_text(source, encoding="utf-8")
        request = {"key": key.as_dict(), "cc": env.CC.get(), "parent": os.getpid()}
        (folder / REQUEST).write_text(json.dumps(request), encoding="utf-8")
        start = time.monotonic()
        status = (run or run_child)(folder, limit)
        seconds = time.monotonic() - start
        result = _result(folder, status)
        if status == 0 and "kernels" in result:
            return Built((folder / LIBRARY).read_bytes(), source, result["kernels"], seconds)
        if "error" in result:
            error = CompileFailed(**_account(key, folder, store, result["differs"], result["remedy"]))
            error.lasting = result.get("lasting", True)
            raise error
        raise CompileInterrupted(**_account(key, folder, store, *_end(status, limit)))


def forget_failures() -> None:
    """Let Keys whose compile failed in this process be tried again, unless the disk remembers them as well."""
    _failed.clear()


def stop_all() -> None:
    """Kill every compile that this process has under way; the threads that wait for one get CompileInterrupted."""
    for child in tuple(_children):
        _kill(child)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill a child with its whole group, the linker included."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)


def _raise_remembered(key: Key, store: Store) -> None:
    e = _failed.get(key.digest) or failures.recall(store, key)
    if e is not None:
        raise CompileFailed(e.asked, supported=e.supported, differs=e.differs, remedy=e.remedy)


def _locked(store: Store, key: Key) -> Any:
    try:
        folder = store.side_folder(LOCKS)
    except CacheUnwritable as e:
        emit("degrade", what="lock", op=key.spec.op, key=key.digest[:12], reason=e.differs)
        return nullcontext()
    path = store.path(key)
    before = _inode(path)  # of an entry that was refused, if there is one
    return lock.exclusive(folder, key.digest, done=lambda: _inode(path) not in (None, before), op=key.spec.op,
                          key=key.digest[:12], kernel=key.name)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


@contextmanager
def _work_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="jitmla-"))  # 0700
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_child(folder: Path, limit: float) -> int | None:
    """Run the child in `folder`; its exit status, or None when it had to be killed after `limit` seconds."""
    with open(folder / LOG, "wb") as log:
        child = start_child(cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        _children.add(child)
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also when this process is interrupted
            _kill(child)
            child.wait()
            _children.discard(child)


def start_child(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start the compiler process in a session of its own; raises ToolchainMissing."""
    if not sys.executable:
        raise ToolchainMissing("to start a process that compiles", supported="a Python with sys.executable",
                               differs="this process does not know its interpreter", remedy="prewarm the cache instead")
    return subprocess.Popen([sys.executable, "-m", "jitmla._child", *arguments], env=_environment(),
                            start_new_session=True, **options)


def _environment() -> dict[str, str]:
    """The child's environment: no GPU, none of the user's settings of the compiler, and this process's import path."""
    clean = {n: v for n, v in os.environ.items() if not n.startswith(COMPILER_SETTINGS)}
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    return {**clean, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1",
            "OPENBLAS_NUM_THREADS": "1"}  # numpy's threads do nothing here, and do not live through a fork


def _result(folder: Path, status: int | None) -> dict[str, Any]:
    try:
        return json.loads((folder / RESULT).read_text(encoding="utf-8")) if status is not None else {}
    except (FileNotFoundError, ValueError):
        return {}


def _end(status: int | None, limit: float) -> tuple[str, str]:
    """How a child without a result ended, and what mends it."""
    if status is None:
        return (f"it was still running after {limit:g} s, and was killed",
                f"give it more time in {env.COMPILE_TIMEOUT.name}, or try again when the machine is less busy")
    if status == -signal.SIGKILL:
        return "the compiler's process was killed", "check this machine's or container's memory limit, and try again"
    if status < 0:
        return f"the compiler's process ended by signal {-status} ({signal.strsignal(-status)})", "try again"
    return f"the compiler's process exited with {status} and left no result", "try again"


def _account(key: Key, folder: Path, store: Store | None, differs: str, remedy: str) -> dict[str, str]:
    """The parts of the error for a compile that left its files in `folder`."""
    log = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    kept = _keep(key, folder, store)
    differs += "".join(f"\n    | {line}" for line in log.rstrip().splitlines()[-LAST_LINES:])
    remedy = f"{remedy}; " if remedy else ""
    return {"asked": f"to compile {key.name} for {key.spec.arch} (Key {key.digest[:12]})",
            "supported": "a source that CuTe DSL compiles without losing performance",
            "differs": COLOR.sub("", differs),
            "remedy": f"{remedy}read the rendered source {kept / SOURCE} and the whole output {kept / LOG}"}


def _keep(key: Key, folder: Path, store: Store | None) -> Path:
    """A folder that outlives this process, with the source and the log of a failed compile."""
    kept = None
    if store is not None:
        try:
            kept = store.side_folder(FAILED) / key.digest
            kept.mkdir(mode=0o700, exist_ok=True)
        except OSError as e:  # CacheUnwritable is one
            emit("degrade", what="failed source", reason=str(e))
            kept = None
    kept = kept or Path(tempfile.mkdtemp(prefix="jitmla-failed-"))
    for name in (SOURCE, LOG):
        shutil.copyfile(folder / name, kept / name)
    return kept
