"""The compiler process: a rendered source in, `kernel.so` and `result.json` out. The one module that imports cutlass.

Run by `jitmla.compile` as `python -m jitmla._child` in a private folder that holds `request.json` and `kernel.py`.
Every file is written there under a fixed name, so no path gets into the binary. What the compiler prints is for people;
the outcome is `result.json`: `{"kernels": [...]}`, or `{"error": ..., "differs": ..., "remedy": ..., "lasting": ...}`.

Run by `jitmla.pool` as `python -m jitmla._child --serve`, it imports the compiler once and does the same for many
folders, each in a fork of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

REQUEST, RESULT, SOURCE, OBJECT, LIBRARY, REMARKS = (
    "request.json", "result.json", "kernel.py", "kernel.o", "kernel.so", "ptxas.yaml")
LOG = "compile.log"
LOAD_SUFFIX = "_cuda_load"  # the library exports <op> and <op>_cuda_load
# The compiler targets the processor it runs on; a cache is carried to other ones, so the launcher code is held to what
# every processor of the architecture has.
BASELINE = {"x86_64": ("x86-64", '"+cx8", "+fxsr", "+mmx", "+sse", "+sse2", "+x87"'),
            "aarch64": ("generic", '"+fp-armv8", "+neon"')}
PR_SET_PDEATHSIG = 1


class Failed(Exception):
    """The compile cannot succeed: `args` are what was wrong and what mends it."""


class FailedHere(Failed):
    """It cannot succeed as this machine is set up; the source may be right."""


# kinds of errors that say nothing about the source
PASSING = (FailedHere, OSError, MemoryError, ImportError)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux); at once, when it died before the call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def import_compiler() -> Any:
    """cutlass.cute, without torch: importing that as well would double the time of a compile."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    import cutlass.cute as cute

    return cute


def import_kernel() -> ModuleType:
    """The module in kernel.py. A file, because the compiler reads the source of what it traces."""
    spec = importlib.util.spec_from_file_location("jitmla_kernel", SOURCE)
    if spec is None or spec.loader is None:
        raise Failed(f"{SOURCE} cannot be imported", "")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check_toolchain(wanted: dict[str, str]) -> None:
    """Raise Failed unless the compiler that was loaded is the one that the Key names."""
    import cutlass

    binary = str(sys.modules["cutlass._mlir._mlir_libs._cutlass_ir"].__file__)
    flavor = re.search(r"_cutlass_ir\.(cu\d+)\.", binary)
    loaded = {"cute_dsl": cutlass.__version__, "cuda": flavor.group(1) if flavor else "unknown"}
    differs = [f"{name}: the Key says {wanted[name]}, {value} was loaded"
               for name, value in loaded.items() if value != wanted[name]]
    if differs:
        raise FailedHere("; ".join(differs), "install the toolchain that the Key names, and only that flavor of it")


def portable(module: Any) -> None:
    """Hold the launcher code in an MLIR module to the baseline of the processor architecture."""
    from cutlass._mlir import ir

    cpu, features = BASELINE[os.uname().machine]
    with module.context:
        for op in module.body.operations:
            if op.operation.name == "llvm.func" and op.regions[0].blocks:
                op.attributes["target_cpu"] = ir.StringAttr.get(cpu)
                op.attributes["target_features"] = ir.Attribute.parse(f"#llvm.target_features<[{features}]>")


