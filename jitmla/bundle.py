"""A bundle: entries of a cache in one compressed file, for machines without a compiler, CI and container images.

A tar file compressed with xz, whose first member `bundle.json` states size and sha256 of every other one. xz, because
it is in every Python (zstd is not, before 3.14) and packs tighter than gzip. The same entries give the same bytes.
Reading takes nothing from the file that was not stated first and checked: no path of it is ever used.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from . import manifest as manifests
from .errors import CacheCorrupt, InvalidArgument
from .key import Key, canonical
from .layer import DIGEST, Entry
from .manifest import LIBRARY, MANIFEST, SOURCE
from .store import Store

INDEX = "bundle.json"
FORMAT = 1
FILES = (MANIFEST, SOURCE, LIBRARY)
MOST = 1 << 26  # bytes of an index or a file: no kernel comes near


def write(file: Path, entries: Iterable[Entry]) -> str:
    """Write a bundle, all of it or nothing; returns the sha256 of the file."""
    ordered = sorted(entries, key=lambda entry: entry.key.digest)
    contents = {entry.key.digest: dict(zip(FILES, (manifests.manifest_bytes(entry.manifest), entry.source.encode(),
                                                   entry.so_bytes), strict=True)) for entry in ordered}
    stated = {digest: {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()}
              for digest, files in contents.items()}
    index = canonical({"format": FORMAT, "entries": stated}).encode()
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        with open(partial, "xb") as out:
            with tarfile.open(fileobj=out, mode="w:xz", format=tarfile.USTAR_FORMAT) as archive:
                _add(archive, INDEX, index)
                for digest, files in contents.items():
                    for name, data in files.items():
                        _add(archive, f"{digest}/{name}", data)
            out.flush()
            os.fsync(out.fileno())
        digest = _sha256(partial.read_bytes())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return digest


def load(path: Path, store: Store, sha256: str = "") -> Iterator[tuple[Entry, str]]:
    """Store every entry of a bundle in the user's cache; yields each with "imported", "there", or "there, other bytes".

    The whole file is checked before anything is stored. sha256: of the file, when its origin has told it. Raises
    InvalidArgument, CacheCorrupt, CacheUnwritable and CacheUntrusted.
    """
    with _unpacked(path, sha256) as file:
        for _ in read(file, str(path)):
            pass
        for entry in read(file, str(path)):
            stored = store.adopt(entry)
            same = stored.so_bytes == entry.so_bytes and stored.source == entry.source
            new = stored.so_bytes is entry.so_bytes  # rather than read from the entry that was there
            yield stored, "imported" if new else "there" if same else "there, other bytes"


def read(file: IO[bytes], name: str) -> Iterator[Entry]:
    """The entries of a decompressed bundle, each checked against the index, its own manifest and its Key; raises
    CacheCorrupt."""
    file.seek(0)
    with _told(name), tarfile.open(fileobj=file, mode="r:") as archive:
        raw = _take(archive, INDEX, None)
        index = json.loads(raw)
        if index["format"] != FORMAT or canonical(index).encode() != raw:
            raise ValueError(f"its {INDEX} is not one of format {FORMAT}")
        for digest, stated in index["entries"].items():
            if not DIGEST.match(digest) or stated.keys() != set(FILES):
                raise ValueError(f"its {INDEX} names an entry {digest!r} of {sorted(stated)}")
            manifest, source, so_bytes = (_take(archive, f"{digest}/{file}", stated[file]) for file in FILES)
            key = Key.from_dict(manifests.parse(manifest, Path(digest))["key"])
            yield Entry(key, source.decode(), so_bytes,
                        manifests.verified(key, manifest, source, so_bytes, Path(digest)), None)
        if archive.next() is not None:
            raise ValueError("it holds more than its index names")


@contextmanager
def _unpacked(path: Path, sha256: str) -> Iterator[IO[bytes]]:
    """The tar file in a bundle, in a temporary file that nobody else can reach."""
    seen = hashlib.sha256()
    unpack = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    with tempfile.TemporaryFile() as tar:
        try:
            with open(path, "rb") as file, _told(str(path)):
                while block := file.read(1 << 20):
                    seen.update(block)
                    tar.write(unpack.decompress(block))
                if not unpack.eof or unpack.unused_data:
                    raise ValueError("it is cut short, or something follows it")
        except OSError as e:
            raise InvalidArgument(f"the bundle {path}", supported="a file that `jitmla cache export` wrote",
                                  differs=str(e), remedy="name such a file") from e
        if sha256 and seen.hexdigest() != sha256.lower():
            raise _differs(str(path), f"its sha256 is {seen.hexdigest()}, not {sha256}")
        yield tar


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time, owner and mode are constants
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _take(archive: tarfile.TarFile, name: str, stated: dict[str, Any] | None) -> bytes:
    """The next member, which must have this name, and the size and sha256 that are stated."""
    member = archive.next()
    if member is None or member.name != name or not member.isreg():
        raise ValueError(f"{name} is missing, or not where it should be")
    if member.size > MOST or (stated is not None and member.size != stated["bytes"]):
        raise ValueError(f"{name} has {member.size} bytes")
    content = archive.extractfile(member)
    data = content.read() if content is not None else b""
    if stated is not None and _sha256(data) != stated["sha256"]:
        raise ValueError(f"{name} does not have the sha256 that is stated for it")
    return data


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turns whatever a damaged file does to a reader into CacheCorrupt."""
    try:
        yield
    except CacheCorrupt as e:
        raise _differs(name, f"{e.asked}: {e.differs}") from e
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError, TypeError, AttributeError, LookupError,
            RecursionError) as e:
        raise _differs(name, str(e) or type(e).__name__) from e


def _differs(name: str, differs: str) -> CacheCorrupt:
    return CacheCorrupt(f"the bundle {name}", supported="a file that `jitmla cache export` wrote, unchanged",
                        differs=differs, remedy="fetch or export it again; nothing of it was stored")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
