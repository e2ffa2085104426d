"""Files that lead to code: opened only when nobody but this user and root can write them, and no symbolic links.

Every function takes the descriptor of the folder that was checked before, so nothing can be exchanged between a check
and a use.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from . import env
from .errors import CacheCorrupt, CacheUntrusted

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: a planted FIFO must not hang


def corrupt(path: Path, differs: str) -> CacheCorrupt:
    return CacheCorrupt(f"the cache entry file {path}", supported="the bytes that its manifest names", differs=differs,
                        remedy="none needed: it is built again and replaced")


def _untrusted(path: Path, differs: str, remedy: str = "") -> CacheUntrusted:
    return CacheUntrusted(f"to load code from {path}", supported="folders and files that this user or root owns, that "
                          "nobody else can write, and that are no symbolic links", differs=differs,
                          remedy=remedy or f"delete it, or name a folder of your own in {env.CACHE_DIR.name}")


def open_trusted(name: str | Path, flags: int, parent: int | None, path: Path) -> int:
    """A descriptor of `path`, which is `name` in folder `parent`; raises FileNotFoundError and CacheUntrusted."""
    try:
        fd = os.open(name, flags, dir_fd=parent)
    except PermissionError as e:
        raise _untrusted(path, f"this user cannot open it: {e.strerror}") from e
    except OSError as e:
        if e.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        if stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            raise _untrusted(path, "it is a symbolic link") from e
        raise corrupt(path, "it is not a folder") from e
    try:
        _check_trust(os.fstat(fd), path)
    except CacheUntrusted:
        os.close(fd)
        raise
    return fd


def _check_trust(status: os.stat_result, path: Path) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise _untrusted(path, f"user id {status.st_uid} owns it, this process runs as {os.geteuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _untrusted(path, f"its mode is {stat.S_IMODE(status.st_mode):04o}: others can write it",
                         f"chmod -R go-w {path}, if you know what it holds; otherwise delete it")


def read_file(folder: int, path: Path) -> bytes:
    """The bytes of a file of an entry; raises CacheCorrupt and CacheUntrusted."""
    try:
        fd = open_trusted(path.name, FILE, folder, path)
    except FileNotFoundError as e:
        raise corrupt(path, "it is missing") from e
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise corrupt(path, "it is not a regular file")
        with open(fd, "rb", buffering=0, closefd=False) as file:
            return file.readall()
    except OSError as e:
        raise corrupt(path, f"it cannot be read: {e}") from e
    finally:
        os.close(fd)


def fault_point(name: str) -> None:
    """Marks a step of changing the cache. It does nothing; tests/faults puts a kill in its place."""


def write_new(folder: int, name: str, data: bytes) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)
    with open(fd, "wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) or 0:]
        os.fsync(fd)


def make_folder(name: str | Path, mode: int, parent: int | None = None) -> None:
    try:
        os.mkdir(name, mode, dir_fd=parent)
    except FileExistsError:
        pass
