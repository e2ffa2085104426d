"""Test problems of mla_decode with e4m3 tensors, compact queries, slot caches or the batch-invariant split.

    case = featured(mla_decode_problem([17, 0, 513], heads=16, device="cuda"), q_lens=[1, 3, 2], kv="e4m3")
    out, lse = jitmla.mla_decode(*case.args, **case.kwargs, return_lse=True)
    case.check(out, lse)

A featured problem is a plain one seen through a feature: the plain one has the same numbers (after rounding to e4m3) in
float32 and [batch, s_q, heads], and its oracle is the judge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .testing import Problem, Report, mla_decode_oracle

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Featured:
    """args, kwargs: of the call. exact: the plain problem. tokens: which (request, token) of the plain problem each
    row of a compact result is, or None."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    exact: Problem
    tokens: tuple[Tensor, Tensor] | None

    def spread(self, result: Tensor, fill: Tensor) -> Tensor:
        """A result in the shape of the plain problem; tokens that the call does not have are taken from `fill`."""
        if self.tokens is None:
            return result
        wide = fill.to(result.dtype)
        wide[self.tokens] = result[:self.tokens[0].shape[0]]
        return wide

    def check(self, out: Tensor, lse: Tensor, dots: float = 0.0) -> Report:
        """As Oracle.check."""
        oracle = mla_decode_oracle(self.exact)
        return oracle.check(self.spread(out, oracle.out.clone()), self.spread(lse, oracle.lse.clone()), dots)


def to_e4m3(values: Tensor, scale: float) -> Tensor:
    """values / scale in e4m3, saturated; NaN stays NaN; strides as they are."""
    storage = torch.empty_strided(values.shape, values.stride(), dtype=torch.uint8, device=values.device)
    storage.copy_((values.float() / scale).clamp(-448, 448).to(E4M3).view(torch.uint8))
    return storage.view(E4M3)


def featured(problem: Problem, *, kv: str = "plain", q: str = "plain", descale: str = "tensor",
             q_lens: Sequence[int] | None = None, extra_tokens: int = 0, slots: bool = False, split: bool = False,
             batch_invariant: bool = False, scales: tuple[float, float] = (0.37, 0.0131)) -> Featured:
    """kv, q: "plain" or "e4m3" (q only together with kv). descale: "tensor" or "float". q_lens: query tokens of each
    request, for a compact query: the last ones of the plain problem; extra_tokens: rows behind the last, of NaN.
    slots: the cache as one page a request, as long as the longest (the block table has one column). split: the cache as
    two tensors."""
    device, dtype = problem.device, problem.dtype
    nope, pe = problem.q_parts
    joined = torch.cat([nope, pe], -1)
    cache, table, kwargs = problem.kv_cache, problem.block_table, dict(problem.kwargs)
    exact = problem
    if slots:
        cache, table = _slots(problem)
        exact = dataclasses.replace(exact, kv_cache=cache, block_table=table)
    for name, which, scale, value in (("q_descale", q, scales[0], joined), ("kv_descale", kv, scales[1], cache)):
        if which == "e4m3":
            rounded = to_e4m3(value, scale)
            kwargs[name] = torch.tensor([scale], device=device) if descale == "tensor" else scale
            exact = dataclasses.replace(exact, **{"q" if name == "q_descale" else "kv_cache": rounded.float() * scale})
            joined, cache = (rounded, cache) if name == "q_descale" else (joined, rounded)
    tokens = None
    if q_lens is not None:
        s_q = joined.shape[1]
        where = [(b, s_q - n + i) for b, n in enumerate(q_lens) for i in range(n)]
        rows, columns = (torch.tensor([w[k] for w in where], dtype=torch.int64, device=device) for k in (0, 1))
        tokens = rows, columns
        filler = torch.full((extra_tokens, *joined.shape[2:]), float("nan"), dtype=dtype, device=device)
        filler = filler.to(joined.dtype)
        bits = torch.uint8 if joined.dtype == E4M3 else torch.int16
        joined = torch.cat([joined.view(bits)[tokens], filler.view(bits)]).view(joined.dtype)
        starts = torch.tensor([0, *q_lens], device=device).cumsum(0).int()
        kwargs.update(cu_seqlens_q=starts, max_q_len=s_q)
    if split:
        bits, rank = cache.view(torch.uint8 if cache.dtype == E4M3 else torch.int16), problem.kv_lora_rank
        cache = tuple(part.contiguous().view(cache.dtype) for part in (bits[..., :rank], bits[..., rank:]))
    if batch_invariant:
        kwargs["batch_invariant"] = True
    return Featured((joined, cache, table, problem.seq_lens), kwargs, exact, tokens)


def _slots(problem: Problem) -> tuple[Tensor, Tensor]:
    """(cache [slots, longest, width] with NaN where nothing is, table [batch, 1]) with the rows of the problem."""
    batch, longest = len(problem.lengths), max(1, *problem.lengths)
    width, size = problem.kv_cache.shape[2], problem.kv_cache.shape[1]
    cache = torch.full((batch + 1, longest, width), float("nan"), dtype=problem.dtype, device=problem.device)
    slots = torch.arange(batch, 0, -1, dtype=torch.int32, device=problem.device)  # slot 0 is nobody's
    for b, length in enumerate(problem.lengths):
        pages = problem.block_table[b, :-(-length // size)].long()
        cache[batch - b, :length] = problem.kv_cache[pages].flatten(0, 1)[:length]
    return cache, slots[:, None]
