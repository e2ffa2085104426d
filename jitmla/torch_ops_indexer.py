"""`torch.ops.jitmla.*` around the indexer of DeepSeek Sparse Attention: what torch.compile and graph passes see.

    indexer_prologue, cat_quant_fp8, indexer_k_gather, fp8_mqa_logits, fp8_paged_mqa_logits, topk_indices,
    local_to_global                                        functional: allocate and return
    the last five with _out; indexer_k_scatter, kv_row_pack, dsa_append   write what their schemas declare as mutated

As in torch_ops.py: all call the front ends of eager code, which import this module; hence the late imports. `empty_*`
are the results of the functional ones, for the front ends and as fakes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import layouts

FP8 = torch.float8_e4m3fn


def empty_prologue(q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, heads, dim = q.shape
    return (q.new_empty((tokens, heads, dim), dtype=FP8), q.new_empty((tokens, dim), dtype=FP8),
            q.new_empty((tokens, 1), dtype=torch.float32), q.new_empty((tokens, heads), dtype=torch.float32))


def empty_cat_quant(pe: Tensor) -> tuple[Tensor, Tensor]:
    rows = pe.shape[0] if pe.dim() == 2 else pe.shape[0] * pe.shape[1]
    return pe.new_empty((rows, layouts.INDEX_DIM), dtype=FP8), pe.new_empty((rows, 1), dtype=torch.float32)


def empty_gather(cache: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    return (cache.new_empty((tokens, layouts.INDEX_DIM), dtype=FP8), cache.new_empty((tokens,), dtype=torch.float32))


def empty_logits(q: Tensor, rows: int, columns: int) -> Tensor:
    return q.new_empty((rows, layouts.logits_stride(columns)), dtype=torch.float32)[:, :columns]


def empty_topk(logits: Tensor, k: int) -> Tensor:
    return logits.new_empty((logits.shape[0], k), dtype=torch.int32)


def empty_global(topk: Tensor) -> Tensor:
    return topk.new_empty(topk.shape)


def front(op: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"{__package__}.ops.{op}"), op)


_MQA = "Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor ks, Tensor ke, bool clean_logits, int max_seqlen_k"
_PAGED = "Tensor q, Tensor cache, Tensor weights, Tensor context_lens, Tensor block_table, int max_context_len"
_TOPK = "Tensor logits, int k, Tensor? row_start, Tensor? row_end, Tensor? seq_lens, int next_n"
_GLOBAL = ("Tensor topk, Tensor req_id, Tensor? block_table, int page_size, int? stride_factor, int layer_offset, "
           "Tensor? workspace_start, int? num_pages")
_GATHER = "Tensor cache, Tensor block_table, Tensor cu_seq_lens, int tokens"


def _prologue(q: Tensor, k_raw: Tensor, w_raw: Tensor, ln_weight: Tensor, ln_bias: Tensor, positions: Tensor,
              cos_sin_cache: Tensor, rope_interleave: bool, scale_mode: str, hadamard: bool, eps: float, backend: str
              ) -> tuple[Tensor, ...]:
    return front("indexer_prologue")(q, k_raw, w_raw, ln_weight, ln_bias, positions, cos_sin_cache,
                                     rope_interleave=rope_interleave, scale_mode=scale_mode, hadamard=hadamard, eps=eps,
                                     backend=backend)


def _mqa(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, clean_logits: bool,
         max_seqlen_k: int, backend: str, out: Tensor | None = None) -> Tensor:
    return front("fp8_mqa_logits")(q, k, k_scale, weights, ks, ke, clean_logits=clean_logits,
                                   max_seqlen_k=max_seqlen_k, out=out, backend=backend)


def _paged(q: Tensor, cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, max_context_len: int,
           backend: str, out: Tensor | None = None) -> Tensor:
    return front("fp8_paged_mqa_logits")(q, cache, weights, context_lens, block_table, max_context_len=max_context_len,
                                         out=out, backend=backend)


def _topk(logits: Tensor, k: int, row_start: Tensor | None, row_end: Tensor | None, seq_lens: Tensor | None,
          next_n: int, backend: str, out: Tensor | None = None) -> Tensor:
    return front("topk_indices")(logits, k, row_start=row_start, row_end=row_end, seq_lens=seq_lens, next_n=next_n,
                                 out=out, backend=backend)


def _global(topk: Tensor, req_id: Tensor, block_table: Tensor | None, page_size: int, stride_factor: int | None,
            layer_offset: int, workspace_start: Tensor | None, num_pages: int | None, backend: str,
            out: Tensor | None = None, valid_count: Tensor | None = None) -> Tensor:
    return front("local_to_global")(topk, req_id, block_table, page_size=page_size, stride_factor=stride_factor,
                                    layer_offset=layer_offset, workspace_start=workspace_start, num_pages=num_pages,
                                    out=out, valid_count=valid_count, backend=backend)


def _append(q_pe: Tensor, q_out: Tensor, kv_c: Tensor, k_pe: Tensor, positions: Tensor, cos_sin_cache: Tensor,
            kv_cache: Tensor, slot_mapping: Tensor, k_fp8: Tensor | None, k_scale: Tensor | None,
            index_cache: Tensor | None, index_slot_mapping: Tensor | None, backend: str) -> None:
    front("dsa_append")(q_pe, q_out, kv_c, k_pe, positions, cos_sin_cache, kv_cache, slot_mapping, k_fp8=k_fp8,
                        k_scale=k_scale, index_cache=index_cache, index_slot_mapping=index_slot_mapping,
                        backend=backend)


def _gather(cache: Tensor, block_table: Tensor, cu_seq_lens: Tensor, tokens: int, backend: str,
            k_fp8: Tensor | None = None, k_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return front("indexer_k_gather")(cache, block_table, cu_seq_lens, tokens, k_fp8=k_fp8, k_scale=k_scale,
                                     backend=backend)


def silent(call: Callable[..., Any]) -> Callable[..., None]:
    """`call`, returning nothing."""

    def run(*args: Any) -> None:
        call(*args)

    return run


def _nothing(*_: Any) -> None:
    return None


# name: (schema, what it calls, its fake)
DEFINED: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "indexer_prologue": (
        "(Tensor q, Tensor k_raw, Tensor w_raw, Tensor ln_weight, Tensor ln_bias, Tensor positions, "
        "Tensor cos_sin_cache, bool rope_interleave, str scale_mode, bool hadamard, float eps, str backend) "
        "-> (Tensor, Tensor, Tensor, Tensor)", _prologue, lambda q, *_: empty_prologue(q)),
    "cat_quant_fp8": (
        "(Tensor pe, Tensor nope, str scale_mode, str backend) -> (Tensor, Tensor)",
        lambda pe, nope, scale_mode, backend: front("cat_quant_fp8")(pe, nope, scale_mode=scale_mode, backend=backend),
        lambda pe, *_: empty_cat_quant(pe)),
    "indexer_k_scatter": (
        "(Tensor k_fp8, Tensor k_scale, Tensor(a!) cache, Tensor slot_mapping, str backend) -> ()",
        lambda *args: front("indexer_k_scatter")(*args[:-1], backend=args[-1]), _nothing),
    "kv_row_pack": (
        "(Tensor kv_c, Tensor k_pe, Tensor(a!) cache, Tensor slot_mapping, str backend) -> ()",
        lambda *args: front("kv_row_pack")(*args[:-1], backend=args[-1]), _nothing),
    "dsa_append": (
        "(Tensor q_pe, Tensor(a!) q_out, Tensor kv_c, Tensor k_pe, Tensor positions, Tensor cos_sin_cache, "
        "Tensor(b!) kv_cache, Tensor slot_mapping, Tensor? k_fp8, Tensor? k_scale, Tensor(c!)? index_cache, "
        "Tensor? index_slot_mapping, str backend) -> ()", _append, _nothing),
    "indexer_k_gather": (f"({_GATHER}, str backend) -> (Tensor, Tensor)", _gather,
                         lambda cache, table, start, tokens, _: empty_gather(cache, tokens)),
    "indexer_k_gather_out": (f"({_GATHER}, str backend, Tensor(a!) k_fp8, Tensor(b!) k_scale) -> ()", silent(_gather),
                             _nothing),
    "fp8_mqa_logits": (f"({_MQA}, str backend) -> Tensor", _mqa,
                       lambda q, k, *rest: empty_logits(q, q.shape[0], rest[5] or k.shape[0])),
    "fp8_mqa_logits_out": (f"({_MQA}, str backend, Tensor(a!) out) -> ()", silent(_mqa), _nothing),
    "fp8_paged_mqa_logits": (f"({_PAGED}, str backend) -> Tensor", _paged,
                             lambda q, *rest: empty_logits(q, q.shape[0] * q.shape[1], rest[4])),
    "fp8_paged_mqa_logits_out": (f"({_PAGED}, str backend, Tensor(a!) out) -> ()", silent(_paged), _nothing),
    "topk_indices": (f"({_TOPK}, str backend) -> Tensor", _topk, lambda logits, k, *_: empty_topk(logits, k)),
    "topk_indices_out": (f"({_TOPK}, str backend, Tensor(a!) out) -> ()", silent(_topk), _nothing),
    "local_to_global": (f"({_GLOBAL}, str backend) -> Tensor", _global, lambda topk, *_: empty_global(topk)),
    "local_to_global_out": (f"({_GLOBAL}, str backend, Tensor(a!) out, Tensor(b!)? valid_count) -> ()", silent(_global),
                            _nothing),
}

_library = torch.library.Library("jitmla", "FRAGMENT")
for _name, (_schema, _real, _fake) in DEFINED.items():
    _library.define(_name + _schema)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _real, _key)
    torch.library.register_fake(f"jitmla::{_name}", _fake, lib=_library)

# ------------------------------------------------------------------------ what the front ends do under torch.compile


def call_gather(cache: Tensor, block_table: Tensor, cu_seq_lens: Tensor, tokens: int, k_fp8: Tensor | None,
                k_scale: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    inputs = (cache, block_table, cu_seq_lens, tokens, backend)
    if k_fp8 is None and k_scale is None:
        return torch.ops.jitmla.indexer_k_gather(*inputs)
    empty = empty_gather(cache, tokens)
    given = empty[0] if k_fp8 is None else k_fp8, empty[1] if k_scale is None else k_scale
    torch.ops.jitmla.indexer_k_gather_out(*inputs, *given)
    return given


def call_mqa_logits(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, clean_logits: bool,
                    max_seqlen_k: int, out: Tensor | None, backend: str) -> Tensor:
    inputs = (q, k, k_scale, weights, ks, ke, clean_logits, max_seqlen_k, backend)
    if out is None:
        return torch.ops.jitmla.fp8_mqa_logits(*inputs)
    torch.ops.jitmla.fp8_mqa_logits_out(*inputs, out)
    return out


def call_paged_logits(q: Tensor, cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
                      max_context_len: int, out: Tensor | None, backend: str) -> Tensor:
    inputs = (q, cache, weights, context_lens, block_table, max_context_len, backend)
    if out is None:
        return torch.ops.jitmla.fp8_paged_mqa_logits(*inputs)
    torch.ops.jitmla.fp8_paged_mqa_logits_out(*inputs, out)
    return out


def call_topk(logits: Tensor, k: int, row_start: Tensor | None, row_end: Tensor | None, seq_lens: Tensor | None,
              next_n: int, out: Tensor | None, backend: str) -> Tensor:
    inputs = (logits, k, row_start, row_end, seq_lens, next_n, backend)
    if out is None:
        return torch.ops.jitmla.topk_indices(*inputs)
    torch.ops.jitmla.topk_indices_out(*inputs, out)
    return out


def call_local_to_global(topk: Tensor, req_id: Tensor, block_table: Tensor | None, page_size: int,
                         stride_factor: int | None, layer_offset: int, workspace_start: Tensor | None,
                         num_pages: int | None, out: Tensor | None, valid_count: Tensor | None, backend: str) -> Tensor:
    inputs = (topk, req_id, block_table, page_size, stride_factor, layer_offset, workspace_start, num_pages, backend)
    if out is None and valid_count is None:
        return torch.ops.jitmla.local_to_global(*inputs)
    given = empty_global(topk) if out is None else out
    torch.ops.jitmla.local_to_global_out(*inputs, given, valid_count)
    return given
