"""Compiles that failed, remembered on disk: the next process gets the error at once, without paying for the compile.

`.failed/<Key digest>/error.json` lies beside the source and the compiler's output. The Key names the toolchain, so that
another one tries again, and so does another version of jitmla. What says nothing about the source is not remembered: a
compile that was killed or ran out of time, a linker or a disk that failed.
"""

from __future__ import annotations

import json
import os
import uuid

from . import __version__
from .bounds import FAILED
from .errors import CacheCorrupt, CacheUnwritable, CompileFailed
from .events import emit
from .key import Key, canonical
from .layer import LAYOUT
from .store import Store
from .trusted import read_file, write_new

NOTE = "error.json"
PARTS = ("asked", "supported", "differs", "remedy")
FOLDER = "{folder}"  # in the remedy, for the folder of the note: a cache may be moved


def remember(store: Store, key: Key, error: CompileFailed) -> None:
    """Keep `error` for every later process that asks for `key`; where nothing can be written, an event `degrade`."""
    try:
        folder = store.side_folder(FAILED) / key.digest
        note = {part: getattr(error, part) for part in PARTS} | {"producer": __version__}
        note["remedy"] = note["remedy"].replace(str(folder), FOLDER)
        folder.mkdir(mode=0o755, exist_ok=True)
        with store.user.folder(LAYOUT, FAILED, key.digest) as fd:
            if fd is not None:
                name = uuid.uuid4().hex
                write_new(fd, name, canonical(note).encode())
                os.rename(name, NOTE, src_dir_fd=fd, dst_dir_fd=fd)
    except OSError as e:  # CacheUnwritable is one
        emit("degrade", what="memory of a failed compile", op=key.spec.op, key=key.digest[:12],
             reason=e.differs if isinstance(e, CacheUnwritable) else str(e))


def recall(store: Store, key: Key) -> CompileFailed | None:
    """How the compile of `key` failed before, or None. Raises CacheUntrusted."""
    path = store.root / LAYOUT / FAILED / key.digest
    try:
        with store.user.folder(LAYOUT, FAILED, key.digest) as fd:
            note = json.loads(read_file(fd, path / NOTE)) if fd is not None else {}
    except (CacheCorrupt, ValueError):  # never finished, or damaged
        return None
    if not isinstance(note, dict) or note.get("producer") != __version__ or not set(PARTS) <= note.keys():
        return None
    asked, supported, differs, remedy = (str(note[part]).replace(FOLDER, str(path)) for part in PARTS)
    return CompileFailed(asked, supported=supported, differs=differs,
                         remedy=f"{remedy}; it failed before and is not tried again here until `jitmla cache gc "
                         "--failed`")
