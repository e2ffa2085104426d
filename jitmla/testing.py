"""What tests of MLA decode share, here and in an engine's own suite: problems, a float64 oracle, the pass criterion.

    problem = mla_decode_problem([17, 0, 513], heads=16, device="cuda", seed=1)
    out, lse = jitmla.mla_decode(*problem.args, **problem.kwargs, return_lse=True)
    mla_decode_oracle(problem).check(out, lse)

A problem is poisoned unless told otherwise: whatever a kernel must not read holds NaN (unused pages, rows behind a
request's length, the padding of every strided view) or a page id out of range (unread block-table entries). The oracle
shares no code with jitmla.ops.reference: it gathers rows densely, masks explicitly, and computes in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

GARBAGE_PAGES = (2147480000, -1, 2147483647, -2147483648, 1 << 20)  # what unread block-table entries may hold
E4M3_DOTS = 2.0**-11  # error of a dot product of e4m3 vectors on 8-bit tensor cores, relative to |q| |key|
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ORACLE_TOKENS = 1 << 16  # gathered at once: 0.3 GB in float64


@dataclass(frozen=True)
class Problem:
    """The arguments of one jitmla.mla_decode call, and what the host knows of them."""

    q: Tensor | tuple[Tensor, Tensor]
    kv_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    kv_lora_rank: int
    sm_scale: float
    causal: bool
    sinks: Tensor | None
    lengths: tuple[int, ...]
    inputs: str

    @property
    def args(self) -> tuple[Any, ...]:
        return self.q, self.kv_cache, self.block_table, self.seq_lens

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"kv_lora_rank": self.kv_lora_rank, "sm_scale": self.sm_scale, "causal": self.causal,
                "sinks": self.sinks}

    @property
    def q_parts(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.q, tuple):
            return self.q
        return self.q[..., :self.kv_lora_rank], self.q[..., self.kv_lora_rank:]

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        batch, s_q, heads, _ = self.q_parts[0].shape
        return batch, s_q, heads, self.kv_lora_rank

    @property
    def dtype(self) -> torch.dtype:
        return self.kv_cache.dtype

    @property
    def device(self) -> torch.device:
        return self.kv_cache.device


def mla_decode_problem(lengths: Sequence[int], *, heads: int, s_q: int = 1, page_size: int = 64,
                       kv_lora_rank: int = 512, qk_rope_head_dim: int = 64, dtype: torch.dtype = torch.bfloat16,
                       device: torch.device | str = "cpu", seed: int = 0, causal: bool = True,
                       sm_scale: float | None = None, sinks: str | None = None, inputs: str = "usual",
                       query: str = "joined", poison: bool = True, spare_pages: int = 3, first_page: int = 0,
                       extra_table: int = 2, q_pad: int = 0, row_pad: int = 0, page_pad: int = 0) -> Problem:
    """A random problem with these lengths. The same arguments give the same problem.

    sm_scale: None takes the natural one of a model with 128 more query columns before absorption.
    sinks: None, "finite", or "mixed" (every third head +inf, the next one -inf).
    inputs: "usual" (N(0, 1) / 10, clamped to +-1: what the criterion was made for) or "large" (N(0, 1) and a scale that
        spreads the logits over tens, so that few keys have all the weight).
    query: "joined" tensor, "pair" of tensors, or "views" (a pair that are views of one tensor).
    spare_pages, first_page: pages that no request uses; all pages below first_page are unused.
    extra_table: block-table columns behind the longest request. q_pad, row_pad, page_pad: elements of padding behind
        each query row, each cache row and each page (multiples of 8 keep rows 16-byte aligned).
    """
    if inputs not in ("usual", "large") or sinks not in (None, "finite", "mixed"):
        raise ValueError(f"inputs={inputs!r}, sinks={sinks!r}")
    rng = torch.Generator(device=device).manual_seed(seed)
    width = kv_lora_rank + qk_rope_head_dim
    batch = len(lengths)
    nan = float("nan") if poison else 0.0

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=rng, device=device, dtype=torch.float32)
        return (x if inputs == "large" else (x / 10).clamp_(-1, 1)).to(dtype)

    def padded(values: Tensor, pad: int) -> Tensor:
        storage = torch.full((*values.shape[:-1], values.shape[-1] + pad), nan, dtype=dtype, device=device)
        storage[..., :values.shape[-1]] = values
        return storage[..., :values.shape[-1]]

    counts = [-(-n // page_size) for n in lengths]
    used = sum(counts)
    pages = first_page + used + spare_pages
    storage = torch.full((pages * ((page_size * (width + row_pad)) + page_pad),), nan, dtype=dtype, device=device)
    kv_cache = storage.as_strided((pages, page_size, width),
                                  (page_size * (width + row_pad) + page_pad, width + row_pad, 1))
    ids = torch.randperm(used + spare_pages, generator=rng, device=device)[:used] + first_page
    rows = normal(used, page_size, width)
    if poison and used:
        live = torch.tensor([min(page_size, n - j * page_size) for n, c in zip(lengths, counts, strict=True)
                             for j in range(c)], device=device)
        rows[torch.arange(page_size, device=device) >= live[:, None]] = nan
    kv_cache[ids] = rows

    max_pages = max(counts, default=0) + extra_table
    garbage = torch.tensor(GARBAGE_PAGES if poison else (0,), dtype=torch.int32, device=device)
    table = garbage.repeat(batch * (max_pages + 1) // len(garbage) + 1)[:batch * (max_pages + 1)]
    where = torch.tensor([b * (max_pages + 1) + j for b, c in enumerate(counts) for j in range(c)], dtype=torch.int64,
                         device=device)
    table[where] = ids.int()
    block_table = table.view(batch, max_pages + 1)[:, :max_pages]  # its row stride is not its width

    joined = normal(batch, s_q, heads, width)
    q: Tensor | tuple[Tensor, Tensor]
    if query == "joined":
        q = padded(joined, q_pad)
    elif query == "pair":
        q = padded(joined[..., :kv_lora_rank], q_pad), padded(joined[..., kv_lora_rank:], q_pad)
    elif query == "views":
        both = padded(joined, q_pad)
        q = both[..., :kv_lora_rank], both[..., kv_lora_rank:]
    else:
        raise ValueError(f"query={query!r}")

    sink_values = None
    if sinks is not None:
        sink_values = torch.randn(heads, generator=rng, device=device) * 3 + 3
        if sinks == "mixed":
            sink_values[0::3], sink_values[1::3] = float("inf"), float("-inf")
    natural = (128 + qk_rope_head_dim) ** -0.5
    return Problem(q, kv_cache, block_table, torch.tensor(lengths, dtype=torch.int32, device=device), kv_lora_rank,
                   sm_scale if sm_scale is not None else natural * (8 if inputs == "large" else 1), causal,
                   sink_values, tuple(lengths), inputs)


@dataclass
class Worst:
    """The largest error seen, and where. `ratio` is to the allowance: above 1 is a failure."""

    ratio: float = 0.0
    error: float = 0.0
    place: tuple[int, ...] = ()


@dataclass
class Report:
    """How a result compares with the oracle. `faults` is empty when it passes."""

    out: Worst = field(default_factory=Worst)
    lse: Worst = field(default_factory=Worst)
    cosine: float = 0.0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (f"out {self.out.error:.2e} ({self.out.ratio:.2f} of what is allowed, at (b, i, h, c) {self.out.place})"
                f", cosine difference {self.cosine:.1e}, lse {self.lse.error:.2e} ({self.lse.ratio:.2f} of what is "
                f"allowed, at (b, i, h) {self.lse.place})")


@dataclass(frozen=True)
class Oracle:
    """Exact results of a problem, float64. `requests` are the requests they are for."""

    problem: Problem
    requests: tuple[int, ...]
    out: Tensor  # [requests, s_q, heads, kv_lora_rank]
    lse: Tensor  # [requests, s_q, heads]
    spread: Tensor  # like out: sum of weight * |value|, what rounding the weights acts on
    logit: Tensor  # like lse: |sm_scale| * |q| * max |key|, what rounding the dot products acts on

    def compare(self, out: Tensor, lse: Tensor | None = None, dots: float = 0.0) -> Report:
        """Every element of every head, no percentages.

        inputs="usual": FlashMLA's criterion: out absolute 8e-4 or relative 2.01/128, and a cosine difference of at most
        5e-6; lse absolute 1e-6 or relative 8.01/65536.
        inputs="large": weights and result are each rounded once to the dtype, so out is off by at most
        2 * unit roundoff * sum of weight * |value| (plus half of that for the rest); lse as above, plus a float32
        roundoff of the dot products.
        dots: what else the dot products may be off by, relative to |q| |key| (E4M3_DOTS): it moves lse as much, and
        each weight by twice that.
        Either way NaN and infinities must stand at the same places.
        """
        report = Report()
        got = self._chosen(out)
        usual = self.problem.inputs == "usual"
        if usual:
            allowed = torch.maximum(torch.full_like(self.out, 8e-4), self.out.abs() * (2.01 / 128))
        else:
            allowed = 3 * UNIT_ROUNDOFF[out.dtype] * self.spread + 1e-4
        allowed = allowed + 2 * dots * self.logit[..., None] * self.spread
        report.out = _worst("out", got, self.out, allowed, report.faults)
        x = got.double()
        total = (x * x + self.out * self.out).sum()
        report.cosine = float(torch.where(total > 0, 1 - 2 * (x * self.out).sum() / total, 0.0))
        if usual and not report.cosine <= 5e-6:
            report.faults.append(f"cosine difference {report.cosine:.2e} > 5e-6")
        if lse is not None:
            got = self._chosen(lse)
            allowed = torch.maximum(torch.full_like(self.lse, 1e-6), self.lse.abs() * (8.01 / 65536))
            if not usual:
                allowed = allowed + 1e-6 * self.logit
            allowed = allowed + dots * self.logit
            report.lse = _worst("lse", got, self.lse, allowed, report.faults)
        return report

    def _chosen(self, result: Tensor) -> Tensor:
        if self.requests == tuple(range(result.shape[0])):
            return result
        return result[torch.tensor(self.requests, dtype=torch.int64, device=result.device)]

    def check(self, out: Tensor, lse: Tensor | None = None, dots: float = 0.0) -> Report:
        """`compare`, raising AssertionError with the worst place of each fault."""
        report = self.compare(out, lse, dots)
        if report.faults:
            p = self.problem
            raise AssertionError("; ".join(report.faults) + f"\n  {report}\n  {len(p.lengths)} requests of "
                                 f"{p.lengths[:8]}..., s_q, heads = {p.out_shape[1:3]}, page {p.kv_cache.shape[1]}, "
                                 f"{p.dtype}, causal={p.causal}")
        return report


def _worst(name: str, got: Tensor, exact: Tensor, allowed: Tensor, faults: list[str]) -> Worst:
    if got.shape != exact.shape:
        raise AssertionError(f"{name} has shape {list(got.shape)}, not {list(exact.shape)}")
    if got.numel() == 0:
        return Worst()
    x = got.double()
    same = torch.where(x.isfinite() & exact.isfinite(), torch.zeros_like(x, dtype=torch.bool),
                       (x == exact) | (x.isnan() & exact.isnan()))
    error = torch.where(same, 0.0, (x - exact).abs())
    ratio = torch.where(same, 0.0, error / torch.where(allowed.isfinite(), allowed, 1.0)).nan_to_num(nan=float("inf"))
    top, at = ratio.flatten().max(0)
    summary = torch.stack([top, error.flatten()[at], x.flatten()[at], exact.flatten()[at], at.double()]).tolist()
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(int(summary[4])), got.shape))
    if not summary[0] <= 1:
        bad = (ratio > 1).flatten(3).any(-1) if name == "out" else ratio > 1
        heads = bad.flatten(0, 1).any(0).nonzero().flatten().tolist()
        faults.append(f"{name}: {summary[2]} instead of {summary[3]} at {place}; wrong in {int((ratio > 1).sum())} "
                      f"elements of heads {heads[:12]}{'...' if len(heads) > 12 else ''}")
    return Worst(summary[0], summary[1], place)


def mla_decode_oracle(problem: Problem, requests: Sequence[int] | None = None) -> Oracle:
    """The exact result of `problem`, or of some of its requests, on its device."""
    p = problem
    device, (batch, s_q, heads, rank) = p.device, p.out_shape
    chosen = list(range(batch)) if requests is None else list(requests)
    shape = (len(chosen), s_q, heads)
    out = torch.zeros(*shape, rank, dtype=torch.float64, device=device)
    spread, lse = torch.zeros_like(out), torch.full(shape, float("-inf"), dtype=torch.float64, device=device)
    logit = torch.zeros_like(lse)
    order = sorted(range(len(chosen)), key=lambda i: p.lengths[chosen[i]])
    for group in _groups(order, [p.lengths[b] for b in chosen]):
        which = torch.tensor([chosen[i] for i in group], device=device)
        into = torch.tensor(group, device=device)
        lengths = p.seq_lens[which].long()[:, None]
        token = torch.arange(max(p.lengths[chosen[i]] for i in group), device=device)[None]
        exists = token < lengths  # [group, token]
        column = (token // p.kv_cache.shape[1]).expand(len(group), -1)
        page = torch.where(exists, p.block_table[which].long().gather(1, column), 0)
        key = torch.where(exists[..., None], p.kv_cache[page, token % p.kv_cache.shape[1]], 0).double()
        query = torch.cat([part[which] for part in p.q_parts], -1).double().flatten(1, 2)  # [group, rows, width]
        x = p.sm_scale * (query @ key.transpose(1, 2))
        seen = exists[:, None].expand(-1, s_q, -1)
        if p.causal:
            behind = s_q - 1 - torch.arange(s_q, device=device)
            seen = seen & (token[:, None] < (lengths - behind)[..., None])
        seen = seen.repeat_interleave(heads, 1)  # rows are token-major
        x = x.masked_fill(~seen, float("-inf"))
        top = x.max(-1, keepdim=True).values
        top = torch.where(top.isinf(), 0.0, top)
        weight = torch.exp(x - top)
        sink = torch.zeros_like(top)
        if p.sinks is not None:
            sink = torch.exp(p.sinks.double().repeat(s_q)[None, :, None] - top)
        total = weight.sum(-1, keepdim=True)
        weight = weight / torch.where(total + sink > 0, total + sink, 1.0)
        value = key[..., :rank]
        shaped = (len(group), s_q, heads)
        out[into] = (weight @ value).view(*shaped, rank)
        spread[into] = (weight @ value.abs()).view(*shaped, rank)
        lse[into] = (top + torch.log(total))[..., 0].view(shaped)
        logit[into] = (abs(p.sm_scale) * query.norm(dim=-1) * key.norm(dim=-1).amax(-1, keepdim=True)).view(shaped)
    return Oracle(p, tuple(chosen), out, lse, spread, logit)


def _groups(order: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Requests of similar length, at most ORACLE_TOKENS tokens when padded to the longest; none of length 0."""
    group: list[int] = []
    for i in order:
        if lengths[i] == 0:
            continue
        if group and (len(group) + 1) * lengths[i] > ORACLE_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
