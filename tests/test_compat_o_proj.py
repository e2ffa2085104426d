"""vLLM's quantiser and DeepGEMM's product in jitmla.compat, as their tests ask (test_fused_inv_rope_fp8_quant.py and
test_einsum.py), with their parameters and tighter bounds. Here in small sizes on CPU tensors;
tests/kernels/test_compat_o_proj.py has theirs on a GPU."""

from __future__ import annotations

import pytest
import torch

from jitmla.compat import deep_gemm, vllm
from jitmla.testing_o_proj import CHAIN_DIFF, FP8, calc_diff, check_quant, exact_chain, quant_problem


def check_quantiser(tokens: int, heads: int, groups: int, seed: int, packed: bool, device: str) -> None:
    """Values, scales, strides, contiguity of each group, and padding."""
    problem = quant_problem(tokens, heads=heads, groups=groups, device=device, seed=seed)
    o = problem.o.clone()
    o_fp8, o_scale = vllm.fused_inv_rope_fp8_quant(*problem.args, groups, heads // groups, tma_aligned_scales=packed)
    assert torch.equal(problem.o, o)  # not rotated in place
    columns, padded = heads // groups * 512, (tokens + 3) // 4 * 4
    blocks = columns // 128 // (4 if packed else 1)
    assert o_fp8.shape == (tokens, groups, columns) and o_fp8.stride() == (columns, tokens * columns, 1)
    assert all(o_fp8[:, g].is_contiguous() for g in range(groups))
    assert o_scale.shape == (tokens, groups, blocks) and o_scale.permute(1, 0, 2).stride(1) == 1
    storage = o_scale.as_strided((groups, blocks, padded), (blocks * padded, padded, 1))
    assert not bool(storage[..., tokens:].any())
    check_quant(problem, o_fp8.transpose(0, 1), storage, scale_mode="ue8m0_i32" if packed else "pow2_f32")


def check_einsum(tokens: int, groups: int, k: int, columns: int, ue8m0: bool, device: str) -> None:
    """Against the product in float64 of what was not quantised; scales of a with blocks innermost, as theirs come."""
    rng = torch.Generator(device=device).manual_seed(tokens)
    x, y = (torch.randn(shape, generator=rng, device=device).bfloat16()
            for shape in ((tokens, groups, k), (groups, columns, k)))
    a = quantised(x.view(tokens, groups, 1, k // 128, 128), ue8m0, (tokens, groups, k))
    b = quantised(y.view(groups, columns // 128, 128, k // 128, 128), ue8m0, (groups, columns, k))
    z = torch.full((tokens, groups, columns), float("nan"), dtype=torch.bfloat16, device=device)
    deep_gemm.fp8_einsum("bhr,hdr->bhd", (a[0], a[1].view(tokens, groups, -1)), b, z)
    assert calc_diff(z, torch.einsum("bhr,hdr->bhd", x.double(), y.double())) < 1e-3


def quantised(x, ue8m0: bool, shape):
    """Blocks of x [.., rows, k / 128, 128] in e4m3 with one scale each, amax / 448 or the next power of two."""
    scale = x.abs().float().amax((-3, -1), keepdim=True).clamp_min(1e-4) / 448
    if ue8m0:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return (x / scale).to(FP8).reshape(shape), scale[..., 0, :, 0].contiguous()


def check_both(tokens: int, heads: int, groups: int, device: str) -> None:
    """The product of what the quantiser gives, against the whole in float64."""
    problem = quant_problem(tokens, heads=heads, groups=groups, device=device, seed=tokens)
    k = heads // groups * 512
    rng = torch.Generator(device=device).manual_seed(1)
    y = torch.randn((groups, 1024, k), generator=rng, device=device)
    w = quantised(y.view(groups, 8, 128, k // 128, 128), True, y.shape)
    d = torch.full((tokens, groups, 1024), float("nan"), dtype=torch.bfloat16, device=device)
    views = vllm.fused_inv_rope_fp8_quant(*problem.args, groups, heads // groups)
    deep_gemm.fp8_einsum("bhr,hdr->bhd", views, w, d, recipe=(1, 128, 128))
    assert calc_diff(d, exact_chain(problem, *w)) < CHAIN_DIFF


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads, groups", [(64, 8), (32, 4), (4, 2)])
@pytest.mark.parametrize("tokens", [1, 7])
def test_quantiser(tokens, heads, groups, packed):
    check_quantiser(tokens, heads, groups, 0, packed, "cpu")


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("tokens", [4, 33])
def test_einsum(tokens, ue8m0):
    check_einsum(tokens, 2, 1024, 256, ue8m0, "cpu")


def test_both():
    check_both(7, 16, 2, "cpu")
