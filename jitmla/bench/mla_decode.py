"""jitmla.mla_decode and its peers, case by case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jitmla

from .. import dispatch, registry, tune
from ..spec import Spec, mla_decode_spec
from ..store import Store
from ..testing import Problem, mla_decode_oracle, mla_decode_problem
from .cases import HOST, MLA_DECODE, MLA_DECODE_SWEEP, DecodeCase
from .peers import Peer
from .peers import available as available
from .report import sweep_lines, write
from .timing import Timing, captured, gpu_times, host_us

OURS = "jitmla"
CHECKED = 4  # requests of each case that are compared with float64
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def problem_of(case: DecodeCase) -> Problem:
    return mla_decode_problem(case.lengths(), heads=case.heads, s_q=case.s_q, page_size=case.page_size,
                              kv_lora_rank=case.kv_lora_rank, qk_rope_head_dim=case.qk_rope_head_dim,
                              dtype=_DTYPES[case.dtype], device="cuda", inputs="large", poison=False, extra_table=0,
                              sm_scale=0.1352)


def contenders(problem: Problem, peers: Sequence[Peer]) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """The calls that can serve `problem`, and why the others cannot."""
    out = torch.empty(problem.out_shape, dtype=problem.dtype, device=problem.device)
    calls: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: jitmla.mla_decode(*problem.args, **problem.kwargs, out=out)}
    refused = {}
    for peer in peers:
        call = peer.prepare(problem)
        if isinstance(call, str):
            refused[peer.name] = call
        else:
            calls[peer.name] = call
    return calls, refused


def verify(problem: Problem, calls: dict[str, Callable[[], Tensor]]) -> None:
    """Raise AssertionError unless all of them compute the same thing, and the right one."""
    last = len(problem.lengths) - 1
    oracle = mla_decode_oracle(problem, sorted({i * last // (CHECKED - 1) for i in range(CHECKED)}))
    for name, call in calls.items():
        try:
            oracle.check(call())
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from e


def spec_of(case: DecodeCase) -> Spec:
    return mla_decode_spec(arch=dispatch.arch_of(torch.device("cuda", torch.cuda.current_device())), dtype=case.dtype,
                           kv_dtype=case.kv_dtype or case.dtype, kv_lora_rank=case.kv_lora_rank,
                           qk_rope_head_dim=case.qk_rope_head_dim, page_size=case.page_size, s_q=case.s_q,
                           heads=case.heads, causal=True)


def sizes_of(case: DecodeCase) -> dict[str, int]:
    """What the rule of the op looks at."""
    room = -(-max(case.lengths()) // case.page_size) * case.page_size
    return {"rows": case.s_q * case.heads, "batch": case.batch, "tokens": 1 << (room - 1).bit_length(),
            "sms": dispatch.sm_count(torch.device("cuda", torch.cuda.current_device()))}


def kernel_of(case: DecodeCase) -> tuple[str, dict[str, Any]]:
    """Name of the Key that serves the case, and the toolchain that built what is in the cache."""
    choice = registry.choose(spec_of(case), "auto", sizes_of(case))
    entry = Store().find(choice.key)
    return choice.key.name, dict(entry.key.toolchain or ()) if entry else {}


def rates(case: DecodeCase, timing: Timing) -> dict[str, Any]:
    return {"us": timing.us, "tflops": case.flops() / timing.us / 1e6, "gbps": case.bytes() / timing.us / 1e3,
            "kernels": timing.kernels, "samples": timing.samples}


def rows(peers: Sequence[Peer], cases: Sequence[DecodeCase] = tuple(MLA_DECODE), iters: int = 20
         ) -> Iterator[dict[str, Any]]:
    """One result per case. ratio: time of the better peer over ours, so above 1 we are faster."""
    for case in cases:
        problem = problem_of(case)
        calls, refused = contenders(problem, peers)
        verify(problem, calls)
        times = gpu_times(calls, iters=iters)
        kernel, toolchain = kernel_of(case)
        others = [t.us for name, t in times.items() if name != OURS]
        yield {"case": case.as_dict(), "kernel": kernel, "toolchain": toolchain, "refused": refused,
               "times": {name: rates(case, timing) for name, timing in times.items()},
               "ratio": min(others) / times[OURS].us if others else None}


def sweep(result: dict[str, Any], json_file: Path | None, cases: Sequence[DecodeCase] = tuple(MLA_DECODE_SWEEP),
          iters: int = 8) -> dict[str, Any]:
    """Time every variant that serves a case, and show what is picked beside the best. Those of a case take turns."""
    result |= {"op": "mla_decode sweep", "rows": []}
    for case in cases:
        problem, spec = problem_of(case), spec_of(case)
        out = torch.empty(problem.out_shape, dtype=problem.dtype, device=problem.device)
        calls = {}
        for choice in registry.choices(spec):
            tune.use_tunings(tune.naming(spec, choice.name))
            calls[choice.name] = captured(lambda p=problem, out=out: jitmla.mla_decode(*p.args, **p.kwargs, out=out))
        tune.use_tunings(None)
        us = {name: timing.us for name, timing in gpu_times(calls, iters=iters, graph=False).items()}
        mine = registry.choose(spec, "auto", sizes_of(case)).name
        loss = us[mine] / min(us.values()) - 1
        result["rows"].append({"case": case.as_dict(), "us": us, "picked": mine, "loss": loss})
    if json_file:
        write(result, json_file)
    for line in sweep_lines(result):
        print(line)
    return result


def host(peers: Sequence[Peer]) -> list[dict[str, Any]]:
    """Host time of one eager call, out given (FlashMLA's op allocates its own)."""
    found = []
    for case in HOST:
        problem = problem_of(case)
        calls, _ = contenders(problem, peers)
        with torch.inference_mode():
            found.append({"case": case.as_dict(), "us": host_us(calls)})
    return found
