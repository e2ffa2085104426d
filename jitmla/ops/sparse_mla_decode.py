"""sparse_mla_decode: MLA of a few query tokens per request, each over a list of cache rows of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import torch_ops_sparse as torch_ops
from .checks import REQUIRED
from .sparse_mla import launch


def sparse_mla_decode(q: Tensor, k_cache: Tensor, indices: Tensor, *, sm_scale: float = REQUIRED,
                      topk_length: Tensor | None = None, attn_sink: Tensor | None = None, out: Tensor | None = None,
                      lse: Tensor | None = None, return_lse: bool = False, backend: str = "auto") -> Any:
    """Absorbed MLA of every query token over its own list of cache rows (DeepSeek Sparse Attention, arXiv 2512.02556).

    With I the valid entries of a token's list (duplicates count as often as they stand there), x_j = sm_scale * <q,
    row_j>: lse = ln sum_{j in I} exp(x_j), out = sum_{j in I} exp(x_j - lse) * row_j[:512].

    q: [batch, s_q, heads, 576] bf16, the absorbed part (512) and the rope part; 1 to 128 heads. Any strides whose rows
        are 16-byte aligned.
    k_cache: [pages, page_size, 1, row], any page size and page stride. Rows of 656 bytes (e4m3, uint8 or int8: 512
        e4m3, 4 float32 scales that are powers of two, 64 bf16; see jitmla.kv_row_pack), or of 576 (or 512) bf16
        columns.
    indices: [batch, s_q, topk] int32, any topk: page * page_size + row of the page. Entries that are no row of the
        cache (negative, or too large) are not read and have no weight; NaN behind them does not show.
    sm_scale: positive factor of the raw dot product; never inferred (0.1352 for DeepSeek-V3, not 576**-0.5).
    topk_length: [batch] int32: entries at and behind it are ignored. Read on the device only.
    attn_sink: [heads] float32: logits (natural units, not scaled) of one more key with a zero value.
    out: [batch, s_q, heads, 512] bf16, written. lse: [batch, heads, s_q] float32, any strides, written when given or
        asked for: sinks excluded. A token without a valid entry has out 0 and lse +inf.
    backend: "auto", a backend of `jitmla kernels` such as "sm90", or "reference".

    Returns out, or (out, lse) with return_lse. No host synchronisation and no plan() call: a captured CUDA graph stays
    right for other lists and lengths.

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_decode(q, k_cache, indices, topk_length, attn_sink, sm_scale, out, lse, return_lse,
                                     backend)
    if lse is None and return_lse and isinstance(q, Tensor) and q.dim() == 4:
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device).transpose(1, 2)
    out = launch(q, k_cache, indices, sm_scale, topk_length, attn_sink, out, lse, None, False, backend)
    return (out, lse) if return_lse else out
