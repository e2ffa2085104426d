"""Which compiler would build a kernel here, and where the libraries are that loading one needs.

Nothing here imports the compiler: versions come from the installed packages' metadata, files from the import system.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

from . import env
from .errors import ToolchainMissing

DSL = "nvidia-cutlass-dsl"
FLAVORS = ("cu13", "cu12")  # of the compiler, by the CUDA version that its kernels need of the driver
RUNTIME = "libcute_dsl_runtime.so"
INSTALL = "pip install 'jitmla[compile]'"


def _version(folder: Path) -> str | None:
    """Of the compiler that lies in `folder`: from what pip wrote beside it. Only where that is not to be found are all
    installed packages looked through, which takes longer."""
    prefix = folder.name + "-"
    beside = [name for name in os.listdir(folder.parent) if name.startswith(prefix) and name.endswith(".dist-info")]
    try:
        if len(beside) == 1:
            text = (folder.parent / beside[0] / "METADATA").read_text(encoding="utf-8")
        else:
            text = importlib.metadata.distribution(DSL).read_text("METADATA") or ""
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        return None
    # importlib.metadata parses all of it, the description included, with the parser for e-mails
    return text.partition("\nVersion:")[2].partition("\n")[0].strip() or None


@functools.cache
def _runtimes() -> dict[str, Path]:
    """The runtime library of each installed flavor, newest first."""
    package = importlib.util.find_spec(DSL.replace("-", "_"))
    roots = list(package.submodule_search_locations or ()) if package else []
    paths = [(flavor, Path(root, flavor, "lib", RUNTIME)) for flavor in FLAVORS for root in reversed(roots)]
    return {flavor: path for flavor, path in paths if path.is_file()}


def _flavor() -> str | None:
    """The installed flavor that the compiler takes: the newest that the driver runs; without a driver, the newest."""
    found = list(_runtimes())
    if len(found) < 2:
        return next(iter(found), None)
    driver = _driver_major()
    return next((flavor for flavor in found if driver is None or int(flavor[2:]) <= driver), found[-1])


def _driver_major() -> int | None:
    """The newest major version of CUDA that the driver runs, or None when there is no driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value // 1000


@functools.cache
def current(options: str = "") -> tuple[tuple[str, str], ...] | None:
    """The toolchain part of a Key built here, or None when no compiler is installed. `options`: of cute.compile."""
    flavor = _flavor()
    dsl = _version(_runtimes()[flavor].parents[2]) if flavor else None
    if dsl is None or flavor is None:
        return None
    return tuple(sorted({"cute_dsl": dsl, "cuda": flavor, "host": host(), "options": options}.items()))


@functools.cache
def host() -> str:
    """System and processor that launcher code built here runs on."""
    return f"{platform.system().lower()}-{platform.machine().lower()}"


def require_compiler() -> None:
    """Raise ToolchainMissing unless kernels can be compiled and linked here."""
    if current() is None:
        raise ToolchainMissing("to compile a kernel", supported=f"{DSL} (CuTe DSL)", differs="it is not installed here",
                               remedy=f"{INSTALL}, or prewarm on another machine and carry the cache here")
    if linker() is None:
        raise ToolchainMissing(f"to link a kernel with {env.CC.get()!r}", supported="a C compiler driver (gcc, clang)",
                               differs="it is not on PATH", remedy=f"install gcc, or name one in {env.CC.name}")


def linker() -> str | None:
    """Path of the C compiler driver, or None."""
    return shutil.which(env.CC.get())


def runtime_library() -> Path:
    """The DSL's runtime library, which every kernel needs in the process; raises ToolchainMissing."""
    if env.CUTE_RUNTIME.get():
        path = Path(env.CUTE_RUNTIME.get())
        if path.is_file():
            return path
        raise ToolchainMissing(f"{env.CUTE_RUNTIME.name}={path}", supported=f"the path of {RUNTIME}",
                               differs="there is no such file", remedy=f"correct or unset {env.CUTE_RUNTIME.name}")
    flavor = _flavor()
    if flavor is not None:
        return _runtimes()[flavor]
    raise ToolchainMissing(f"to load a kernel: {RUNTIME}", supported=f"{env.CUTE_RUNTIME.name}, or an installed {DSL}",
                           differs="neither is here", remedy=f"{INSTALL}, or copy the library here and set "
                           f"{env.CUTE_RUNTIME.name} to its path")
