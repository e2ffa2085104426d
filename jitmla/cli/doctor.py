"""`jitmla doctor`: what is installed here, and what would stop a compile or a launch.

What might crash or take long to import (torch, the compiler, the linker) is tried in processes of its own.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import typer

from .. import __version__, arch, env, registry, toolchain
from ..errors import CacheUntrusted, JitmlaError
from ..store import Store
from . import output

COMPILE, LAUNCH = "compile", "launch"
PROBE_SECONDS = 120
TORCH_PROBE = """
import json, torch
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"cuda": torch.version.cuda, "devices": [[d.name, d.major, d.minor] for d in devices]}))
"""
COMPILER_PROBE = "import sys; sys.modules['torch'] = None; import cutlass.cute"


@dataclass(frozen=True)
class Check:
    """One finding. `stops`: what cannot be done because of it; empty when all is well or it does not matter."""

    name: str
    found: str
    stops: list[str] = field(default_factory=list)
    remedy: str = ""


@output.reports_errors
def doctor(as_json: output.Json = False) -> None:
    """Check what this machine lacks.

    Shows what is installed, and what would stop a compile or a launch, each with its remedy. Exit code 1 when the main
    job cannot be done: with a GPU to launch, without one to compile.
    """
    drivers = gpu_count()
    checks = list(findings(drivers))
    able = {job: not any(job in check.stops for check in checks) for job in (COMPILE, LAUNCH)}
    if not able[COMPILE] and _prewarmed():
        checks.append(Check("prewarmed", "the cache holds kernels: those can be launched without compiling"))
    elif not able[COMPILE]:
        able[LAUNCH] = False
    main_job = LAUNCH if drivers else COMPILE
    if as_json:
        output.json_line({"version": __version__, "checks": [asdict(check) for check in checks], **able,
                          "ok": able[main_job]})
    else:
        output.line(f"jitmla {__version__}\n")
        output.table(("what", "", "found"), [(check.name, f"stops {', '.join(check.stops)}" if check.stops else "ok",
                                              check.found) for check in checks])
        for check in checks:
            if check.remedy:
                output.line(f"\n{check.name}: {check.remedy}")
        output.line(f"\ncompile: {'possible' if able[COMPILE] else 'not possible'}"
                    f"\nlaunch:  {'possible' if able[LAUNCH] else 'not possible'}"
                    + ("" if drivers else " (there is no GPU; calls on CPU tensors run the reference)"))
    if not able[main_job]:
        raise typer.Exit(1)


def findings(drivers: int) -> Iterator[Check]:
    """All checks, in the order in which a kernel would meet them. `drivers`: GPUs that the driver reports."""
    torch, compiler = _probe(TORCH_PROBE), _probe(COMPILER_PROBE, CUDA_VISIBLE_DEVICES="")
    yield Check("Python", f"{platform.python_version()} ({sys.executable})")
    yield _compiler(compiler)
    yield _linker()
    yield from _cache()
    yield _runtime()
    yield _package("tvm_ffi", "apache-tvm-ffi")
    yield from _torch(torch, drivers)


def gpu_count() -> int:
    """GPUs that an NVIDIA driver reports here, 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _probe(program: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def _outcome(process: subprocess.Popen[str]) -> tuple[str, str]:
    """(stdout, what went wrong): the last line of stderr, or how it died; empty when it succeeded."""
    try:
        out, err = process.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "", f"no answer after {PROBE_SECONDS} s"
    if process.returncode == 0:
        return out, ""
    return "", (err.strip().splitlines() or [f"exit status {process.returncode}"])[-1]


def _compiler(probe: subprocess.Popen[str]) -> Check:
    _, fault = _outcome(probe)
    current = dict(toolchain.current() or ())
    if not current:
        return Check("CuTe DSL", "not installed", [COMPILE],
                     f"{toolchain.INSTALL}; not needed where a prewarmed cache is used")
    found = f"{current['cute_dsl']}, {current['cuda']}"
    if fault:
        return Check("CuTe DSL", f"{found}, but it cannot be imported: {fault}", [COMPILE],
                     f"install it again: pip install --force-reinstall {toolchain.DSL}=={current['cute_dsl']}")
    return Check("CuTe DSL", found)


def _linker() -> Check:
    path = toolchain.linker()
    if path is None:
        return Check("linker", f"no {env.CC.get()!r} on PATH", [COMPILE], f"install gcc, or name one in {env.CC.name}")
    with tempfile.TemporaryDirectory(prefix="jitmla-") as folder:
        link = subprocess.run([path, "-shared", "-nostdlib", "-x", "c", os.devnull, "-o", f"{folder}/empty.so"],
                              capture_output=True, text=True)
    if link.returncode:
        fault = (link.stderr.strip().splitlines() or [f"exit status {link.returncode}"])[-1]
        return Check("linker", f"{path} cannot link: {fault}", [COMPILE],
                     f"install gcc, or name another one in {env.CC.name}")
    return Check("linker", path)


def _cache() -> Iterator[Check]:
    store = Store()
    try:
        count = sum(1 for _ in store.user.entries())
        below = [(layer.root, sum(1 for _ in layer.entries())) for layer in store.layers() if layer is not store.user]
    except CacheUntrusted as error:
        yield Check("cache", f"{store.root}: {error.differs}", [COMPILE, LAUNCH], error.remedy)
        return
    for root, held in below:
        yield Check("cache layer", f"{root}: {_entries(held)}")
    nearest = next(p for p in (store.root, *store.root.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(1 << 16))  # less than an entry, enough to notice a full disk
    except OSError as error:
        yield Check("cache", f"{store.root}: {_entries(count)}; it cannot be written: {error}", [COMPILE],
                    f"name another folder in {env.CACHE_DIR.name}; what is in this one can still be loaded")
        return
    yield Check("cache", f"{store.root}: {_entries(count)}")


def _entries(count: int) -> str:
    return f"{count} entry" if count == 1 else f"{count} entries"


def _prewarmed() -> bool:
    try:
        return any(listing.key is not None for listing in Store().entries())
    except CacheUntrusted:
        return False


def _runtime() -> Check:
    try:
        return Check("runtime library", str(toolchain.runtime_library()))
    except JitmlaError as error:
        return Check("runtime library", error.differs, [LAUNCH], error.remedy)


def _package(module: str, package: str) -> Check:
    if importlib.util.find_spec(module) is None:
        return Check(package, "not installed", [LAUNCH], f"pip install {package}")
    return Check(package, _version(package) or "installed")


def _torch(probe: subprocess.Popen[str], drivers: int) -> Iterator[Check]:
    out, fault = _outcome(probe)
    version = _version("torch")
    seen: dict[str, Any] = {"cuda": None, "devices": []} if fault else json.loads(out.splitlines()[-1])
    if fault:
        yield Check("torch", f"{version}; it cannot be imported: {fault}" if version else "not installed", [LAUNCH],
                    "pip install --force-reinstall torch" if version else "pip install torch")
    else:
        yield Check("torch", f"{version}, " + (f"CUDA {seen['cuda']}" if seen["cuda"] else "without CUDA"))
    if not drivers:
        yield Check("GPU", "none", [LAUNCH])
    elif fault:
        yield Check("GPU", f"{drivers}, by what the driver says")
    elif not seen["devices"]:
        yield Check("GPU", f"{drivers}, but torch sees none", [LAUNCH],
                    "install a CUDA build of torch that fits the driver" if not seen["cuda"] else
                    "check CUDA_VISIBLE_DEVICES, and that the driver is new enough for this build of torch")
    served: dict[str, list[str]] = {}  # arch -> the ops that have kernels for it
    for op in registry.ops():
        for name in dict.fromkeys(name for template in registry.templates(op) for name in template.archs):
            served.setdefault(name, []).append(op)
    for name, major, minor in seen["devices"]:
        known = arch.BY_CAPABILITY.get((major, minor))
        if known in served:
            some = served[known]
            yield Check("GPU", f"{name}, {known}" + ("" if some == registry.ops() else f": only {', '.join(some)}"))
        else:
            yield Check("GPU", f"{name}, {known or f'compute capability {major}.{minor}'}: no kernel for it", [LAUNCH],
                        f"there are kernels for {', '.join(sorted(served))}; backend='reference' runs anywhere")
