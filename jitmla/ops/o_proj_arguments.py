"""What inv_rope_fp8_quant, fp8_bmm and o_a_proj take: every argument check. They run once per call shape, and when a
compiled kernel's own guards refused a call, to say what is wrong with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import layouts
from ..errors import InvalidArgument, InvalidArgumentType
from . import checks

FP8 = torch.float8_e4m3fn
POSITION_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MAX_TOKENS = 4 * 65535  # blocks of at least 4 tokens in the second dimension of a grid
WEIGHTS = "[groups, rows, columns]"


def check_quant(o: Any, positions: Any, cos_sin_cache: Any, n_groups: Any, nope_dim: Any, rope_dim: Any,
                group_size: Any, scale_mode: Any, o_fp8: Any, o_scale: Any) -> Tensor:
    """Raise InvalidArgument or InvalidArgumentType unless the op is defined on these. o as [tokens, heads, dim]."""
    head_dim = _head_dim(nope_dim, rope_dim, group_size)
    if scale_mode not in layouts.SCALE_MODES:
        raise InvalidArgument(f"scale_mode={scale_mode!r}", supported=", ".join(layouts.SCALE_MODES),
                              differs="it is none of them", remedy="see docs/output_path.md")
    layout = "[tokens, heads, head_dim] or [tokens, heads * head_dim]"
    if isinstance(o, Tensor) and o.dim() == 2 and o.shape[1] % head_dim == 0:
        o = o.unflatten(1, (-1, head_dim))
    checks.tensor("o", o, layout, 3)
    checks.dtype("o", o, [torch.bfloat16])
    if o.shape[2] != head_dim:
        raise InvalidArgument(f"o: {checks.describe(o)}", supported=layout,
                              differs=f"nope_dim + rope_dim = {head_dim}, not {o.shape[2]}",
                              remedy="pass nope_dim and rope_dim of the model: 448 and 64 for DeepSeek-V4")
    checks.contiguous_last("o", o)
    tokens, heads, _ = o.shape
    if tokens > MAX_TOKENS:
        raise InvalidArgument(f"o: {checks.describe(o)}", supported=f"at most {MAX_TOKENS} tokens",
                              differs=f"it has {tokens}", remedy="split the tokens over several calls")
    if not _is_int(n_groups) or n_groups < 1 or heads < 1 or heads % n_groups:
        raise InvalidArgument(f"n_groups={n_groups!r} for {heads} heads", supported="a divisor of the number of heads",
                              differs="heads cannot be split evenly",
                              remedy="n_groups is what this rank has: o_groups / tp")
    checks.tensor("positions", positions, "[tokens]", 1)
    checks.dtype("positions", positions, POSITION_TYPES)
    checks.shape("positions", positions, "[tokens]", [tokens], "o")
    checks.device("positions", positions, o.device, "o")
    checks.tensor("cos_sin_cache", cos_sin_cache, "[positions, rope_dim]", 2)
    checks.dtype("cos_sin_cache", cos_sin_cache, [torch.float32])
    checks.shape("cos_sin_cache", cos_sin_cache, "[positions, rope_dim]", [cos_sin_cache.shape[0], rope_dim],
                 "rope_dim")
    checks.device("cos_sin_cache", cos_sin_cache, o.device, "o")
    if not cos_sin_cache.is_contiguous():
        raise InvalidArgument(f"cos_sin_cache with strides {cos_sin_cache.stride()}", supported="a contiguous table",
                              differs="its rows are not one behind the other", remedy="pass cos_sin_cache.contiguous()")
    columns = heads // n_groups * head_dim
    checks.output("o_fp8", o_fp8, (n_groups, tokens, columns), FP8, o)
    scale_dtype = torch.int32 if scale_mode == "ue8m0_i32" else torch.float32
    checks.output("o_scale", o_scale, layouts.scale_shape(n_groups, columns, tokens, scale_mode), scale_dtype, o)
    checks.no_gradient("inv_rope_fp8_quant", o=o)
    return o


def check_quant_layout(o: Tensor, cos_sin_cache: Tensor, o_fp8: Tensor | None, o_scale: Tensor | None) -> None:
    """Raise InvalidArgument unless the kernels can read and write these in place."""
    for name, value in (("o", o), ("cos_sin_cache", cos_sin_cache), ("o_fp8", o_fp8), ("o_scale", o_scale)):
        if value is not None:
            checks.aligned(name, value)


def check_bmm(a: Any, a_scale: Any, b: Any, b_scale: Any, out: Any) -> None:
    """Raise InvalidArgument or InvalidArgumentType unless the op is defined on these."""
    checks.tensor("a", a, "[groups, tokens, K]", 3)
    checks.dtype("a", a, [FP8])
    groups, tokens, k = a.shape
    check_weights(b, b_scale, "b", "b_scale", "[groups, N, K]", a)
    checks.shape("b", b, "[groups, N, K]", [groups, b.shape[1], k], "a")
    checks.contiguous_last("a", a)
    blocks = k // layouts.BLOCK
    layout = "[groups, K / 128, tokens or more]"
    checks.tensor("a_scale", a_scale, layout, 3)
    checks.dtype("a_scale", a_scale, [torch.float32])
    checks.device("a_scale", a_scale, a.device, "a")
    if a_scale.shape[0] != groups or a_scale.shape[1] != blocks or a_scale.shape[2] < tokens:
        raise InvalidArgument(f"a_scale: {checks.describe(a_scale)}", supported=f"{layout}: {[groups, blocks, tokens]}",
                              differs=f"its shape is {list(a_scale.shape)}",
                              remedy="tokens are its last dimension, padded as jitmla.layouts.scale_stride says")
    checks.contiguous_last("a_scale", a_scale)
    checks.output("out", out, (groups, tokens, b.shape[1]), torch.bfloat16, a)
    checks.no_gradient("fp8_bmm", a=a, b=b)


def check_weights(b: Any, b_scale: Any, name: str, scale_name: str, layout: str, like: Tensor) -> None:
    """The second factor and its scales."""
    checks.tensor(name, b, layout, 3)
    checks.dtype(name, b, [FP8])
    checks.device(name, b, like.device, "the first argument")
    checks.contiguous_last(name, b)
    groups, rows, k = b.shape
    if groups < 1 or rows < 1 or k < 1 or rows % layouts.BLOCK or k % layouts.BLOCK:
        raise InvalidArgument(f"{name}: {checks.describe(b)}", supported=f"{layout}, the last two multiples of 128",
                              differs=f"it is {list(b.shape)}",
                              remedy="pad the weight with zeros, and its scales with it")
    checks.tensor(scale_name, b_scale, f"of blocks of 128 x 128 of {name}", 3)
    checks.dtype(scale_name, b_scale, [torch.float32])
    expected = [groups, rows // layouts.BLOCK, k // layouts.BLOCK]
    checks.shape(scale_name, b_scale, f"of blocks of 128 x 128 of {name}", expected, name)
    checks.device(scale_name, b_scale, like.device, "the first argument")
    if not b_scale.is_contiguous():
        raise InvalidArgument(f"{scale_name} with strides {b_scale.stride()}", supported="a contiguous tensor",
                              differs="it is not", remedy=f"pass {scale_name}.contiguous()")


def check_bmm_layout(a: Tensor, a_scale: Tensor, b: Tensor, out: Tensor | None) -> None:
    """Raise InvalidArgument unless the kernels can read and write these in place."""
    for name, value in (("a", a), ("a_scale", a_scale), ("b", b), ("out", out)):
        if value is not None:
            checks.aligned(name, value)


def check_o_a_proj(o: Any, positions: Any, cos_sin_cache: Any, w_fp8: Any, w_scale: Any, nope_dim: Any, rope_dim: Any,
                   scale_mode: Any, out: Any) -> Tensor:
    """Raise InvalidArgument or InvalidArgumentType unless the op is defined on these. o as [tokens, heads, dim]."""
    if scale_mode == "ue8m0_i32":
        raise InvalidArgument("o_a_proj with scale_mode='ue8m0_i32'", supported="raw_f32, pow2_f32",
                              differs="fp8_bmm takes fp32 scales", remedy="scale_mode='pow2_f32' has the same values")
    if not isinstance(o, Tensor):
        checks.tensor("o", o, "[tokens, heads, head_dim]", 3)
    check_weights(w_fp8, w_scale, "w_fp8", "w_scale", WEIGHTS, o)
    o = check_quant(o, positions, cos_sin_cache, w_fp8.shape[0], nope_dim, rope_dim, layouts.BLOCK, scale_mode, None,
                    None)
    columns = o.shape[1] // w_fp8.shape[0] * o.shape[2]
    checks.shape("w_fp8", w_fp8, WEIGHTS, [w_fp8.shape[0], w_fp8.shape[1], columns], "o")
    checks.output("out", out, (o.shape[0], w_fp8.shape[0], w_fp8.shape[1]), torch.bfloat16, o)
    return o


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _head_dim(nope_dim: Any, rope_dim: Any, group_size: Any) -> int:
    for name, value in (("nope_dim", nope_dim), ("rope_dim", rope_dim), ("group_size", group_size)):
        if not _is_int(value):
            raise InvalidArgumentType(f"{name}={value!r}", supported="an integer", differs=f"a {type(value).__name__}",
                                      remedy=f"pass {name} as a Python int")
    if group_size != layouts.BLOCK:
        raise InvalidArgument(f"group_size={group_size}", supported="128", differs="it is another one",
                              remedy="leave it out")
    if not 2 <= rope_dim <= group_size or rope_dim % 2 or nope_dim < 0 or (nope_dim + rope_dim) % group_size:
        raise InvalidArgument(f"nope_dim={nope_dim}, rope_dim={rope_dim}",
                              supported="an even rope_dim up to 128, and a sum that 128 divides: the rotated columns "
                              "are the tail of the last block of a head", differs=f"the sum is {nope_dim + rope_dim}",
                              remedy="pass those of the model: 448 and 64 for DeepSeek-V4")
    return nope_dim + rope_dim
