"""Many compiles for one import of the compiler: a server process without a GPU, and a fork of it for each kernel.

    with Pool() as pool:
        compile.get_or_compile(key, source_of, store, builder=pool.build)      # from as many threads as there are cores

A fork that crashes or is killed takes one compile with it; a server that does is replaced. A kernel compiled in a fork
has the bytes of one compiled in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import compile
from ._child import kill_group
from .compile import Built
from .events import emit
from .key import Key
from .store import Store

CLOSE_SECONDS = 1.0  # for a server to end by itself; while it imports the compiler it does not listen
LISTENER_SECONDS = 5.0  # for its last words to be read once it has ended; threads stand still when the interpreter ends


@dataclass
class _Job:
    """A compile under way. `status` is None until it has ended, and stays so when the server died first."""

    ended: threading.Event = field(default_factory=threading.Event)
    pid: int | None = None
    status: int | None = None


class Pool:
    """Compiles in forks of one server. It is started by the first compile; `close` ends it and what it still does."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._server: _Server | None = None
        self._closed = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def build(self, key: Key, source: str, store: Store | None = None, timeout: float | None = None) -> Built:
        """The same as compile.build."""
        return compile.build(key, source, store=store, timeout=timeout, run=self.run)

    def run(self, folder: Path, limit: float) -> int | None:
        """The same as compile.run_child."""
        (folder / compile.LOG).touch()  # the fork may not get as far as opening it
        for _ in range(2):
            server = self._started()
            if server is None:
                return -9
            job = server.submit(str(folder))
            try:
                in_time = job.ended.wait(limit)
            finally:  # also when this thread is interrupted
                if not job.ended.is_set():
                    server.cancel(job)
            if not in_time:
                return None
            if job.status is not None:
                return job.status
            if self._closed:
                return -9
            emit("degrade", what="compile server", reason="it died, and is replaced", said=server.said)
        return compile.run_child(folder, limit)  # which says what is wrong

    def close(self) -> None:
        """Kill what is still compiled, and end the server."""
        with self._guard:
            self._closed, server = True, self._server
        if server is not None:
            server.close()

    def _started(self) -> _Server | None:
        with self._guard:
            if self._closed:
                return None
            if self._server is None or not self._server.alive:
                if self._server is not None:
                    self._server.close()
                self._server = _Server()
            return self._server


class _Server:
    """The process, and a thread that reads its answers."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile(prefix="jitmla-")
        self.process = compile.start_child("--serve", cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           stderr=self._log)
        self.alive, self.said = True, ""
        self._jobs: dict[str, _Job] = {}
        self._guard = threading.Lock()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def submit(self, folder: str) -> _Job:
        job = _Job()
        with self._guard:
            if self.alive:
                self._jobs[folder] = job
                try:
                    os.write(self.process.stdin.fileno(), os.fsencode(folder) + b"\n")  # type: ignore[union-attr]
                    return job
                except OSError:  # it died just now
                    del self._jobs[folder]
        job.ended.set()
        return job

    def cancel(self, job: _Job) -> None:
        """Kill one compile; the whole server, when that has not even begun it."""
        kill_group(job.pid or self.process.pid)

    def close(self) -> None:
        with self._guard:
            self.alive = False
            self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            kill_group(self.process.pid)
        self._listener.join(LISTENER_SECONDS)

    def _listen(self) -> None:
        for line in self.process.stdout:  # type: ignore[union-attr]
            message: dict[str, Any] = json.loads(line)
            with self._guard:
                job = self._jobs[message["folder"]]
                job.pid = message["pid"]
                if "status" in message:
                    job.status = message["status"]
                    del self._jobs[message["folder"]]
                    job.ended.set()
        self.process.wait()
        self.process.stdout.close()  # type: ignore[union-attr]
        self._log.seek(0)
        self.said = self._log.read().decode(errors="replace").strip().rpartition("\n")[2]
        self._log.close()
        with self._guard:
            self.alive = False
            for job in self._jobs.values():
                job.ended.set()
            self._jobs.clear()
