"""The second op of a DSA layer in decode, against the peers' kernels chained.

DeepGEMM's paged logits, torch's or FlashInfer's top-k, and FlashMLA take the places of jitmla's kernels; what has no
peer is the same in all.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import jitmla

from .. import dsa, env
from ..testing_dsa import dsa_batch, dsa_layer
from . import sparse_mla
from .cases import DSA_LAYER, SparseCase
from .sparse_mla import FLASHMLA, OURS, result_of
from .timing import gpu_times

CHAINS = {f"deepgemm + {topk} + flashmla": needed for topk, needed in (
    ("torch.topk", ("deep_gemm",)), ("flashinfer top-k", ("deep_gemm", "flashinfer")))}


def available() -> tuple[dict[str, str], dict[str, str]]:
    """(chains of peers that are here, with a note; the others, with the reason why not)"""
    found, absent = sparse_mla.available()
    if FLASHMLA not in found:
        return {}, dict.fromkeys(CHAINS, absent[FLASHMLA])
    if env.PEERS.get() not in sys.path:
        sys.path.insert(0, env.PEERS.get())
    found, absent = {}, {}
    for chain, needed in CHAINS.items():
        try:
            for module in needed:
                importlib.import_module(module)
            found[chain] = "with jitmla's other steps; schedules are made before"
        except Exception as e:  # whatever a peer raises on import is why it is not measured
            absent[chain] = f"import: {type(e).__name__}: {e}"
    return found, absent


def rows(peers: dict[str, str], cases: tuple[SparseCase, ...] = DSA_LAYER, iters: int = 20) -> Iterator[dict[str, Any]]:
    """One result per case. ratio: time of the best chain over ours, so above 1 we are faster."""
    for case in cases:
        yield result_of(case, gpu_times(contenders(case, peers), iters=iters))


def contenders(case: SparseCase, peers: dict[str, str]) -> dict[str, Callable[[], Any]]:
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

    ours = op().clone()
    calls: dict[str, Callable[[], Any]] = {OURS: op}
    for name in [chain for chain in CHAINS if chain in peers]:
        swapped = peer_steps(batch, case, "flashinfer" in CHAINS[name])

        def chain(swapped: dict[str, Callable[..., Any]] = swapped) -> Any:
            kept = batch.topk
            try:
                with replaced(swapped):
                    return op()
            finally:
                batch.topk = kept

        difference = (chain().float() - ours.float()).norm() / ours.float().norm()
        if not difference < 2e-2:
            raise AssertionError(f"{name} differs by {difference}")
        calls[name] = chain
    return calls


def peer_steps(batch: dsa.Batch, case: SparseCase, flashinfer: bool) -> dict[str, Callable[..., Any]]:
    """jitmla's names for three steps, served by the peers. Schedules are made once, as a server would for one
    length."""
    import deep_gemm  # type: ignore[import-not-found]
    generation = batch.generation
    assert generation is not None
    lengths = generation.seq_lens[:, None].contiguous()
    plan = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, deep_gemm.get_num_sms())
    beyond = torch.arange(case.rows, device="cuda") >= generation.seq_lens[:, None]
    zero = torch.zeros_like(generation.seq_lens)
    schedule: list[Any] = []  # FlashMLA's, from its first call

    def logits(q: Tensor, cache: Tensor, weights: Tensor, *_: Any, **__: Any) -> Tensor:
        return deep_gemm.fp8_paged_mqa_logits(q, cache, weights, lengths, generation.index_block_table, plan, case.rows,
                                              clean_logits=False)

    def torch_topk(values: Tensor, k: int, *, out: Tensor, **_: Any) -> Tensor:
        return out.copy_(values.masked_fill(beyond, -torch.inf).topk(k, sorted=False)[1])

    def flashinfer_topk(values: Tensor, k: int, **_: Any) -> Tensor:
        batch.topk = importlib.import_module("flashinfer").top_k_ragged_transform(values, zero, generation.seq_lens, k)
        return batch.topk

    def attention(q: Tensor, kv: Tensor, indices: Tensor, *, sm_scale: float, out: Tensor, **_: Any) -> Tensor:
        heads = q.shape[2]
        padded = q.new_zeros(*q.shape[:2], max(heads, 64), 576)
        padded[:, :, :heads] = q
        found, _, *made = torch.ops._flashmla_C.sparse_decode_fwd(
            padded, kv.view(torch.float8_e4m3fn), indices, None, None, *(schedule or (None, None)), None, None, None,
            512, sm_scale, None)
        schedule[:] = schedule or made
        return out.copy_(found[:, :, :heads])

    return {"fp8_paged_mqa_logits": logits, "topk_indices": flashinfer_topk if flashinfer else torch_topk,
            "sparse_mla_decode": attention}


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
