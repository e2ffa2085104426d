"""From the verified bytes of an entry to a function that can be called.

What is loaded is the memory that was verified, not the file: it goes into a sealed memfd, which nobody can change any
more, and from there through the dynamic linker. The folder of the cache may be mounted noexec.

The compiler's launchers load the GPU code into the driver in their first call, which must not be inside a CUDA graph
capture; `load` does it at once when it is told the device.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from . import arch, toolchain
from .errors import LoadFailed, ToolchainMissing
from .events import emit
from .store import Entry

LOAD_SUFFIX = "_cuda_load"  # as in _child.py
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

_modules: dict[str, Any] = {}  # sha256 of kernel.so -> tvm_ffi.Module, kept for the life of the process
_ready: set[tuple[str, int]] = set()  # (sha256, device) whose kernels are in the driver
_guard = threading.Lock()


def load(entry: Entry, op: str, device_index: int | None = None) -> Callable[..., Any]:
    """The function `op` of `entry`, ready to be called; the same bytes are loaded once in a process.

    With a device: the entry must be for its arch, and its kernels are loaded into the driver before this returns.
    Raises LoadFailed, ToolchainMissing and UnknownArch.
    """
    if device_index is not None:
        _check_device(entry, device_index)
    sha256 = entry.manifest["files"]["kernel.so"]["sha256"]
    with _guard:
        start = time.perf_counter()
        fresh = sha256 not in _modules
        if fresh:
            _modules[sha256] = _load_bytes(entry)
        module = _modules[sha256]
        if device_index is not None and (sha256, device_index) not in _ready:
            _load_into_driver(_function(entry, module, op + LOAD_SUFFIX)(), device_index)
            _ready.add((sha256, device_index))
        function = _function(entry, module, op)
        if fresh:
            emit("load", op=op, key=entry.key.digest[:12], ms=round((time.perf_counter() - start) * 1e3, 2))
        return function


def _check_device(entry: Entry, device_index: int) -> None:
    import torch

    here = arch.of_capability(*torch.cuda.get_device_capability(device_index))
    if here != entry.key.spec.arch:
        raise _failed(entry, f"it is for {entry.key.spec.arch}, and cuda:{device_index} is {here}",
                      f"prewarm the cache for {here}")


def _load_bytes(entry: Entry) -> Any:
    tvm_ffi = _tvm_ffi()
    runtime()
    fd = os.memfd_create(f"jitmla_{entry.key.spec.op}_{entry.key.digest[:12]}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(entry.so_bytes)
        while rest:
            rest = rest[os.write(fd, rest):]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        folder = tempfile.mkdtemp(prefix="jitmla-", dir=_memory_disk())
        # tvm_ffi wants a suffix; the linker takes a path that it has seen before for the same library
        path = os.path.join(folder, f"{entry.key.digest}.so")
        os.symlink(f"/proc/self/fd/{fd}", path)
        try:
            return tvm_ffi.load_module(path)
        finally:
            os.unlink(path)
            os.rmdir(folder)
    except RuntimeError as e:
        raise _failed(entry, str(e), "install the versions of tvm_ffi and of the DSL runtime library that this version "
                      "of jitmla asks for") from e
    finally:
        os.close(fd)


@functools.cache
def _memory_disk() -> str | None:
    """Where a folder costs microseconds (on a busy disk: milliseconds), or None for the usual place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None


def _tvm_ffi() -> Any:
    try:
        import tvm_ffi
    except ImportError as e:
        raise ToolchainMissing("to load a kernel", supported="tvm_ffi", differs=str(e),
                               remedy="pip install apache-tvm-ffi") from e
    return tvm_ffi


@functools.cache
def runtime() -> ctypes.CDLL:
    """The DSL's runtime library, loaded where every kernel finds it; raises ToolchainMissing."""
    path = toolchain.runtime_library()
    try:
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as e:
        raise ToolchainMissing(f"to load a kernel: {path}", supported="the DSL's runtime library for this machine",
                               differs=str(e), remedy="reinstall it, together with tvm_ffi") from e


def _function(entry: Entry, module: Any, name: str) -> Callable[..., Any]:
    try:
        return module.get_function(name)
    except AttributeError as e:
        raise _failed(entry, f"it has no function {name!r}", "delete the entry: it is built again") from e


def _load_into_driver(library: int, device_index: int) -> None:
    """Have every kernel of a CUlibrary loaded in the primary context of the device, rather than at its first launch."""
    driver = ctypes.CDLL("libcuda.so.1")
    if not hasattr(driver, "cuFuncLoad") or not hasattr(driver, "cuLibraryEnumerateKernels"):
        emit("degrade", what="preload", reason="the driver is older than CUDA 12.4; the first launch loads the kernel")
        return
    _call(driver, "cuCtxPushCurrent_v2", _primary_context(device_index))
    try:
        count = ctypes.c_uint()
        _call(driver, "cuLibraryGetKernelCount", ctypes.byref(count), ctypes.c_void_p(library))
        kernels = (ctypes.c_void_p * count.value)()
        _call(driver, "cuLibraryEnumerateKernels", kernels, count, ctypes.c_void_p(library))
        for kernel in kernels:
            function = ctypes.c_void_p()
            _call(driver, "cuKernelGetFunction", ctypes.byref(function), ctypes.c_void_p(kernel))
            _call(driver, "cuFuncLoad", function)
    finally:
        _call(driver, "cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@functools.cache
def _primary_context(device_index: int) -> ctypes.c_void_p:
    """Kept for the life of the process, as the CUDA runtime keeps it."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call(driver, "cuInit", 0)
    _call(driver, "cuDeviceGet", ctypes.byref(device), device_index)
    _call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


def _call(driver: ctypes.CDLL, name: str, *args: Any) -> None:
    status = getattr(driver, name)(*args)
    if status:
        raise LoadFailed(f"{name} for a kernel", supported="status 0", differs=f"the CUDA driver returned {status}",
                         remedy="`jitmla doctor` checks the driver; its status codes are those of CUresult in cuda.h")


def _failed(entry: Entry, differs: str, remedy: str) -> LoadFailed:
    return LoadFailed(f"to load {entry.key.name} (Key {entry.key.digest[:12]})", supported="a kernel for this device, "
                      "with the libraries it was linked for", differs=differs, remedy=remedy)
