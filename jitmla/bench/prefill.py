"""jitmla.mla_prefill and its peers, case by case: FlashAttention-3 as built in vLLM, and FlashInfer's fa3 backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jitmla

from .. import dispatch, env, registry
from ..spec import mla_prefill_spec
from ..store import Store
from ..testing import UNIT_ROUNDOFF
from ..testing_prefill import PrefillProblem, exact_attention, prefill_problem
from .cases import PREFILL, PREFILL_HOST, PrefillCase
from .report import case_name
from .timing import gpu_times, host_us

OURS, FA3, FLASHINFER = "jitmla", "flash-attn 3", "flashinfer"
NOTES = {FA3: "as built in vLLM; allocates its outputs", FLASHINFER: "fa3 backend, out given; its plan() is not timed"}
WORKSPACE = 512 * 2**20
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CHECKED_ROWS, CHECKED_HEADS = 64, 3  # of the first and of the last request that are compared with float64
BUSY = 5e13  # products of all contenders of a case, about: what the samples of a case may take


def available() -> tuple[dict[str, str], dict[str, str]]:
    """(peers that are here, with a note; the others, with the reason why not)"""
    found, absent = {}, {}
    for name, find in ((FA3, _load_fa3), (FLASHINFER, lambda: importlib.import_module("flashinfer"))):
        try:
            find()
            found[name] = NOTES[name]
        except (ImportError, OSError) as e:
            absent[name] = f"{type(e).__name__}: {e}"
    return found, absent


def _load_fa3() -> None:
    folder = env.PEERS.get()
    if not folder:
        raise ImportError(f"{env.PEERS.name} is not set")
    torch.ops.load_library(str(Path(folder) / "_vllm_fa3_C.abi3.so"))


def problem_of(case: PrefillCase) -> PrefillProblem:
    return prefill_problem(case.lengths(), heads=case.heads, qk_head_dim=case.qk_head_dim, v_head_dim=case.v_head_dim,
                           causal=case.causal, keys="joined", pad=0, dtype=DTYPES[case.dtype],
                           device="cuda")


def contenders(problem: PrefillProblem, peers: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
    out = torch.empty(problem.out_shape, dtype=problem.q.dtype, device="cuda")
    calls: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: jitmla.mla_prefill(*problem.args, **problem.kwargs, out=out, return_lse=True)[0]}
    if FA3 in peers:
        calls[FA3] = lambda: _fa3(problem)
    if FLASHINFER in peers and problem.q.shape[2] == 192:
        calls[FLASHINFER] = _flashinfer(problem)
    return calls


def _fa3(p: PrefillProblem) -> Tensor:
    longest = [p.kwargs["max_seqlen_q"], p.kwargs["max_seqlen_k"]]
    return torch.ops._vllm_fa3_C.fwd(p.q, p.k, p.v, None, None, None, None, p.cu_seqlens_q, p.cu_seqlens_k, None, None,
                                     None, *longest, *[None] * 9, p.sm_scale, p.causal, -1, -1, 0.0, True, None, 0,
                                     None, 0, None, 1, 0, None)[0]


def _flashinfer(p: PrefillProblem) -> Callable[[], Tensor]:
    flashinfer = importlib.import_module("flashinfer")
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda"),
                                                              "NHD", backend="fa3")
    heads = p.q.shape[1]
    wrapper.plan(p.cu_seqlens_q, p.cu_seqlens_k, heads, heads, p.q.shape[2], head_dim_vo=p.v.shape[2], causal=p.causal,
                 sm_scale=p.sm_scale, q_data_type=p.q.dtype)
    out = torch.empty(p.out_shape, dtype=p.q.dtype, device="cuda")
    return lambda: wrapper.run(p.q, p.k, p.v, out=out)


def verify(problem: PrefillProblem, calls: dict[str, Callable[[], Tensor]]) -> None:
    """Raise AssertionError unless all of them are right in the last rows of the first and of the last request."""
    assert isinstance(problem.k, Tensor)
    starts = problem.cu_seqlens_q.tolist()
    for b in {0, len(starts) - 2}:
        rows, heads = slice(starts[b], starts[b + 1]), slice(CHECKED_HEADS)
        last = slice(max(starts[b], starts[b + 1] - CHECKED_ROWS), starts[b + 1])
        exact, _, spread, _ = exact_attention(problem.q[last, heads], problem.k[rows, heads], problem.v[rows, heads],
                                              problem.sm_scale, problem.causal)
        for name, call in calls.items():
            error = (call()[last, heads].double() - exact).abs()
            if not bool((error <= 3 * UNIT_ROUNDOFF[problem.q.dtype] * spread + 1e-4).all()):
                raise AssertionError(f"{name}: off by {float(error.max()):.1e} in request {b}")


def kernel_of(case: PrefillCase) -> tuple[str, dict[str, Any]]:
    """Name of the Key that serves the case, and the toolchain that built what is in the cache."""
    spec = mla_prefill_spec(arch=dispatch.arch_of(torch.device("cuda", torch.cuda.current_device())), dtype=case.dtype,
                            qk_head_dim=case.qk_head_dim, v_head_dim=case.v_head_dim, qk_rope_head_dim=64,
                            causal=case.causal)
    choice = registry.choose(spec)
    entry = Store().find(choice.key)
    return choice.key.name, dict(entry.key.toolchain or ()) if entry else {}


def rows(peers: Sequence[str], cases: Sequence[PrefillCase] = tuple(PREFILL)) -> Iterator[dict[str, Any]]:
    """One result per case. ratio: time of the better peer over ours, so above 1 we are faster."""
    for case in cases:
        problem = problem_of(case)
        calls = contenders(problem, peers)
        try:
            verify(problem, calls)
        except AssertionError as e:
            raise AssertionError(f"{case_name(case.as_dict())}: {e}") from e
        times = gpu_times(calls, iters=max(5, min(20, int(BUSY / case.flops() / len(calls)))))
        kernel, toolchain = kernel_of(case)
        others = [t.us for name, t in times.items() if name != OURS]
        yield {"case": case.as_dict(), "kernel": kernel, "toolchain": toolchain,
               "times": {name: {"us": t.us, "tflops": case.flops() / t.us / 1e6, "gbps": case.bytes() / t.us / 1e3,
                                "kernels": t.kernels, "samples": t.samples} for name, t in times.items()},
               "ratio": min(others) / times[OURS].us if others else None}


def host(peers: Sequence[str]) -> list[dict[str, Any]]:
    """Host time of one eager call."""
    found = []
    for case in PREFILL_HOST:
        calls = contenders(problem_of(case), peers)
        with torch.inference_mode():
            found.append({"case": case.as_dict(), "us": host_us(calls, rounds=10)})
    return found
