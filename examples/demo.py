"""One kernel from request to result: a decode step of DeepSeek-V3 goes through all of jitmla. `make demo` runs it.

It uses a cache of its own, emptied first: build/demo-cache, or the folder given as an argument. Without a GPU that
jitmla has kernels for, it compiles for sm_90a all the same, and the result comes from the PyTorch reference.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parent.parent / "build" / "demo-cache"
MODEL, PAGE_SIZE = "deepseek-v3", 64
SM_SCALE = 0.1352  # of DeepSeek-V3: 192**-0.5 times its YaRN factor


def step(title: str, text: str) -> None:
    print(f"{title:10}{text}", flush=True)


def gpu_arch() -> str | None:
    """The arch of the GPU, if there is one that jitmla has kernels for."""
    import torch

    from jitmla import arch, registry

    if not torch.cuda.is_available():
        return None
    name = arch.BY_CAPABILITY.get(torch.cuda.get_device_capability())
    return name if any(name in template.archs for template in registry.templates("mla_decode")) else None


def choose(arch: str) -> Any:
    """What serves a decode step of the model (all heads on one GPU, one new token per request)."""
    from jitmla import registry
    from jitmla.models import specs_for

    [spec] = specs_for(MODEL, tp=1, arch=arch, page_sizes=[PAGE_SIZE], max_s_q=1)
    return registry.choose(spec)


def first_process(cache: Path) -> None:
    import torch

    import jitmla
    from jitmla import compile
    from jitmla.store import Store

    arch = gpu_arch()
    if arch:
        step("machine", f"{torch.cuda.get_device_name()} ({arch}): the kernel is compiled, launched, checked and timed")
    else:
        step("machine", f"no GPU that jitmla has kernels for (torch {torch.__version__}): compiling for sm_90a, result "
             "from the reference")
    choice = choose(arch or "sm_90a")
    step("request", f"{MODEL}, one new token: {choice.spec}")
    step("choice", f"template {choice.template.name}, variant {choice.variant.name}: {choice.template.summary}")
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["JITMLA_CACHE_DIR"] = str(cache)
    start = time.perf_counter()
    entry = compile.get_or_compile(choice.key, choice.source, Store())
    step("cold", f"{time.perf_counter() - start:.2f} s from an empty cache to Key {entry.key.digest[:12]} on disk")
    assert entry.path is not None, "the demo's cache cannot be written"
    step("source", str(entry.path / "kernel.py"))
    step("binary", f"{len(entry.so_bytes)} bytes; " + "; ".join(
        f"{k['registers']} registers, {k['spill_bytes']} bytes spilled" for k in entry.manifest["kernels"]))
    command = [sys.executable, __file__, "--second-process", arch or ""]
    times = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    step("warm", f"{times['find']:.2f} ms to find and verify it in a second process, {times['load']:.2f} ms to load it "
         f"(before that: imports {times['imports']:.0f} ms, choosing {times['choose']:.1f} ms)")
    run(jitmla, "cuda" if arch else "cpu")


def second_process(arch: str) -> None:
    """A later process: the kernel is on disk."""
    start = time.perf_counter()
    device = 0 if arch else None
    if arch:
        import torch
        torch.cuda.init()
    import tvm_ffi  # noqa: F401  # loading needs it, and it takes long to import

    from jitmla import load
    from jitmla.store import Store

    load.runtime()
    times = [("imports", start), ("choose", time.perf_counter())]
    choice = choose(arch or "sm_90a")
    choice.key.digest  # noqa: B018  # computed on first use, and part of choosing
    times.append(("find", time.perf_counter()))
    entry = Store().find(choice.key)
    assert entry is not None, "not found: has a template changed since the first process?"
    times.append(("load", time.perf_counter()))
    load.load(entry, choice.spec.op, device)
    times.append(("", time.perf_counter()))
    print(json.dumps({name: (end - begin) * 1e3 for (name, begin), (_, end) in itertools.pairwise(times)}))


def run(jitmla: Any, device: str) -> None:
    """The same call on tensors, checked against an exact computation, and on a GPU timed."""
    from jitmla.testing import mla_decode_oracle, mla_decode_problem

    lengths = [4096] * 62 + [1, 0] if device == "cuda" else [600, 64, 1, 0]
    problem = mla_decode_problem(lengths, heads=128, page_size=PAGE_SIZE, sm_scale=SM_SCALE, device=device)
    chosen: list[Any] = []
    end = jitmla.subscribe(lambda event: chosen.append(event) if event.kind == "choose" else None)
    out, lse = jitmla.mla_decode(*problem.args, **problem.kwargs, return_lse=True)
    end()
    step("call", f"jitmla.mla_decode, {len(lengths)} requests on {device}: backend {chosen[-1].fields['backend']}")
    report = mla_decode_oracle(problem).check(out, lse)
    step("check", f"matches float64: {report}")
    if device == "cuda":
        tokens = sum(lengths)
        microseconds = time_graph(lambda: jitmla.mla_decode(*problem.args, **problem.kwargs, out=out, lse=lse))
        step("time", f"{microseconds:.1f} us for {tokens} cached tokens: {tokens * 1152 / microseconds / 1e6:.2f} TB/s")


def time_graph(call: Any, launches: int = 20, samples: int = 15) -> float:
    """Microseconds of one call, in a CUDA graph of several: the median of some replays."""
    import torch

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    took = []
    for _ in range(samples):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        took.append(start.elapsed_time(stop) * 1e3 / launches)
    return statistics.median(took)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--second-process"]:
        second_process(arch=sys.argv[2])
    else:
        first_process(Path(sys.argv[1]) if len(sys.argv) > 1 else CACHE)
