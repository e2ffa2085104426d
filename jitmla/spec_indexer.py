"""The Specs of the ops around the indexer of DeepSeek Sparse Attention."""

from __future__ import annotations

import functools

from . import layouts
from .spec import Spec


@functools.cache
def indexer_prologue_spec(*, arch: str, heads: int, rope_interleave: bool, scale_mode: str, hadamard: bool,
                          k_dtype: str, w_dtype: str, ln_dtype: str, positions: str) -> Spec:
    """The Spec of an indexer_prologue call."""
    return Spec.of("indexer_prologue", arch=arch, heads=heads, rope_interleave=rope_interleave, scale_mode=scale_mode,
                   hadamard=hadamard, k_dtype=k_dtype, w_dtype=w_dtype, ln_dtype=ln_dtype, positions=positions)


@functools.cache
def cat_quant_fp8_spec(*, arch: str, scale_mode: str) -> Spec:
    """The Spec of a cat_quant_fp8 call."""
    return Spec.of("cat_quant_fp8", arch=arch, dtype="bf16", scale_mode=scale_mode)


@functools.cache
def indexer_k_spec(op: str, *, arch: str) -> Spec:
    """The Spec of an indexer_k_scatter or indexer_k_gather call."""
    return Spec.of(op, arch=arch, page_size=layouts.INDEX_PAGE)


@functools.cache
def kv_row_pack_spec(*, arch: str, row: str) -> Spec:
    """The Spec of a kv_row_pack call."""
    return Spec.of("kv_row_pack", arch=arch, row=row)


@functools.cache
def dsa_append_spec(*, arch: str, row: str, index_keys: bool, positions: str) -> Spec:
    """The Spec of a dsa_append call."""
    return Spec.of("dsa_append", arch=arch, row=row, index_keys=index_keys, positions=positions)


@functools.cache
def fp8_mqa_logits_spec(*, arch: str, heads: int, store: str) -> Spec:
    """The Spec of an fp8_mqa_logits call."""
    return Spec.of("fp8_mqa_logits", arch=arch, heads=heads, head_dim=layouts.INDEX_DIM, out_dtype="fp32", store=store)


@functools.cache
def fp8_paged_mqa_logits_spec(*, arch: str, heads: int, next_n: int) -> Spec:
    """The Spec of an fp8_paged_mqa_logits call."""
    return Spec.of("fp8_paged_mqa_logits", arch=arch, heads=heads, head_dim=layouts.INDEX_DIM, out_dtype="fp32",
                   page_size=layouts.INDEX_PAGE, next_n=next_n)


@functools.cache
def topk_indices_spec(*, arch: str, rows: str) -> Spec:
    """The Spec of a topk_indices call."""
    return Spec.of("topk_indices", arch=arch, dtype="fp32", rows=rows)


@functools.cache
def local_to_global_spec(*, arch: str, workspace: bool, count: bool) -> Spec:
    """The Spec of a local_to_global call."""
    return Spec.of("local_to_global", arch=arch, workspace=workspace, count=count)
