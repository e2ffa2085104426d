"""GPU time of callables that take turns, and host time of a call.

GPU time is what the profiler reports from the start of a call's first kernel to the end of its last one, replayed from
a CUDA graph with a cold and clean L2. Contenders alternate inside one profile, because clocks fall with power: a matmul
is a quarter slower after a second of matmuls than in a burst. After a cudaFree (of a case before, of a graph's pool)
the driver clears that memory in the background, for milliseconds a GB, and a copy takes a tenth longer: measuring waits
until that is over.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # more than any L2
SETTLE = 0.05  # seconds, until freed memory has been cleared
BURST = 200  # calls that fit in the launch queue, so that the host never waits for the GPU


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median of the samples. kernels: how many one call launches."""

    us: float
    samples: tuple[float, ...]
    kernels: int


def gpu_times(contenders: dict[str, Callable[[], Any]], *, iters: int = 20, graph: bool = True) -> dict[str, Timing]:
    """GPU time of each contender, measured in turns. With graph=False they are called eagerly."""
    calls = {name: captured(fn) if graph else fn for name, fn in contenders.items()}
    flush = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64, device="cuda")
    mark = torch.zeros(1, dtype=torch.int16, device="cuda")

    def rounds(n: int) -> None:
        for _ in range(n):
            for call in calls.values():
                flush.sum()  # a read: a flush that writes leaves dirty lines, which the call would have to evict
                mark.add_(1)
                call()
                mark.add_(1)

    rounds(2)
    marker = {name for name, _, _ in profiled(lambda: mark.add_(1))}
    time.sleep(SETTLE)
    spans = groups(profiled(lambda: rounds(iters)), marker)
    if len(spans) != iters * len(calls):
        raise RuntimeError(f"the profile holds {len(spans)} calls instead of {iters * len(calls)}")
    return {name: summary(spans[i::len(calls)]) for i, name in enumerate(calls)}


def captured(fn: Callable[[], Any]) -> Callable[[], None]:
    """A replay of `fn`, captured after three eager calls on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def profiled(run: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """(name, start, end) in microseconds of everything that `run` does on the GPU, by start."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found = [(e.name, e.time_range.start, e.time_range.end) for e in profile.events()
             if e.device_type == torch.autograd.DeviceType.CUDA]
    return sorted(found, key=lambda e: e[1])


def groups(events: Iterable[tuple[str, float, float]], marker: set[str]) -> list[list[tuple[float, float]]]:
    """The (start, end) pairs between each odd marker and the next one."""
    found: list[list[tuple[float, float]]] = []
    inside = False
    for name, start, end in events:
        if name in marker:
            inside = not inside
            if inside:
                found.append([])
        elif inside:
            found[-1].append((start, end))
    return [g for g in found if g]


def summary(spans: Sequence[Sequence[tuple[float, float]]]) -> Timing:
    times = tuple(max(end for _, end in span) - min(start for start, _ in span) for span in spans)
    return Timing(statistics.median(times), times, len(spans[0]))


def host_us(calls: dict[str, Callable[[], Any]], rounds: int = 40) -> dict[str, float]:
    """Host microseconds of one eager call of each, not waiting for the GPU: the median over rounds, in which they take
    turns, of the mean in a burst."""
    means: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):  # the first one warms up
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            for _ in range(BURST):
                call()
            means[name].append((time.perf_counter_ns() - start) / BURST / 1e3)
    torch.cuda.synchronize()
    return {name: statistics.median(times[1:]) for name, times in means.items()}


def ceilings() -> dict[str, dict[str, float]]:
    """What the GPU can do at all, in this run: {"copy", "read": GB/s} and {"matmul": TFLOP/s}."""
    source = torch.empty(2**31, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    moved = gpu_times({"copy": lambda: target.copy_(source), "read": lambda: torch.sum(source.view(torch.int64))},
                      iters=5, graph=False)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = gpu_times({"matmul": lambda: a @ b.t()}, iters=10)["matmul"]
    return {"copy": {"us": moved["copy"].us, "gbps": 2 * size / moved["copy"].us / 1e3},
            "read": {"us": moved["read"].us, "gbps": size / moved["read"].us / 1e3},
            "matmul": {"us": matmul.us, "tflops": 2 * 8192**3 / matmul.us / 1e6}}
