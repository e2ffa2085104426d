"""Which variant a call runs, for the ops that decide it by the sizes of a call: pure functions of these.

Such an op has a Rule here; registry.choose applies it, after tunings. All that a rule can give is in `keys_for`, so a
server that has prewarmed meets no new Key when a batch grows, and `jitmla.explain(spec, **sizes)` shows what a rule
says, and why. Variants go by "template/variant". The numbers were measured on an H200.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from .errors import InvalidArgument, NoTemplate


class Rule(NamedTuple):
    """sizes: names of the sizes of a call. fits(variant, **sizes): whether it can be launched with them.
    best(variants that fit, **sizes) -> (variant, reason)."""

    sizes: tuple[str, ...]
    fits: Callable[..., bool]
    best: Callable[..., tuple[str, str]]


def fitting(op: str, variants: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Those that a call of these sizes can run; raises InvalidArgument unless they are the sizes of the op's rule, and
    NoTemplate when none fits."""
    rule = RULES.get(op)
    if rule is None:
        raise InvalidArgument(f"sizes {', '.join(sizes)} of {op}", supported=", ".join(RULES),
                              differs="a Spec of this op has one variant, whatever the sizes")
    if set(sizes) != set(rule.sizes):
        raise InvalidArgument(f"sizes {', '.join(sizes)} of {op}", supported=", ".join(rule.sizes),
                              differs=f"not the same: {', '.join(sorted(set(sizes) ^ set(rule.sizes)))}")
    found = tuple(v for v in variants if rule.fits(v, **sizes))
    if not found:
        raise NoTemplate(f"{op} with {', '.join(f'{n}={v}' for n, v in sizes.items())}", supported=", ".join(variants),
                         differs="none can be launched with these sizes")
    return found


def best(op: str, variants: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, str]:
    """(variant, reason): the one of `variants`, which fit, that the rule expects to be the fastest."""
    return RULES[op].best(tuple(variants), **sizes)


# ----------------------------------------------------------------------------------------------- inv_rope_fp8_quant


class Rows(NamedTuple):
    """A variant. tokens, heads: of a block. most: (token, head) rows up to which it is the best."""

    tokens: int
    heads: int
    most: float


QUANT = {
    "warp_rows/t4h1": Rows(4, 1, 30 * 128),
    "warp_rows/t8h2": Rows(8, 2, 64 * 128),
    "warp_rows/t16h4": Rows(16, 4, 640 * 128),
    "warp_rows/t8h8": Rows(8, 8, float("inf")),
}
RAGGED = 160 * 128  # rows up to which t8h2 is better than t8h8 where t16h4 would have much padding


def _quant_fits(variant: str, *, tokens: int, heads: int, heads_per_group: int) -> bool:
    return heads_per_group % QUANT[variant].heads == 0


def _quant_best(variants: tuple[str, ...], *, tokens: int, heads: int, heads_per_group: int) -> tuple[str, str]:
    """Small blocks while they do not fill the GPU; then large ones, which load the sines once for more heads."""
    rows = tokens * heads
    chosen = next((v for v in variants if rows <= QUANT[v].most), variants[-1])
    padding = -tokens % QUANT[chosen].tokens
    if chosen == "warp_rows/t16h4" and padding * 32 > tokens:
        chosen = "warp_rows/t8h2" if rows <= RAGGED else variants[-1]
    return chosen, f"{rows} (token, head) rows, {padding} tokens of padding, {heads_per_group} heads per group"


# ---------------------------------------------------------------------------------------------------------- fp8_bmm


class Cost(NamedTuple):
    """What a variant with tiles of so many tokens and columns takes: waves times blocks of K times `block` us, plus
    `fixed` us, plus `token` us for each token of the first tile, plus `wave` us for each wave behind the first. again:
    the share of the weights that a further token tile waits for as if it read them from memory."""

    tokens: int
    columns: int
    block: float
    fixed: float
    token: float
    wave: float
    again: float


