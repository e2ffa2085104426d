"""Which variant a call runs, for the ops whose card says `per_call`: pure functions of the sizes of the call.

All variants that a rule can give are in `keys_for`, so a server that has prewarmed them meets no new Key when a batch
grows. `jitmla.explain(spec, **sizes)` shows what a rule says, and why. The numbers were measured on an H200
(`python -m jitmla.bench o_proj --sweep` measures them again).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from .errors import InvalidArgument


def pick(op: str, **sizes: int) -> tuple[str, str]:
    """(variant, reason) for a call of `op` with these sizes; raises InvalidArgument when they are not those of a
    rule."""
    if op not in RULES:
        raise InvalidArgument(f"sizes {', '.join(sizes)} of {op}", supported=", ".join(RULES),
                              differs="a Spec of this op has one variant, whatever the sizes")
    try:
        return RULES[op](**sizes)
    except TypeError as e:
        raise InvalidArgument(f"sizes {', '.join(sizes)} of {op}", supported=f"the arguments of jitmla.pick.{op}",
                              differs=str(e)) from e


class Rows(NamedTuple):
    """A variant of inv_rope_fp8_quant. heads: of a block. most: (token, head) rows up to which it is the best."""

    variant: str
    heads: int
    most: float


QUANT = (Rows("t4h1", 1, 32 * 128), Rows("t8h2", 2, 96 * 128), Rows("t8h4", 4, 512 * 128),
         Rows("t8h8", 8, float("inf")))


@lru_cache(maxsize=4096)
def inv_rope_fp8_quant(*, tokens: int, heads: int, heads_per_group: int) -> tuple[str, str]:
    """Small blocks while they do not fill the GPU; then large ones, which load the sines once for more heads."""
    fitting = [q for q in QUANT if heads_per_group % q.heads == 0]
    chosen = next((q for q in fitting if tokens * heads <= q.most), fitting[-1])
    limit = "no limit" if chosen is fitting[-1] else f"up to {int(chosen.most)}"
    return chosen.variant, f"{tokens * heads} (token, head) rows ({limit}), {heads_per_group} heads per group"


class Cost(NamedTuple):
    """What a variant of fp8_bmm takes: `waves` times blocks of K of a CTA times `block` us, plus `fixed` us.

    tokens, columns: of a tile. ctas: that share a tile (and its blocks of K). share: columns of a cluster / columns.
    """

    tokens: int
    columns: int
    ctas: int
    share: int
    block: float
    fixed: float


BMM = {
    "m128n256": Cost(128, 256, 1, 1, 0.78, 3.0),
    "m128n128": Cost(128, 128, 1, 1, 0.50, 5.0),
    "t16r64": Cost(16, 64, 1, 1, 0.20, 3.0),
    "t64r64": Cost(64, 64, 1, 1, 0.25, 3.0),
    "t64r128": Cost(64, 128, 1, 1, 0.33, 3.0),
    "t64r128x2": Cost(64, 128, 2, 1, 0.33, 4.5),
    "t128r128x2": Cost(128, 128, 2, 1, 0.60, 4.5),
}
BYTES_PER_US = 4.4e6  # what the memory of an H200 gives to a kernel that reads


@lru_cache(maxsize=65536)
def fp8_bmm(*, groups: int, tokens: int, columns: int, k: int, sms: int) -> tuple[str, str]:
    """The variant that takes the least by this model: the longer of its waves and of the memory traffic."""
    fitting = {name: c for name, c in BMM.items() if columns % (c.columns * c.share) == 0}
    times = {name: _bmm_us(c, groups, tokens, columns, k, sms) for name, c in fitting.items()}
    best = min(times, key=times.__getitem__)
    return best, "estimated us: " + ", ".join(f"{name} {us:.1f}" for name, us in sorted(times.items(), key=_second))


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


def _bmm_us(cost: Cost, groups: int, tokens: int, columns: int, k: int, sms: int) -> float:
    tiles_m = -(-tokens // cost.tokens)
    waves = -(-groups * tiles_m * (columns // cost.columns) * cost.ctas // sms)
    blocks = -(-k // 128 // cost.ctas)
    moved = groups * (columns * k + tokens * k + 2 * tokens * columns)
    return max(waves * blocks * cost.block, moved / BYTES_PER_US) + cost.fixed


RULES: dict[str, Callable[..., Any]] = {"inv_rope_fp8_quant": inv_rope_fp8_quant, "fp8_bmm": fp8_bmm}


def fp8_bmm_ctas(variant: str, groups: int, tokens: int, columns: int, sms: int) -> int:
    """The CTAs of a persistent variant: no more than multiprocessors or tiles. The others do not look at it."""
    cost = BMM[variant]
    return min(sms, groups * -(-tokens // cost.tokens) * (columns // cost.columns))
