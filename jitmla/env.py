"""Every environment variable that jitmla reads, declared once. `docs/env.md` is generated from this table."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class EnvVar:
    """One variable: its name, its default ("" where there is none), and what docs/env.md says of it."""

    name: str
    default: str
    doc: str

    def get(self) -> str:
        """The value in the environment, or the default; an empty value counts as unset."""
        return os.environ.get(self.name) or self.default


CACHE_DIR = EnvVar("JITMLA_CACHE_DIR", "", "Root of the kernel cache. Unset: the user cache folder of the platform "
                   "(`$XDG_CACHE_HOME/jitmla` or `~/.cache/jitmla` on Linux).")
CACHE_PATH = EnvVar("JITMLA_CACHE_PATH", "", "Read-only layers below the kernel cache: roots of other caches, "
                    "separated by colons. They are looked through in this order, and never written or locked.")
CACHE_SIZE = EnvVar("JITMLA_CACHE_SIZE", "2GiB", "Size to which the kernel cache is trimmed after an entry is stored: "
                    "the least recently used ones go first, pinned ones stay. `unlimited` keeps all.")
CUTE_RUNTIME = EnvVar("JITMLA_CUTE_RUNTIME", "", "Path of `libcute_dsl_runtime.so`, for machines without the CuTe DSL "
                      "wheel. Unset: the copy inside the installed wheel.")
CC = EnvVar("JITMLA_CC", "cc", "C compiler driver that links a compiled kernel into a shared library.")
COMPILE_TIMEOUT = EnvVar("JITMLA_COMPILE_TIMEOUT", "300", "Seconds one compile may take before its process is killed.")
LOCK_TIMEOUT = EnvVar("JITMLA_LOCK_TIMEOUT", "360", "Seconds to wait for another process that compiles the same Key "
                      "before compiling it here as well.")
ON_MISS = EnvVar("JITMLA_ON_MISS", "compile", "What a call may do when its kernel is not loaded: `compile` it if the "
                 "cache lacks it; `load` it from the cache, and never compile; or `error`: only kernels that "
                 "`jitmla.warm` loaded are used.")
TUNINGS = EnvVar("JITMLA_TUNINGS", "", "Path of a file that `jitmla tune` wrote, or `off`. Unset: the tunings that "
                 "come with jitmla, for the GPUs they were measured on.")
LOG = EnvVar("JITMLA_LOG", "", "Level (`INFO`, `DEBUG`, ...) at which jitmla's events are written to stderr. "
             "Unset: nothing is written unless the application configures logging.")
PEERS = EnvVar("JITMLA_PEERS", "", "Folder with other libraries' kernels that `jitmla bench --peers` measures as well. "
               "Unset: those that can be imported.")

ALL = tuple(v for v in globals().values() if isinstance(v, EnvVar))


def as_markdown() -> str:
    """The page `docs/env.md`."""
    rows = "\n".join(f"| `{v.name}` | {'`' + v.default + '`' if v.default else 'unset'} | {v.doc} |" for v in ALL)
    return ("# Environment variables\n\nGenerated from `jitmla/env.py`.\n\n"
            f"| variable | default | meaning |\n|---|---|---|\n{rows}\n")
