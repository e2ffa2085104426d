"""Which variant or form a call runs, for the ops that decide it by the sizes of a call: pure functions of these.

Such an op has a Rule here; registry.choose applies it, after tunings. All that a rule can give is in `keys_for`, so a
server that has prewarmed meets no new Key when a batch grows, and `jitmla.explain(spec, **sizes)` shows what a rule
says, and why. Variants go by "template/variant". An op of several forms, which launch different kernels, has a Form.
The numbers were measured on an H200.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from .errors import InvalidArgument, NoTemplate
from .schedule import row_tiles


class Rule(NamedTuple):
    """sizes: names of the sizes of a call. fits(variant, **sizes): whether it can be launched with them.
    best(variants that fit, **sizes) -> (variant, reason)."""

    sizes: tuple[str, ...]
    fits: Callable[..., bool]
    best: Callable[..., tuple[str, str]]


class Form(NamedTuple):
    """sizes: as of a Rule. best(**sizes) -> (form, reason)."""

    sizes: tuple[str, ...]
    best: Callable[..., tuple[str, str]]


def fitting(op: str, variants: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Those that a call of these sizes can run; raises InvalidArgument unless they are the sizes of the op's rule, and
    NoTemplate when none fits."""
    rule = RULES.get(op)
    if rule is None:
        raise InvalidArgument(f"sizes {', '.join(sizes)} of {op}", supported=", ".join(RULES),
                              differs="a Spec of this op has one variant, whatever the sizes",
                              remedy="leave the sizes out")
    if set(sizes) != set(rule.sizes):
        raise InvalidArgument(f"sizes {', '.join(sizes)} of {op}", supported=", ".join(rule.sizes),
                              differs=f"not the same: {', '.join(sorted(set(sizes) ^ set(rule.sizes)))}",
                              remedy=f"name each of {', '.join(rule.sizes)}")
    found = tuple(v for v in variants if rule.fits(v, **sizes))
    if not found:
        raise NoTemplate(f"{op} with {', '.join(f'{n}={v}' for n, v in sizes.items())}", supported=", ".join(variants),
                         differs="none can be launched with these sizes",
                         remedy="docs/kernels.md says what each variant is for")
    return found


def best(op: str, variants: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, str]:
    """(variant, reason): the one of `variants`, which fit, that the rule expects to be the fastest."""
    return RULES[op].best(tuple(variants), **sizes)


# ----------------------------------------------------------------------------------------------- inv_rope_fp8_quant


class Rows(NamedTuple):
    """A variant. heads: of a block. most: (token, head) rows up to which it is the best."""

    heads: int
    most: float


QUANT = {
    "warp_rows/t4h1": Rows(1, 24 * 128),
    "warp_rows/t8h2": Rows(2, 640 * 128),
    "warp_rows/t8h8": Rows(8, float("inf")),
}


def _quant_fits(variant: str, *, tokens: int, heads: int, heads_per_group: int) -> bool:
    return heads_per_group % QUANT[variant].heads == 0


def _quant_best(variants: tuple[str, ...], *, tokens: int, heads: int, heads_per_group: int) -> tuple[str, str]:
    """Small blocks while they do not fill the GPU; then large ones, which load the sines once for more heads."""
    chosen = next((v for v in variants if tokens * heads <= QUANT[v].most), variants[-1])
    limit = "no limit" if chosen == variants[-1] else f"up to {int(QUANT[chosen].most)}"
    return chosen, f"{tokens * heads} (token, head) rows ({limit}), {heads_per_group} heads per group"


# ---------------------------------------------------------------------------------------------------------- fp8_bmm


class Cost(NamedTuple):
    """What a variant with tiles of so many tokens and columns takes: waves times blocks of K times `block` us, plus
    `fixed` us, plus `token` us for each token of the first tile."""

    tokens: int
    columns: int
    block: float
    fixed: float
    token: float


