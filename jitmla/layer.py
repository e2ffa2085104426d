"""Reading a cache: one root with its entries. Nothing here takes a lock, makes a file or changes one.

Two things are checked on every read, and answered differently. *Trust*: whoever can write a folder or file that leads
to the code can run code here, so when that is anyone but this user and root, CacheUntrusted is raised. *Integrity*: an
entry whose bytes do not match its digests is refused (event `refuse`) and is a miss.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import toolchain
from .errors import CacheCorrupt, CacheUntrusted
from .events import emit
from .key import Key, canonical
from .manifest import LIBRARY, MANIFEST, SOURCE, read_manifest, verified
from .trusted import FOLDER, open_trusted, read_file

LAYOUT = "v1"
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


class Layer:
    """A root that is read. `origin` says who named it, for errors; empty for the user's own cache."""

    def __init__(self, root: str | os.PathLike[str], origin: str = "") -> None:
        self.root = Path(os.path.realpath(root))
        self.origin = origin

    def __repr__(self) -> str:
        return f"Layer({str(self.root)!r})"

    def path(self, key: Key) -> Path:
        """Where the entry of `key` lies, if it exists."""
        return self.root.joinpath(LAYOUT, key.spec.arch, key.spec.op, key.digest)

    def find(self, key: Key) -> Entry | None:
        """The verified entry of `key`, or None. Emits `hit`, or `refuse` for an entry that does not verify.

        Raises CacheUntrusted.
        """
        fault = ""
        for _ in range(2):  # a second look: another process may be replacing or evicting it right now
            try:
                entry = self.read(key)
            except CacheCorrupt as e:
                fault = e.differs
                continue
            if entry is not None:
                fields = dict(key.toolchain or ())
                emit("hit", op=key.spec.op, key=key.digest[:12], layer=str(self.root),
                     toolchain=f"{fields['cute_dsl']}-{fields['cuda']}")
            return entry
        emit("refuse", op=key.spec.op, key=key.digest[:12], reason=fault, path=str(self.path(key)))
        return None

    def read(self, key: Key) -> Entry | None:
        """The entry, None when there is none; raises CacheCorrupt or CacheUntrusted."""
        path = self.path(key)
        with self.folder(LAYOUT, key.spec.arch, key.spec.op, key.digest) as folder:
            if folder is None:
                return None
            raw, source, so_bytes = (read_file(folder, path / name) for name in (MANIFEST, SOURCE, LIBRARY))
        manifest = verified(key, raw, source, so_bytes, path)
        return Entry(key, source.decode(), so_bytes, manifest, path)

    def fitting(self, key: Key) -> list[Key]:
        """The Keys stored here that name the same source as `key` and were built for this host."""
        spec = f'"spec":{canonical(key.spec.as_dict())}'  # as manifests have it; the others are not parsed
        found = [listing.key for listing in self._list(key.spec.arch, key.spec.op, spec)]
        return [k for k in found if k is not None and k.same_but_toolchain(key)
                and dict(k.toolchain or ())["host"] == toolchain.host()]

    def entries(self) -> Iterator[Listing]:
        """Every entry, in the order of arch, op and digest. Raises CacheUntrusted."""
        for arch in self._names(LAYOUT):
            for op in self._names(LAYOUT, arch):
                yield from self._list(arch, op)

    def listing(self, arch: str, op: str, digest: str, mention: str = "") -> Listing | None:
        """One entry; None when it is not there, or its manifest does not contain the text `mention`."""
        path = self.root.joinpath(LAYOUT, arch, op, digest)
        try:
            with self.folder(LAYOUT, arch, op, digest) as folder:
                manifest = folder and read_manifest(folder, path, mention)
        except CacheCorrupt as e:
            return Listing(path, None, e.differs)
        return Listing(path, manifest) if manifest else None

    def places(self) -> Iterator[tuple[str, str, str]]:
        """(arch, op, digest) of every entry, none of them opened."""
        for arch in self._names(LAYOUT):
            for op in self._names(LAYOUT, arch):
                yield from ((arch, op, name) for name in self._names(LAYOUT, arch, op) if DIGEST.match(name))

    def _list(self, arch: str, op: str, mention: str = "") -> Iterator[Listing]:
        names = (name for name in self._names(LAYOUT, arch, op) if DIGEST.match(name))
        yield from filter(None, (self.listing(arch, op, name, mention) for name in names))

    def _names(self, *parts: str) -> list[str]:
        with self.folder(*parts) as folder:
            return sorted(n for n in os.listdir(folder) if not n.startswith(".")) if folder is not None else []

    @contextmanager
    def folder(self, *parts: str) -> Iterator[int | None]:
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
            except CacheUntrusted as e:
                raise self._explained(e) from e
            try:
                yield fd
            except CacheUntrusted as e:
                raise self._explained(e) from e

    def _explained(self, e: CacheUntrusted) -> CacheUntrusted:
        """The error, saying how this root came into play."""
        if not self.origin:
            return e
        return CacheUntrusted(e.asked, supported=e.supported, differs=e.differs,
                              remedy=f"{e.remedy}; or do without this layer, which {self.origin} names")
