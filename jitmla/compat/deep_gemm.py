"""DeepGEMM's signatures: the grouped FP8 product, for the expression and the scales of DeepSeek-V4's output path on
Hopper, and the indexer logits of DeepSeek Sparse Attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import layouts
from ..errors import InvalidArgument
from ..ops.fp8_bmm import fp8_bmm
from .deep_gemm_logits import fp8_mqa_logits, fp8_paged_mqa_logits, get_paged_mqa_logits_metadata

__all__ = ["fp8_einsum", "fp8_mqa_logits", "fp8_paged_mqa_logits", "get_paged_mqa_logits_metadata"]
EXPRESSION, RECIPE = "bhr,hdr->bhd", (1, 128, 128)


def fp8_einsum(expr: str, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, c: Tensor | None = None,
               recipe: Sequence[int] = RECIPE) -> None:
    """d[b, h, :] = (values of a)[b, h, :] . (values of b)[h, :, :], written in place.

    a: (e4m3 [tokens, groups, K], float32 [tokens, groups, K / 128]), b: (e4m3 [groups, N, K], float32 [groups, N / 128,
    K / 128]), d: bf16 [tokens, groups, N]. Scales of a with tokens innermost, padded to 4, are used as they are; any
    other layout of them is copied into that one first.
    """
    if expr != EXPRESSION or tuple(recipe) != RECIPE or c is not None:
        raise InvalidArgument(f"fp8_einsum({expr!r}, recipe={tuple(recipe)}{'' if c is None else ', c=...'})",
                              supported=f"{EXPRESSION!r} with recipe={RECIPE} and no c",
                              differs="it is another product",
                              remedy="call jitmla.fp8_bmm, or DeepGEMM itself for other products")
    (values, scales), (weights, weight_scales) = a, b
    fp8_bmm(values.transpose(0, 1), tokens_innermost(scales), weights, weight_scales.contiguous(),
            out=d.transpose(0, 1))


def tokens_innermost(scales: Tensor) -> Tensor:
    """[tokens, groups, blocks] as [groups, blocks, tokens] with the strides that fp8_bmm reads."""
    tokens, groups, blocks = scales.shape
    turned = scales.permute(1, 2, 0)
    if (tokens <= 1 or turned.stride(2) == 1) and turned.stride(1) % 4 == 0 and turned.stride(0) % 4 == 0:
        return turned
    padded = torch.zeros(groups, blocks, layouts.scale_stride(tokens), dtype=scales.dtype, device=scales.device)
    padded[..., :tokens] = turned
    return padded
