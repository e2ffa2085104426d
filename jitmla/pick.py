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

from . import schedule
from .errors import InvalidArgument, NoTemplate


class Rule(NamedTuple):
    """sizes: names of the sizes of a call. fits(variant, **sizes): whether it can be launched with them.
    best(variants that fit, **sizes) -> (variant, reason). among(variants that serve a Spec): those that best can give.
    """

    sizes: tuple[str, ...]
    fits: Callable[..., bool]
    best: Callable[..., tuple[str, str]]
    among: Callable[[tuple[str, ...]], tuple[str, ...]] = tuple


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


def among(op: str, variants: Sequence[str]) -> tuple[str, ...]:
    """Those of `variants`, all that serve a Spec, that calls of it can get."""
    return RULES[op].among(tuple(variants)) if op in RULES else tuple(variants[:1])


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


def _padding(variant: str, tokens: int) -> int:
    """Tokens that the last block has too few."""
    return -tokens % QUANT[variant].tokens


def _quant_fits(variant: str, *, tokens: int, heads: int, heads_per_group: int) -> bool:
    return heads_per_group % QUANT[variant].heads == 0


def _quant_best(variants: tuple[str, ...], *, tokens: int, heads: int, heads_per_group: int) -> tuple[str, str]:
    """Small blocks while they do not fill the GPU; then large ones, which load the sines once for more heads."""
    rows = tokens * heads
    chosen = next((v for v in variants if rows <= QUANT[v].most), variants[-1])
    if chosen == "warp_rows/t8h2" and _padding(chosen, tokens) * 8 > tokens:
        chosen = variants[0]
    elif chosen == "warp_rows/t16h4" and _padding(chosen, tokens) * 32 > tokens:
        chosen = "warp_rows/t8h2" if rows <= RAGGED else variants[-1]
    padding = _padding(chosen, tokens)
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
TOPK = {"sampled_select/c1t512": 1, "sampled_select/c2t1024": 2, "sampled_select/c4t512": 4, "sampled_select/c8t512": 8}


def _topk_fits(variant: str, *, rows: int, columns: int, sms: int) -> bool:
    return True


def _topk_best(variants: tuple[str, ...], *, rows: int, columns: int, sms: int) -> tuple[str, str]:
    """As many CTAs for a row as find a multiprocessor each; one where rows alone fill the GPU."""
    fitting = [v for v in variants if rows * TOPK[v] <= sms] or variants
    chosen = max(fitting, key=TOPK.__getitem__) if rows < sms else min(fitting, key=TOPK.__getitem__)
    return chosen, f"{rows} rows with {TOPK[chosen]} CTAs each, {sms} multiprocessors"


# ------------------------------------------------------------------------------------------------------- mla_decode


class DecodeCost(NamedTuple):
    """What a variant with row tiles of `rows` takes, in us: `fixed`, `block` for each block of a CTA unless the memory
    takes longer, `split` where pieces of a request have to be combined, `many` from MANY pieces of one on, and `more`
    where a CTA has more than one request. bytes: of an element of the cache."""

    rows: int
    block: float
    fixed: float
    split: float
    many: float
    more: float
    bytes: int = 2


DECODE = {
    "sm90_seesaw/m64n64": DecodeCost(64, 1.71, 9.5, 5.4, 5.4, 7.5),
    "sm90_trio/r64_triples6": DecodeCost(64, 1.67, 9.7, 2.6, 3.6, 2.2),
    "sm90_relay/r32_triples7": DecodeCost(32, 1.32, 7.6, 3.9, 3.6, 2.7),
    "sm90_swap/r16_triples8": DecodeCost(16, 1.21, 7.3, 3.6, 1.5, 2.3),
    "sm90_swap/r8_triples8": DecodeCost(8, 1.18, 7.0, 3.6, 1.5, 2.3),
    "sm90_trio/r64_triples6_gather": DecodeCost(64, 1.75, 10.9, 2.6, 3.4, 1.5),
    "sm90_relay/r32_triples7_gather": DecodeCost(32, 1.46, 7.5, 4.3, 4.3, 1.6),
    "sm90_swap/r16_triples8_gather": DecodeCost(16, 1.30, 7.2, 3.8, 2.2, 2.3),
    "sm90_swap/r8_triples8_gather": DecodeCost(8, 1.27, 6.9, 3.8, 2.2, 2.3),
    "sm90_trio/r64_fives4": DecodeCost(64, 1.0, 6.9, 2.1, 5.0, 0.0),
    "sm90_relay/r32_fives5": DecodeCost(32, 0.89, 4.7, 4.2, 4.3, 0.2),
    "sm90_swap/r16_fives5": DecodeCost(16, 0.67, 6.65, 1.75, 1.5, 1.0),
    "sm90_swap/r8_fives5": DecodeCost(8, 0.65, 6.4, 1.75, 1.5, 1.0),
    "sm90_trio/r64_fives4_gather": DecodeCost(64, 1.06, 8.0, 2.1, 5.0, 0.0),
    "sm90_relay/r32_fives5_gather": DecodeCost(32, 1.00, 6.5, 2.6, 2.7, 1.0),
    "sm90_swap/r16_fives5_gather": DecodeCost(16, 0.75, 6.65, 1.75, 1.5, 1.0),
    "sm90_swap/r8_fives5_gather": DecodeCost(8, 0.73, 6.4, 1.75, 1.5, 1.0),
    "sm90_fp8/e4m3_64": DecodeCost(64, 1.3, 16.0, 0.0, 0.0, 0.0, 1),
    "sm90_fp8/e4m3_32": DecodeCost(32, 0.95, 11.0, 0.0, 0.0, 0.0, 1),
    "sm90_fp8/e4m3_16": DecodeCost(16, 0.71, 9.5, 0.0, 0.0, 0.0, 1),
    "sm90_fp8/half_64": DecodeCost(64, 1.86, 19.2, 0.0, 0.0, 0.0, 1),
    "sm90_fp8/half_32": DecodeCost(32, 1.38, 12.8, 0.0, 0.0, 0.0, 1),
    "sm90_fp8/half_16": DecodeCost(16, 1.0, 9.7, 0.0, 0.0, 0.0, 1),
    "sm90_fp8/e4m3_64_256": DecodeCost(64, 0.93, 12.6, 0.0, 0.0, 0.0, 1),
    "sm90_fp8/e4m3_32_256": DecodeCost(32, 0.62, 10.0, 0.0, 0.0, 0.0, 1),
    "sm90_fp8/e4m3_16_256": DecodeCost(16, 0.49, 8.4, 0.0, 0.0, 0.0, 1),
    "sm90_fp8/half_64_256": DecodeCost(64, 1.20, 13.7, 0.0, 0.0, 0.0, 1),
    "sm90_fp8/half_32_256": DecodeCost(32, 0.88, 10.7, 0.0, 0.0, 0.0, 1),
    "sm90_fp8/half_16_256": DecodeCost(16, 0.61, 9.3, 0.0, 0.0, 0.0, 1),
}
SEESAW_256 = DecodeCost(64, 1.25, 7.6, 3.3, 4.9, 3.5)  # a variant of both latent sizes
MANY = 16  # sm90_swap then has warps that share what they combine
EVEN = 4.0  # us: of an even split, where a CTA has pieces of two requests
WIDE_BLOCK, NARROW_BLOCK = 64 * 576, 64 * 320  # elements
CACHE_BYTES_PER_US = 4.55e6  # bytes of a cache per us, at most


