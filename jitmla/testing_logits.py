"""What tests of the logits of DSA's indexer and of its top-k share: problems, oracles, criteria. The oracles compute in
float64 and share no code with jitmla.ops.indexer_reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .testing_indexer import DIM, FP8, generator
from .testing_o_proj import calc_diff

LOGITS_DIFF = 5e-6


@dataclass(frozen=True)
class LogitsProblem:
    """Queries, keys and their factors. integer: every partial sum is exact in float32, in any order."""

    q: Tensor
    k: Tensor
    k_scale: Tensor
    weights: Tensor
    integer: bool


def logits_problem(rows: int, keys: int, *, heads: int = 64, integer: bool = True, device: torch.device | str = "cpu",
                   seed: int = 0) -> LogitsProblem:
    rng = generator(seed, device)

    def drawn(values: Sequence[float], *shape: int) -> Tensor:
        at = torch.randint(0, len(values), shape, generator=rng, device=device)
        return torch.tensor(values, dtype=torch.float32, device=device)[at]

    if integer:
        small = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
        return LogitsProblem(drawn(small, rows, heads, DIM).to(FP8), drawn(small, keys, DIM).to(FP8),
                             drawn([0.5, 1.0, 2.0], keys), drawn([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0], rows, heads), True)
    q, k = (torch.randn(shape, generator=rng, device=device) * 4 for shape in ((rows, heads, DIM), (keys, DIM)))
    return LogitsProblem(q.to(FP8), k.to(FP8), torch.rand(keys, generator=rng, device=device) + 0.1,
                         torch.randn(rows, heads, generator=rng, device=device), False)


def exact_logits(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor) -> Tensor:
    """[rows, keys] float64."""
    out = torch.empty(q.shape[0], k.shape[0], dtype=torch.float64, device=q.device)
    keys = k.double()
    for i in range(0, q.shape[0], 16):
        dots = (q[i:i + 16].double() @ keys.T).clamp_min(0)
        out[i:i + 16] = (dots * weights[i:i + 16, :, None].double()).sum(1) * k_scale.double()
    return out


def check_logits(got: Tensor, exact: Tensor, inside: Tensor, integer: bool) -> None:
    """Raise AssertionError unless the cells `inside` are right: bit for bit on integer problems."""
    x, y = got[inside].double(), exact[inside]
    assert bool(x.isfinite().all()), f"{int((~x.isfinite()).sum())} of {x.numel()} cells are not finite"
    if integer:
        assert torch.equal(x, y), f"{int((x != y).sum())} of {x.numel()} cells differ"
    else:
        diff = calc_diff(x, y)
        assert diff < LOGITS_DIFF, f"calc_diff {diff:.1e}"


def windows(rows: int, keys: int, kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Starts and ends: "causal" (aligned at the end), "any", "band" (narrow, increasing, every seventh one empty),
    "over" (ends behind the last key)."""
    rng = generator(seed, "cpu")
    a, b = (torch.randint(0, keys + 1, (rows,), generator=rng) for _ in range(2))
    if kind == "causal":
        a, b = torch.zeros(rows), torch.arange(keys - rows + 1, keys + 1).clamp(min=0)
    elif kind == "band":
        a = torch.arange(rows) * keys // rows
        b = (a + torch.randint(0, 90, (rows,), generator=rng)).clamp(max=keys)
        b[::7] = a[::7]
    elif kind == "over":
        b = a + keys
    else:
        a, b = torch.minimum(a, b), torch.maximum(a, b)
    return a.int(), b.int()


# ------------------------------------------------------------------------------------------------ top-k


def topk_rows(rows: int, n: int, seed: int = 0, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """(name, [rows, n] float32): distributions that have broken implementations of top-k."""
    rng = generator(seed, device)

    def normal() -> Tensor:
        return torch.randn(rows, n, generator=rng, device=device)

    def chance(p: float) -> Tensor:
        return torch.rand(rows, n, generator=rng, device=device) < p

    inf, nan = float("inf"), float("nan")
    yield "normal", normal()
    yield "around five", normal() * 0.3 + 5
    low = torch.randint(0, 1024, (rows, n), generator=rng, device=device, dtype=torch.int32)
    yield "low bits", (low + 0x3F800000).view(torch.float32)
    yield "ascending", torch.arange(n, device=device).float().repeat(rows, 1)
    yield "constant", torch.full((rows, n), 2.5, device=device)
    yield "zeros", normal().masked_fill(chance(0.9), 0.0)
    yield "both zeros", torch.where(chance(0.5), 0.0, -0.0) - chance(0.05) * normal().abs()
    tail = normal()
    tail[:, 100:] = -inf
    yield "-inf behind", tail
    yield "nan and inf", normal().masked_fill(chance(0.3), nan).masked_fill(chance(0.01), inf)
    nothing = torch.full((rows, n), nan, device=device)
    nothing[:, ::3], nothing[:, :7] = -inf, 1.0
    yield "hardly a number", nothing
    bulge = -normal().abs()
    bulge[:, n // 2:n // 2 + 2500] += 10
    yield "in one place", bulge
    wide = normal()
    wide[:, n // 3] = 1e30
    yield "an outlier", wide


def exact_topk(logits: Tensor, start: Tensor, end: Tensor, k: int) -> Tensor:
    """[rows, k] int64: the positions in increasing order, then -1. By a stable sort, where `logits` are."""
    out = torch.full((logits.shape[0], k), -1, dtype=torch.int64)
    for r, (a, b) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        row = logits[r, a:max(a, min(b, logits.shape[1]))].double()
        row = torch.where(row.isnan(), -torch.inf, row)
        row[row == 0] = 0.0
        order = row.sort(descending=True, stable=True)[1] if len(row) > k else torch.arange(len(row))
        out[r, :min(k, len(row))] = order[:k].sort()[0]
    return out


def check_topk(got: Tensor, exact: Tensor) -> None:
    """Raise AssertionError unless each row of `got` holds the positions of `exact`, -1 at its end alone."""
    got = got.long().cpu()
    valid = (exact >= 0).sum(1, keepdim=True)
    front = torch.arange(got.shape[1]) < valid
    assert bool((got[~front] == -1).all()) and bool((got[front] >= 0).all()), "-1 elsewhere than at the end"
    ordered = torch.where(got < 0, 2**40, got).sort(1).values
    wanted = torch.where(exact < 0, 2**40, exact)
    bad = (ordered != wanted).any(1)
    assert not bool(bad.any()), f"{int(bad.sum())} of {len(bad)} rows have other positions"
