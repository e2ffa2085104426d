"""What tests of sparse MLA share, here and in an engine's own suite: problems, a float64 oracle, the pass criterion.

    problem = sparse_mla_problem(batch=3, topk=100, rows=640, heads=16, device="cuda", seed=1)
    out, lse = jitmla.sparse_mla_decode(*problem.args, **problem.kwargs, return_lse=True)
    sparse_mla_oracle(problem).check(out, lse)

What must not be read holds NaN: rows that no list names, the padding of rows and pages, and what lies behind a length.
The oracle takes the values that the rows were packed from, and computes in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .testing import Report, _worst

NO_ROW = (-1, -1, -1, 1 << 31, (1 << 31) - 1, -123456, 0)  # what invalid entries hold; 1 << 31: the size of the pool
MAX_DECODE, MAX_PREFILL = (1e-3, 2.01 / 128, 5e-6, 8.01 / 65536), (8e-4, 3.01 / 128, 7e-6, 2.01 / 65536)
ORACLE_ENTRIES = 1 << 15  # gathered at once


def pack_rows(latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 512] and [n, 64] as rows of 656 bytes (uint8), and what they stand for, [n, 576] float64.

    Scale of 128 columns: the power of two at or above max(amax / 448, 1e-4), by bits.
    """
    values = latent.float().view(-1, 4, 128)
    raw = (values.abs().amax(-1) / 448).clamp_min(1e-4)
    mantissa, exponent = torch.frexp(raw)
    scale = torch.ldexp(torch.ones_like(raw), exponent - (mantissa == 0.5).int())
    fp8 = (values / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    rope = rope.to(torch.bfloat16).contiguous()
    rows = torch.cat([fp8.view(-1, 512).view(torch.uint8), scale.contiguous().view(torch.uint8).view(-1, 16),
                      rope.view(torch.uint8)], 1)
    exact = (fp8.double() * scale.double()[..., None]).view(-1, 512)
    return rows, torch.cat([exact, rope.double()], 1)


@dataclass(frozen=True)
class SparseProblem:
    """The arguments of one jitmla.sparse_mla_decode call, and what the cache rows stand for."""

    q: Tensor
    kv: Tensor
    indices: Tensor
    sm_scale: float
    topk_length: Tensor | None
    attn_sink: Tensor | None
    exact: Tensor  # [rows, columns] float64; NaN where no row is
    large: bool

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.kv, self.indices

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"sm_scale": self.sm_scale, "topk_length": self.topk_length, "attn_sink": self.attn_sink}

    @property
    def prefill(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of jitmla.sparse_mla_prefill, for a problem of s_q 1 and pages that lie one behind the
        other."""
        return self.q[:, 0], self.kv.flatten(0, 1), self.indices


def sparse_mla_problem(*, batch: int, topk: int, rows: int, heads: int, s_q: int = 1, page_size: int = 64,
                       fmt: str = "fp8", columns: int = 576, lengths: Sequence[int] | None = None,
                       invalid: float = 0.0, sinks: str | None = None, large: bool = False, sm_scale: float = 0.1352,
                       page_pad: int = 0, q_pad: int = 0, device: torch.device | str = "cpu", seed: int = 0
                       ) -> SparseProblem:
    """A random problem; the same arguments give the same one. Half of the rows of the pool are used, the others NaN.

    rows: about as many in the pool (whole pages). fmt: "fp8" or "bf16". invalid: share of entries that are no row.
    lengths: topk_length of each request. sinks: None, "finite" or "mixed" (every third +inf, the next -inf).
    large: N(0, 1) and rows of very different size, instead of N(0, 1) / 10 clamped to +-1, which the criterion is for.
    page_pad: bytes behind each page, q_pad: columns behind each row of q (multiples of 16 and 8).
    """
    rng = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=rng, device=device, dtype=torch.float32)
        return x if large else (x / 10).clamp_(-1, 1)

    def uniform(top: int, *shape: int) -> Tensor:
        return torch.randint(top, shape, generator=rng, device=device)

    pages = max(-(-rows // page_size), 1)
    rows = pages * page_size
    used = torch.randperm(rows, generator=rng, device=device)[:max(rows // 2, 1)]
    values = normal(len(used), columns)
    if large:
        values[:, :512] *= torch.exp2(uniform(9, len(used), 1).float() - 6)
    exact = torch.full((rows, columns), float("nan"), dtype=torch.float64, device=device)
    if fmt == "fp8":
        packed, exact[used] = pack_rows(values[:, :512], values[:, 512:])
    else:
        narrow = values.bfloat16()
        exact[used] = narrow.double()
        packed = narrow.view(torch.uint8)
    width = packed.shape[1]
    storage = torch.full((pages, page_size * width + page_pad), 255, dtype=torch.uint8, device=device)
    kv = storage.as_strided((pages, page_size, 1, width), (page_size * width + page_pad, width, width, 1))
    kv[used // page_size, used % page_size, 0] = packed
    if fmt == "bf16":
        kv = kv.view(torch.bfloat16)

    indices = used[uniform(len(used), batch, s_q, topk)].int()
    no_row = torch.tensor([rows if x == 1 << 31 else x or -(1 << 31) for x in NO_ROW], dtype=torch.int32, device=device)
    bad = torch.rand(batch, s_q, topk, generator=rng, device=device) < invalid
    indices = torch.where(bad, no_row[uniform(len(no_row), batch, s_q, topk)], indices)
    topk_length = None
    if lengths is not None:
        topk_length = torch.tensor(list(lengths), dtype=torch.int32, device=device)
        unused = torch.ones(rows, dtype=torch.bool, device=device)
        unused[used] = False
        trap = unused.nonzero().flatten().int()
        behind = torch.arange(topk, device=device) >= topk_length[:, None, None]
        indices = torch.where(behind, trap[uniform(len(trap), batch, s_q, topk)], indices)  # valid, and NaN
    attn_sink = None
    if sinks is not None:
        attn_sink = torch.randn(heads, generator=rng, device=device) * 3 + 3
        if sinks == "mixed":
            attn_sink[0::3], attn_sink[1::3] = float("inf"), float("-inf")
    q = torch.full((batch, s_q, heads, columns + q_pad), float("nan"), dtype=torch.bfloat16, device=device)
    q[..., :columns] = normal(batch, s_q, heads, columns).bfloat16()
    return SparseProblem(q[..., :columns], kv, indices, sm_scale, topk_length, attn_sink, exact, large)


@dataclass(frozen=True)
class SparseOracle:
    """Exact results of a problem, float64; `requests` are those they are for."""

    problem: SparseProblem
    requests: tuple[int, ...]
    out: Tensor  # [requests, s_q, heads, 512]
    lse: Tensor  # [requests, heads, s_q]
    top: Tensor  # like lse: the largest logit
    spread: Tensor  # like out: sum of weight * |value|
    logit: Tensor  # like lse: |q| * max |key| * sm_scale

    def check(self, out: Tensor, lse: Tensor | None = None, top: Tensor | None = None, *, prefill: bool = False
              ) -> Report:
        """Raise AssertionError unless every element is within FlashMLA's criterion for decode or prefill: out absolute
        or relative, a cosine difference, lse relative. large=True: out within three roundings to bf16 of what is
        summed."""
        absolute, relative, cosine, lse_relative = MAX_PREFILL if prefill else MAX_DECODE
        report = Report()
        chosen = torch.tensor(self.requests, dtype=torch.int64, device=out.device)
        got = out[chosen]
        allowed = torch.maximum(torch.full_like(self.out, absolute), self.out.abs() * relative)
        if self.problem.large:
            allowed = torch.maximum(3 * 2.0**-8 * self.spread + 1e-4, allowed)
        report.out = _worst("out", got, self.out, allowed, report.faults)
        x = got.double()
        total = (x * x + self.out * self.out).sum()
        report.cosine = float(torch.where(total > 0, 1 - 2 * (x * self.out).sum() / total, 0.0))
        if not self.problem.large and not report.cosine <= cosine:
            report.faults.append(f"cosine difference {report.cosine:.2e} > {cosine}")
        for name, value, exact in (("lse", lse, self.lse), ("max_logits", top, self.top)):
            if value is not None:
                allowed = torch.maximum(torch.full_like(exact, 1e-6), exact.abs() * lse_relative) + 1e-6 * self.logit
                worst = _worst(name, value[chosen], exact, allowed, report.faults)
                report.lse = max(report.lse, worst, key=lambda w: w.ratio)
        if report.faults:
            p = self.problem
            raise AssertionError("; ".join(report.faults) + f"\n  {report}\n  q {list(p.q.shape)}, cache "
                                 f"{list(p.kv.shape)} {p.kv.dtype}, topk {p.indices.shape[2]}")
        return report


def sparse_mla_oracle(problem: SparseProblem, requests: Sequence[int] | None = None) -> SparseOracle:
    """The exact result of `problem`, or of some of its requests, on its device."""
    p = problem
    batch, s_q, heads, columns = p.q.shape
    topk, rows = p.indices.shape[2], len(p.exact)
    chosen = list(range(batch)) if requests is None else list(requests)
    pieces: list[tuple[Tensor, ...]] = []
    at_once = max(ORACLE_ENTRIES // max(s_q * topk, 1), 1)
    for first in range(0, len(chosen), at_once):
        which = torch.tensor(chosen[first:first + at_once], device=p.q.device)
        index = p.indices[which].long()
        valid = (index >= 0) & (index < rows)
        if p.topk_length is not None:
            valid &= torch.arange(topk, device=index.device) < p.topk_length[which][:, None, None]
        key = torch.where(valid[..., None], p.exact[index.where(valid, 0)], 0.0)
        query = p.q[which].double()
        x = (p.sm_scale * torch.einsum("bihd,bikd->bihk", query, key)).masked_fill(~valid[:, :, None], float("-inf"))
        top = x.max(-1, keepdim=True).values if topk else x.new_full((*x.shape[:3], 1), float("-inf"))
        floor = torch.where(top.isinf(), 0.0, top)
        weight = torch.exp(x - floor)
        sink = 0.0 if p.attn_sink is None else torch.exp(p.attn_sink.double()[:, None] - floor)
        total = weight.sum(-1, keepdim=True)
        lse = torch.where(total > 0, floor + torch.log(total), float("inf"))
        weight = weight / torch.where(total + sink > 0, total + sink, 1.0)
        norm = query.norm(dim=-1) * key.norm(dim=-1).amax(-1)[..., None] if topk else query.norm(dim=-1)
        pieces.append((torch.einsum("bihk,bikd->bihd", weight, key[..., :512]), lse[..., 0].transpose(1, 2),
                       top[..., 0].transpose(1, 2), torch.einsum("bihk,bikd->bihd", weight, key[..., :512].abs()),
                       p.sm_scale * norm.transpose(1, 2)))
    results = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    return SparseOracle(p, tuple(chosen), *results)
