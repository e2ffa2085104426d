"""fp8_bmm: FP8 product per group, with a scale per 128 columns of a token and per 128 x 128 block of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, pick
from .. import torch_ops_o_proj as torch_ops
from ..spec import fp8_bmm_spec
from . import checks, o_proj_reference
from .o_proj_arguments import check_bmm, check_bmm_layout

OP = "fp8_bmm"


def fp8_bmm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out: Tensor | None = None,
            backend: str = "auto") -> Tensor:
    """out[g, t, n] = sum over blocks kb of a_scale[g, kb, t] * b_scale[g, n // 128, kb] * (a[g, t, kb] . b[g, n, kb]).

    The products of a block of 128 are summed by the tensor core, the scaled sums in float32, rounded once.

    a: [groups, tokens, K] e4m3; group and token strides are free, rows 16-byte aligned.
    a_scale: [groups, K / 128, tokens or more] float32, tokens innermost. Its strides are taken from the tensor:
        jitmla.inv_rope_fp8_quant pads them as jitmla.layouts.scale_stride says.
    b: [groups, N, K] e4m3, strides as a; b_scale: [groups, N / 128, K / 128] float32, contiguous. 128 divides K and N.
    out: [groups, tokens, N] bf16, any group and token stride; allocated otherwise, as a view of [tokens, groups, N],
        which is what the next projection reads.
    backend: "auto", a backend of `jitmla kernels` such as "sm90", or "reference".

    Returns out. On a GPU no host synchronisation; the rule by which it picks a kernel is jitmla.pick.fp8_bmm.

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_fp8_bmm(a, a_scale, b, b_scale, out, backend)
    try:
        prepared = _prepared[a.shape, b.shape, a_scale.shape, a.get_device(), backend]
        if a.requires_grad or b.get_device() != prepared.device:
            prepared = None
    except (KeyError, AttributeError, TypeError):
        prepared = None
    if prepared is None:
        prepared = prepare(a, a_scale, b, b_scale, out, backend)
    if out is None:
        groups, tokens, columns = prepared.out_shape
        out = torch.empty((tokens, groups, columns), dtype=torch.bfloat16, device=a.device).transpose(0, 1)
    try:
        prepared.run(a, a_scale, b, b_scale, out, 0)
    except Exception:
        # The compiled wrapper refuses a wrong layout before it launches anything; these checks say what is wrong.
        check_bmm(a, a_scale, b, b_scale, out)
        check_bmm_layout(a, a_scale, b, out)
        raise
    return out


@dataclass(frozen=True)
class Bmm:
    """What calls of one shape do: launch a kernel, run the reference (function None), or nothing (no tokens)."""

    out_shape: tuple[int, int, int]
    device: int
    function: Callable[..., None] | None
    ctas: int

    def run(self, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, early: int) -> None:
        """early: 1 promises that the kernel launched before this one does not write b or b_scale."""
        if out.shape != self.out_shape:
            raise ValueError("out has another shape")
        if 0 in self.out_shape:
            return
        if self.function is None:
            o_proj_reference.fp8_bmm(a, a_scale, b, b_scale, out=out)
            return
        try:
            self.function(a, a_scale, b, b_scale, out, self.ctas, early)
        except Exception:
            if self.out_shape[0] > 1 and self.out_shape[1] > 1:
                raise
            # the stride of a dimension of size 1 means nothing, but the compiled wrapper looks at it
            self.function(*(checks.usual_strides(x) for x in (a, a_scale, b, b_scale, out)), self.ctas, early)


_prepared = dispatch.Remembered()


def prepare(a: Any, a_scale: Any, b: Any, b_scale: Any, out: Any, backend: Any) -> Bmm:
    """Check every argument, choose who serves the call, and remember it when that is a kernel."""
    check_bmm(a, a_scale, b, b_scale, out)
    if checks.chooses_reference(OP, backend, a):
        return Bmm((*a.shape[:2], b.shape[1]), a.get_device(), None, 0)
    check_bmm_layout(a, a_scale, b, out)
    prepared = on_gpu(*a.shape, b.shape[1], a.device, backend)
    _prepared[a.shape, b.shape, a_scale.shape, a.get_device(), backend] = prepared
    return prepared


def on_gpu(groups: int, tokens: int, k: int, columns: int, device: torch.device, backend: str) -> Bmm:
    """What a call of these sizes launches."""
    sms = dispatch.sm_count(device)
    spec = fp8_bmm_spec(arch=dispatch.arch_of(device))
    plan = dispatch.plan_for(spec, backend, device, groups=groups, tokens=max(tokens, 1), columns=columns, k=k, sms=sms)
    ctas = pick.fp8_bmm_ctas(plan.key.choice, groups, tokens, columns, sms)
    return Bmm((groups, tokens, columns), device.index or 0, plan, ctas)
