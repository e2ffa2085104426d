"""Sparse MLA and its peer, case by case: FlashMLA's sparse kernels (JITMLA_PEERS has `_flashmla_C.abi3.so`; q padded to
64 heads where it has fewer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jitmla

from .. import dispatch, env, registry
from ..ops.sparse_mla_arguments import format_of
from ..ops.sparse_reference import unpack_rows
from ..spec import sparse_mla_spec
from ..store import Store
from ..testing_sparse import SparseProblem, pack_rows, sparse_mla_oracle
from .cases import SPARSE_MLA, SparseCase
from .timing import Timing, gpu_times

OURS, FLASHMLA = "jitmla", "flashmla"
CHECKED = 3  # query tokens of each case that are compared with float64


def available() -> tuple[dict[str, str], dict[str, str]]:
    """(peers that are here, with a note; the others, with the reason why not)"""
    folder = env.PEERS.get()
    found, absent = {}, {}
    if not folder or not (Path(folder) / "_flashmla_C.abi3.so").is_file():
        absent[FLASHMLA] = f"{env.PEERS.name} names no folder with _flashmla_C.abi3.so"
        return found, absent
    torch.ops.load_library(str(Path(folder) / "_flashmla_C.abi3.so"))
    found[FLASHMLA] = "sparse kernels; q is padded and its metadata kernel run before, neither is timed"
    return found, absent


def problem_of(case: SparseCase) -> SparseProblem:
    """Random lists over the whole pool."""
    rng = torch.Generator(device="cuda").manual_seed(0)
    values = torch.randn(case.rows, 576, generator=rng, device="cuda")
    if case.kv_format == "fp8":
        kv = pack_rows(values[:, :512], values[:, 512:])[0]
    else:
        kv = values.bfloat16()
    shape = (case.batch, case.s_q, case.topk)
    indices = torch.randint(case.rows, shape, generator=rng, device="cuda", dtype=torch.int32)
    q = torch.randn(case.batch, case.s_q, case.heads, 576, generator=rng, device="cuda").bfloat16()
    return SparseProblem(q, kv.view(-1, 64, 1, kv.shape[1]), indices, 0.1352, None, None, torch.empty(0), True)


def verify(problem: SparseProblem, calls: dict[str, Callable[[], Tensor]]) -> None:
    """Raise AssertionError unless all compute the same thing, and the right one, for some tokens."""
    p = problem
    chosen = torch.linspace(0, p.q.shape[0] - 1, CHECKED).long().unique().tolist()
    used = p.indices[chosen].flatten().long()
    rows = p.kv.flatten(0, 2)
    exact = torch.full((len(rows), 576), torch.nan, dtype=torch.float64, device="cuda")
    exact[used] = (rows[used] if format_of(p.kv) == "bf16" else unpack_rows(rows[used])).double()
    oracle = sparse_mla_oracle(SparseProblem(p.q, p.kv, p.indices, p.sm_scale, None, None, exact, True), chosen)
    for name, call in calls.items():
        try:
            oracle.check(call())
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from e


def contenders(case: SparseCase, problem: SparseProblem, peers: dict[str, str]) -> dict[str, Callable[[], Tensor]]:
    p = problem
    out = torch.empty(*p.q.shape[:3], 512, dtype=torch.bfloat16, device="cuda")
    if case.part == "prefill":
        q, kv, rows = p.q[:, 0], p.kv.flatten(0, 1), out[:, 0]

        def prefill() -> Tensor:
            jitmla.sparse_mla_prefill(q, kv, p.indices, sm_scale=p.sm_scale, out=rows)
            return out

        calls: dict[str, Callable[[], Tensor]] = {OURS: prefill}
        if FLASHMLA in peers:
            theirs = torch.ops._flashmla_C.sparse_prefill_fwd
            calls[FLASHMLA] = lambda: theirs(q, kv, p.indices, p.sm_scale, 512, None, None, None)[0].unsqueeze(1)
        return calls
    calls = {OURS: lambda: jitmla.sparse_mla_decode(*p.args, sm_scale=p.sm_scale, out=out)}
    if FLASHMLA in peers and case.kv_format == "fp8":
        calls[FLASHMLA] = flashmla_decode(p.q, p.kv, p.indices, p.sm_scale)
    return calls


def flashmla_decode(q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float) -> Callable[[], Tensor]:
    heads = q.shape[2]
    padded = torch.zeros(*q.shape[:2], max(heads, 64), 576, dtype=q.dtype, device=q.device)
    padded[:, :, :heads] = q
    cache = kv.view(torch.float8_e4m3fn)

    def call(metadata: Any, splits: Any) -> Any:
        return torch.ops._flashmla_C.sparse_decode_fwd(padded, cache, indices, None, None, metadata, splits, None, None,
                                                       None, 512, sm_scale, None)

    _, _, metadata, splits = call(None, None)
    return lambda: call(metadata, splits)[0][:, :, :heads]


def rates(case: SparseCase, timing: Timing) -> dict[str, Any]:
    return {"us": timing.us, "tflops": case.flops() / timing.us / 1e6, "gbps": case.bytes() / timing.us / 1e3,
            "kernels": timing.kernels, "samples": timing.samples}


def rows(peers: dict[str, str], cases: tuple[SparseCase, ...] = SPARSE_MLA, iters: int = 20
         ) -> Iterator[dict[str, Any]]:
    """One result per case. ratio: time of the peer over ours, so above 1 we are faster."""
    for case in cases:
        problem = problem_of(case)
        calls = contenders(case, problem, peers)
        verify(problem, calls)
        times = gpu_times(calls, iters=iters if case.part != "prefill" else max(iters // 4, 3))
        yield result_of(case, times)


def result_of(case: SparseCase, times: dict[str, Timing]) -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    spec = sparse_mla_spec(arch=dispatch.arch_of(device), kv_format=case.kv_format, kv_lora_rank=512,
                           qk_rope_head_dim=64, heads=case.heads)
    sizes = {"tokens": case.batch * case.s_q, "heads": case.heads, "whole": int(case.part == "prefill"),
             "sms": dispatch.sm_count(device)}
    key = registry.choose(spec, sizes=sizes).key
    entry = Store().find(key)
    others = [t.us for name, t in times.items() if name != OURS]
    return {"case": case.as_dict(), "kernel": key.name, "refused": {},
            "toolchain": dict(entry.key.toolchain or ()) if entry else {},
            "times": {name: rates(case, timing) for name, timing in times.items()},
            "ratio": min(others) / times[OURS].us if others else None}
