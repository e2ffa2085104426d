"""fp8_mqa_logits: DSA indexer logits of prefill, ragged windows over gathered keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_indexer as torch_ops
from ..spec_indexer import fp8_mqa_logits_spec
from . import indexer_arguments as arguments
from . import indexer_reference, launch

OP = "fp8_mqa_logits"
BLOCK = 128  # keys that are written together
_calls = dispatch.Remembered()


def fp8_mqa_logits(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor, *,
                   clean_logits: bool = True, max_seqlen_k: int = 0, out: Tensor | None = None, backend: str = "auto"
                   ) -> Tensor:
    """logits[i, j] = k_scale[j] * sum_h max(q[i, h] . k[j], 0) * weights[i, h]      for ks[i] <= j < ke[i]

    The index score of DeepSeek-V3.2 (arXiv 2512.02556, section 2.1), with the scales of q and k outside of the
    products, which are summed in float32. The bits do not depend on the number of multiprocessors.

    q: [rows, heads, 128] e4m3, contiguous; heads 32 or 64. k: [N, 128] e4m3, k_scale: [N] float32, contiguous.
    weights: [rows, heads] float32, row stride a multiple of 4; the scale of q is in them.
    ks, ke: [rows] int32, contiguous. ke <= ks is an empty window; windows end at N.
    clean_logits: cells outside of the windows become -inf. Otherwise they are undefined.
    max_seqlen_k: if not 0, logits are compressed: cell j of row i at column j - ks[i], max_seqlen_k columns, cells
        outside of the windows as they were. Only with clean_logits=False.
    out: [rows, N or max_seqlen_k] float32, allocated otherwise. Rows must be round_up(N, 128) elements apart: whole
        blocks of keys are written (compressed logits write windows alone). jitmla.layouts.logits_stride is enough.
    backend: "auto", a backend of `jitmla kernels` ("sm90"), or "reference".

    Returns out. Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed,
    ToolchainMissing, CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_mqa_logits(q, k, k_scale, weights, ks, ke, clean_logits, max_seqlen_k, out, backend)
    store = "compressed" if max_seqlen_k else "clean" if clean_logits else "tiles"

    def check() -> None:
        arguments.mqa_logits(q, k, k_scale, weights, ks, ke, clean_logits, max_seqlen_k)
        if out is not None:
            arguments.logits_out(out, q.shape[0], max_seqlen_k or k.shape[0], room, q)

    if not isinstance(q, Tensor) or q.dim() != 3 or not isinstance(k, Tensor) or not q.shape[0] or not k.shape[0]:
        check()
    columns = max_seqlen_k or k.shape[0]
    room = max_seqlen_k or -(-columns // BLOCK) * BLOCK
    given = torch_ops.empty_logits(q, q.shape[0], columns) if out is None else out
    if not q.shape[0] or not k.shape[0]:
        return given
    launch.run(OP, _calls, (q.get_device(), q.shape[1], store, backend), q, backend, check,
               lambda: dispatch.plan_for(fp8_mqa_logits_spec(arch=dispatch.arch_of(q.device), heads=q.shape[1],
                                                             store=store), backend, q.device),
               lambda: (q, k, k_scale, weights, ks, ke, given, dispatch.sm_count(q.device)),
               lambda: indexer_reference.fp8_mqa_logits(q, k, k_scale, weights, ks, ke, store=store, out=given),
               out is None or arguments.has_room(out, columns, room))
    return given
