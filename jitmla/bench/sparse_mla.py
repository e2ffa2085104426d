"""Sparse MLA and its peers, case by case, and the whole second op of a DSA layer against the peers' kernels chained.

Peers: FlashMLA's sparse kernels (JITMLA_PEERS has `_flashmla_C.abi3.so`; q padded to 64 heads where it has fewer). In
the second op DeepGEMM's paged logits, torch.topk and FlashMLA take the places of jitmla's; what has no peer is the
same in both.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jitmla

from .. import dispatch, dsa, env, registry
from ..ops.sparse_mla_arguments import format_of
from ..ops.sparse_reference import unpack_rows
from ..spec import sparse_mla_spec
from ..store import Store
from ..testing_dsa import dsa_batch, dsa_layer
from ..testing_sparse import SparseProblem, pack_rows, sparse_mla_oracle
from .cases import SPARSE_MLA, SparseCase
from .timing import Timing, gpu_times

OURS, FLASHMLA, CHAIN = "jitmla", "flashmla", "deepgemm + torch.topk + flashmla"
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
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        importlib.import_module("deep_gemm")
        found[CHAIN] = "in the second op, with jitmla's other steps"
    except Exception as e:  # whatever a peer raises on import is why it is not measured
        absent[CHAIN] = f"import deep_gemm: {type(e).__name__}: {e}"
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
        if case.part == "second op":
            calls = second_op(case, peers)
        else:
            problem = problem_of(case)
            calls = contenders(case, problem, peers)
            verify(problem, calls)
        times = gpu_times(calls, iters=iters if case.part != "prefill" else max(iters // 4, 3))
        device = torch.device("cuda", torch.cuda.current_device())
        spec = sparse_mla_spec(arch=dispatch.arch_of(device), kv_format=case.kv_format, kv_lora_rank=512,
                               qk_rope_head_dim=64, heads=case.heads)
        sizes = {"tokens": case.batch * case.s_q, "heads": case.heads, "whole": int(case.part == "prefill"),
                 "sms": dispatch.sm_count(device)}
        key = registry.choose(spec, sizes=sizes).key
        entry = Store().find(key)
        others = [t.us for name, t in times.items() if name != OURS]
        yield {"case": case.as_dict(), "kernel": key.name, "refused": {},
               "toolchain": dict(entry.key.toolchain or ()) if entry else {},
               "times": {name: rates(case, timing) for name, timing in times.items()},
               "ratio": min(others) / times[OURS].us if others else None}


# ---------------------------------------------------------------------------------------------- the whole second op


def second_op(case: SparseCase, peers: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """Decode of a layer of DeepSeek-V3.2's sizes. rows: the context of each request."""
    layer = dsa_layer(f"bench {case}", hidden=7168, heads=case.heads, index_topk=case.topk, device="cuda",
                      pages=case.batch * (case.rows // 64) + 1, positions=case.rows)
    batch = dsa_batch(layer, [], [case.rows] * case.batch, max_context_len=case.rows)
    batch.topk = torch.empty(case.batch, case.topk, dtype=torch.int32, device="cuda")
    hidden = torch.randn(case.batch, 7168, device="cuda").bfloat16()
    given = torch.ops.jitmla.mla_dsa_proj(hidden, batch.positions, layer.key)
    output = torch.empty(case.batch, case.heads * 128, dtype=torch.bfloat16, device="cuda")

    def op() -> Any:
        with dsa.forward(batch):
            torch.ops.jitmla.mla_dsa_attn_inplace(*given[:4], list(given[4:]), batch.positions, layer.key, output)
        return output

    op()
    calls: dict[str, Callable[[], Any]] = {OURS: op}
    if CHAIN in peers:
        swapped = peer_steps(batch, case)

        def chain() -> Any:
            with replaced(swapped):
                return op()

        ours = op().clone()
        difference = (chain().float() - ours.float()).norm() / ours.float().norm()
        if not difference < 2e-2:
            raise AssertionError(f"the peers' chain differs by {difference}")
        calls[CHAIN] = chain
    return calls


def peer_steps(batch: dsa.Batch, case: SparseCase) -> dict[str, Callable[..., Any]]:
    """jitmla's names for three steps, served by the peers. Schedules are made once, as a server would for one
    length."""
    import deep_gemm  # type: ignore[import-not-found]
    generation = batch.generation
    assert generation is not None
    lengths = generation.seq_lens[:, None].contiguous()
    plan = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, deep_gemm.get_num_sms())
    beyond = torch.arange(case.rows, device="cuda") >= generation.seq_lens[:, None]
    schedule: list[Any] = []  # FlashMLA's, from its first call

    def logits(q: Tensor, cache: Tensor, weights: Tensor, *_: Any, **__: Any) -> Tensor:
        return deep_gemm.fp8_paged_mqa_logits(q, cache, weights, lengths, generation.index_block_table, plan, case.rows,
                                              clean_logits=False)

    def topk(values: Tensor, k: int, *, out: Tensor, **_: Any) -> Tensor:
        return out.copy_(values.masked_fill(beyond, -torch.inf).topk(k, sorted=False)[1])

    def attention(q: Tensor, kv: Tensor, indices: Tensor, *, sm_scale: float, out: Tensor, **_: Any) -> Tensor:
        heads = q.shape[2]
        padded = q.new_zeros(*q.shape[:2], max(heads, 64), 576)
        padded[:, :, :heads] = q
        found, _, *made = torch.ops._flashmla_C.sparse_decode_fwd(
            padded, kv.view(torch.float8_e4m3fn), indices, None, None, *(schedule or (None, None)), None, None, None,
            512, sm_scale, None)
        schedule[:] = schedule or made
        return out.copy_(found[:, :, :heads])

    return {"fp8_paged_mqa_logits": logits, "topk_indices": topk, "sparse_mla_decode": attention}


@contextlib.contextmanager
def replaced(steps: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Within it, the second op takes these for jitmla's functions of the same names."""
    kept = {name: getattr(jitmla, name) for name in steps}
    try:
        for name, step in steps.items():
            setattr(jitmla, name, step)
        yield
    finally:
        for name, step in kept.items():
            setattr(jitmla, name, step)
