"""merge_attn_states: one attention result from two over disjoint sets of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_prefill as torch_ops
from ..spec import merge_attn_states_spec
from . import checks, prefill_reference
from .prefill_arguments import check_merge

OP = "merge_attn_states"
ACC_NAMES = {**checks.DTYPE_NAMES, torch.float32: "fp32"}


def merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor | None = None,
                      lse: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The attention over the keys of a and of b together, from the attention over each.

    w_x = exp(lse_x - max(lse_a, lse_b)), out = (w_a out_a + w_b out_b) / (w_a + w_b), lse = ln(exp lse_a + exp lse_b);
    in float32, rounded once. The formula is that of chunked prefill in FlashAttention's split keys (arXiv 2307.08691).

    out_a: [tokens, heads, v_head_dim], bf16 or fp16 or float32; out_b: the same shape, bf16 or fp16, the dtype of out_a
        unless that is float32. Any token and head strides with 16-byte aligned rows.
    lse_a, lse_b: [tokens, heads] float32, natural logarithm, any strides. -inf or +inf: no key was seen; what out holds
        there is not looked at.
    out: like out_a, which it may be; lse: like lse_a, which it may be; both are written, allocated otherwise.
    backend: "auto", a backend of `jitmla kernels` ("simt"), or "reference".

    Returns (out, lse); out is zero and lse -inf where neither has seen a key. No host synchronisation on a GPU. Raises
    InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_merge_attn_states(out_a, lse_a, out_b, lse_b, out, lse, backend)
    try:
        run = _prepared[out_a.dtype, out_b.dtype, out_a.shape[2], out_a.get_device(), backend]
    except (KeyError, AttributeError, TypeError, IndexError):
        run = None
    if run is None:
        run = _prepare(out_a, lse_a, out_b, lse_b, out, lse, backend)
    if out is None:
        out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    if lse is None:
        lse = torch.empty_like(lse_a)
    try:
        if out_a.numel():
            run(out_a, lse_a, out_b, lse_b, out, lse)
    except Exception:
        # The compiled wrapper refuses a wrong layout before it launches anything; these checks say what is wrong.
        check_merge(out_a, lse_a, out_b, lse_b, out, lse)
        for name, value in (("out_a", out_a), ("out_b", out_b), ("out", out)):
            checks.aligned(name, value)
        raise
    return out, lse


_prepared = dispatch.Remembered()


def _prepare(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, out: Any, lse: Any, backend: Any) -> Any:
    check_merge(out_a, lse_a, out_b, lse_b, out, lse)
    if checks.chooses_reference(OP, backend, out_a):
        return lambda a, lse_a, b, lse_b, out, lse: prefill_reference.merge_attn_states(a, lse_a, b, lse_b, out=out,
                                                                                        lse=lse)
    spec = merge_attn_states_spec(arch=dispatch.arch_of(out_a.device), dtype=checks.DTYPE_NAMES[out_b.dtype],
                                  acc_dtype=ACC_NAMES[out_a.dtype], v_head_dim=out_a.shape[2])
    plan = dispatch.plan_for(spec, backend, out_a.device)

    def run(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
        if 1 in a.shape[:2]:
            a, b, out = (checks.usual_strides(x) for x in (a, b, out))
        plan(a, lse_a, b, lse_b, out, lse)

    _prepared[out_a.dtype, out_b.dtype, out_a.shape[2], out_a.get_device(), backend] = run
    return run
