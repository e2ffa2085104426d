"""What vLLM calls for DeepSeek-V4's output path (vllm.v1.attention.ops.deepseek_v4_ops, as of 0.20.2)."""

from __future__ import annotations

from torch import Tensor

from ..errors import InvalidArgument
from ..ops.inv_rope_fp8_quant import inv_rope_fp8_quant

__all__ = ["fused_inv_rope_fp8_quant"]


def fused_inv_rope_fp8_quant(o: Tensor, positions: Tensor, cos_sin_cache: Tensor, n_groups: int, heads_per_group: int,
                             nope_dim: int = 448, rope_dim: int = 64, quant_group_size: int = 128,
                             tma_aligned_scales: bool = False) -> tuple[Tensor, Tensor]:
    """o_fp8 [tokens, groups, columns], strides (columns, tokens * columns, 1), and o_scale [tokens, groups, blocks],
    strides (1, blocks * padded, padded), tokens padded to a multiple of 4: views of what jitmla.inv_rope_fp8_quant
    returns. Scales are powers of two also where they are float32; with tma_aligned_scales they are packed exponents."""
    heads = o.shape[1] if o.dim() == 3 else o.shape[1] // (nope_dim + rope_dim)
    if heads != n_groups * heads_per_group:
        raise InvalidArgument(f"{n_groups} groups of {heads_per_group} heads",
                              supported=f"{heads} heads in all, as o has",
                              differs=f"that makes {n_groups * heads_per_group}",
                              remedy="give the numbers of this rank: heads_per_group is heads / n_groups")
    o_fp8, o_scale = inv_rope_fp8_quant(o, positions, cos_sin_cache, n_groups=n_groups, nope_dim=nope_dim,
                                        rope_dim=rope_dim, group_size=quant_group_size,
                                        scale_mode="ue8m0_i32" if tma_aligned_scales else "pow2_f32")
    return o_fp8.transpose(0, 1), o_scale.permute(2, 0, 1)[:o.shape[0]]
