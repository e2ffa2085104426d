"""What tests of cached_mla share: problems, and a float64 oracle that keeps keys and values apart.

    problem = cached_problem([(5, 3), (0, 7)], decode=[12, 0], heads=6, device="cuda")
    out = jitmla.cached_mla(*problem.args, **problem.kwargs)
    check_cached(problem, out)

Whatever must not be read holds NaN (rows behind a sequence, other slots, places without a token) or garbage (metadata
behind the last sequence). The oracle expands keys and values of each head (the ops absorb both projections), masks
explicitly, and shares no code with jitmla.ops.cached_reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

TOKEN_HEAD = 2e-2  # largest relative L2 error of a (token, head): four roundings to bf16 (2^-9 each), of which that of
# the absorbed query acts through the logits
GARBAGE = 2147480000
ORACLE_QUERIES = 128  # at once


@dataclass(frozen=True)
class CachedProblem:
    """The arguments of one jitmla.cached_mla call, and what the host knows of them."""

    q_nope: Tensor
    q_pe: Tensor
    latent: Tensor
    k_pe: Tensor
    weight: Tensor
    kv_cache: Tensor  # written by the call
    before: Tensor  # the cache before it
    metadata: dict[str, Tensor]
    counts: dict[str, int]
    sm_scale: float
    sequences: tuple[tuple[int, int, int, int], ...]  # (tokens cached, new tokens, slot, first token) of each
    kv_scale: Tensor | None  # of an e4m3 cache

    @property
    def args(self) -> tuple[Tensor, ...]:
        return self.q_nope, self.q_pe, self.latent, self.k_pe, self.weight, self.kv_cache

    @property
    def kwargs(self) -> dict[str, Any]:
        scale = {} if self.kv_scale is None else {"kv_scale": self.kv_scale}
        return {**self.metadata, **self.counts, "sm_scale": self.sm_scale, **scale}

    def again(self) -> CachedProblem:
        """The same problem before its call."""
        return replace(self, kv_cache=self.before.clone())


def cached_problem(prefill: Sequence[tuple[int, int]] = (), decode: Sequence[int] = (), *, heads: int, nope: int = 64,
                   rope: int = 64, rank: int = 256, value: int = 128, max_seq_len: int = 512, spare_slots: int = 2,
                   gap: int = 0, tail: int = 0, rows: bool = False, dtype: torch.dtype = torch.bfloat16,
                   device: torch.device | str = "cpu", seed: int = 0, strided: bool = False, e4m3: bool = False
                   ) -> CachedProblem:
    """A random problem. The same arguments give the same one.

    prefill: (tokens cached, new tokens) of each sequence with any number of new ones. decode: tokens cached of each
    sequence with one. gap: places without a token behind each sequence but the last; tail: behind the last one.
    rows: inputs are [sequences, longest, ...] with each sequence in a row of its own, instead of [1, tokens, ...].
    strided: inputs and cache are views of wider tensors. e4m3: of the cache, with a scale.
    """
    rng = torch.Generator(device=device).manual_seed(seed)
    everything = [*prefill, *((cached, 1) for cached in decode)]
    generate = not prefill and not gap and not rows
    longest = max((new for _, new in everything), default=1)
    starts, at = [], 0
    for _, new in everything:
        starts.append(at)
        at += longest if rows else new + gap
    tokens = at - (gap if everything and not rows else 0) + tail
    live = torch.zeros(tokens, dtype=torch.bool, device=device)
    for start, (_, new) in zip(starts, everything, strict=True):
        live[start:start + new] = True
    shape = (tokens, 1) if generate else (len(everything), longest) if rows and not tail else (1, tokens)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=rng, device=device) * scale).to(dtype)

    def inputs(*size: int) -> Tensor:
        wide = torch.full((tokens, *size[:-1], size[-1] + (8 if strided else 0)), float("nan"), dtype=dtype,
                          device=device)
        view = wide[..., :size[-1]]
        view[live] = normal(int(live.sum()), *size)
        return view.unflatten(0, shape)

    slots = len(everything) + spare_slots
    slot_of = torch.randperm(slots, generator=rng, device=device)[:len(everything)].tolist()
    wide = torch.full((slots, max_seq_len, rank + rope + (16 if strided else 0)), float("nan"), dtype=dtype,
                      device=device)
    scale = torch.tensor([0.0173], device=device) if e4m3 else None
    wide = stored(wide, scale)
    kv_cache = wide[..., :rank + rope]
    for slot, (cached, _) in zip(slot_of, everything, strict=True):
        bits(kv_cache)[slot, :cached] = bits(stored(normal(cached, rank + rope), scale))

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor([*values, GARBAGE, -GARBAGE], dtype=torch.int32, device=device)

    metadata = {"seq_len": ints([new for _, new in everything]), "input_pos": ints([c for c, _ in everything]),
                "slot_idx": ints(slot_of), "cu_seqlen": ints([*starts, tokens])}
    counts = {"num_prefill": len(prefill), "prefill_tokens": sum(new for _, new in prefill), "num_decode": len(decode)}
    # keys of about unit variance, and a scale that spreads the logits over a few units
    weight = normal(heads * (nope + value), rank, scale=rank**-0.5)
    return CachedProblem(inputs(heads, nope), inputs(heads, rope), inputs(rank), inputs(1, rope), weight, kv_cache,
                         kv_cache.clone(), metadata, counts, 1.5 * (nope + rope) ** -0.5,
                         tuple((c, n, slot, start) for (c, n), slot, start
                               in zip(everything, slot_of, starts, strict=True)), scale)


def stored(rows: Tensor, scale: Tensor | None) -> Tensor:
    """What the cache has of rows: in e4m3 the quotient, saturated at 448 and rounded once."""
    return rows if scale is None else (rows.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def bits(x: Tensor) -> Tensor:
    """The same memory as integers, which torch can compare and assign whatever they stand for."""
    return x.view({1: torch.uint8, 2: torch.int16}[x.element_size()])


def expected_cache(problem: CachedProblem) -> Tensor:
    """The cache after the call."""
    cache = problem.before.clone()
    latent, k_pe = problem.latent.flatten(0, 1), problem.k_pe.flatten(0, 1)[:, 0]
    for cached, new, slot, start in problem.sequences:
        rows = torch.cat([latent[start:start + new], k_pe[start:start + new]], -1)
        bits(cache)[slot, cached:cached + new] = bits(stored(rows, problem.kv_scale))
    return cache


def cached_oracle(problem: CachedProblem) -> Tensor:
    """The exact result, float64; zero at places without a token."""
    p = problem
    heads, nope = p.q_nope.shape[2:]
    rank = p.latent.shape[2]
    q = torch.cat([p.q_nope, p.q_pe], -1).flatten(0, 1)
    w = p.weight.double().view(heads, -1, rank)
    cache = expected_cache(p)
    out = torch.zeros(q.shape[0], heads, w.shape[1] - nope, dtype=torch.float64, device=q.device)
    for cached, new, slot, start in p.sequences:
        rows = cache[slot, :cached + new].float().double() * (1.0 if p.kv_scale is None else p.kv_scale.double())
        expanded = torch.einsum("jr,hdr->hjd", rows[:, :rank], w)
        key = torch.cat([expanded[..., :nope], rows[None, :, rank:].expand(heads, -1, -1)], -1)
        value = expanded[..., nope:]
        for i in range(0, new, ORACLE_QUERIES):
            some = slice(start + i, start + min(new, i + ORACLE_QUERIES))
            x = p.sm_scale * torch.einsum("thd,hjd->thj", q[some].double(), key)
            position = cached + i + torch.arange(x.shape[0], device=q.device)
            hidden = torch.arange(cached + new, device=q.device) > position[:, None]
            out[some] = torch.einsum("thj,hjv->thv", x.masked_fill(hidden[:, None], float("-inf")).softmax(-1), value)
    return out


def check_cached(problem: CachedProblem, out: Tensor, limit: float = TOKEN_HEAD) -> float:
    """Raise AssertionError unless the cache is exactly what it must be, places without a token are zero, and each
    (token, head) is within `limit`. Returns the largest relative error."""
    if not torch.equal(bits(problem.kv_cache), bits(expected_cache(problem))):
        differ = (bits(problem.kv_cache) != bits(expected_cache(problem))).any(-1).nonzero()
        raise AssertionError(f"the cache differs in {len(differ)} rows (slot, position), first {differ[:4].tolist()}")
    exact = cached_oracle(problem)
    if out.shape[:3] != problem.q_nope.shape[:3] or out.dtype != problem.q_nope.dtype:
        raise AssertionError(f"out is {list(out.shape)} {out.dtype}")
    got = out.flatten(0, 1).double()
    norm = exact.norm(dim=-1)
    empty = norm == 0
    if got[empty].any() or not got.isfinite().all():
        raise AssertionError(f"places without a token are not zero, or there are {int((~got.isfinite()).sum())} "
                             "infinities and NaN")
    error = torch.where(empty, 0.0, (got - exact).norm(dim=-1) / norm.where(~empty, 1.0))
    worst = float(error.max()) if error.numel() else 0.0
    if not worst <= limit:
        bad = (error > limit).nonzero()
        raise AssertionError(f"{len(bad)} (token, head) of {error.numel()} are off by more than {limit}: worst "
                             f"{worst:.3g}, first {bad[:6].tolist()}")
    return worst