def _decode_fits(variant: str, *, rows: int, batch: int, tokens: int, sms: int) -> bool:
    return True


@lru_cache(maxsize=4096)
def _decode_best(variants: tuple[str, ...], *, rows: int, batch: int, tokens: int, sms: int) -> tuple[str, str]:
    """The variant that takes the least by this model if all requests have as many tokens as the block table has room
    for: more row tiles leave fewer parts to combine, but each of them reads every block."""
    if len(variants) == 1 or _decode_among(variants) != variants:
        return variants[0], "the first in the card"
    narrow = any("_fives" in v or v.endswith("_256") for v in variants)
    times = {v: decode_us(v, rows, batch, tokens, sms, narrow) for v in variants}
    ranked = sorted(times, key=times.__getitem__)
    return ranked[0], f"estimated us with {tokens} tokens: " + ", ".join(f"{v} {times[v]:.1f}" for v in ranked)


def _decode_among(variants: tuple[str, ...]) -> tuple[str, ...]:
    """All, if the model knows them; else the first in the card."""
    return variants if all(v in DECODE for v in variants) else variants[:1]


def decode_us(variant: str, rows: int, batch: int, tokens: int, sms: int, narrow: bool) -> float:
    """narrow: latent 256 instead of 512."""
    cost = DECODE[variant]
    if narrow and variant == "sm90_seesaw/m64n64":
        cost = SEESAW_256
    launch = schedule.launch_args(rows, batch, sms, tile_rows=schedule.unusual_tile(rows, cost.rows))
    share = schedule.equal_share(launch, batch, tokens)
    block = max(cost.block, share.busy * (NARROW_BLOCK if narrow else WIDE_BLOCK) * cost.bytes / CACHE_BYTES_PER_US)
    combine = 0.0 if share.pieces == 1 else cost.many if share.pieces >= MANY else cost.split
    others = cost.more * (share.requests > 1) + EVEN * share.even
    return cost.fixed + combine + others + share.blocks * block


# ------------------------------------------------------------------------------------------------------- sparse_mla

TURNS = "sm90_gather_seesaw/"


def _sparse_fits(variant: str, *, tokens: int, heads: int, whole: int, sms: int) -> bool:
    return True


def _sparse_best(variants: tuple[str, ...], *, tokens: int, heads: int, whole: int, sms: int) -> tuple[str, str]:
    """Warpgroups that take turns do a block in less time and need more to start. In decode they are for calls that fill
    the GPU, of more than 64 heads: with fewer, memory gives the rows no faster than the others use them. whole: no
    token is split (prefill), so that every CTA has many blocks."""
    tiles = tokens * schedule.row_tiles(heads)
    turns = [v for v in variants if v.startswith(TURNS)]
    if turns and (whole or schedule.row_tiles(heads) > 1 and 4 * tiles > 3 * sms):
        return turns[0], f"{'prefill' if whole else 'decode'}, {tiles} row tiles, {sms} multiprocessors"
    others = [v for v in variants if not v.startswith(TURNS)]
    return (others or turns)[0], f"decode, {heads} heads, {tiles} row tiles, {sms} multiprocessors"


RULES = {
    "mla_decode": Rule(("rows", "batch", "tokens", "sms"), _decode_fits, _decode_best, _decode_among),
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
MHA_BLOCK_US, ABSORBED_US, EXPANDING, ABSORBING = 1.5, 40.0, 325e6, 305e6


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
