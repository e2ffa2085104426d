"""The kernel cache on disk: `<root>/v1/<arch>/<op>/<key digest>/{kernel.py,kernel.so,manifest.json}`.

An entry is a folder that appears by one rename and is never written again. It holds no path, no pickle and no
time-dependent byte. A Store is the user's own cache, which is written, over any number of read-only layers (layers.py):
`find` walks them all, `publish` writes to the first. An entry that does not verify is replaced when it is next built.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from . import bounds, env, layers, trusted
from .bounds import FAILED as FAILED
from .bounds import LOCKS as LOCKS
from .bounds import PINS, STAGING
from .errors import CacheCorrupt, CacheUntrusted, CacheUnwritable
from .events import emit
from .key import Key
from .layer import LAYOUT, Entry, Layer, Listing
from .manifest import LIBRARY, MANIFEST, SOURCE, manifest_bytes, manifest_of
from .trusted import FOLDER, make_folder, open_trusted, write_new

NOWHERE = Path("/nonexistent/jitmla")  # nothing is there, and nothing is ever written there


def default_root() -> Path:
    """The root that the environment names, or the platform's cache folder of this user; NOWHERE for one without a
    home."""
    if env.CACHE_DIR.get():
        return Path(env.CACHE_DIR.get())
    import platformdirs

    try:
        root = Path(platformdirs.user_cache_dir("jitmla"))
    except RuntimeError:  # how platformdirs says that there is no home
        return NOWHERE
    return root if root.is_absolute() else NOWHERE


class Store:
    """The user's cache and the layers below it. Constructing one touches nothing; the root is made, for this user
    alone, by the first publish.

    root: instead of the one that the environment names. below: the read-only layers; by default those of the
    environment for its own root, and none for a root that is given.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None, below: Sequence[Layer] | None = None) -> None:
        self.user = Layer(default_root() if root is None else root)
        self._below = tuple(below or ()) if root is not None or below is not None else None

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    @property
    def root(self) -> Path:
        return self.user.root

    def layers(self) -> Iterator[Layer]:
        """The user's cache, then those below it. Installed packages are looked through only when one gets there."""
        yield self.user
        if self._below is not None:
            yield from self._below
        else:
            yield from (layer for layer in layers.named() if layer.root != self.root)
            yield from layers.installed()

    def path(self, key: Key) -> Path:
        """Where the entry of `key` lies in the user's cache, if it exists."""
        return self.user.path(key)

    def find(self, key: Key) -> Entry | None:
        """The verified entry of `key` from the first layer that has one, or None. Emits `hit`; `refuse` for an entry
        that does not verify.

        A Key without a toolchain (no compiler here) takes the newest toolchain's entry that fits otherwise, of the
        first layer that has one. Raises CacheUntrusted.
        """
        for layer in self.layers():
            keys = [key] if key.toolchain is not None else sorted(layer.fitting(key), key=_age, reverse=True)
            entry = next(filter(None, map(layer.find, keys)), None)
            if entry is not None:
                if layer is self.user:
                    bounds.touch(self.root, entry.key.digest)
                return entry
        return None

    def entries(self) -> Iterator[Listing]:
        """Every entry of every layer, in the order of layer, arch, op and digest. Raises CacheUntrusted."""
        for layer in self.layers():
            yield from layer.entries()

    def resolve(self, prefix: str) -> list[Listing]:
        """The entries whose digest begins with `prefix`; of one that several layers hold, the first."""
        found = {listing.digest: listing for listing in reversed(list(self.entries()))}
        return [listing for listing in reversed(found.values()) if listing.digest.startswith(prefix)]

    # ------------------------------------------------------------------------------------------------- writing

    def publish(self, key: Key, source: str, so_bytes: bytes, kernels: list[dict[str, Any]]) -> Entry:
        """Store an entry and return it, or the valid entry that another process stored meanwhile.

        The entry appears by a rename after all of it is on disk; a process killed here leaves nothing a reader sees.
        Raises CacheUnwritable (full, read-only), CacheUntrusted, and SchemaViolation.
        """
        return self.adopt(Entry(key, source, so_bytes, manifest_of(key, source, so_bytes, kernels), None))

    def adopt(self, entry: Entry) -> Entry:
        """Store a verified entry as it is, its manifest included: otherwise like `publish`."""
        key = entry.key
        limit = bounds.default_limit()
        files = {SOURCE: entry.source.encode(), LIBRARY: entry.so_bytes, MANIFEST: manifest_bytes(entry.manifest)}
        with (self._writing(), self._made(LAYOUT, STAGING) as staging,
              self._made(LAYOUT, key.spec.arch, key.spec.op) as parent):
            existing = self._move_in(key, files, staging, parent)
            bounds.sweep_staging(self.root)
        if existing is not None:
            return existing
        emit("publish", op=key.spec.op, key=key.digest[:12], bytes=len(entry.so_bytes), path=str(self.path(key)))
        bounds.touch(self.root, key.digest)
        bounds.trim(self.root, limit, keep=key.digest)
        return Entry(key, entry.source, entry.so_bytes, entry.manifest, self.path(key))

    def side_folder(self, name: str) -> Path:
        """A folder beside the entries (LOCKS, FAILED), made if need be; raises CacheUnwritable or CacheUntrusted."""
        with self._writing(), self._made(LAYOUT, name):
            return self.root / LAYOUT / name

    def pin(self, digest: str, pinned: bool = True) -> None:
        """Keep an entry of the user's cache from being evicted, or let it be again; raises CacheUnwritable."""
        pin = self.side_folder(PINS) / digest
        with self._writing():
            if not pinned:
                pin.unlink(missing_ok=True)
            elif not pin.exists():
                pin.touch()

    def _move_in(self, key: Key, files: dict[str, bytes], staging: int, parent: int) -> Entry | None:
        """Write `files` to a staging folder and rename it into place; returns the valid entry that was there first."""
        name = uuid.uuid4().hex
        staged = self.root / LAYOUT / STAGING / name
        trusted.fault_point("begin")
        os.mkdir(name, 0o755, dir_fd=staging)
        try:
            folder = os.open(name, FOLDER, dir_fd=staging)
            try:
                for file, data in files.items():  # the manifest is the last
                    trusted.fault_point(f"before {file}")
                    write_new(folder, file, data)
                trusted.fault_point("before sync")
                os.fsync(folder)
            finally:
                os.close(folder)
            while True:
                trusted.fault_point("before rename")
                try:
                    os.rename(name, key.digest, src_dir_fd=staging, dst_dir_fd=parent)
                    break
                except OSError as e:
                    if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                try:
                    existing = self.user.read(key)
                except CacheCorrupt:
                    aside = uuid.uuid4().hex
                    trusted.fault_point("before moving aside")
                    os.rename(key.digest, aside, src_dir_fd=parent, dst_dir_fd=staging)
                    trusted.fault_point("moved aside")
                    bounds.discard(self.root / LAYOUT / STAGING / aside)
                    continue
                if existing is not None:
                    return existing
            trusted.fault_point("renamed")
            os.fsync(parent)
            trusted.fault_point("end")
            return None
        finally:
            bounds.discard(staged)

    @contextmanager
    def _made(self, *parts: str) -> Iterator[int]:
        """Like `Layer.folder`, but makes what is missing: nobody else can write it, or read what is in the root."""
        if self.root == NOWHERE:
            raise FileNotFoundError(errno.ENOENT, "this user has no home folder, and no other place is named")
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


def _age(key: Key) -> tuple[list[int], str, str]:
    fields = dict(key.toolchain or ())
    return [int(n) for n in re.findall(r"\d+", fields["cute_dsl"])], fields["cuda"], key.digest