def export_cuda_load(module: Any, name: str) -> None:
    """Add an FFI function `name` that loads the kernels into the driver now and returns the CUlibrary as an integer.

    The launcher does that in its first call, through a guard variable that no other code can reach; this function goes
    through the same variable, so the first launch finds the work done.
    """
    from cutlass._mlir import ir

    with module.context:
        names = [op.attributes["sym_name"].value for op in module.body.operations
                 if op.operation.name == "llvm.mlir.global"]
        states = [name for name in names if name.endswith("_cuda_state")]
        if len(states) != 1:
            raise Failed(f"the compiler's output has {len(states)} CUDA state variables, not 1",
                         "use a version of CuTe DSL that this version of jitmla supports")
        text = f"""
        llvm.mlir.global private @{states[0]}(0 : i64) : i64
        llvm.func @cuda_init(!llvm.ptr) -> i32
        llvm.func @cuda_load_to_device(!llvm.ptr, i32) -> i32
        llvm.func @TVMFFIErrorSetRaisedFromCStr(!llvm.ptr, !llvm.ptr)
        llvm.func @cuda_dialect_init_library_once(!llvm.ptr, !llvm.ptr, !llvm.ptr, !llvm.ptr) -> i32
        llvm.func @{name}(%self: !llvm.ptr, %args: !llvm.ptr, %count: i32, %result: !llvm.ptr) -> i32 {{
          %state = llvm.mlir.addressof @{states[0]} : !llvm.ptr
          %init = llvm.mlir.addressof @cuda_init : !llvm.ptr
          %load = llvm.mlir.addressof @cuda_load_to_device : !llvm.ptr
          %error = llvm.mlir.addressof @TVMFFIErrorSetRaisedFromCStr : !llvm.ptr
          %status = llvm.call @cuda_dialect_init_library_once(%state, %init, %load, %error)
            : (!llvm.ptr, !llvm.ptr, !llvm.ptr, !llvm.ptr) -> i32
          %zero = llvm.mlir.constant(0 : i32) : i32
          %fine = llvm.icmp "eq" %status, %zero : i32
          llvm.cond_br %fine, ^fine, ^failed
        ^failed:
          %minus = llvm.mlir.constant(-1 : i32) : i32
          llvm.return %minus : i32
        ^fine:
          %integer = llvm.mlir.constant(1 : i64) : i64
          llvm.store %integer, %result : i64, !llvm.ptr
          %library = llvm.load %state : !llvm.ptr -> i64
          %value = llvm.getelementptr %result[8] : (!llvm.ptr) -> !llvm.ptr, i8
          llvm.store %library, %value : i64, !llvm.ptr
          llvm.return %zero : i32
        }}"""
        parsed = ir.Module.parse(text)  # must outlive the copy
        *_, function = parsed.body.operations  # what stands before it is there already
        module.body.append(function.operation.clone())


def kernels_of(log: str) -> list[dict[str, Any]]:
    """Registers, spills and stack of each kernel in the output of `ptxas -v`; raises Failed when performance was lost.

    Functions that ptxas did not inline count towards the kernel they follow.
    """
    lost = [line.strip() for line in log.splitlines() if "Potential Performance Loss" in line]
    if lost:  # wgmma serialised (C7510 and its kin) or setmaxnreg ignored: a kernel at a fraction of its speed
        raise Failed("ptxas: " + "; ".join(dict.fromkeys(lost)), "change the template: see docs/templates.md")
    kernels: dict[str, dict[str, Any]] = {}
    at: dict[str, Any] = {}
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(.+?)' for", line):
            at = kernels[m.group(1)] = {"name": m.group(1), "registers": 0, "spill_bytes": 0, "stack_bytes": 0}
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            at["stack_bytes"] += int(m.group(1))
            at["spill_bytes"] += int(m.group(2)) + int(m.group(3))
        elif m := re.search(r"Used (\d+) registers", line):
            at["registers"] = max(at["registers"], int(m.group(1)))
    if not kernels or not all(k["registers"] for k in kernels.values()):
        raise Failed("the compiler did not report what ptxas said about the kernels",
                     "use a version of CuTe DSL that this version of jitmla supports")
    return [kernels[name] for name in sorted(kernels)]


def ptxas_log(remarks: str) -> str:
    """The text of ptxas in the compiler's YAML remarks; it comes once per pass that looks at it."""
    texts = re.findall(r"Remark:\s*'(ptxas output: (?:[^']|'')*)'", remarks)
    return "\n".join(dict.fromkeys(text.replace("''", "'") for text in texts))


