"""What tests of prefill share, here and in an engine's own suite: problems, a float64 oracle, the pass criterion.

    problem = prefill_problem([17, 0, 513], [17, 40, 2000], heads=16, device="cuda", seed=1)
    out, lse = jitmla.mla_prefill(*problem.args, **problem.kwargs, return_lse=True)
    check_prefill(problem, out, lse)

Whatever a kernel must not read holds NaN: rows behind the last request, and the padding of strided views. The oracle
shares no code with jitmla.ops.prefill_reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .testing import UNIT_ROUNDOFF

ORACLE_LOGITS = 1 << 27  # at once: 1 GB in float64


@dataclass(frozen=True)
class PrefillProblem:
    """The arguments of one jitmla.mla_prefill call, and what the host knows of them."""

    q: Tensor
    k: Tensor | tuple[Tensor, Tensor]
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    sm_scale: float
    causal: bool
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.cu_seqlens_q, self.cu_seqlens_k

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"max_seqlen_q": max(self.lengths_q, default=0), "max_seqlen_k": max(self.lengths_k, default=0),
                "sm_scale": self.sm_scale, "causal": self.causal}

    @property
    def out_shape(self) -> tuple[int, int, int]:
        return (*self.q.shape[:2], self.v.shape[2])

    def keys(self, rows: slice) -> Tensor:
        if isinstance(self.k, Tensor):
            return self.k[rows]
        k_nope, k_pe = (part[rows] for part in self.k)
        return torch.cat([k_nope, k_pe.expand(-1, k_nope.shape[1], -1)], -1)


def offsets(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def prefill_problem(lengths_q: Sequence[int], lengths_k: Sequence[int] | None = None, *, heads: int,
                    qk_head_dim: int = 192, v_head_dim: int = 128, causal: bool = True, keys: str = "pair",
                    inputs: str = "usual", pad: int = 5, width_pad: int = 0, dtype: torch.dtype = torch.bfloat16,
                    device: torch.device | str = "cpu", seed: int = 0) -> PrefillProblem:
    """A random problem. The same arguments give the same problem.

    lengths_k: None takes lengths_q. keys: "joined", "pair" (k_nope and v are views of one tensor, all heads share
    k_pe) or "heads" (a pair with a k_pe for each head).
    inputs: "usual", or "sharp" (logits spread over tens, and a late key that is seen by far the most).
    pad: rows of NaN behind the last request. width_pad: elements of NaN behind each row of q (a multiple of 8 keeps
        rows aligned).
    """
    lengths_k = lengths_q if lengths_k is None else lengths_k
    rng = torch.Generator(device=device).manual_seed(seed)
    rope, total_q, total_k = 64, sum(lengths_q), sum(lengths_k)

    def normal(rows: int, of: int, width: int, wide: int = 0) -> Tensor:
        storage = torch.full((rows + pad, of, width + wide), float("nan"), dtype=dtype, device=device)
        storage[:rows, :, :width] = torch.randn((rows, of, width), generator=rng, device=device).to(dtype)
        return storage[..., :width]

    q = normal(total_q, heads, qk_head_dim, width_pad)
    if inputs == "sharp":
        q *= 6
    elif inputs != "usual":
        raise ValueError(f"inputs={inputs!r}")
    k: Tensor | tuple[Tensor, Tensor]
    if keys == "joined":
        k, v = normal(total_k, heads, qk_head_dim), normal(total_k, heads, v_head_dim)
        first = k
    else:
        both = normal(total_k, heads, qk_head_dim - rope + v_head_dim)
        k = both[..., :qk_head_dim - rope], normal(total_k, 1 if keys == "pair" else heads, rope)
        v, first = both[..., qk_head_dim - rope:], k[0]
    if inputs == "sharp" and total_k:
        first[total_k // 2] *= 4
    return PrefillProblem(q, k, v, offsets(lengths_q, device), offsets(lengths_k, device), qk_head_dim**-0.5, causal,
                          tuple(lengths_q), tuple(lengths_k))


def exact_attention(q: Tensor, k: Tensor, v: Tensor, sm_scale: float, causal: bool) -> tuple[Tensor, ...]:
    """(out [tokens, heads, width], lse [tokens, heads], sum of weight * |value|, bound of the logits) of one request in
    float64; q [tokens, heads, D], k [keys, heads, D], v [keys, heads, width]."""
    tokens, keys = q.shape[0], k.shape[0]
    parts = []
    step = max(1, ORACLE_LOGITS // max(1, q.shape[1] * keys))
    for first in range(0, tokens, step):
        rows = q[first:first + step].double()
        x = sm_scale * torch.einsum("ihd,jhd->ihj", rows, k.double())
        if causal:
            position = torch.arange(first, first + rows.shape[0], device=q.device) + keys - tokens
            hidden = torch.arange(keys, device=q.device) > position[:, None]
            x = x.masked_fill(hidden[:, None], float("-inf"))
        top = x.amax(-1, keepdim=True) if keys else x.new_full((*x.shape[:2], 1), float("-inf"))
        top = torch.where(top.isinf(), 0.0, top)
        weight = torch.exp(x - top)
        total = weight.sum(-1, keepdim=True)
        lse = (top + torch.log(total))[..., 0]
        weight = weight / torch.where(total > 0, total, 1.0)
        bound = sm_scale * rows.norm(dim=-1) * (k.double().norm(dim=-1).amax(0) if keys else 0.0)
        parts.append((torch.einsum("ihj,jhd->ihd", weight, v.double()), lse,
                      torch.einsum("ihj,jhd->ihd", weight, v.double().abs()), bound))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def check_prefill(problem: PrefillProblem, out: Tensor, lse: Tensor | None = None, *, requests: Sequence[int] = (),
                  roundings: float = 3.0) -> float:
    """Raise AssertionError unless every element of every head of the requests (default: all) is right; returns the
    largest error as a fraction of what is allowed.

    Weights and result are each rounded once to the dtype, so out may be off by 2 * unit roundoff * sum of weight *
    |value| (plus half of that for the rest); lse by 1e-6, 8.01/65536 of itself, and a float32 roundoff of the products.
    """
    worst = 0.0
    starts_q, starts_k = ([0, *accumulate(x)] for x in (problem.lengths_q, problem.lengths_k))
    for b in requests or range(len(problem.lengths_q)):
        rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        if problem.lengths_q[b] == 0:
            continue
        exact, exact_lse, spread, bound = exact_attention(problem.q[rows], problem.keys(keys), problem.v[keys],
                                                          problem.sm_scale, problem.causal)
        allowed = roundings * UNIT_ROUNDOFF[problem.q.dtype] * spread + 1e-4
        worst = max(worst, _compare(f"out of request {b}", out[rows], exact, allowed))
        if lse is not None:
            allowed = torch.maximum(torch.full_like(exact_lse, 1e-6), exact_lse.abs() * (8.01 / 65536)) + 1e-6 * bound
            worst = max(worst, _compare(f"lse of request {b}", lse[rows], exact_lse, allowed))
    return worst


def _compare(name: str, got: Tensor, exact: Tensor, allowed: Tensor) -> float:
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)} instead of {list(exact.shape)}"
    got = got.double()
    both = exact.isinf() & (got == exact)
    error = torch.where(both, 0.0, (got - exact).abs())
    ratio = torch.where(both, 0.0, error / allowed).nan_to_num(nan=float("inf"))
    worst = float(ratio.max())
    if not worst <= 1:
        place = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
        wrong = (ratio > 1).flatten(2).any(-1) if ratio.dim() > 2 else ratio > 1
        heads = wrong.any(0).nonzero().flatten().tolist()
        raise AssertionError(f"{name}: {got[place].item()} instead of {exact[place].item()} at {place}; wrong in "
                             f"{int((ratio > 1).sum())} elements of heads {heads[:12]}")
    return worst