BMM = {
    "sm90_tiles/m128n256": Cost(128, 256, 0.74, 2.5, 0.0),
    "sm90_tiles/m128n128": Cost(128, 128, 0.405, 4.0, 0.0),
    "sm90_tiles/m64n128": Cost(64, 128, 0.30, 2.4, 0.016),
    "sm90_tiles/m64n64": Cost(64, 64, 0.30, 2.93, 0.0),
    "sm90_stream/t16r64": Cost(16, 64, 0.29, 2.4, 0.0),
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
    moved = groups * (columns * k + tokens * k + 2 * tokens * columns)
    first = cost.token * min(tokens, cost.tokens)
    return max(waves * (k // 128) * cost.block, moved / BYTES_PER_US) + cost.fixed + first


def fp8_bmm_ctas(variant: str, groups: int, tokens: int, columns: int, sms: int) -> int:
    """The CTAs of a persistent variant: as few as give the same number of waves, which leaves power to the others. The
    other variants do not look at it."""
    cost = BMM[variant]
    tiles = groups * -(-tokens // cost.tokens) * (columns // cost.columns)
    return -(-tiles // -(-tiles // sms)) if tiles else 1


# ----------------------------------------------------------------------------------------------------- topk_indices

# CTAs that share a row
TOPK = {"sampled_select/c1t512": 1, "sampled_select/c2t1024": 2, "sampled_select/c4t512": 4, "sampled_select/c8t512": 8}


def _topk_fits(variant: str, *, rows: int, columns: int, sms: int) -> bool:
    return True


def _topk_best(variants: tuple[str, ...], *, rows: int, columns: int, sms: int) -> tuple[str, str]:
    """As many CTAs for a row as find a multiprocessor each; one where rows alone fill the GPU."""
    fitting = [v for v in variants if rows * TOPK[v] <= sms] or variants
    chosen = max(fitting, key=TOPK.__getitem__) if rows < sms else min(fitting, key=TOPK.__getitem__)
    return chosen, f"{rows} rows with {TOPK[chosen]} CTAs each, {sms} multiprocessors"


# ------------------------------------------------------------------------------------------------------- sparse_mla

TURNS = "sm90_gather_seesaw/"


def _sparse_fits(variant: str, *, tokens: int, heads: int, whole: int, sms: int) -> bool:
    return True


def _sparse_best(variants: tuple[str, ...], *, tokens: int, heads: int, whole: int, sms: int) -> tuple[str, str]:
    """Warpgroups that take turns do a block in less time and need more to start. In decode they are for calls that fill
    the GPU, of more than 64 heads: with fewer, memory gives the rows no faster than the others use them. whole: no
    token is split (prefill), so that every CTA has many blocks."""
    tiles = tokens * row_tiles(heads)
    turns = [v for v in variants if v.startswith(TURNS)]
    if turns and (whole or row_tiles(heads) > 1 and 4 * tiles > 3 * sms):
        return turns[0], f"{'prefill' if whole else 'decode'}, {tiles} row tiles, {sms} multiprocessors"
    others = [v for v in variants if not v.startswith(TURNS)]
    return (others or turns)[0], f"decode, {heads} heads, {tiles} row tiles, {sms} multiprocessors"


RULES = {
    "inv_rope_fp8_quant": Rule(("tokens", "heads", "heads_per_group"), _quant_fits, _quant_best),
    "fp8_bmm": Rule(("groups", "tokens", "columns", "k", "sms"), _bmm_fits, _bmm_best),
    "sparse_mla": Rule(("tokens", "heads", "whole", "sms"), _sparse_fits, _sparse_best),
    "topk_indices": Rule(("rows", "columns", "sms"), _topk_fits, _topk_best),
}


# ------------------------------------------------------------------------------------------------------- cached_mla

# Query rows (new tokens times heads) times kv_lora_rank from which the MHA form is faster; and tokens of a sequence.
# Where prefixes are possible, it has launches for them, whether they exist or not.
MHA_WORK, MHA_WORK_ALONE, MHA_TOKENS = 6 << 20, 1 << 20, 32


def cached_form(*, heads: int, kv_lora_rank: int, sequences: int, tokens: int, prefix: bool) -> tuple[str, str]:
    """For prefill sequences with so many new tokens together. prefix: whether one may have one; which of them has one
    is known to the device alone."""
    rows, each = tokens * heads, tokens // sequences
    work, most = (MHA_WORK, MHA_TOKENS) if prefix else (MHA_WORK_ALONE, 0)
    least = -(-work // kv_lora_rank)
    found = "mha" if rows >= least and each >= most else "absorbed"
    of_each = f", and of {most} tokens a sequence" if most else ""
    return found, f"{rows} query rows, {each} new tokens a sequence; the MHA form from {least} rows{of_each} on"


# -------------------------------------------------------------------------------------------------- mla_prefill_paged

# Microseconds: of 128 query rows and 128 keys of a head with 192 + 128 columns on one multiprocessor; and what the
# absorbed form's launches take beyond the other's. Products (multiply and add) a microsecond: expanding keys; absorbed.
MHA_BLOCK_US, ABSORBED_US, EXPANDING, ABSORBING = 1.15, 62.0, 325e6, 290e6


def prefill_form(*, heads: int, requests: int, new: int, prefix: int, kv_lora_rank: int, qk_head_dim: int,
                 qk_nope_head_dim: int, v_head_dim: int, sms: int) -> tuple[str, str]:
    """For requests with `new` tokens each behind `prefix` cached ones.

    The MHA form expands every key, heads * kv_lora_rank * (qk_nope_head_dim + v_head_dim) products, and attends in
    tiles of 128 rows, of which a multiprocessor does one at a time. The absorbed form needs heads * (2 * kv_lora_rank +
    qk_head_dim - qk_nope_head_dim) products for each pair of query and key, and nothing else. Of the products alone the
    break-even would be 171 new tokens behind a long prefix for DeepSeek-V3, and 154 for Mistral Small 4."""
    keys, pairs = prefix + new, new * prefix + new * (new + 1) // 2
    rounds = -(-requests * heads * -(-new // 128) // sms)
    attending = rounds * -(-keys // 128) * MHA_BLOCK_US * (qk_head_dim + v_head_dim) / 320
    expanding = requests * heads * keys * kv_lora_rank * (qk_nope_head_dim + v_head_dim) / EXPANDING
    absorbed = requests * heads * pairs * (2 * kv_lora_rank + qk_head_dim - qk_nope_head_dim) / ABSORBING + ABSORBED_US
    return ("absorbed" if absorbed < attending + expanding else "mha",
            f"{new} new tokens behind {prefix}, {requests} requests, {heads} heads: on an H200 about "
            f"{attending + expanding:.0f} us in the MHA form, of which {expanding:.0f} expand keys, and {absorbed:.0f} "
            "absorbed, without what both launch")


FORMS = {
    "cached_mla": Form(("heads", "kv_lora_rank", "sequences", "tokens", "prefix"), cached_form),
    "mla_prefill": Form(("heads", "requests", "new", "prefix", "kv_lora_rank", "qk_head_dim", "qk_nope_head_dim",
                         "v_head_dim", "sms"), prefill_form),  # of mla_prefill_paged
}
