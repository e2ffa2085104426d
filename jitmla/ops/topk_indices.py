"""topk_indices: positions of the largest values of every row, exact, with ties broken by position."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_indexer as torch_ops
from ..spec_indexer import topk_indices_spec
from . import indexer_arguments as arguments
from . import indexer_reference, launch

OP = "topk_indices"
_calls = dispatch.Remembered()


def topk_indices(logits: Tensor, k: int, *, row_start: Tensor | None = None, row_end: Tensor | None = None,
                 seq_lens: Tensor | None = None, next_n: int = 1, out: Tensor | None = None, backend: str = "auto"
                 ) -> Tensor:
    """The k positions of each row's range with the largest values, relative to the range's start; of equal values those
    in front. +0 equals -0, NaN counts as -inf, and -inf is a value like others.

    A range of n <= k cells gives 0, 1, .., n - 1 and then -1. Otherwise there are exactly k positions, none twice, in
    an order that depends on the row alone: the same cells give the same bits. What is outside of the ranges does
    not matter.

    logits: [rows, columns] float32, any row stride.
    row_start, row_end: [rows] int32, contiguous: the range is [row_start, row_end), cut to the columns.
    seq_lens: or [rows / next_n] int32, contiguous: lengths L of requests with next_n rows each; row d of a request
        has the range [0, max(0, L - next_n + d + 1)). For flattened rows: their own lengths, and next_n = 1.
    out: [rows, k] int32, any row stride; allocated otherwise.
    backend: "auto", a backend of `jitmla kernels` ("simt"), or "reference".

    Returns out. On a GPU no host synchronisation, and no workspace; the rule by which it picks a kernel is in
    jitmla.pick.

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_topk(logits, k, row_start, row_end, seq_lens, next_n, out, backend)

    def check() -> None:
        arguments.topk(logits, k, row_start, row_end, seq_lens, next_n, out)

    def plan() -> dispatch.Plan:
        kind = "windows" if seq_lens is None else "lengths"
        spec = topk_indices_spec(arch=dispatch.arch_of(logits.device), rows=kind)
        return dispatch.plan_for(spec, backend, logits.device, rows=logits.shape[0], columns=logits.shape[1],
                                 sms=dispatch.sm_count(logits.device))

    def reference() -> None:
        if seq_lens is None:
            indexer_reference.topk_indices(logits, row_start, row_end, out=given)
        else:
            end = indexer_reference.row_ends(seq_lens, next_n)
            indexer_reference.topk_indices(logits, torch.zeros_like(end), end, out=given)

    if not isinstance(logits, Tensor) or not logits.dim() or not logits.shape[0] or not isinstance(k, int) or k < 1:
        check()
    given = torch_ops.empty_topk(logits, k) if out is None else out
    if not logits.shape[0]:
        return given
    like = (logits.get_device(), logits.shape[0], logits.shape[1], k, given.shape, launch.rows(seq_lens), next_n,
            backend)
    rows = (row_start, row_end) if seq_lens is None else (seq_lens, next_n)
    launch.run(OP, _calls, like, logits, backend, check, plan, lambda: (logits, *rows, given), reference)
    return given
