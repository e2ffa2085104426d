"""The ops around DSA's indexer and their peers, case by case.

Peers: DeepGEMM (a folder with `deep_gemm` in JITMLA_PEERS, or installed), torch.topk, and FlashInfer's top-k.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import jitmla

from .. import dispatch, env, layouts, registry
from ..spec import Spec
from ..spec_indexer import (
    dsa_append_spec,
    fp8_mqa_logits_spec,
    fp8_paged_mqa_logits_spec,
    indexer_k_spec,
    indexer_prologue_spec,
    kv_row_pack_spec,
    local_to_global_spec,
    topk_indices_spec,
)
from ..store import Store
from ..testing_indexer import append_problem, prologue_problem
from ..testing_logits import LOGITS_DIFF, exact_logits, logits_problem
from ..testing_o_proj import calc_diff
from .cases import INDEXER, INDEXER_HOST, IndexerCase
from .report import case_name
from .timing import Timing, gpu_times, host_us

OURS, DEEPGEMM, TORCH, FLASHINFER, ORDERED = "jitmla", "deepgemm", "torch", "flashinfer", "flashinfer deterministic"
COPY = "copy"
K = 2048
I32 = torch.int32


@functools.cache
def _module(name: str) -> Any:
    folder = env.PEERS.get()
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def available() -> tuple[dict[str, str], dict[str, str]]:
    """(peers that are here, with a note; the others, with the reason why not)"""
    found = {TORCH: "torch.topk, unsorted", COPY: "torch's copy that moves as many bytes, beside what only moves them"}
    absent = {}
    for module, names in (("deep_gemm", {DEEPGEMM: "clean_logits as ours"}),
                          ("flashinfer", {FLASHINFER: "top_k_ragged_transform", ORDERED: "the same, deterministic"})):
        try:
            _module(module)
            found |= names
        except Exception as e:  # whatever a peer raises on import is why it is not measured
            absent |= dict.fromkeys(names, f"import: {type(e).__name__}: {e}")
    return found, absent


Calls = dict[str, Callable[[], Any]]


def _logits(case: IndexerCase, peers: Sequence[str]) -> Calls:
    p = logits_problem(case.rows, case.columns, integer=False, device="cuda")
    ks = torch.zeros(case.rows, dtype=I32, device="cuda")
    ke = torch.arange(case.columns - case.rows + 1, case.columns + 1, dtype=I32, device="cuda")
    out = torch.empty(case.rows, layouts.logits_stride(case.columns), device="cuda")[:, :case.columns]
    args = (p.weights, ks, ke)
    calls: Calls = {OURS: lambda: jitmla.fp8_mqa_logits(p.q, p.k, p.k_scale, *args, clean_logits=False, out=out)}
    if DEEPGEMM in peers:
        calls[DEEPGEMM] = lambda: _module("deep_gemm").fp8_mqa_logits(p.q, (p.k, p.k_scale), *args, clean_logits=False)
    some = slice(case.rows - 4, case.rows)  # whose windows are nearly everything
    exact = exact_logits(p.q[some], p.k, p.k_scale, p.weights[some])
    inside = torch.arange(case.columns, device="cuda") < ke[some, None]
    for name, call in calls.items():
        diff = calc_diff(call()[some][inside], exact[inside])
        assert diff < LOGITS_DIFF, f"{name}, {case_name(case.as_dict())}: calc_diff {diff:.1e}"
    return calls


def _paged(case: IndexerCase, peers: Sequence[str]) -> Calls:
    pages = case.rows * case.columns // layouts.INDEX_PAGE
    pool = torch.empty(pages, layouts.INDEX_PAGE, 1, layouts.INDEX_TOKEN_BYTES, dtype=torch.uint8, device="cuda")
    p = logits_problem(case.rows * case.next_n, 4096, integer=False, device="cuda")
    for first in range(0, pages * layouts.INDEX_PAGE, 4096):
        slots = torch.arange(first, min(first + 4096, pages * layouts.INDEX_PAGE), device="cuda")
        jitmla.indexer_k_scatter(p.k, p.k_scale, pool, slots, backend="reference")
    table = torch.randperm(pages, device="cuda").int().view(case.rows, -1)
    lens = torch.full((case.rows, case.next_n), case.columns, dtype=I32, device="cuda")
    q = p.q.view(case.rows, case.next_n, 64, 128)
    out = torch.empty(case.rows * case.next_n, layouts.logits_stride(case.columns), device="cuda")[:, :case.columns]
    calls: Calls = {OURS: lambda: jitmla.fp8_paged_mqa_logits(q, pool, p.weights, lens, table,
                                                              max_context_len=case.columns, out=out)}
    if DEEPGEMM in peers:
        peer = _module("deep_gemm")
        meta = peer.get_paged_mqa_logits_metadata(lens, layouts.INDEX_PAGE, peer.get_num_sms())
        calls[DEEPGEMM] = lambda: peer.fp8_paged_mqa_logits(q, pool, p.weights, lens, table, meta, case.columns,
                                                            clean_logits=False)
        diff = calc_diff(calls[DEEPGEMM](), calls[OURS]())
        assert diff < LOGITS_DIFF, f"{case_name(case.as_dict())}: calc_diff {diff:.1e}"
    return calls


def _topk(case: IndexerCase, peers: Sequence[str]) -> Calls:
    values = torch.randn(case.rows, case.columns, device="cuda")
    lens = torch.full((case.rows,), case.columns, dtype=I32, device="cuda")
    zero, out = torch.zeros_like(lens), torch.empty(case.rows, K, dtype=I32, device="cuda")
    calls: Calls = {OURS: lambda: jitmla.topk_indices(values, K, seq_lens=lens, out=out)}
    if TORCH in peers:
        calls[TORCH] = lambda: torch.topk(values, K, dim=1, sorted=False).indices
    for name in (FLASHINFER, ORDERED):
        if name in peers:
            calls[name] = functools.partial(_module("flashinfer").top_k_ragged_transform, values, zero, lens, K,
                                            deterministic=name == ORDERED)
    expected = torch.topk(values, K, dim=1).values.sort(1).values
    for name, call in calls.items():
        got = values.gather(1, call().long()).sort(1).values
        assert torch.equal(got, expected), f"{name}, {case_name(case.as_dict())}: other values than torch.topk"
    return calls


def _prologue(case: IndexerCase, peers: Sequence[str]) -> Calls:
    p = prologue_problem(case.rows, device="cuda")
    return {OURS: lambda: jitmla.indexer_prologue(*p.args)}


def _cache(case: IndexerCase, peers: Sequence[str]) -> Calls:
    tokens = case.rows
    slots = torch.randperm(2 * tokens, device="cuda")[:tokens]
    codes = torch.zeros(tokens, 128, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    scales = torch.ones(tokens, 1, device="cuda")
    pool = torch.zeros(2 * tokens // 64, 64, 1, 132, dtype=torch.uint8, device="cuda")
    if case.op == "indexer_k_scatter":
        return {OURS: lambda: jitmla.indexer_k_scatter(codes, scales, pool, slots)}
    if case.op == "kv_row_pack":
        latent = torch.randn(tokens, 576, device="cuda").bfloat16()
        rows = torch.zeros(2 * tokens // 64, 64, 1, layouts.ROW_BYTES["fp8"], dtype=torch.uint8, device="cuda")
        return {OURS: lambda: jitmla.kv_row_pack(latent[:, :512], latent[:, 512:], rows, slots)}
    table = torch.randperm(tokens // 64, device="cuda").int().view(8, -1)
    start = torch.arange(9, device="cuda", dtype=I32) * (tokens // 8)
    flat = scales.flatten()
    return {OURS: lambda: jitmla.indexer_k_gather(pool, table, start, tokens, k_fp8=codes, k_scale=flat)}


def _to_global(case: IndexerCase, peers: Sequence[str]) -> Calls:
    chosen = torch.randint(0, 32768, (case.rows, K), dtype=I32, device="cuda")
    table = torch.randint(0, 32768, (64, 512), dtype=I32, device="cuda")
    request = torch.arange(case.rows, dtype=I32, device="cuda") % 64
    out = torch.empty_like(chosen)
    return {OURS: lambda: jitmla.local_to_global(chosen, request, table, out=out)}


def _append(case: IndexerCase, peers: Sequence[str]) -> Calls:
    p = append_problem(case.rows, case.columns, "fp8", device="cuda")
    return {OURS: lambda: jitmla.dsa_append(*p.args, **p.index)}


def _copied(case: IndexerCase) -> Callable[[], Any]:
    source, target = torch.zeros(2, case.bytes() // 2, dtype=torch.uint8, device="cuda")
    return lambda: target.copy_(source)


MADE: dict[str, Callable[[IndexerCase, Sequence[str]], Calls]] = {
    "fp8_mqa_logits": _logits, "fp8_paged_mqa_logits": _paged, "topk_indices": _topk, "indexer_prologue": _prologue,
    "indexer_k_scatter": _cache, "indexer_k_gather": _cache, "kv_row_pack": _cache, "dsa_append": _append,
    "local_to_global": _to_global}


MOVERS = ("indexer_prologue", "indexer_k_scatter", "indexer_k_gather", "kv_row_pack", "dsa_append", "local_to_global")


def spec_of(case: IndexerCase) -> Spec:
    arch = dispatch.arch_of(torch.device("cuda", torch.cuda.current_device()))
    made: dict[str, Callable[[], Spec]] = {
        "fp8_mqa_logits": lambda: fp8_mqa_logits_spec(arch=arch, heads=64, store="tiles"),
        "fp8_paged_mqa_logits": lambda: fp8_paged_mqa_logits_spec(arch=arch, heads=64, next_n=case.next_n),
        "topk_indices": lambda: topk_indices_spec(arch=arch, rows="lengths"),
        "indexer_prologue": lambda: indexer_prologue_spec(
            arch=arch, heads=64, rope_interleave=False, scale_mode="pow2_f32", hadamard=False, k_dtype="bf16",
            w_dtype="fp32", ln_dtype="fp32", positions="i64"),
        "dsa_append": lambda: dsa_append_spec(arch=arch, row="fp8", index_keys=True, positions="i64"),
        "kv_row_pack": lambda: kv_row_pack_spec(arch=arch, row="fp8"),
        "local_to_global": lambda: local_to_global_spec(arch=arch, workspace=False, count=False)}
    return made[case.op]() if case.op in made else indexer_k_spec(case.op, arch=arch)


def rates(case: IndexerCase, timing: Timing) -> dict[str, Any]:
    return {"us": timing.us, "tflops": case.flops() / timing.us / 1e6, "gbps": case.bytes() / timing.us / 1e3,
            "kernels": timing.kernels, "samples": timing.samples}


def rows(peers: Sequence[str], cases: Sequence[IndexerCase] = tuple(INDEXER), iters: int = 20
         ) -> Iterator[dict[str, Any]]:
    """One result per case. ratio: time of the best peer over ours, so above 1 we are faster."""
    for case in cases:
        calls = MADE[case.op](case, peers)
        if COPY in peers and case.op in MOVERS:
            calls[COPY] = _copied(case)
        times = gpu_times(calls, iters=iters if case.rows < 4096 else max(6, iters // 2))
        sizes = {"rows": case.rows, "columns": case.columns,
                 "sms": dispatch.sm_count(torch.device("cuda", torch.cuda.current_device()))}
        choice = registry.choose(spec_of(case), "auto", sizes if case.op == "topk_indices" else None)
        entry = Store().find(choice.key)
        others = [t.us for name, t in times.items() if name != OURS]
        yield {"case": case.as_dict(), "kernel": choice.key.name,
               "toolchain": dict(entry.key.toolchain or ()) if entry else {}, "refused": {},
               "times": {name: rates(case, timing) for name, timing in times.items()},
               "ratio": min(others) / times[OURS].us if others else None}


def host() -> list[dict[str, Any]]:
    """Host time of one eager call, outputs given where the op takes them."""
    found = []
    for case in INDEXER_HOST:
        with torch.inference_mode():
            found.append({"case": case.as_dict(), "us": host_us({OURS: MADE[case.op](case, [])[OURS]})})
    return found