BMM = {
    "sm90_tiles/m128n256": Cost(128, 256, 0.684, 1.2, 0.026, 0.0, 0.0),
    "sm90_tiles/m128n128": Cost(128, 128, 0.381, 3.8, 0.003, 0.0, 0.0),
    "sm90_stream/t16r64": Cost(16, 64, 0.181, 3.0, 0.0, 0.7, 0.5),
    "sm90_stream/t64r64": Cost(64, 64, 0.214, 3.2, 0.007, 0.7, 0.5),
    "sm90_stream/t64r128": Cost(64, 128, 0.261, 2.6, 0.019, 0.7, 0.5),
    "sm90_stream/t128r64": Cost(128, 64, 0.271, 3.0, 0.01, 0.7, 0.5),
}
BYTES_PER_US = 4.4e6  # what the memory of an H200 gives to a kernel that reads


def _bmm_fits(variant: str, *, groups: int, tokens: int, columns: int, k: int, sms: int) -> bool:
    return columns % BMM[variant].columns == 0


@lru_cache(maxsize=65536)
def _bmm_best(variants: tuple[str, ...], *, groups: int, tokens: int, columns: int, k: int, sms: int
              ) -> tuple[str, str]:
    """The variant that takes the least by this model: the longer of its waves and of the memory traffic."""
    times = {v: _bmm_us(BMM[v], groups, tokens, columns, k, sms) for v in variants}
    ranked = sorted(times, key=times.__getitem__)
    return ranked[0], "estimated us: " + ", ".join(f"{v} {times[v]:.1f}" for v in ranked)


def _bmm_us(cost: Cost, groups: int, tokens: int, columns: int, k: int, sms: int) -> float:
    tiles_m = -(-tokens // cost.tokens)
    waves = -(-groups * tiles_m * (columns // cost.columns) // sms)
    weights = columns * k * (1 + cost.again * (tiles_m - 1))
    moved = groups * (weights + tokens * k + 2 * tokens * columns)
    rest = cost.fixed + cost.token * min(tokens, cost.tokens) + cost.wave * (waves - 1)
    return max(waves * (k // 128) * cost.block, moved / BYTES_PER_US) + rest


def fp8_bmm_ctas(variant: str, groups: int, tokens: int, columns: int, sms: int) -> int:
    """The CTAs of a persistent variant: as few as give the same number of waves, which leaves power to the others. The
    other variants do not look at it."""
    cost = BMM[variant]
    tiles = groups * -(-tokens // cost.tokens) * (columns // cost.columns)
    return -(-tiles // -(-tiles // sms)) if tiles else 1


# ----------------------------------------------------------------------------------------------------- topk_indices

# CTAs that share a row
TOPK = {"sampled_select/c1t512": 1, "sampled_select/c2t1024": 2, "sampled_select/c8t1024": 8}


def _topk_fits(variant: str, *, rows: int, columns: int, sms: int) -> bool:
    return True


def _topk_best(variants: tuple[str, ...], *, rows: int, columns: int, sms: int) -> tuple[str, str]:
    """As many CTAs for a row as find a multiprocessor each; one where rows alone fill the GPU."""
    fitting = [v for v in variants if rows * TOPK[v] <= sms] or variants
    chosen = max(fitting, key=TOPK.__getitem__) if rows < sms else min(fitting, key=TOPK.__getitem__)
    return chosen, f"{rows} rows with {TOPK[chosen]} CTAs each, {sms} multiprocessors"


RULES = {
    "inv_rope_fp8_quant": Rule(("tokens", "heads", "heads_per_group"), _quant_fits, _quant_best),
    "fp8_bmm": Rule(("groups", "tokens", "columns", "k", "sms"), _bmm_fits, _bmm_best),
    "topk_indices": Rule(("rows", "columns", "sms"), _topk_fits, _topk_best),
}
