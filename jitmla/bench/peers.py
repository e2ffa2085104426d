"""Kernels of others, on the same problems. All are optional; what is not there is named, never passed over in silence.

JITMLA_PEERS names a folder with `_flashmla_C.abi3.so` (FlashMLA as built in vLLM). FlashInfer is imported as usual.
Their planning, which a server repeats every step, is done once and not timed: FlashMLA's metadata kernel, FlashInfer's
plan() on the host.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import env
from ..testing import Problem

FLASHINFER_WORKSPACE = 128 * 2**20


@dataclass(frozen=True)
class Peer:
    """`prepare(problem)` gives a function that launches and returns out; or a reason (str) why it cannot serve it."""

    name: str
    note: str
    prepare: Callable[[Problem], Callable[[], Tensor] | str]


def available() -> tuple[list[Peer], dict[str, str]]:
    """The peers that are here, and for the others the reason why not."""
    peers: list[Peer] = []
    absent: dict[str, str] = {}
    for name, find in (("flashmla", _flashmla), ("flashinfer", _flashinfer)):
        found = find()
        if isinstance(found, Peer):
            peers.append(found)
        else:
            absent[name] = found
    return peers, absent


def _flashmla() -> Peer | str:
    folder = env.PEERS.get()
    if not folder:
        return f"{env.PEERS.name} is not set"
    library = Path(folder) / "_flashmla_C.abi3.so"
    if not library.is_file():
        return f"there is no {library}"
    torch.ops.load_library(str(library))
    return Peer("flashmla", "dense decode; its metadata kernel runs once and is not timed", _prepare_flashmla)


def _prepare_flashmla(problem: Problem) -> Callable[[], Tensor] | str:
    _, page_size, width = problem.kv_cache.shape
    if page_size != 64 or width != 576 or not isinstance(problem.q, Tensor):
        return "pages of 64 tokens of width 576 only"
    decode = torch.ops._flashmla_C.dense_decode_fwd
    cache = problem.kv_cache.unsqueeze(2)

    def call(metadata: Any, splits: Any) -> Any:
        return decode(problem.q, cache, problem.kv_lora_rank, problem.seq_lens, problem.block_table, problem.sm_scale,
                      True, metadata, splits, None)

    _, _, metadata, splits = call(None, None)
    return lambda: call(metadata, splits)[0]


def _flashinfer() -> Peer | str:
    try:
        importlib.import_module("flashinfer")
    except ImportError as e:
        return f"import flashinfer: {e}"
    return Peer("flashinfer", "fa3 backend, out given; its plan() runs once and is not timed", _prepare_flashinfer)


def _prepare_flashinfer(problem: Problem) -> Callable[[], Tensor] | str:
    rank, device = problem.kv_lora_rank, problem.device
    _, page_size, width = problem.kv_cache.shape
    if (rank, width - rank) != (512, 64):
        return "kv_lora_rank 512 and qk_rope_head_dim 64 only"
    batch, s_q, heads, _ = problem.out_shape
    mla = importlib.import_module("flashinfer").mla
    wrapper = mla.BatchMLAPagedAttentionWrapper(torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device),
                                                backend="fa3")
    pages = [-(-n // page_size) for n in problem.lengths]
    first = torch.tensor([0, *pages], dtype=torch.int32).cumsum(0).int().to(device)
    used = torch.arange(problem.block_table.shape[1], device=device) < torch.tensor(pages, device=device)[:, None]
    wrapper.plan(torch.arange(batch + 1, dtype=torch.int32, device=device) * s_q, first,
                 problem.block_table[used].contiguous(), problem.seq_lens, heads, rank, width - rank, page_size, True,
                 problem.sm_scale, problem.dtype, problem.dtype)
    q_nope, q_pe = (part.flatten(0, 1).contiguous() for part in problem.q_parts)
    latent, rope = problem.kv_cache[..., :rank].contiguous(), problem.kv_cache[..., rank:].contiguous()
    out = torch.empty_like(q_nope)
    shape = problem.out_shape
    return lambda: wrapper.run(q_nope, q_pe, latent, rope, out=out).view(shape)
