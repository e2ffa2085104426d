"""local_to_global: positions within requests to rows of a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_indexer as torch_ops
from ..spec_indexer import local_to_global_spec
from . import indexer_arguments as arguments
from . import indexer_reference, launch

OP = "local_to_global"
_calls = dispatch.Remembered()


def local_to_global(topk: Tensor, req_id: Tensor, block_table: Tensor | None = None, *, page_size: int = 64,
                    stride_factor: int | None = None, layer_offset: int = 0, workspace_start: Tensor | None = None,
                    num_pages: int | None = None, out: Tensor | None = None, valid_count: Tensor | None = None,
                    backend: str = "auto") -> Tensor:
    """g = block_table[req_id[r], t // page_size] * stride_factor + layer_offset + t % page_size     for t = topk[r, i]

    and -1 where t is negative, the table ends before it, or its entry is negative.

    topk: [rows, k] int32, what jitmla.topk_indices returns; req_id: [rows] int32 (rows of padding: 0).
    block_table: [requests, pages of a request] int32. page_size: a power of two.
    stride_factor: rows from one page to the next, by default page_size; where layers lie one behind the other within a
        page, layers * page_size, with layer_offset = layer * page_size.
    workspace_start: instead of block_table, [requests] int32: g = workspace_start[req_id[r]] + t.
    num_pages: of the pool; if given, it is checked that all rows fit in 31 bits.
    out: [rows, k] int32, may not be topk; allocated otherwise. valid_count: [rows] int32; if given, gets the number of
        entries of each row that are not -1.
    backend: "auto", a backend of `jitmla kernels` ("simt"), or "reference".

    Returns out. Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed,
    ToolchainMissing, CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_local_to_global(topk, req_id, block_table, page_size, stride_factor, layer_offset,
                                              workspace_start, num_pages, out, valid_count, backend)
    factor = page_size if stride_factor is None else stride_factor

    def check() -> None:
        arguments.to_global(topk, req_id, block_table, page_size, factor, layer_offset, workspace_start, out,
                            valid_count, num_pages)

    def args() -> tuple[object, ...]:
        table = workspace_start.view(-1, 1) if block_table is None else block_table
        count = req_id if valid_count is None else valid_count  # a stand-in that is not written
        return topk, req_id, table, page_size.bit_length() - 1, factor, layer_offset, given, count

    def reference() -> None:
        indexer_reference.local_to_global(topk, req_id, workspace_start if block_table is None else block_table,
                                          workspace=block_table is None, page_size=page_size, stride_factor=factor,
                                          layer_offset=layer_offset, out=given, valid_count=valid_count)

    if not isinstance(topk, Tensor) or not topk.numel():
        check()
        if valid_count is not None:
            valid_count.zero_()
    given = torch_ops.empty_global(topk) if out is None else out
    if not topk.numel():
        return given
    like = (topk.get_device(), block_table is None, valid_count is None, page_size, factor, layer_offset, num_pages,
            backend)
    launch.run(OP, _calls, like, topk, backend, check,
               lambda: dispatch.plan_for(local_to_global_spec(arch=dispatch.arch_of(topk.device),
                                                              workspace=block_table is None,
                                                              count=valid_count is not None), backend, topk.device),
               args, reference)
    return given
