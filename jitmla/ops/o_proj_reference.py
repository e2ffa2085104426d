"""DeepSeek-V4's output path in plain PyTorch: its definition in readable lines, and what runs where there is no GPU.

Computed in float32, the product in float32 as well (sums of 128 products at a time, as the kernels do).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import layouts

FP8_MAX = 448.0
TINY = 1e-10


def rotated_back(o: Tensor, positions: Tensor, cos_sin_cache: Tensor, neox: bool) -> Tensor:
    """o [tokens, heads, dim] in float32 with its last rope_dim columns rotated by minus the token's angle."""
    x = o.float()
    half = cos_sin_cache.shape[1] // 2
    cos, sin = cos_sin_cache[positions.long()][:, None].split(half, -1)
    rope = x[..., -2 * half:]
    a, b = (rope[..., :half], rope[..., half:]) if neox else (rope[..., 0::2], rope[..., 1::2])
    pair = a * cos + b * sin, b * cos - a * sin
    return torch.cat([x[..., :-2 * half], torch.cat(pair, -1) if neox else torch.stack(pair, -1).flatten(-2)], -1)


def power_of_two(amax: Tensor) -> Tensor:
    """Biased exponent (int32) of the smallest power of two s with amax <= 448 s, from the bits: 448 = 1.75 * 2^8."""
    bits = amax.view(torch.int32)
    return (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()


def inv_rope_fp8_quant(o: Tensor, positions: Tensor, cos_sin_cache: Tensor, *, n_groups: int, scale_mode: str,
                       neox: bool, o_fp8: Tensor, o_scale: Tensor) -> None:
    """Writes `o_fp8` [groups, tokens, columns] and `o_scale`. See jitmla.inv_rope_fp8_quant."""
    tokens, heads, dim = o.shape
    x = rotated_back(o, positions, cos_sin_cache, neox).view(tokens, heads * dim // layouts.BLOCK, layouts.BLOCK)
    amax = x.abs().amax(-1).clamp_min(TINY)
    if scale_mode == "raw_f32":
        stored = scale = amax * torch.tensor(1 / FP8_MAX, dtype=torch.float32, device=o.device)
    else:
        exponent = power_of_two(amax)
        stored = scale = (exponent << 23).view(torch.float32)
        if scale_mode == "ue8m0_i32":
            shifts = torch.tensor([0, 8, 16, 24], device=o.device, dtype=torch.int32)
            # the bytes do not overlap, so the sum (which wraps) is their union
            stored = (exponent.view(tokens, -1, 4) << shifts).sum(-1, dtype=torch.int32)
    codes = (x / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    o_fp8.view(torch.uint8).copy_(codes.view(torch.uint8).view(tokens, n_groups, -1).transpose(0, 1))
    o_scale.zero_()
    o_scale[..., :tokens] = stored.view(tokens, n_groups, -1).permute(1, 2, 0)


def fp8_bmm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out: Tensor) -> None:
    """Writes `out` [groups, tokens, N]. See jitmla.fp8_bmm."""
    groups, tokens, k = a.shape
    columns = b.shape[1]
    total = torch.zeros(groups, tokens, columns, dtype=torch.float32, device=a.device)
    for block in range(k // layouts.BLOCK):
        at = slice(block * layouts.BLOCK, (block + 1) * layouts.BLOCK)
        product = torch.bmm(a[..., at].float(), b[..., at].float().transpose(1, 2))
        columns_scale = b_scale[:, :, block].repeat_interleave(layouts.BLOCK, 1)
        total += product * (a_scale[:, block, :tokens, None] * columns_scale[:, None])
    out.copy_(total)
