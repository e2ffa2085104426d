"""Calls that may run at the same time: they share neither workspace nor counters, and do not wait for each other's SMs.

Run by test_mla_decode.py in a process of its own with a time limit: kernels whose blocks wait for one another could
hang here when two of them each get half of the multiprocessors, and a hang cannot be ended from inside.

    python -m tests.kernels.side_by_side [streams] [priorities] [graphs] [busy]
"""

from __future__ import annotations

import sys

import torch

import jitmla
from jitmla.testing import mla_decode_oracle, mla_decode_problem

SHAPES = [(16, [9000, 5]), (128, [4000, 30]), (16, [70, 700, 3000]), (64, [6000]), (128, [300] * 140)]
ROUNDS = 40


def same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(a[0].view(torch.int16), b[0].view(torch.int16)) and torch.equal(a[1].view(torch.int32),
                                                                                       b[1].view(torch.int32))


def call(problem) -> tuple[torch.Tensor, torch.Tensor]:
    return jitmla.mla_decode(*problem.args, **problem.kwargs, return_lse=True)


def on_streams(problems, expected, streams) -> None:
    results = []
    for _ in range(ROUNDS):
        for problem, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(call(problem))
    torch.cuda.synchronize()
    wrong = [i for i, result in enumerate(results) if not same(result, expected[i % len(problems)])]
    assert not wrong, f"{len(wrong)} of {len(results)} differ: {wrong[:20]}"


def streams(problems, expected) -> None:
    on_streams(problems, expected, [torch.cuda.Stream() for _ in problems])


def priorities(problems, expected) -> None:
    """Blocks of an urgent kernel go before waiting blocks of others, in the middle of them."""
    on_streams(problems, expected, [torch.cuda.Stream(priority=-(i % 2)) for i in range(len(problems))])


def graphs(problems, expected) -> None:
    """Graphs at the same time as one another and as eager calls."""
    captured = []
    for problem in problems:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call(problem)
        captured.append((graph, result))
    sides = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    eager = []
    for _ in range(ROUNDS):
        for (graph, result), stream in zip(captured, sides, strict=True):
            with torch.cuda.stream(stream):
                for tensor in result:
                    tensor.fill_(float("nan"))
                graph.replay()
        eager.append(call(problems[0]))
    torch.cuda.synchronize()
    assert all(same(result, exact) for (_, result), exact in zip(captured, expected, strict=True))
    assert all(same(result, expected[0]) for result in eager)


def busy(problems, expected) -> None:
    """Beside other work that takes up multiprocessors in pieces of any size."""
    other = torch.cuda.Stream()
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    results = []
    for _ in range(ROUNDS):
        with torch.cuda.stream(other):
            for size in (256, 1024, 2048):
                a[:size] @ a
        results += [call(problem) for problem in problems]
    torch.cuda.synchronize()
    assert all(same(result, expected[i % len(problems)]) for i, result in enumerate(results))


def main(names: list[str]) -> None:
    problems = [mla_decode_problem(lengths, heads=heads, device="cuda", seed=i)
                for i, (heads, lengths) in enumerate(SHAPES)]
    expected = []
    for problem in problems:
        expected.append(call(problem))
        mla_decode_oracle(problem).check(*expected[-1])
    for name in names or ["streams", "priorities", "graphs", "busy"]:
        print(name, "...", end=" ", flush=True)
        {"streams": streams, "priorities": priorities, "graphs": graphs, "busy": busy}[name](problems, expected)
        print("right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
