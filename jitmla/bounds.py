"""The bounds of the user's cache: which entries were used when, which are pinned, and what goes when it is too large.

Beside the entries, which are never written again, lie empty files: `.used/<digest>`, whose mtime is the last use (to
the hour), and `.pins/<digest>`. Eviction is by size alone, least recently used first, so a clock that is wrong changes
the order, never the amount.

An entry is evicted by renaming its folder into `.staging` and deleting it GRACE seconds later. A reader that opened the
folder before the rename still finds all files in it; one that comes after finds no entry. Either way it has a whole
entry or none; only a reader that is stopped for GRACE seconds between two files finds none where there was one.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import env, trusted
from .errors import InvalidArgument
from .events import emit
from .layer import DIGEST, LAYOUT

STAGING, USED, PINS, LOCKS, FAILED = ".staging", ".used", ".pins", ".locks", ".failed"
EVICTED = "evicted-"
GRACE = 2.0
STALE_SECONDS = 3600.0  # publishing takes well under a second; what is older was left by a process that was killed
LEFTOVER_SECONDS = 7 * 86400.0  # for locks, outputs of failed compiles, and marks of entries that are gone
HOUR, DAY = 3600.0, 86400.0
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_touched: set[tuple[Path, str]] = set()


@dataclass(frozen=True)
class Resident:
    """An entry as eviction sees it. `used`: when it was used last, as far as that can be told."""

    path: Path
    bytes: int
    used: float
    pinned: bool

    @property
    def digest(self) -> str:
        return self.path.name


def size_of(text: str, name: str = "a size") -> int | None:
    """The bytes that `2GiB`, `500 MB` or `1000` stand for, None for `unlimited`; raises InvalidArgument."""
    if text.strip().lower() == "unlimited":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found.group(2).upper() not in UNITS:
        raise InvalidArgument(f"{name}: {text!r}", supported="a number with B, KiB, MiB, GiB, TiB, KB, MB or GB, or "
                              "`unlimited`", differs="it is no size", remedy="such as 2GiB")
    return int(float(found.group(1)) * UNITS[found.group(2).upper()])


def default_limit() -> int | None:
    """The bound that the environment names; raises InvalidArgument."""
    return size_of(env.CACHE_SIZE.get(), env.CACHE_SIZE.name)


def touch(root: Path, digest: str) -> None:
    """Note that an entry of the user's cache is used now: once in a process, and only when the note is an hour off."""
    if (root, digest) in _touched:
        return
    _touched.add((root, digest))
    mark = root / LAYOUT / USED / digest
    try:
        if abs(time.time() - os.stat(mark, follow_symlinks=False).st_mtime) > HOUR:
            os.utime(mark, follow_symlinks=False)
    except FileNotFoundError:
        try:
            mark.parent.mkdir(mode=0o755, exist_ok=True)
            os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))
        except OSError:  # a cache that is only read has no bounds to keep
            pass
    except OSError:
        pass


def residents(root: Path) -> list[Resident]:
    """Every entry under a root, the least recently used first.

    A mark in the future is from before the clock was set back: the entry has not been used since, and comes first.
    """
    pins, used = _names(root / LAYOUT / PINS), root / LAYOUT / USED
    horizon = time.time() + DAY
    found = []
    for folder in _entry_folders(root):
        try:
            size = sum(file.stat(follow_symlinks=False).st_size for file in os.scandir(folder.path))
            last = _mtime(used / folder.name) or folder.stat(follow_symlinks=False).st_mtime
        except (FileNotFoundError, NotADirectoryError):  # evicted meanwhile; or a file in the place of an entry
            continue
        found.append(Resident(Path(folder.path), size, last, folder.name in pins))
    return sorted(found, key=lambda r: (r.used <= horizon, r.used, r.digest))


def trim(root: Path, limit: int | None, keep: str = "") -> list[Resident]:
    """Evict the least recently used entries until `limit` bytes hold the rest; never the pinned ones, nor `keep`."""
    if limit is None:
        return []
    evicted = []
    try:
        there = residents(root)
        total = sum(resident.bytes for resident in there)
        for resident in there:
            if total > limit and not resident.pinned and resident.digest != keep:
                evict(root, resident)
                evicted.append(resident)
                total -= resident.bytes
    except OSError as e:
        emit("degrade", what="eviction", reason=str(e))
    return evicted


def evict(root: Path, resident: Resident) -> None:
    """Take an entry away; its bytes are deleted by `sweep_staging`, GRACE seconds later."""
    aside = root / LAYOUT / STAGING / f"{EVICTED}{uuid.uuid4().hex}"
    trusted.fault_point("before evicting")
    try:
        os.utime(resident.path)  # GRACE counts from here for everybody who sweeps
        os.rename(resident.path, aside)
    except FileNotFoundError:  # another process was faster
        return
    trusted.fault_point("evicted")
    (root / LAYOUT / USED / resident.digest).unlink(missing_ok=True)
    _touched.discard((root, resident.digest))
    emit("evict", key=resident.digest[:12], bytes=resident.bytes, path=str(resident.path))


def sweep_staging(root: Path) -> None:
    """Delete what killed writers left, and what was evicted."""
    staging = root / LAYOUT / STAGING
    try:
        os.utime(staging)
    except OSError:  # there is none, or it cannot be written, and so not swept
        return
    now = _mtime(staging)  # by the clock of the disk, which may be another machine's
    for name in _names(staging):
        age = abs(now - _mtime(staging / name))
        if age > (GRACE if name.startswith(EVICTED) else STALE_SECONDS):
            trusted.fault_point("before sweeping")
            discard(staging / name)


def sweep(root: Path, failures: bool = False) -> None:
    """`sweep_staging`, and marks, locks and outputs of failed compiles that nobody needs; with `failures`, the
    memory of failed compiles as well."""
    sweep_staging(root)
    here = {folder.name for folder in _entry_folders(root)}
    for side in (USED, LOCKS, FAILED):
        for name in _names(root / LAYOUT / side):
            path = root / LAYOUT / side / name
            if side == FAILED and failures or (abs(time.time() - _mtime(path)) > LEFTOVER_SECONDS and name not in here):
                discard(path)


def discard(path: Path) -> None:
    """Remove a file or folder that no reader looks at; what cannot be removed now is swept later."""
    try:
        path.unlink()
    except IsADirectoryError:
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass


def _entry_folders(root: Path) -> Iterator[os.DirEntry[str]]:
    for arch in _scan(root / LAYOUT):
        for op in () if arch.name.startswith(".") else _scan(arch.path):
            yield from (entry for entry in _scan(op.path) if DIGEST.match(entry.name))


def _scan(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in _scan(folder)}


def _mtime(path: Path) -> float:
    """When a file was changed; 0 when it is not there."""
    try:
        return os.stat(path, follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return 0.0
