"""The kernel cache on disk: `<root>/v1/<arch>/<op>/<key digest>/{kernel.py,kernel.so,manifest.json}`.

An entry is a folder that appears by one rename and is never written again. It holds no path, no pickle and no
time-dependent byte. Reading takes no lock and writes nothing, so a cache may lie on read-only media.

Two things are checked on every read, and answered differently. *Trust*: whoever can write a folder or file that leads
to the code can run code here, so when that is anyone but this user and root, CacheUntrusted is raised. *Integrity*: an
entry whose bytes do not match its digests is refused (event `refuse`), is a miss, and is replaced when next built.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__, env, schema, toolchain
from .errors import CacheCorrupt, CacheUntrusted, CacheUnwritable, SchemaViolation
from .events import emit
from .key import Key, canonical
from .trusted import FOLDER, corrupt, make_folder, open_trusted, read_file, write_new

LAYOUT = "v1"
SOURCE, LIBRARY, MANIFEST = "kernel.py", "kernel.so", "manifest.json"
STAGING, LOCKS, FAILED = ".staging", ".locks", ".failed"
STALE_SECONDS = 3600.0  # publishing takes well under a second; what is older was left by a process that was killed
DIGEST = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class Entry:
    """A verified entry. `so_bytes` are the bytes that were verified; `path` is None when they could not be stored."""

    key: Key
    source: str
    so_bytes: bytes
    manifest: dict[str, Any]
    path: Path | None


@dataclass(frozen=True)
class Listing:
    """An entry as `entries` sees it: manifest verified, files not read. `fault` says why there is no manifest."""

    path: Path
    manifest: dict[str, Any] | None
    fault: str = ""

    @property
    def digest(self) -> str:
        return self.path.name

    @property
    def key(self) -> Key | None:
        return None if self.manifest is None else Key.from_dict(self.manifest["key"])


def default_root() -> Path:
    """The root that the environment names, or the platform's cache folder of this user."""
    if env.CACHE_DIR.get():
        return Path(env.CACHE_DIR.get())
    import platformdirs

    return Path(platformdirs.user_cache_dir("jitmla"))


def fault_point(name: str) -> None:
    """Marks a step of `publish`. It does nothing; tests/faults puts a kill in its place."""


