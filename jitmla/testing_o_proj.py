"""What tests of DeepSeek-V4's output path share, here and in an engine's own suite: problems, oracles, criteria.

    problem = quant_problem(1500, heads=128, groups=8, device="cuda")
    o_fp8, o_scale = jitmla.inv_rope_fp8_quant(*problem.args, n_groups=8, scale_mode="pow2_f32")
    check_quant(problem, o_fp8, o_scale, scale_mode="pow2_f32")

The oracles compute in float64 and share no code with jitmla.ops.o_proj_reference. Whatever must not be read is NaN:
heads behind the last one of a padded buffer, columns between the rows of a strided view, scales behind the last token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
MAX_POSITION = 8192
PRODUCT_DIFF = 1e-5  # a product against an exact one of the same quantised factors
CHAIN_DIFF = 2e-3  # the chain against one of unquantised activations


def calc_diff(x: Tensor, y: Tensor) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>) in float64, over all elements; 0 for empty tensors."""
    x, y = x.double(), y.double()
    total = (x * x + y * y).sum().item()
    return 1 - 2 * (x * y).sum().item() / total if total else 0.0


def cos_sin_table(rows: int = MAX_POSITION, rope_dim: int = 64, base: float = 10000.0) -> Tensor:
    """[rows, rope_dim] float32: cosines and sines of position * base^(-2 i / rope_dim), rounded once."""
    i = torch.arange(rope_dim // 2, dtype=torch.float64)
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * base ** (-2 * i / rope_dim)
    return torch.cat([angles.cos(), angles.sin()], 1).float()


@dataclass(frozen=True)
class QuantProblem:
    """The arguments of one jitmla.inv_rope_fp8_quant call."""

    o: Tensor
    positions: Tensor
    cos_sin_cache: Tensor
    groups: int

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.o, self.positions, self.cos_sin_cache


def quant_problem(tokens: int, *, heads: int, groups: int, head_dim: int = 512, rope_dim: int = 64,
                  padded_heads: int | None = None, token_pad: int = 0, positions: torch.dtype = torch.int64,
                  inputs: str = "usual", device: torch.device | str = "cpu", seed: int = 0) -> QuantProblem:
    """A random problem. The same arguments give the same problem.

    padded_heads: heads of the buffer that o is a view of; token_pad: elements behind each token's heads.
    inputs: "usual" (magnitudes over a few decades), "wild" (from 1e-26 to 1e26, with blocks of zeros and values whose
        scale is at a power of two).
    """
    rng = torch.Generator(device=device).manual_seed(seed)
    wide = (padded_heads or heads) * head_dim + token_pad
    storage = torch.full((tokens, wide), float("nan"), dtype=torch.bfloat16, device=device)
    x = torch.randn((tokens, heads, head_dim), generator=rng, device=device)
    level = torch.randn((tokens, heads, head_dim // 128), generator=rng, device=device)
    if inputs == "wild":
        pick = torch.rand(level.shape, generator=rng, device=device)
        level = torch.where(pick < 0.2, -200.0, (level * 25).clamp(-60, 60))  # exp(-200) is zero in bf16
        x = torch.where((pick > 0.9).repeat_interleave(128, -1), x.sign() * 448, x)
        level = torch.where(pick > 0.9, level.round() * math.log(2), level)
    elif inputs != "usual":
        raise ValueError(f"inputs={inputs!r}")
    o = storage[:, :heads * head_dim].unflatten(1, (heads, head_dim))
    o.copy_(x * level.repeat_interleave(128, -1).exp())
    where = torch.randint(0, MAX_POSITION, (tokens,), generator=rng, device=device).to(positions)
    return QuantProblem(o, where, cos_sin_table(rope_dim=rope_dim).to(device), groups)


def exact_rotation(problem: QuantProblem, neox: bool = False) -> Tensor:
    """o with its last columns rotated back, float64, [tokens, heads, head_dim]."""
    x = problem.o.double()
    table = problem.cos_sin_cache.double()[problem.positions.long()]
    half = table.shape[1] // 2
    angle = torch.complex(table[:, :half], -table[:, half:])[:, None]  # minus the angle
    rope = x[..., -2 * half:]
    if neox:
        turned = torch.complex(rope[..., :half].contiguous(), rope[..., half:].contiguous()) * angle
        new = torch.cat([turned.real, turned.imag], -1)
    else:
        turned = torch.view_as_complex(rope.unflatten(-1, (half, 2)).contiguous()) * angle
        new = torch.view_as_real(turned).flatten(-2)
    return torch.cat([x[..., :-2 * half], new], -1)


def stored_scales(o_scale: Tensor, tokens: int, scale_mode: str) -> Tensor:
    """What consumers multiply with, float64 [groups, tokens, blocks]."""
    scale = o_scale[..., :tokens]
    if scale_mode == "ue8m0_i32":
        parts = torch.stack([(scale >> (8 * j)) & 255 for j in range(4)], 2).flatten(1, 2)
        return torch.exp2(parts.double() - 127).transpose(1, 2)
    return scale.double().transpose(1, 2)


def check_quant(problem: QuantProblem, o_fp8: Tensor, o_scale: Tensor, *, scale_mode: str,
                neox: bool = False) -> None:
    """Raise AssertionError unless this is the quantised `problem`.

    Powers of two: exact where no rotation is involved, and elsewhere the smallest one that does not clip the values as
    a float32 rotation may have rounded them. amax / 448: to 1e-6. Codes: the nearest, but for ties and the last bits of
    the rotation and of the division; never further than the next one.
    """
    tokens, heads, dim = problem.o.shape
    groups, per_token = problem.groups, heads // problem.groups * dim
    assert o_fp8.shape == (groups, tokens, per_token) and o_fp8.dtype == FP8, (o_fp8.shape, o_fp8.dtype)
    words = per_token // 128 // (4 if scale_mode == "ue8m0_i32" else 1)
    assert o_scale.shape == (groups, words, (tokens + 3) // 4 * 4), o_scale.shape
    assert not bool(o_scale[..., tokens:].any()), "the padding of the scales is not zero"
    if tokens == 0:
        return
    exact = exact_rotation(problem, neox).view(tokens, groups, -1, 128).transpose(0, 1)  # [groups, tokens, blocks, 128]
    turned = torch.zeros(dim // 128, dtype=torch.bool, device=o_fp8.device)
    turned[-1] = True  # blocks with rotated columns
    turned = turned.repeat(heads // groups)
    amax = exact.abs().amax(-1).clamp_min(1e-10)
    scale = stored_scales(o_scale, tokens, scale_mode)
    if scale_mode == "raw_f32":
        error = (scale / (amax / FP8_MAX) - 1).abs().max().item()
        assert error < 1e-6, f"scales are off by {error:.1e}"
    else:
        mantissa, _ = torch.frexp(scale)
        assert bool((mantissa == 0.5).all()), "a scale is not a power of two"
        slack = torch.where(turned, 1e-6, 0.0)
        assert bool((amax <= scale * FP8_MAX * (1 + slack)).all()), "a scale clips"
        assert bool((amax > scale * FP8_MAX / 2 * (1 - slack)).all()), "a scale is larger than needed"
    ideal = exact / scale[..., None]
    got = o_fp8.view(groups, tokens, -1, 128).double()
    assert bool(got.isfinite().all()), "a code is NaN"
    # half a step at the size of the value: 1/16 of it, or of the smallest normal
    step = ideal.abs().clamp(2.0**-6, FP8_MAX).log2().floor().exp2() / 8
    loose = torch.full_like(step, 1e-6) if scale_mode == "raw_f32" else torch.where(turned, 1e-6, 0.0)[:, None]
    error = (got - ideal.clamp(-FP8_MAX, FP8_MAX)).abs()
    allowed = step / 2 + loose * exact.abs().amax(-1, keepdim=True) / scale[..., None]
    worst = (error / allowed).max().item()
    assert worst <= 1, f"a code is {worst:.3f} of what rounding allows away from its value"


@dataclass(frozen=True)
class ProductProblem:
    """The arguments of one jitmla.fp8_bmm call."""

    a: Tensor
    a_scale: Tensor
    b: Tensor
    b_scale: Tensor

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.a, self.a_scale, self.b, self.b_scale

    @property
    def out_shape(self) -> tuple[int, int, int]:
        return self.a.shape[0], self.a.shape[1], self.b.shape[1]


def product_problem(tokens: int, *, groups: int, columns: int, k: int, device: torch.device | str = "cpu",
                    seed: int = 0, tokens_first: bool = False, scale_pad: int = 0) -> ProductProblem:
    """A random problem. tokens_first: a is a view of [tokens, groups, k]. scale_pad: further columns (a multiple of 4)
    of the buffer that a_scale is a view of; they hold NaN."""
    rng = torch.Generator(device=device).manual_seed(seed)

    def values(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=rng, device=device) * 100
        return x.clamp_(-FP8_MAX, FP8_MAX).to(FP8)

    def scales(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng, device=device) * 1e-2 + 1e-3

    a = values(tokens, groups, k).transpose(0, 1) if tokens_first else values(groups, tokens, k)
    padded = (tokens + 3) // 4 * 4
    storage = torch.full((groups, k // 128, padded + scale_pad), float("nan"), device=device)
    storage[..., :tokens] = scales(groups, k // 128, tokens)
    if not scale_pad:
        storage[..., tokens:] = 0
    return ProductProblem(a, storage[..., :tokens] if scale_pad else storage, values(groups, columns, k),
                          scales(groups, columns // 128, k // 128))


def exact_product(problem: ProductProblem) -> Tensor:
    """[groups, tokens, columns] in float64."""
    p = problem
    groups, tokens, k = p.a.shape
    columns = p.b.shape[1]
    a = p.a.double().unflatten(2, (-1, 128)) * p.a_scale[..., :tokens].double().transpose(1, 2)[..., None]
    b = p.b.double().view(groups, columns // 128, 128, -1, 128) * p.b_scale.double()[:, :, None, :, None]
    return a.flatten(2) @ b.view(groups, columns, k).transpose(1, 2)


def check_product(problem: ProductProblem, out: Tensor) -> None:
    """Raise AssertionError unless `out` is the product: calc_diff below 1e-5 and every element as near as rounding to
    bf16 and float32 sums of tensor-core sums allow."""
    exact = exact_product(problem)
    assert out.shape == exact.shape and out.dtype == torch.bfloat16, (out.shape, out.dtype)
    assert bool(out.isfinite().all()), f"{int((~out.isfinite()).sum())} elements are not finite"
    diff = calc_diff(out, exact)
    assert diff < PRODUCT_DIFF, f"calc_diff {diff:.1e}"
    if out.numel():
        size = exact.square().mean().sqrt()  # what the sums that cancelled were made of
        worst = ((out.double() - exact).abs() / ((exact.abs() + size) * 2.0**-7)).max().item()
        assert worst <= 1, f"an element is {worst:.2f} times as far away as rounding to bf16 allows"


def exact_chain(problem: QuantProblem, w_fp8: Tensor, w_scale: Tensor, neox: bool = False) -> Tensor:
    """o_a_proj of unquantised activations in float64, [tokens, groups, rows]."""
    groups, rows, k = w_fp8.shape
    x = exact_rotation(problem, neox).view(-1, groups, k).transpose(0, 1)
    w = w_fp8.double().view(groups, rows // 128, 128, -1, 128) * w_scale.double()[:, :, None, :, None]
    return (x @ w.view(groups, rows, k).transpose(1, 2)).transpose(0, 1)


def golden_row() -> Tensor:
    """A row whose values are exact in bf16; jitmla's golden codes and scales are of it, at position 3."""
    d = torch.arange(512)
    return (((37 * d) % 101 - 50) / 16 * torch.exp2((d // 64 - 3).float())).bfloat16()


GOLDEN: dict[str, dict[str, Any]] = {
    "pow2_f32": {"scales": [2.0 ** (e - 127) for e in (118, 120, 122, 124)], "head": "f4e56cf2d470ef5e",
                 "rope": "7965fbea7bee6d73", "crc": 0x4E40AFF6},
    "ue8m0_i32": {"scales": [0x7C7A7876], "head": "f4e56cf2d470ef5e", "rope": "7965fbea7bee6d73", "crc": 0x4E40AFF6},
    "raw_f32": {"scales": [0.00174386, 0.00697545, 0.02790179, 0.11163674], "head": "f6e76df3d572f060", "rope": None,
                "crc": 0x3A86B8DC},
}
