"""`torch.ops.jitmla.*` of DeepSeek-V4's output path: what torch.compile and graph passes see.

    inv_rope_fp8_quant, fp8_bmm, o_a_proj               functional: allocate and return
    inv_rope_fp8_quant_out, fp8_bmm_out, o_a_proj_out   write what their schemas declare as mutated

As in torch_ops.py: all call the front ends of eager code, which import this module; hence the late imports.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import layouts

_QUANT = ("Tensor o, Tensor positions, Tensor cos_sin_cache, int n_groups, int nope_dim, int rope_dim, int group_size, "
          "str scale_mode, bool neox, str backend")
_BMM = "Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, str backend"
_CHAIN = ("Tensor o, Tensor positions, Tensor cos_sin_cache, Tensor w_fp8, Tensor w_scale, int nope_dim, int rope_dim, "
          "str scale_mode, bool neox, str backend")

_library = torch.library.Library("jitmla", "FRAGMENT")
_library.define(f"inv_rope_fp8_quant({_QUANT}) -> (Tensor, Tensor)")
_library.define(f"inv_rope_fp8_quant_out({_QUANT}, Tensor(a!) o_fp8, Tensor(b!) o_scale) -> ()")
_library.define(f"fp8_bmm({_BMM}) -> Tensor")
_library.define(f"fp8_bmm_out({_BMM}, Tensor(a!) out) -> ()")
_library.define(f"o_a_proj({_CHAIN}) -> Tensor")
_library.define(f"o_a_proj_out({_CHAIN}, Tensor(a!) out) -> ()")


def _quant(o: Tensor, positions: Tensor, cos_sin_cache: Tensor, n_groups: int, nope_dim: int, rope_dim: int,
           group_size: int, scale_mode: str, neox: bool, backend: str) -> tuple[Tensor, Tensor]:
    from .ops.inv_rope_fp8_quant import inv_rope_fp8_quant
    return inv_rope_fp8_quant(o, positions, cos_sin_cache, n_groups=n_groups, nope_dim=nope_dim, rope_dim=rope_dim,
                              group_size=group_size, scale_mode=scale_mode, neox=neox, backend=backend)


def _quant_out(o: Tensor, positions: Tensor, cos_sin_cache: Tensor, n_groups: int, nope_dim: int, rope_dim: int,
               group_size: int, scale_mode: str, neox: bool, backend: str, o_fp8: Tensor, o_scale: Tensor) -> None:
    from .ops.inv_rope_fp8_quant import inv_rope_fp8_quant
    inv_rope_fp8_quant(o, positions, cos_sin_cache, n_groups=n_groups, nope_dim=nope_dim, rope_dim=rope_dim,
                       group_size=group_size, scale_mode=scale_mode, neox=neox, backend=backend, o_fp8=o_fp8,
                       o_scale=o_scale)


def _bmm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, backend: str) -> Tensor:
    from .ops.fp8_bmm import fp8_bmm
    return fp8_bmm(a, a_scale, b, b_scale, backend=backend)


def _bmm_out(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, backend: str, out: Tensor) -> None:
    from .ops.fp8_bmm import fp8_bmm
    fp8_bmm(a, a_scale, b, b_scale, out=out, backend=backend)


def _chain(o: Tensor, positions: Tensor, cos_sin_cache: Tensor, w_fp8: Tensor, w_scale: Tensor, nope_dim: int,
           rope_dim: int, scale_mode: str, neox: bool, backend: str) -> Tensor:
    from .ops.o_a_proj import o_a_proj
    return o_a_proj(o, positions, cos_sin_cache, w_fp8, w_scale, nope_dim=nope_dim, rope_dim=rope_dim,
                    scale_mode=scale_mode, neox=neox, backend=backend)


def _chain_out(o: Tensor, positions: Tensor, cos_sin_cache: Tensor, w_fp8: Tensor, w_scale: Tensor, nope_dim: int,
               rope_dim: int, scale_mode: str, neox: bool, backend: str, out: Tensor) -> None:
    from .ops.o_a_proj import o_a_proj
    o_a_proj(o, positions, cos_sin_cache, w_fp8, w_scale, nope_dim=nope_dim, rope_dim=rope_dim, scale_mode=scale_mode,
             neox=neox, out=out, backend=backend)


def _fake_quant(o: Tensor, positions: Tensor, cos_sin_cache: Tensor, n_groups: int, nope_dim: int, rope_dim: int,
                group_size: int, scale_mode: str, neox: bool, backend: str) -> tuple[Tensor, Tensor]:
    width = o.shape[1] if o.dim() == 2 else o.shape[1] * o.shape[2]
    columns = width // n_groups
    scale_dtype = torch.int32 if scale_mode == "ue8m0_i32" else torch.float32
    return (o.new_empty(n_groups, o.shape[0], columns, dtype=torch.float8_e4m3fn),
            o.new_empty(layouts.scale_shape(n_groups, columns, o.shape[0], scale_mode), dtype=scale_dtype))


def _fake_bmm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, backend: str) -> Tensor:
    return a.new_empty(a.shape[1], a.shape[0], b.shape[1], dtype=torch.bfloat16).transpose(0, 1)


def _fake_chain(o: Tensor, positions: Tensor, cos_sin_cache: Tensor, w_fp8: Tensor, w_scale: Tensor, nope_dim: int,
                rope_dim: int, scale_mode: str, neox: bool, backend: str) -> Tensor:
    return o.new_empty(o.shape[0], w_fp8.shape[0], w_fp8.shape[1], dtype=torch.bfloat16)


def _fake_out(*_: Any) -> None:
    return None


for _name, _real, _fake in (("inv_rope_fp8_quant", _quant, _fake_quant),
                            ("inv_rope_fp8_quant_out", _quant_out, _fake_out),
                            ("fp8_bmm", _bmm, _fake_bmm), ("fp8_bmm_out", _bmm_out, _fake_out),
                            ("o_a_proj", _chain, _fake_chain), ("o_a_proj_out", _chain_out, _fake_out)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _real, _key)
    torch.library.register_fake(f"jitmla::{_name}", _fake, lib=_library)


def call_inv_rope_fp8_quant(o: Tensor, positions: Tensor, cos_sin_cache: Tensor, n_groups: int, nope_dim: int,
                            rope_dim: int, group_size: int, scale_mode: str, neox: bool, o_fp8: Tensor | None,
                            o_scale: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """What jitmla.inv_rope_fp8_quant does while torch.compile traces it."""
    inputs = (o, positions, cos_sin_cache, n_groups, nope_dim, rope_dim, group_size, scale_mode, neox, backend)
    if o_fp8 is None and o_scale is None:
        return torch.ops.jitmla.inv_rope_fp8_quant(*inputs)
    like = _fake_quant(*inputs)
    o_fp8 = like[0] if o_fp8 is None else o_fp8
    o_scale = like[1] if o_scale is None else o_scale
    torch.ops.jitmla.inv_rope_fp8_quant_out(*inputs, o_fp8, o_scale)
    return o_fp8, o_scale


def call_fp8_bmm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None, backend: str) -> Tensor:
    """What jitmla.fp8_bmm does while torch.compile traces it."""
    if out is None:
        return torch.ops.jitmla.fp8_bmm(a, a_scale, b, b_scale, backend)
    torch.ops.jitmla.fp8_bmm_out(a, a_scale, b, b_scale, backend, out)
    return out


def call_o_a_proj(o: Tensor, positions: Tensor, cos_sin_cache: Tensor, w_fp8: Tensor, w_scale: Tensor, nope_dim: int,
                  rope_dim: int, scale_mode: str, neox: bool, out: Tensor | None, backend: str) -> Tensor:
    """What jitmla.o_a_proj does while torch.compile traces it."""
    inputs = (o, positions, cos_sin_cache, w_fp8, w_scale, nope_dim, rope_dim, scale_mode, neox, backend)
    if out is None:
        return torch.ops.jitmla.o_a_proj(*inputs)
    torch.ops.jitmla.o_a_proj_out(*inputs, out)
    return out
