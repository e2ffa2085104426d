"""o_a_proj: DeepSeek-V4's output path in one call: rotate back, quantise, multiply with each group's FP8 weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_o_proj as torch_ops
from . import checks, fp8_bmm, inv_rope_fp8_quant
from .o_proj_arguments import FP8, check_o_a_proj, check_quant_layout

OP = "o_a_proj"


def o_a_proj(o: Tensor, positions: Tensor, cos_sin_cache: Tensor, w_fp8: Tensor, w_scale: Tensor, *,
             nope_dim: int = 448, rope_dim: int = 64, scale_mode: str = "pow2_f32", neox: bool = False,
             out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """jitmla.inv_rope_fp8_quant and jitmla.fp8_bmm as one call: [tokens, heads, dim] -> [tokens, groups, rows] bf16.

    o, positions, cos_sin_cache, nope_dim, rope_dim, neox: as in inv_rope_fp8_quant.
    scale_mode: "pow2_f32" or "raw_f32".
    w_fp8: [groups, rows, heads / groups * dim] e4m3; w_scale: [groups, rows / 128, columns / 128] float32, contiguous.
    out: [tokens, groups, rows] bf16, any token and group stride; allocated otherwise.
    backend: "auto", a backend of fp8_bmm such as "sm90", or "reference".

    On a GPU: two kernels, no host synchronisation. The second is launched with programmatic dependent launch and loads
    its first weights while the first one runs, so nothing may write w_fp8 or w_scale at that time. What lies between
    them, one FP8 copy of o, comes from torch's allocator and goes back to it.

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_o_a_proj(o, positions, cos_sin_cache, w_fp8, w_scale, nope_dim, rope_dim, scale_mode,
                                       neox, out, backend)
    try:
        prepared = _prepared[o.shape, o.dtype, o.get_device(), positions.dtype, w_fp8.shape, nope_dim, rope_dim,
                             scale_mode, neox, backend]
        if o.requires_grad or w_fp8.get_device() != prepared.quant.device:
            prepared = None
    except (KeyError, AttributeError, TypeError):
        prepared = None
    if prepared is None:
        prepared = _prepare(o, positions, cos_sin_cache, w_fp8, w_scale, nope_dim, rope_dim, scale_mode, neox, out,
                            backend)
    if out is None:
        groups, tokens, columns = prepared.bmm.out_shape
        out = torch.empty((tokens, groups, columns), dtype=torch.bfloat16, device=o.device)
    try:
        prepared.run(o, positions, cos_sin_cache, w_fp8, w_scale, out)
    except Exception:
        # The compiled wrappers refuse a wrong layout before they launch anything; these checks say what is wrong.
        o = check_o_a_proj(o, positions, cos_sin_cache, w_fp8, w_scale, nope_dim, rope_dim, scale_mode, out)
        _check_layout(o, cos_sin_cache, w_fp8, out)
        raise
    return out


@dataclass(frozen=True)
class Chain:
    """What calls of one shape do."""

    quant: inv_rope_fp8_quant.Quant
    bmm: fp8_bmm.Bmm

    def run(self, o: Tensor, positions: Tensor, cos_sin_cache: Tensor, w_fp8: Tensor, w_scale: Tensor,
            out: Tensor) -> None:
        o_fp8 = torch.empty(self.quant.fp8_shape, dtype=FP8, device=o.device)
        o_scale = torch.empty(self.quant.scale_shape, dtype=torch.float32, device=o.device)
        self.quant.run(o, positions, cos_sin_cache, o_fp8, o_scale)
        self.bmm.run(o_fp8, o_scale, w_fp8, w_scale, out.transpose(0, 1), 1)


def _check_layout(o: Tensor, cos_sin_cache: Tensor, w_fp8: Tensor, out: Tensor | None) -> None:
    check_quant_layout(o, cos_sin_cache, None, None)
    checks.aligned("w_fp8", w_fp8)
    if out is not None:
        checks.aligned("out", out)


_prepared = dispatch.Remembered()


def _prepare(o: Any, positions: Any, cos_sin_cache: Any, w_fp8: Any, w_scale: Any, nope_dim: Any, rope_dim: Any,
             scale_mode: Any, neox: Any, out: Any, backend: Any) -> Chain:
    """Check every argument, choose who serves the call, and remember it when that is a pair of kernels."""
    rows = check_o_a_proj(o, positions, cos_sin_cache, w_fp8, w_scale, nope_dim, rope_dim, scale_mode, out)
    groups, columns, k = w_fp8.shape
    reference = checks.takes_reference(fp8_bmm.OP, backend, rows)
    quant = inv_rope_fp8_quant.prepare(o, positions, cos_sin_cache, groups, nope_dim, rope_dim, 128, scale_mode, neox,
                                       None, None, "reference" if reference else "auto")
    if reference:
        return Chain(quant, fp8_bmm.Bmm((groups, rows.shape[0], columns), rows.get_device(), None, 0))
    _check_layout(rows, cos_sin_cache, w_fp8, out)
    prepared = Chain(quant, fp8_bmm.on_gpu(groups, rows.shape[0], k, columns, rows.device, backend))
    _prepared[o.shape, o.dtype, o.get_device(), positions.dtype, w_fp8.shape, nope_dim, rope_dim, scale_mode, neox,
              backend] = prepared
    return prepared