def link(cc: str, op: str) -> None:
    """kernel.o -> kernel.so. No start files, no libraries: their bytes would depend on the linker's installation."""
    alias = f"__tvm_ffi_{op}{LOAD_SUFFIX}=__cute_internal_{op}_{op}{LOAD_SUFFIX}"  # export_to_c put the prefix there
    command = [*shlex.split(cc), "-shared", "-nostdlib", "-Wl,--build-id=none", "-Wl,-z,now", "-Wl,-Bsymbolic",
               f"-Wl,--defsym={alias}", "-o", LIBRARY, OBJECT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise FailedHere(f"{shlex.join(command)} exited with {done.returncode}: {done.stderr.strip()[-500:]}",
                         "check the C compiler driver named by JITMLA_CC")


def compile_kernel(key: dict[str, Any], cc: str) -> list[dict[str, Any]]:
    """Write kernel.so for `key`; returns what ptxas said about each kernel."""
    cute = import_compiler()

    check_toolchain(key["toolchain"])
    op, arch, options = key["spec"]["op"], key["spec"]["arch"], key["toolchain"]["options"]
    function, arguments = import_kernel().entry()
    compiled = cute.compile(function, *arguments, options=f"--gpu-arch {arch} --enable-tvm-ffi {options} "
                            f"--remark-filter ptxas --remark-output {REMARKS}")
    export_cuda_load(compiled.ir_module, op + LOAD_SUFFIX)
    portable(compiled.ir_module)
    compiled.export_to_c(object_file_path=OBJECT, function_name=op)
    kernels = kernels_of(ptxas_log(Path(REMARKS).read_text(encoding="utf-8")))
    link(cc, op)
    return kernels


def answer(parent: int) -> NoReturn:
    """Do what request.json in the working folder asks, and end the process."""
    request = json.loads(Path(REQUEST).read_text(encoding="utf-8"))
    die_with_parent(parent or request["parent"])
    try:
        result = {"kernels": compile_kernel(request["key"], request["cc"])}
    except Failed as e:
        result = {"error": "Failed", "differs": e.args[0], "remedy": e.args[1],
                  "lasting": not isinstance(e, PASSING)}
    except Exception as e:  # whatever a template or the compiler raises is the result of this compile
        traceback.print_exc()
        result = {"error": type(e).__name__, "differs": f"{type(e).__name__}: {e}", "remedy": "",
                  "lasting": not isinstance(e, PASSING)}
    sys.stdout.flush()
    Path(RESULT).write_text(json.dumps(result), encoding="utf-8")
    os._exit(1 if "error" in result else 0)  # the compiler's own shutdown costs 0.1 s and does nothing for us


def serve() -> NoReturn:
    """A folder per line on stdin; on stdout `{"folder", "pid"}` when its fork starts, and with "status" when it ended.

    Ends with stdin, and kills what still runs.
    """
    answers = os.dup(1)
    os.dup2(2, 1)  # what the compiler prints is no answer
    import_compiler()
    gc.freeze()  # a collection in a fork would copy the pages that it shares with this process
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    running: dict[int, str] = {}
    received = b""

    def say(**message: Any) -> None:
        os.write(answers, json.dumps(message).encode() + b"\n")

    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            say(folder=running.pop(pid), pid=pid, status=os.waitstatus_to_exitcode(status))
        if 0 not in ready:
            continue
        data = os.read(0, 65536)
        if not data:
            for pid in running:
                kill_group(pid)
            os._exit(0)
        *folders, received = (received + data).split(b"\n")
        for folder in map(os.fsdecode, folders):
            parent, pid = os.getpid(), os.fork()
            if pid == 0:
                become_worker(folder, parent, [answers, woken, wake])
            running[pid] = folder
            say(folder=folder, pid=pid)


def become_worker(folder: str, parent: int, close: list[int]) -> NoReturn:
    """In a fork of the server: what a process of its own would have from its start, then the compile."""
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in close:
            os.close(fd)
        os.chdir(folder)
        for name, flags, fds in ((os.devnull, os.O_RDONLY, (0,)), (LOG, os.O_WRONLY | os.O_CREAT, (1, 2))):
            opened = os.open(name, flags, 0o600)
            for fd in fds:
                os.dup2(opened, fd)
            os.close(opened)
        answer(parent)
    finally:  # whatever happens, this process must not go on as a second server
        os._exit(3)


def kill_group(pid: int) -> None:
    """Kill a worker with all that it started; it may not have its group yet, or may have ended."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else answer(0)