class Store:
    """A cache root. Constructing one touches nothing; the folder is made, for this user alone, by the first publish."""

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = Path(os.path.realpath(default_root() if root is None else root))

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    # ------------------------------------------------------------------------------------------------- reading

    def path(self, key: Key) -> Path:
        """Where the entry of `key` lies, if it exists."""
        return self.root.joinpath(LAYOUT, key.spec.arch, key.spec.op, key.digest)

    def find(self, key: Key) -> Entry | None:
        """The verified entry of `key`, or None. Emits `hit`, or `refuse` for an entry that does not verify.

        A Key without a toolchain (no compiler here) takes the newest toolchain's entry that fits otherwise.
        Raises CacheUntrusted.
        """
        if key.toolchain is not None:
            return self._find(key)
        fitting = [found.key for found in self._list(key.spec.arch, key.spec.op, key.template_digest)
                   if found.key is not None and found.key.same_but_toolchain(key)]
        return next(filter(None, map(self._find, sorted(filter(_runs_here, fitting), key=_age, reverse=True))), None)

    def entries(self) -> Iterator[Listing]:
        """Every entry, in the order of arch, op and digest. Raises CacheUntrusted."""
        for arch in self._names(LAYOUT):
            for op in self._names(LAYOUT, arch):
                yield from self._list(arch, op)

    def resolve(self, prefix: str) -> list[Listing]:
        """The entries whose digest begins with `prefix`."""
        return [found for found in self.entries() if found.digest.startswith(prefix)]

    def _find(self, key: Key) -> Entry | None:
        fault = ""
        for _ in range(2):  # a second look: another process may be replacing a corrupt entry right now
            try:
                entry = self._read(key)
            except CacheCorrupt as e:
                fault = e.differs
                continue
            if entry is not None:
                emit("hit", op=key.spec.op, key=key.digest[:12], toolchain=_toolchain_name(key))
            return entry
        emit("refuse", op=key.spec.op, key=key.digest[:12], reason=fault, path=str(self.path(key)))
        return None

    def _read(self, key: Key) -> Entry | None:
        """The entry, None when there is none; raises CacheCorrupt or CacheUntrusted."""
        path = self.path(key)
        with self._folder(LAYOUT, key.spec.arch, key.spec.op, key.digest) as folder:
            if folder is None:
                return None
            manifest = _read_manifest(folder, path)
            if canonical(manifest["key"]) != canonical(key.as_dict()):
                raise corrupt(path / MANIFEST, "it names another Key")
            source, so_bytes = (read_file(folder, path / name, manifest["files"][name]) for name in (SOURCE, LIBRARY))
        return Entry(key, source.decode(), so_bytes, manifest, path)

    def _list(self, arch: str, op: str, mention: str = "") -> Iterator[Listing]:
        """The entries under one arch and op; with `mention`, those whose manifest contains that text."""
        for name in self._names(LAYOUT, arch, op):
            path = self.root.joinpath(LAYOUT, arch, op, name)
            if not DIGEST.match(name):
                continue
            try:
                with self._folder(LAYOUT, arch, op, name) as folder:
                    manifest = folder and _read_manifest(folder, path, mention)
                if manifest:
                    yield Listing(path, manifest)
            except CacheCorrupt as e:
                yield Listing(path, None, e.differs)

    def _names(self, *parts: str) -> list[str]:
        with self._folder(*parts) as folder:
            return sorted(n for n in os.listdir(folder) if not n.startswith(".")) if folder is not None else []

    @contextmanager
    def _folder(self, *parts: str) -> Iterator[int | None]:
        """A descriptor of a folder under the root, each step to it checked; None when it does not exist."""
        with ExitStack() as stack:
            fd: int | None = None
            path = self.root
            try:
                for part in ("", *parts):
                    path = path / part
                    fd = open_trusted(part or path, FOLDER, fd, path)
                    stack.callback(os.close, fd)
            except (FileNotFoundError, NotADirectoryError):  # the second: the root would lie below a file
                fd = None
            yield fd

    # ------------------------------------------------------------------------------------------------- writing

    def publish(self, key: Key, source: str, so_bytes: bytes, kernels: list[dict[str, Any]]) -> Entry:
        """Store an entry and return it, or the valid entry that another process stored meanwhile.

        The entry appears by a rename after all of it is on disk; a process killed here leaves nothing a reader sees.
        Raises CacheUnwritable (full, read-only), CacheUntrusted, and SchemaViolation.
        """
        manifest = manifest_of(key, source, so_bytes, kernels)
        files = {SOURCE: source.encode(), LIBRARY: so_bytes, MANIFEST: manifest_bytes(manifest)}
        with (self._writing(), self._made(LAYOUT, STAGING) as staging,
              self._made(LAYOUT, key.spec.arch, key.spec.op) as parent):
            existing = self._move_in(key, files, staging, parent)
            _sweep(staging, self.root / LAYOUT / STAGING)
        if existing is not None:
            return existing
        emit("publish", op=key.spec.op, key=key.digest[:12], bytes=len(so_bytes), path=str(self.path(key)))
        return Entry(key, source, so_bytes, manifest, self.path(key))

    def side_folder(self, name: str) -> Path:
        """A folder beside the entries (LOCKS, FAILED), made if need be; raises CacheUnwritable or CacheUntrusted."""
        with self._writing(), self._made(LAYOUT, name):
            return self.root / LAYOUT / name

    def _move_in(self, key: Key, files: dict[str, bytes], staging: int, parent: int) -> Entry | None:
        """Write `files` to a staging folder and rename it into place; returns the valid entry that was there first."""
        name = uuid.uuid4().hex
        staged = self.root / LAYOUT / STAGING / name
        fault_point("begin")
        os.mkdir(name, 0o755, dir_fd=staging)
        try:
            folder = os.open(name, FOLDER, dir_fd=staging)
            try:
                for file, data in files.items():  # the manifest is the last
                    fault_point(f"before {file}")
                    write_new(folder, file, data)
                fault_point("before sync")
                os.fsync(folder)
            finally:
                os.close(folder)
            while True:
                fault_point("before rename")
                try:
                    os.rename(name, key.digest, src_dir_fd=staging, dst_dir_fd=parent)
                    break
                except OSError as e:
                    if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                try:
                    existing = self._read(key)
                except CacheCorrupt:
                    aside = uuid.uuid4().hex
                    fault_point("before moving aside")
                    os.rename(key.digest, aside, src_dir_fd=parent, dst_dir_fd=staging)
                    fault_point("moved aside")
                    _discard(self.root / LAYOUT / STAGING / aside)
                    continue
                if existing is not None:
                    return existing
            fault_point("renamed")
            os.fsync(parent)
            fault_point("end")
            return None
        finally:
            _discard(staged)

    @contextmanager
    def _made(self, *parts: str) -> Iterator[int]:
        """Like `_folder`, making what is missing: the root for this user alone, below it for this user to write."""
        if not self.root.is_dir():
            self.root.parent.mkdir(parents=True, exist_ok=True)
            make_folder(self.root, 0o700)
        with ExitStack() as stack:
            path = self.root
            fd = open_trusted(path, FOLDER, None, path)
            stack.callback(os.close, fd)
            for part in parts:
                path = path / part
                make_folder(part, 0o755, fd)
                fd = open_trusted(part, FOLDER, fd, path)
                stack.callback(os.close, fd)
            yield fd

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what the system says about a failed write into CacheUnwritable."""
        try:
            yield
        except CacheUntrusted:
            raise
        except (OSError, CacheCorrupt) as e:
            remedy = (f"free space, or name another folder in {env.CACHE_DIR.name}; until then kernels are compiled "
                      "again in each process")
            raise CacheUnwritable(f"to write to the kernel cache {self.root}", supported="a writable folder with free "
                                  "space", differs=str(e), remedy=remedy) from e


# ---------------------------------------------------------------------------------------------------- manifest


def manifest_of(key: Key, source: str, so_bytes: bytes, kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of an entry; raises SchemaViolation."""
    files = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
             for name, data in ((SOURCE, source.encode()), (LIBRARY, so_bytes))}
    manifest = {"key": key.as_dict(), "digest": key.digest, "files": files, "kernels": kernels, "producer": __version__}
    manifest["manifest_sha256"] = _self_digest(manifest)
    schema.check(manifest, "manifest")
    return manifest


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The one form in which a manifest is stored."""
    return canonical(manifest).encode() + b"\n"


def _self_digest(manifest: dict[str, Any]) -> str:
    body = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(canonical(body).encode()).hexdigest()


def _read_manifest(folder: int, path: Path, mention: str = "") -> dict[str, Any]:
    """The verified manifest of the entry at `path`; empty when it does not contain the text `mention`."""
    raw = read_file(folder, path / MANIFEST)
    if mention.encode() not in raw:
        return {}
    try:
        manifest = json.loads(raw)
        schema.check(manifest, "manifest")
        faithful = manifest_bytes(manifest) == raw and _self_digest(manifest) == manifest["manifest_sha256"]
    except (ValueError, RecursionError) as e:
        reason = e.differs if isinstance(e, SchemaViolation) else str(e)
        raise corrupt(path / MANIFEST, f"not a manifest: {reason}") from e
    if not faithful:
        raise corrupt(path / MANIFEST, "it does not match its own digest")
    if not manifest["digest"] == path.name == hashlib.sha256(canonical(manifest["key"]).encode()).hexdigest():
        raise corrupt(path / MANIFEST, "its Key does not match the name of its folder")
    return manifest


def _runs_here(key: Key) -> bool:
    return dict(key.toolchain or ())["host"] == toolchain.host()


def _age(key: Key) -> tuple[list[int], str, str]:
    fields = dict(key.toolchain or ())
    return [int(n) for n in re.findall(r"\d+", fields["cute_dsl"])], fields["cuda"], key.digest


def _toolchain_name(key: Key) -> str:
    fields = dict(key.toolchain or ())
    return f"{fields['cute_dsl']}-{fields['cuda']}"


# ----------------------------------------------------------------------------------------------------- staging


def _discard(path: Path) -> None:
    """Remove a folder that no reader looks at; what cannot be removed now is swept later."""
    shutil.rmtree(path, ignore_errors=True)


def _sweep(staging: int, path: Path) -> None:
    for name in os.listdir(staging):
        try:
            old = time.time() - os.stat(name, dir_fd=staging, follow_symlinks=False).st_mtime > STALE_SECONDS
        except FileNotFoundError:
            continue
        if old:
            _discard(path / name)
