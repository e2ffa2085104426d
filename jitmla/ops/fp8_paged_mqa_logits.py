"""fp8_paged_mqa_logits: DSA indexer logits of decode, keys from the pages of the indexer cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, layouts
from .. import torch_ops_indexer as torch_ops
from ..spec_indexer import fp8_paged_mqa_logits_spec
from . import indexer_arguments as arguments
from . import indexer_reference, launch

OP = "fp8_paged_mqa_logits"
_calls = dispatch.Remembered()


def fp8_paged_mqa_logits(q: Tensor, cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, *,
                         max_context_len: int, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """logits[r * next_n + d, j] = k_scale[j] * sum_h max(q[r, d, h] . k[j], 0) * weights[r * next_n + d, h]
    for j below the length of the last query of request r: the index score, as in jitmla.fp8_mqa_logits.

    There is no schedule to prepare: the work is divided on the device, so one captured graph is right for all later
    lengths. For more than two queries a request, flatten them: [requests * next_n, 1, heads, 128], each with its own
    length and a copy of the table's row.

    q: [requests, next_n, heads, 128] e4m3, contiguous; next_n 1 or 2, heads 32 or 64.
    cache: [pages, 64, 1, 132] bytes, as jitmla.indexer_k_scatter writes it; pages any multiple of 16 bytes apart.
    weights: [requests * next_n, heads] float32, row stride a multiple of 4; the scale of q is in them.
    context_lens: [requests] or [requests, next_n] int32; with two dimensions the last column counts: earlier queries of
        a request get cells behind their own end, which jitmla.topk_indices leaves out. At most max_context_len.
    block_table: [requests, pages of a request] int32. Entries that a length reaches must not be negative; those behind
        are not read.
    max_context_len: columns of the result, from the host; the lengths are not read there.
    out: [requests * next_n, max_context_len] float32, allocated otherwise. Rows must be round_up(max_context_len, 64)
        elements apart. Not cleaned: cells from a request's length on are undefined, up to the end of its last page.
    backend: "auto", a backend of `jitmla kernels` ("sm90"), or "reference".

    Returns out. Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed,
    ToolchainMissing, CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_paged_logits(q, cache, weights, context_lens, block_table, max_context_len, out, backend)
    room = -(-max_context_len // layouts.INDEX_PAGE) * layouts.INDEX_PAGE

    def check() -> None:
        arguments.paged_mqa_logits(q, cache, weights, context_lens, block_table, max_context_len)
        if out is not None:
            arguments.logits_out(out, q.shape[0] * q.shape[1], max_context_len, room, q)

    if not isinstance(q, Tensor) or q.dim() != 4 or not q.shape[0] or not max_context_len:
        check()
    rows = q.shape[0] * q.shape[1]
    given = torch_ops.empty_logits(q, rows, max_context_len) if out is None else out
    if not rows or not max_context_len or not block_table.shape[1]:
        return given
    lens = context_lens if context_lens.dim() == 1 else context_lens[:, -1]
    launch.run(OP, _calls, (q.get_device(), q.shape[1], q.shape[2], backend), q, backend, check,
               lambda: dispatch.plan_for(fp8_paged_mqa_logits_spec(arch=dispatch.arch_of(q.device), heads=q.shape[2],
                                                                   next_n=q.shape[1]), backend, q.device),
               # as wide as what may be written: the kernel stops there
               lambda: (q, cache.view(torch.uint8), weights, lens, block_table,
                        given.as_strided((rows, room), given.stride()), dispatch.sm_count(q.device)),
               lambda: indexer_reference.fp8_paged_mqa_logits(q, cache, weights, lens, block_table, out=given),
               out is None or arguments.has_room(out, max_context_len, room))
    return given
