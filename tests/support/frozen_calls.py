"""A process that warms, freezes, and makes 10,000 calls, with everything forbidden that freezing promises not to do.

    python -m tests.support.frozen_calls audit | seccomp        (JITMLA_CACHE_DIR holds the Keys of MODEL)

Prints a JSON object. `audit` counts what the interpreter reports; under `seccomp` the kernel ends the process at the
first system call that opens, looks up, maps code, or starts a process, whoever makes it.
"""

from __future__ import annotations

import collections
import ctypes
import itertools
import json
import os
import random
import sys

import pytest
import torch

from jitmla import dispatch, events, models
from jitmla.errors import MissNotAllowed
from jitmla.models import keys_for

from .gpu import Gpu

MODEL = {"model": "deepseek-v3", "tp": 8}
CALLS = 10_000
QUIET = {"object.__getattr__", "object.__setattr__", "sys._getframe"}  # touch nothing outside of the interpreter
# of x86-64: open openat stat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents64 creat
# rename renameat renameat2 unlink unlinkat mkdir mkdirat flock memfd_create fork vfork clone3 execve execveat mprotect
FORBIDDEN = (2, 257, 4, 6, 262, 332, 21, 269, 439, 89, 267, 217, 85, 82, 264, 316, 87, 263, 83, 258, 73, 319, 57, 58,
             435, 59, 322, 10)


def forbid():
    """Have the kernel kill this process at the first of the FORBIDDEN system calls; whether that was possible."""
    libc = ctypes.CDLL(None, use_errno=True)
    load, equal, end = 0x20, 0x15, 0x06
    kill, allow = 0x80000000, 0x7FFF0000
    program = [(load, 0, 0, 0)] + [(equal, len(FORBIDDEN) - i, 0, n) for i, n in enumerate(FORBIDDEN)]
    program += [(end, 0, 0, allow), (end, 0, 0, kill)]
    code = b"".join(op.to_bytes(2, "little") + bytes([yes, no]) + k.to_bytes(4, "little") for op, yes, no, k in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(
        len(program).to_bytes(8, "little") + ctypes.addressof(buffer).to_bytes(8, "little"), 16)
    return libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0


def specs(wanted):
    """Specs that are warm, and others that serving this model never asks for."""
    warm = models.specs_for(MODEL["model"], tp=MODEL["tp"], arch="sm_90a")
    other = [spec for name in ("mistral-small-4",) for spec in models.specs_for(name, tp=1, arch="sm_90a")]
    random.seed(1)
    return random.choices(warm, k=wanted), other


def serve(calls, other):
    """Results of the calls, and how many of those for another model were refused."""
    device, refused = torch.device("cuda", 0), 0
    misses = itertools.cycle(other)
    for i, spec in enumerate(calls):
        plan = dispatch.plan_for(spec, ("auto", "sm90")[i % 2], device)
        assert plan.function(i, 2) == i + 2
        if i % 100 == 0:
            try:
                dispatch.plan_for(next(misses), "auto", device)
            except MissNotAllowed:
                refused += 1
    return refused


def main(how):
    with pytest.MonkeyPatch.context() as patch:
        gpu = Gpu(patch)
        dispatch.warm(keys_for(**MODEL))
        dispatch.freeze()
        calls, other = specs(CALLS)
        before, driver = events.stats(), len(gpu.driver)
        seen, counting = collections.Counter(), how == "audit"
        if counting:
            sys.addaudithook(lambda name, args: seen.update([name]) if counting and name not in QUIET else None)
        elif not forbid():
            os.write(1, b'{"skip": "no seccomp here"}\n')
            os._exit(0)
        refused = serve(calls, other)
        counting = False
        after = events.stats()
        os.write(1, json.dumps({"calls": len(calls), "refused": refused, "seen": dict(seen), "loaded": driver,
                                "driver": len(gpu.driver) - driver,
                                "events": {k: after[k] - before[k] for k in after if after[k] != before[k]}}).encode())
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
