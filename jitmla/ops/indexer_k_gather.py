"""indexer_k_gather: keys of the indexer and their scales out of its paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_indexer as torch_ops
from ..spec_indexer import indexer_k_spec
from . import indexer_arguments as arguments
from . import indexer_reference, launch

OP = "indexer_k_gather"
_calls = dispatch.Remembered()


def indexer_k_gather(cache: Tensor, block_table: Tensor, cu_seq_lens: Tensor, tokens: int, *,
                     k_fp8: Tensor | None = None, k_scale: Tensor | None = None, backend: str = "auto"
                     ) -> tuple[Tensor, Tensor]:
    """Collect the keys of several requests, one request behind the other: what fp8_mqa_logits reads.

    cache: [pages, 64, 1, 132] bytes, as jitmla.indexer_k_scatter writes it.
    block_table: [requests, pages of a request] int32. Rows of pages with a negative number are not written.
    cu_seq_lens: [requests + 1] int32: row i of the result, cu_seq_lens[r] <= i < cu_seq_lens[r + 1], is token
        i - cu_seq_lens[r] of request r.
    tokens: rows of the result, from the host; those from cu_seq_lens[requests] on are not written.
    k_fp8 [tokens, 128] e4m3, k_scale [tokens] float32: where to write, contiguous; allocated otherwise.
    backend: "auto", a backend of `jitmla kernels` ("simt"), or "reference".

    Returns k_fp8, k_scale.

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    arguments.index("tokens", tokens)
    if torch.compiler.is_compiling():
        return torch_ops.call_gather(cache, block_table, cu_seq_lens, tokens, k_fp8, k_scale, backend)
    empty = torch_ops.empty_gather(cache, tokens)
    codes, scales = k_fp8 if k_fp8 is not None else empty[0], k_scale if k_scale is not None else empty[1]

    def check() -> None:
        arguments.gather(cache, block_table, cu_seq_lens, codes, scales)

    if not tokens or not block_table.numel():
        check()
        return codes, scales
    launch.run(OP, _calls, (cache.get_device(), backend), cache, backend, check,
               lambda: dispatch.plan_for(indexer_k_spec(OP, arch=dispatch.arch_of(cache.device)), backend,
                                         cache.device),
               lambda: (cache.view(torch.uint8), block_table, cu_seq_lens, codes, scales),
               lambda: indexer_reference.indexer_k_gather(cache, block_table, cu_seq_lens, k_fp8=codes, k_scale=scales),
               launch.rows(cu_seq_lens) == launch.rows(block_table) + 1)
    return codes, scales
