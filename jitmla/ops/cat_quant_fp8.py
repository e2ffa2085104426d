"""cat_quant_fp8: two parts of rows of 128 columns, joined and quantised to FP8."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .. import torch_ops_indexer as torch_ops
from ..spec_indexer import cat_quant_fp8_spec
from . import indexer_arguments as arguments
from . import indexer_reference, launch

OP = "cat_quant_fp8"
_calls = dispatch.Remembered()


def cat_quant_fp8(pe: Tensor, nope: Tensor, *, scale_mode: str = "pow2_f32", backend: str = "auto"
                  ) -> tuple[Tensor, Tensor]:
    """e4m3 of [pe | nope] / scale, with scale = max(amax, 1e-4) / 448 of a row or the power of two above it.

    pe: [rows, pe_dim] or [tokens, heads, pe_dim] bf16, pe_dim a multiple of 4; nope: the same with 128 - pe_dim
        columns. Strides of rows, tokens and heads are free multiples of 4.
    scale_mode: "pow2_f32" or "raw_f32". backend: "auto", a backend of `jitmla kernels` ("simt"), or "reference".

    Returns fp8 [rows, 128] e4m3 and scale [rows, 1] float32, rows being tokens * heads.

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch.ops.jitmla.cat_quant_fp8(pe, nope, scale_mode, backend)

    def check() -> None:
        arguments.cat_quant(pe, nope, scale_mode)

    if not isinstance(pe, Tensor) or pe.dim() not in (2, 3) or not pe.numel():
        check()
    fp8, scale = torch_ops.empty_cat_quant(pe)
    if not fp8.shape[0]:
        return fp8, scale
    parts = (pe, nope) if pe.dim() == 3 else (pe.unsqueeze(1), nope.unsqueeze(1))
    launch.run(OP, _calls, (pe.get_device(), scale_mode, backend), pe, backend, check,
               lambda: dispatch.plan_for(cat_quant_fp8_spec(arch=dispatch.arch_of(pe.device), scale_mode=scale_mode),
                                         backend, pe.device),
               lambda: (*parts, fp8, scale),
               lambda: indexer_reference.cat_quant_fp8(pe, nope, scale_mode=scale_mode, fp8=fp8, scale=scale),
               isinstance(nope, Tensor) and pe.shape[-1] + nope.shape[-1] == arguments.INDEX_DIM)
    return fp8, scale
