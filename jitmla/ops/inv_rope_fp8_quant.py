"""inv_rope_fp8_quant: the attention output, rotated back and quantised to FP8 for the output projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, layouts
from .. import torch_ops_o_proj as torch_ops
from ..spec import inv_rope_fp8_quant_spec
from . import checks, o_proj_reference
from .o_proj_arguments import FP8, check_quant, check_quant_layout

OP = "inv_rope_fp8_quant"
POSITION_NAMES = {torch.int32: "i32", torch.int64: "i64"}


def inv_rope_fp8_quant(o: Tensor, positions: Tensor, cos_sin_cache: Tensor, *, n_groups: int, nope_dim: int = 448,
                       rope_dim: int = 64, group_size: int = 128, scale_mode: str = "raw_f32", neox: bool = False,
                       o_fp8: Tensor | None = None, o_scale: Tensor | None = None, backend: str = "auto"
                       ) -> tuple[Tensor, Tensor]:
    """Rotate the last rope_dim columns of each head back, and quantise to e4m3 with a scale per token and 128 columns.

    With DeepSeek-V4 keys and values are one latent row, so the attention output carries rotated columns; they are
    rotated by minus the angle of the query's position. The rotation is done in float32 and not rounded before
    quantising.

    o: [tokens, heads, nope_dim + rope_dim] bf16, or [tokens, heads * (nope_dim + rope_dim)]; token and head strides are
        free (a view of a buffer with padded heads is fine), rows 16-byte aligned.
    positions: [tokens], integers. Not checked against the table: the host does not read them.
    cos_sin_cache: [positions, rope_dim] float32, contiguous: cosines, then sines, of the pairs' angles.
    n_groups: groups of the output projection; heads of one group are neighbours.
    group_size: columns that share a scale: 128.
    scale_mode: "raw_f32" (amax / 448), "pow2_f32" (the smallest power of two that does not clip) or "ue8m0_i32" (its
        biased exponent, the four blocks of a head in an int32, the first in the lowest byte). amax is at least 1e-10.
    neox: rotated pairs are the columns (i, i + rope_dim / 2) instead of (2 i, 2 i + 1). DeepSeek-V4 has the latter.
    o_fp8, o_scale: where to write; allocated otherwise.
    backend: "auto", a backend of `jitmla kernels` ("simt"), or "reference".

    Returns o_fp8 [n_groups, tokens, heads / n_groups * dim], e4m3, and o_scale [n_groups, blocks, layouts.scale_stride(
    tokens)]: the factors that give back o, tokens innermost, zero behind the last token. o is about o_fp8 * o_scale.
    On a GPU no host synchronisation; the rule by which it picks a kernel is jitmla.pick.inv_rope_fp8_quant.

    Raises InvalidArgument, InvalidArgumentType, NoTemplate, and on first use also CompileFailed, ToolchainMissing,
    CacheUntrusted, MissNotAllowed.
    """
    if torch.compiler.is_compiling():
        return torch_ops.call_inv_rope_fp8_quant(o, positions, cos_sin_cache, n_groups, nope_dim, rope_dim, group_size,
                                                 scale_mode, neox, o_fp8, o_scale, backend)
    try:
        prepared = _prepared[o.shape, o.dtype, o.get_device(), positions.dtype, n_groups, nope_dim, rope_dim,
                             group_size, scale_mode, neox, backend]
        if o.requires_grad or positions.get_device() != prepared.device:
            prepared = None
    except (KeyError, AttributeError, TypeError):
        prepared = None
    if prepared is None:
        prepared = prepare(o, positions, cos_sin_cache, n_groups, nope_dim, rope_dim, group_size, scale_mode, neox,
                           o_fp8, o_scale, backend)
    if o_fp8 is None:
        o_fp8 = torch.empty(prepared.fp8_shape, dtype=FP8, device=o.device)
    if o_scale is None:
        o_scale = torch.empty(prepared.scale_shape, dtype=prepared.scale_dtype, device=o.device)
    try:
        prepared.run(o, positions, cos_sin_cache, o_fp8, o_scale)
    except Exception:
        # The compiled wrapper refuses a wrong layout before it launches anything; these checks say what is wrong.
        o = check_quant(o, positions, cos_sin_cache, n_groups, nope_dim, rope_dim, group_size, scale_mode, o_fp8,
                        o_scale)
        check_quant_layout(o, cos_sin_cache, o_fp8, o_scale)
        raise
    return o_fp8, o_scale


@dataclass(frozen=True)
class Quant:
    """What calls of one shape do: launch a kernel, run the reference (function None), or nothing (no tokens)."""

    view: tuple[int, int, int]  # of o
    fp8_shape: tuple[int, int, int]
    scale_shape: tuple[int, int, int]
    scale_dtype: torch.dtype
    device: int
    cast: bool  # positions are of a type that the kernels do not read
    function: Callable[..., None] | None
    scale_mode: str
    neox: bool

    def run(self, o: Tensor, positions: Tensor, cos_sin_cache: Tensor, o_fp8: Tensor, o_scale: Tensor) -> None:
        if o_fp8.shape != self.fp8_shape or o_scale.shape != self.scale_shape:
            raise ValueError("o_fp8 or o_scale has another shape")
        if self.fp8_shape[1] == 0:
            return
        if o.dim() == 2:
            o = o.unflatten(1, self.view[1:])
        if self.function is None:
            o_proj_reference.inv_rope_fp8_quant(o, positions, cos_sin_cache, n_groups=self.fp8_shape[0],
                                                scale_mode=self.scale_mode, neox=self.neox, o_fp8=o_fp8,
                                                o_scale=o_scale)
        else:
            self.function(o, positions.long() if self.cast else positions, cos_sin_cache, o_fp8, o_scale)


_prepared = dispatch.Remembered()


def prepare(o: Any, positions: Any, cos_sin_cache: Any, n_groups: Any, nope_dim: Any, rope_dim: Any, group_size: Any,
            scale_mode: Any, neox: Any, o_fp8: Any, o_scale: Any, backend: Any) -> Quant:
    """Check every argument, choose who serves the call, and remember it when that is a kernel."""
    rows = check_quant(o, positions, cos_sin_cache, n_groups, nope_dim, rope_dim, group_size, scale_mode, o_fp8,
                       o_scale)
    tokens, heads, dim = rows.shape
    columns = heads // n_groups * dim
    shapes = (n_groups, tokens, columns), layouts.scale_shape(n_groups, columns, tokens, scale_mode)
    scale_dtype = torch.int32 if scale_mode == "ue8m0_i32" else torch.float32
    cast = positions.dtype not in POSITION_NAMES
    function = None
    if not checks.chooses_reference(OP, backend, rows):
        check_quant_layout(rows, cos_sin_cache, o_fp8, o_scale)
        spec = inv_rope_fp8_quant_spec(arch=dispatch.arch_of(rows.device), dtype=checks.DTYPE_NAMES[rows.dtype],
                                       positions=POSITION_NAMES.get(positions.dtype, "i64"), nope_dim=nope_dim,
                                       rope_dim=rope_dim, group_size=group_size, scale_mode=scale_mode, neox=bool(neox))
        function = dispatch.plan_for(spec, backend, rows.device, tokens=tokens, heads=heads,
                                     heads_per_group=heads // n_groups)
    prepared = Quant((tokens, heads, dim), *shapes, scale_dtype, rows.get_device(), cast, function, scale_mode,
                     bool(neox))
    if function is not None:
        _prepared[o.shape, o.dtype, o.get_device(), positions.dtype, n_groups, nope_dim, rope_dim, group_size,
                  scale_mode, neox, backend] = prepared
    return prepared
