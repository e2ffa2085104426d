"""sparse_mla_prefill: MLA of the tokens of a prefill, each over a list of cache rows of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import torch_ops_sparse as torch_ops
from ..errors import InvalidArgument
from .checks import REQUIRED
from .sparse_mla import launch


def sparse_mla_prefill(q: Tensor, kv: Tensor, indices: Tensor, *, sm_scale: float = REQUIRED,
                       topk_length: Tensor | None = None, attn_sink: Tensor | None = None, out: Tensor | None = None,
                       backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """The same for the tokens of a prefill: `jitmla.sparse_mla_decode` without a batch, whole tokens only.

    q: [s_q, heads, 576 or 512] bf16. kv: [rows, 1, columns of q] bf16, any row stride. indices: [s_q, 1, topk] int32.
    topk_length: [s_q] int32. attn_sink: [heads] float32. out: [s_q, heads, 512] bf16. sm_scale, backend: as there.

    Returns (out, max_logits, lse), the latter two [s_q, heads] float32: the largest x_j (-inf where there is none) and
    lse, natural logarithm, sinks excluded in both. A token without a valid entry has out 0, -inf and +inf.

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_prefill(q, kv, indices, topk_length, attn_sink, sm_scale, out, backend)
    ranks = {"q": (q, 3), "kv": (kv, 3), "indices": (indices, 3)} | ({} if out is None else {"out": (out, 3)})
    for name, (value, rank) in ranks.items():
        if not isinstance(value, Tensor) or value.dim() != rank:
            raise InvalidArgument(f"{name} of sparse_mla_prefill", supported="q [s_q, heads, columns], kv [rows, 1, "
                                  "columns], indices [s_q, 1, topk], out [s_q, heads, 512]",
                                  differs=f"{name} has {getattr(value, 'dim', lambda: 'no')()} dimensions, not {rank}",
                                  remedy=f"reshape {name} to that")
    lse, top = (torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) for _ in range(2))
    done = launch(q.unsqueeze(1), kv.unsqueeze(0), indices, sm_scale, topk_length, attn_sink,
                None if out is None else out.unsqueeze(1), lse.unsqueeze(2), top.unsqueeze(2), True, backend)
    return done.squeeze(1) if out is None else out, top, lse
