"""What tests render, compile and run of each op, and a command that puts the kernels into the cache:

    python -m tests.keysets [--op OP] [--all] [--jobs N]      (JITMLA_CACHE_DIR says where)

The usual run compiles `usual_choices`: a template that breaks fails there. `slow` tests compile the rest. GPU tests
draw from `covering_choices` alone, so that a prewarmed cache serves them on a machine without the compiler.
An op is in SETS, or test_registry.py fails.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from jitmla import registry, schema, tune
from jitmla.layouts import SCALE_MODES
from jitmla.registry import Choice
from jitmla.schedule import most_tile
from jitmla.spec import (
    Spec,
    append_latent_spec,
    cached_mla_pack_spec,
    cached_mla_specs,
    fp8_bmm_spec,
    gather_latent_spec,
    inv_rope_fp8_quant_spec,
    merge_attn_states_spec,
    mla_decode_spec,
    mla_prefill_spec,
    sparse_mla_spec,
)

ARCH = "sm_90a"


class Sets(NamedTuple):
    """The Specs of an op. product: all that its card serves, of all archs. covering: those that GPU tests draw from.
    points: whose code is a golden file (the last one of each template).
    wanted: which Choices of the covering Specs, for an op that picks by the sizes of a call; None: all.
    named: Choices that only a named backend gives, which GPU tests run as well."""

    product: Callable[[], list[Spec]]
    covering: Callable[[], list[Spec]]
    points: Callable[[], list[Spec]]
    wanted: Callable[[Choice], bool] | None = None
    named: Callable[[], list[Choice]] = list


@functools.cache
def every_choice(*ops: str) -> list[Choice]:
    """All that calls can get, of these ops or all."""
    return _choices(spec for op in ops or SETS for spec in SETS[op].product()) + _named(ops)


@functools.cache
def covering_choices(*ops: str) -> list[Choice]:
    """Every template and variant and value of each constant, of these ops or all."""
    found = [c for op in ops or SETS for c in _choices(SETS[op].covering()) if (SETS[op].wanted or bool)(c)]
    return found + _named(ops)


@functools.cache
def usual_choices(*ops: str) -> list[Choice]:
    """What the usual run of the tests compiles, of these ops or all: out of `covering_choices` one of each variant and
    arch of a template, and no fewer than two of a template. Each next one differs most from those before it."""
    by_template: dict[Path, list[Choice]] = {}
    for choice in covering_choices(*ops):
        by_template.setdefault(choice.template.path, []).append(choice)
    return [choice for choices in by_template.values() for choice in _spread(choices)]


def _spread(choices: list[Choice]) -> list[Choice]:
    """The fewest, greedily, that have every variant and arch, and are two."""
    def must(choice: Choice) -> set[Any]:
        return {choice.variant.name, choice.spec.arch}

    def may(choice: Choice) -> set[Any]:
        return set(choice.key.constants)

    taken: list[Choice] = []
    left, lacking, unseen = list(choices), set().union(*map(must, choices)), set().union(*map(may, choices))
    while left and (lacking or len(taken) < 2):
        taken.append(max(left, key=lambda c: (len(must(c) & lacking), len(may(c) & unseen))))
        left.remove(taken[-1])
        lacking -= must(taken[-1])
        unseen -= may(taken[-1])
    return taken


@functools.cache
def golden_choices() -> list[Choice]:
    """One of each template."""
    found = _choices(spec for sets in SETS.values() for spec in sets.points())
    return list({choice.template.name: choice for choice in found}.values())


def _named(ops: Iterable[str]) -> list[Choice]:
    return [choice for op in ops or SETS for choice in SETS[op].named()]


def _choices(specs: Iterable[Spec]) -> list[Choice]:
    return [choice for spec in specs for choice in registry.choices(spec)]


# ------------------------------------------------------------------------------------------------------- mla_decode

DTYPES, LATENTS, PAGES, CAUSAL = ("bf16", "fp16"), (512, 256), (64, 16, 32, 128), (False, True)
ROWS = tuple(schema.spec_fields("mla_decode")["rows"]["enum"])


def spec(dtype: str, latent: int, page: int, rows: int, causal: bool) -> Spec:
    return Spec.of("mla_decode", arch=ARCH, dtype=dtype, kv_dtype=dtype, kv_lora_rank=latent, qk_rope_head_dim=64,
                   page_size=page, rows=rows, causal=causal)


def covering() -> list[Spec]:
    """For each template every pair of values of its constants: an orthogonal array of 8 runs, OA(8, 4 x 2 x 2 x 2 x 2),
    for page size, dtype, latent, causal and (two by two) the row buckets that it serves. And the usual working point,
    bf16 with latent 512 and pages of 64, for each row bucket and causal or not; and what cached_mla meets with another.

    What depends on three constants at once is left to the full product, which takes five times as long.
    """
    specs = []
    for rows, a, b, c in itertools.product(_pairs_of_rows(), (0, 1), (0, 1), (0, 1)):
        specs.append(spec(DTYPES[c], LATENTS[a ^ c], PAGES[2 * a + b], rows[(a ^ b ^ c) % len(rows)], CAUSAL[b ^ c]))
    specs += [spec("bf16", 512, 64, rows, causal) for rows in ROWS for causal in CAUSAL]
    for i, rows in enumerate(ROWS):  # a gather of single rows
        specs += [spec("bf16", 512, 0, rows, CAUSAL[i % 2]), spec("fp16", 256, 0, rows, CAUSAL[1 - i % 2])]
    specs += [spec("bf16", 256, 64, 32, False), spec("bf16", 256, 64, 512, True)]  # cached_mla with Mistral Small 4
    return list(dict.fromkeys(specs))


def _pairs_of_rows() -> list[tuple[int, ...]]:
    """The row buckets of each template, at most two together."""
    served: dict[str, list[int]] = {}
    for rows in ROWS:
        served.setdefault(registry.choose(spec("bf16", 512, 64, rows, False)).template.name, []).append(rows)
    return [tuple(rows[i:i + 2]) for rows in served.values() for i in range(0, len(rows), 2)]


def decode_wanted(choice: Choice) -> bool:
    """The usual Choice of each Spec, and of the usual working points all that calls can get."""
    return (choice.template.backend != "sm90" or _usual(choice.spec)
            or choice.name == registry.choose(choice.spec).name)


def _usual(spec: Spec) -> bool:
    """Over an e4m3 cache: of the rows that have all variants."""
    if spec["kv_dtype"] == "e4m3":
        return (spec["dtype"] in ("bf16", "e4m3") and spec["kv_lora_rank"] == 512 and spec["page_size"] in (0, 64)
                and spec["rows"] == 512)
    return (spec["dtype"], spec["kv_lora_rank"], spec["page_size"]) in (
        ("bf16", 512, 64), ("bf16", 512, 0), ("bf16", 256, 64))


def decode_tunings() -> list[dict[str, Any]]:
    """By which calls of the Specs elsewhere get the variant that decode_wanted has of them, whatever their sizes."""
    return [tune.naming(s, registry.choose(s).name) for s in covering() if not _usual(s)]


def e4m3(dtype: str, latent: int, page: int, rows: int, causal: bool) -> Spec:
    return Spec.of("mla_decode", arch=ARCH, dtype=dtype, kv_dtype="e4m3", kv_lora_rank=latent, qk_rope_head_dim=64,
                   page_size=page, rows=rows, causal=causal)


E4M3_DTYPES = ("e4m3", "bf16", "fp16")
# of what sm90_fp8 serves: the usual working point for each row bucket, causal or not, with each kind of query; then
# every other latent, page size and dtype with some of each other. tests/kernels/test_mla_decode_e4m3.py runs them
E4M3 = [e4m3(dtype, 512, 64, rows, causal) for dtype in ("e4m3", "bf16") for rows in ROWS for causal in CAUSAL] + [
    e4m3(E4M3_DTYPES[i % 3], LATENTS[i // 2 % 2], PAGES[1 + i % 3], ROWS[1 + i % 4], CAUSAL[i // 3 % 2])
    for i in range(12)] + [
    e4m3(dtype, 256, 64, rows, rows != 32) for dtype in ("e4m3", "bf16") for rows in (16, 32, 64)] + [
    e4m3("e4m3", 512, 0, 16, False), e4m3("e4m3", 512, 0, 512, False), e4m3("e4m3", 256, 0, 32, True),
    e4m3("e4m3", 512, 0, 512, True),  # their tests, tests/kernels/test_compat_mla_decode.py
    e4m3("bf16", 512, 0, 512, True), e4m3("bf16", 256, 0, 16, False), e4m3("fp16", 512, 0, 64, False)]


def product() -> list[Spec]:
    """Every Spec that the shipped cards serve with an sm90 template."""
    return [*(spec(*values) for values in itertools.product(DTYPES, LATENTS, (*PAGES, 0), ROWS, CAUSAL)),
            *(e4m3(*values) for values in itertools.product(E4M3_DTYPES, LATENTS, (*PAGES, 0), ROWS, CAUSAL))]


def portable(arch: str, dtype: str, kv_dtype: str, latent: int, rope: int, page: int, rows: int, causal: bool,
             **features: bool) -> Spec:
    return Spec.of("mla_decode", arch=arch, dtype=dtype, kv_dtype=kv_dtype, kv_lora_rank=latent,
                   qk_rope_head_dim=rope, page_size=page, rows=rows, causal=causal, **features)


PORTABLE_ON_GPU = [  # what tests/kernels/test_mla_decode_portable.py runs
    portable(ARCH, "bf16", "bf16", 512, 32, 0, 16, False), portable(ARCH, "bf16", "bf16", 512, 16, 0, 32, False),
    portable(ARCH, "bf16", "bf16", 512, 32, 0, 512, True), portable(ARCH, "fp16", "fp16", 256, 32, 0, 8, False),
    portable(ARCH, "fp16", "fp16", 128, 16, 0, 16, True), portable(ARCH, "bf16", "bf16", 64, 0, 0, 512, False),
    portable(ARCH, "bf16", "bf16", 256, 32, 0, 64, True), portable(ARCH, "bf16", "e4m3", 512, 32, 0, 16, False),
    portable(ARCH, "fp16", "e4m3", 128, 0, 0, 32, True), portable(ARCH, "e4m3", "e4m3", 512, 32, 0, 512, True),
    portable(ARCH, "bf16", "bf16", 512, 64, 64, 32, True, compact=True),
    portable(ARCH, "bf16", "bf16", 512, 64, 64, 16, False, batch_invariant=True),
    *(portable(ARCH, "fp16", "fp16", 512, 64, page, rows, rows > 16, split_cache=True)
      for page, rows in ((0, 16), (0, 64), (0, 512), (16, 512))),
    portable(ARCH, "bf16", "e4m3", 512, 64, 16, 512, True, compact=True, batch_invariant=True),
    portable(ARCH, "e4m3", "e4m3", 512, 64, 64, 64, True, compact=True),
    portable(ARCH, "e4m3", "e4m3", 64, 16, 64, 8, False, batch_invariant=True),
]
PORTABLE_ELSEWHERE = [  # compiled by every run of the tests
    portable("sm_80", "bf16", "bf16", 512, 64, 32, 512, True),
    portable("sm_80", "fp16", "e4m3", 256, 16, 0, 16, False),
    portable("sm_89", "bf16", "e4m3", 512, 0, 64, 16, True),
    portable("sm_100a", "bf16", "bf16", 512, 64, 128, 512, True),
    portable("sm_103a", "e4m3", "e4m3", 512, 64, 16, 32, False),
    portable("sm_120a", "bf16", "bf16", 512, 64, 64, 64, False, batch_invariant=True),
]
PORTABLE_MORE = [  # the other rows of the config table, and the archs that have the same machine as one above
    portable(arch, "bf16", kv, 512, 64, 64, rows, True)
    for arch, kv, rows in itertools.product(
        ("sm_80", "sm_86", "sm_87", "sm_89", "sm_100a", "sm_103a", "sm_120a", "sm_121a"), ("bf16", "e4m3"),
        (16, 32, 512))
]


def portable_decode() -> list[Choice]:
    """The portable kernel that a GPU test asks for by name, where a native one comes first."""
    return [registry.choose(portable(ARCH, "bf16", "bf16", 512, 64, 0, 16, False), "portable")]


def every_portable() -> list[Spec]:
    """Specs with each row of the config table and each value of each constant. The full product, of a hundred thousand,
    is nobody's."""
    return list(dict.fromkeys(PORTABLE_ON_GPU + PORTABLE_ELSEWHERE + PORTABLE_MORE))


def points() -> list[Spec]:
    return [*(spec("bf16", 512, 64, rows, rows == max(ROWS)) for rows in ROWS),  # causal: the code it adds is seen
            e4m3("bf16", 512, 64, 512, False), PORTABLE_ON_GPU[-1]]


# ------------------------------------------------------------------------------------------- append_latent, cached_mla

def append_spec(arch: str, dtype: str, e4m3_cache: bool, slots: str, rank: int, rope: int) -> Spec:
    return append_latent_spec(arch=arch, dtype=dtype, e4m3_cache=e4m3_cache, slots=slots, kv_lora_rank=rank,
                              qk_rope_head_dim=rope)


def append_product() -> list[Spec]:
    """All on Hopper; elsewhere the widths of models."""
    (template,) = registry.templates("append_latent")
    return card_product("append_latent", [ARCH]) + [
        append_spec(arch, "bf16", e4m3, "i64", rank, 64)
        for arch, e4m3, rank in itertools.product(template.archs, CAUSAL, LATENTS) if arch != ARCH]


def append_covering() -> list[Spec]:
    """On Hopper the widths of models, and each other value of each constant; the conversion to e4m3 on an arch without
    an instruction for it; one behind Hopper."""
    return [*(append_spec(ARCH, "bf16", e4m3, "i64", rank, 64) for e4m3, rank in itertools.product(CAUSAL, LATENTS)),
            append_spec(ARCH, "fp16", False, "i32", 64, 16), append_spec(ARCH, "fp16", True, "i32", 128, 32),
            append_spec(ARCH, "fp16", False, "i64", 64, 16),  # tests/test_tiny_model.py
            append_spec("sm_80", "bf16", True, "i64", 512, 64), append_spec("sm_100a", "fp16", False, "i64", 512, 64)]


class CachedPoint(NamedTuple):
    """The facts of a cached_mla call. heads: those that GPU tests take; other numbers may need kernels of mla_decode
    that are not compiled for them."""

    nope: int
    rank: int
    rope: int
    value: int
    heads: int
    dtype: str = "bf16"
    e4m3: bool = False
    page: int = 64
    backend: str = "auto"
    mha: bool = True  # mla_prefill has a kernel

    def facts(self, arch: str = ARCH) -> dict[str, Any]:
        return {"arch": arch, "dtype": self.dtype, "qk_nope_head_dim": self.nope, "kv_lora_rank": self.rank,
                "qk_rope_head_dim": self.rope, "e4m3_cache": self.e4m3}

    def specs(self, arch: str = ARCH) -> list[Spec]:
        facts = self.facts(arch)
        return [*cached_mla_specs(**facts), *([cached_mla_pack_spec(**facts)] if self.mha else [])]

    def attention(self) -> list[Choice]:
        """What decode, tiles of as many tokens as fit, and the MHA form with a prefix can get."""
        tile = max(2**i for i in range(1, 10) if 2**i * self.heads <= 512)
        specs = [mla_decode_spec(
            arch=ARCH, dtype=self.dtype, kv_dtype="e4m3" if self.e4m3 else None, kv_lora_rank=self.rank,
            qk_rope_head_dim=self.rope, page_size=self.page, s_q=s_q, heads=self.heads, causal=causal)
            for s_q, causal in ((1, True), (tile, True), (tile, False))]
        if self.mha:
            specs.append(mla_prefill_spec(
                arch=ARCH, dtype=self.dtype, qk_head_dim=self.nope + self.rope, v_head_dim=self.value,
                qk_rope_head_dim=self.rope, causal=True))
        return [c for spec in specs
                for c in registry.choices(spec, self.backend if spec.op == "mla_decode" else "auto")]


MISTRAL_4 = CachedPoint(64, 256, 64, 128, 32)
DEEPSEEK_V3 = CachedPoint(128, 512, 64, 128, 128)
CACHED = (MISTRAL_4, DEEPSEEK_V3)
# Kimi K2; half precision; GLM-5; e4m3; widths and pages that only the portable kernel serves; examples/tiny_mla.py
CACHED_MORE = (
    DEEPSEEK_V3._replace(heads=64), DEEPSEEK_V3._replace(heads=16, dtype="fp16"), CachedPoint(192, 512, 64, 256, 64),
    MISTRAL_4._replace(e4m3=True), DEEPSEEK_V3._replace(heads=16, e4m3=True),
    CachedPoint(32, 64, 16, 32, 6, "fp16", mha=False), CachedPoint(96, 128, 32, 96, 5, e4m3=True, page=50, mha=False),
    MISTRAL_4._replace(backend="portable", mha=False), CachedPoint(32, 512, 64, 32, 8, mha=False))


@functools.cache
def cached_attention() -> list[Choice]:
    """The attention of cached_mla in GPU tests."""
    mistral = [mla_decode_spec(arch=ARCH, dtype="bf16", kv_lora_rank=256, qk_rope_head_dim=64, page_size=64, s_q=2,
                               heads=32, causal=causal) for causal in CAUSAL]
    deepseek = [spec("bf16", 512, 64, rows, causal) for rows in ROWS for causal in CAUSAL]
    tiny = [mla_decode_spec(arch=ARCH, dtype="fp16", kv_lora_rank=64, qk_rope_head_dim=16, page_size=page, s_q=s_q,
                            heads=8, causal=causal)
            for page, s_q, causal in [*itertools.product((16, 64), (1, 2, 4, 8, 64), (True,)), (16, 2, False),
                                      (16, 64, False)]]  # tests/test_tiny_model.py
    found = [*_choices([*mistral, *deepseek, *tiny]), *(c for p in (*CACHED, *CACHED_MORE) for c in p.attention())]
    return list({choice.key.digest: choice for choice in found}.values())


def cached_product() -> list[Spec]:
    archs = registry.templates("cached_mla")[0].archs
    points = [p._replace(dtype=dtype, e4m3=e4m3, mha=True) for p in (*CACHED, *CACHED_MORE)
              for dtype in DTYPES for e4m3 in CAUSAL]
    return list(dict.fromkeys(spec for arch in archs for p in points for spec in p.specs(arch)
                              if arch == ARCH or p.rope == 64))


def cached_covering() -> list[Spec]:
    """What GPU tests run, and an arch without the conversions of e4m3 and one behind Hopper."""
    elsewhere = [("sm_80", MISTRAL_4._replace(e4m3=True)), ("sm_100a", DEEPSEEK_V3._replace(dtype="fp16"))]
    return list(dict.fromkeys([*(spec for p in (*CACHED, *CACHED_MORE) for spec in p.specs()),
                               *(spec for arch, p in elsewhere for spec in p.specs(arch))]))


# ---------------------------------------------------------------------------------- DeepSeek-V4's output path

USUAL_QUANT = {"scale_mode": "pow2_f32", "neox": False, "positions": "i64"}


def quant_spec(arch: str, scale_mode: str, neox: bool, positions: str) -> Spec:
    return inv_rope_fp8_quant_spec(arch=arch, dtype="bf16", positions=positions, nope_dim=448, rope_dim=64,
                                   group_size=128, scale_mode=scale_mode, neox=neox)


def quant_product(archs: Iterable[str] | None = None) -> list[Spec]:
    (template,) = registry.templates("inv_rope_fp8_quant")
    return [quant_spec(*values) for values in itertools.product(archs or template.archs, SCALE_MODES, CAUSAL,
                                                                 ("i64", "i32"))]


def quant_wanted(choice: Choice) -> bool:
    """On Hopper every scale mode with the usual pairing and positions (vLLM's tests want them), and each variant with
    each scale mode, with one pairing and one type of positions each. Elsewhere (an arch without the conversion to e4m3,
    one with it, and one behind Hopper) the smallest and the largest variant, each with a scale mode."""
    spec = dict(choice.spec)
    row = [v.name for v in choice.template.variants].index(choice.variant.name)
    mode = SCALE_MODES.index(spec["scale_mode"])
    drawn = spec["neox"] == (row + mode) % 2 and spec["positions"] == ("i32", "i64")[(row + mode) // 2 % 2]
    if spec["arch"] == ARCH:
        return drawn or all(spec[name] == USUAL_QUANT[name] for name in ("neox", "positions"))
    return drawn and (row, mode) in ((0, 1), (len(choice.template.variants) - 1, 2))


def bmm_product() -> list[Spec]:
    templates = registry.templates("fp8_bmm")
    return [fp8_bmm_spec(arch=arch) for arch in dict.fromkeys(itertools.chain(*(t.archs for t in templates)))]


# ---------------------------------------------------------------------------------------------------------- prefill

HEAD_DIMS = ((192, 128), (128, 128), (256, 256))  # qk and v of DeepSeek-V3, Mistral Small 4, GLM-5


def prefill_spec(dtype: str, dims: tuple[int, int], causal: bool, arch: str = ARCH) -> Spec:
    return mla_prefill_spec(arch=arch, dtype=dtype, qk_head_dim=dims[0], v_head_dim=dims[1], qk_rope_head_dim=64,
                            causal=causal)


def prefill_product() -> list[Spec]:
    archs = dict.fromkeys(itertools.chain(*(t.archs for t in registry.templates("mla_prefill"))))
    return [prefill_spec(*values) for values in itertools.product(DTYPES, HEAD_DIMS, CAUSAL, archs)]


def prefill_covering() -> list[Spec]:
    """On Hopper bf16 with all dimensions, causal and not, and fp16 with one; elsewhere a few."""
    here = [prefill_spec(*values) for values in itertools.product(DTYPES, HEAD_DIMS, CAUSAL)]
    return [s for s in here if s["dtype"] == "bf16" or s["qk_head_dim"] == 192] + PREFILL_ELSEWHERE


PREFILL_ELSEWHERE = [  # each variant of the portable template, on archs with different machines
    prefill_spec("bf16", (192, 128), True, "sm_80"), prefill_spec("fp16", (256, 256), False, "sm_80"),
    prefill_spec("fp16", (256, 256), True, "sm_89"), prefill_spec("fp16", (192, 128), False, "sm_100a"),
    prefill_spec("bf16", (128, 128), True, "sm_103a"), prefill_spec("bf16", (256, 256), False, "sm_120a"),
]


# heads, qk_nope_head_dim, kv_lora_rank, page size and dtype of GPU tests of mla_prefill_paged
PAGED = [(16, 128, 512, 64, "bf16"), (128, 128, 512, 64, "bf16"), (8, 64, 512, 64, "bf16"), (32, 64, 256, 64, "bf16"),
         (128, 128, 512, 16, "bf16"), (96, 128, 512, 32, "fp16"), (32, 64, 256, 128, "bf16"),
         (128, 128, 512, 1, "bf16"), (100, 128, 512, 48, "bf16")]


def paged_attention() -> list[Choice]:
    """What its absorbed form takes of mla_decode."""
    return _choices(mla_decode_spec(arch=ARCH, dtype=dtype, kv_lora_rank=rank, qk_rope_head_dim=64, page_size=page,
                                    s_q=most_tile(heads), heads=heads, causal=True)
                    for heads, _, rank, page, dtype in PAGED)


def prefill_points() -> list[Spec]:
    return [prefill_spec("bf16", (192, 128), True), PREFILL_ELSEWHERE[0]]


def portable_prefill() -> list[Choice]:
    """The portable kernels that tests/kernels/test_mla_prefill.py runs on Hopper, where the native ones come first."""
    specs = [prefill_spec("bf16", dims, causal) for dims in HEAD_DIMS for causal in CAUSAL]
    return [registry.choose(s, "portable") for s in [*specs, prefill_spec("fp16", (192, 128), True)]]


def merge_product(archs: Iterable[str] | None = None) -> list[Spec]:
    (template,) = registry.templates("merge_attn_states")
    return [merge_attn_states_spec(arch=arch, dtype=dtype, acc_dtype=acc, v_head_dim=width)
            for arch in archs or template.archs for dtype in DTYPES for acc in ("fp32", dtype)
            for width in template.supports["v_head_dim"]]


def merge_covering() -> list[Spec]:
    """On Hopper every type and width, and those of mla_prefill_paged; on the oldest arch one."""
    more = ("bf16", "bf16", 512), ("fp16", "fp32", 256), ("fp16", "fp16", 64), ("fp16", "fp32", 128)
    return [s for s in merge_product([ARCH, "sm_80"]) if (s["dtype"], s["acc_dtype"], s["v_head_dim"]) in (
        ("bf16", "fp32", 128), *(more if s["arch"] == ARCH else ()))]


def gather_product(archs: Iterable[str] | None = None) -> list[Spec]:
    (template,) = registry.templates("gather_latent")
    return [gather_latent_spec(arch=arch, dtype=dtype, width=width) for arch in archs or template.archs
            for dtype in DTYPES for width in template.supports["width"]]


def gather_covering() -> list[Spec]:
    return [*gather_product([ARCH]), gather_latent_spec(arch="sm_80", dtype="bf16", width=576)]


# ------------------------------------------------------------------------------------------------------ sparse_mla


def sparse_spec(fmt: str, rope: int, heads: int) -> Spec:
    return sparse_mla_spec(arch=ARCH, kv_format=fmt, kv_lora_rank=512, qk_rope_head_dim=rope, heads=heads)


def sparse_product() -> list[Spec]:
    return [sparse_spec(fmt, rope, heads) for heads in (8, 16, 128)
            for fmt, rope in (("bf16", 0), ("bf16", 64), ("fp8", 64))]


def sparse_covering() -> list[Spec]:
    return [sparse_spec("bf16", 0, 8), sparse_spec("fp8", 64, 16), sparse_spec("bf16", 0, 128),
            sparse_spec("fp8", 64, 128)]


# ------------------------------------------------------------------------------------- DeepSeek Sparse Attention


def card_product(op: str, archs: Iterable[str] | None = None) -> list[Spec]:
    """Every combination of what the templates of `op` support."""
    return list(dict.fromkeys(
        Spec.of(op, arch=arch, **dict(zip(template.supports, values, strict=True)))
        for template in registry.templates(op) for arch in archs or template.archs
        for values in itertools.product(*template.supports.values())))


USUAL_PROLOGUE = {"heads": 64, "rope_interleave": False, "scale_mode": "pow2_f32", "hadamard": False,
                  "k_dtype": "bf16", "w_dtype": "fp32", "ln_dtype": "fp32", "positions": "i64"}
OTHER_PROLOGUE = {"heads": 32, "rope_interleave": True, "scale_mode": "raw_f32", "hadamard": True, "k_dtype": "fp32",
                  "w_dtype": "bf16", "ln_dtype": "bf16", "positions": "i32"}


def prologue_covering() -> list[Spec]:
    """The usual point, its opposite, two with half of the values of each, and what a DSA layer meets: weights from a
    product in bf16."""
    fields = list(USUAL_PROLOGUE)
    points = [lambda i: False, lambda i: True, lambda i: i % 2 == 0, lambda i: i % 4 in (1, 2),
              lambda i: fields[i] == "w_dtype"]
    return [Spec.of("indexer_prologue", arch=ARCH, **{f: (OTHER_PROLOGUE if other(i) else USUAL_PROLOGUE)[f]
                                                      for i, f in enumerate(fields)}) for other in points]


def simple(op: str) -> Sets:
    """An op all of whose Specs for Hopper are compiled by the usual run."""
    return Sets(lambda: card_product(op), lambda: card_product(op, [ARCH]), lambda: card_product(op, [ARCH])[:1])


SETS = {
    "mla_decode": Sets(lambda: product() + every_portable(),
                       lambda: covering() + E4M3 + PORTABLE_ON_GPU + PORTABLE_ELSEWHERE, points, decode_wanted,
                       named=portable_decode),
    "append_latent": Sets(append_product, append_covering, lambda: [append_spec(ARCH, "bf16", True, "i64", 512, 64)]),
    "cached_mla": Sets(cached_product, cached_covering, lambda: cached_covering()[:3]),
    "inv_rope_fp8_quant": Sets(quant_product, lambda: quant_product([ARCH, "sm_80", "sm_89", "sm_100a"]),
                               lambda: [quant_spec(ARCH, **USUAL_QUANT)], quant_wanted),
    "fp8_bmm": Sets(bmm_product, bmm_product, bmm_product),
    "mla_prefill": Sets(prefill_product, prefill_covering, prefill_points, named=portable_prefill),
    "merge_attn_states": Sets(merge_product, merge_covering, lambda: merge_covering()[:1]),
    "gather_latent": Sets(gather_product, gather_covering, lambda: gather_covering()[:1]),
    "sparse_mla": Sets(sparse_product, sparse_covering, sparse_covering),
    "indexer_prologue": Sets(lambda: card_product("indexer_prologue"), prologue_covering,
                             lambda: prologue_covering()[:1]),
    **{op: simple(op) for op in (
        "cat_quant_fp8", "indexer_k_scatter", "indexer_k_gather", "kv_row_pack", "dsa_append", "fp8_mqa_logits",
        "fp8_paged_mqa_logits", "topk_indices", "local_to_global")},
}


def prewarm(choices: list[Choice], jobs: int) -> int:
    """Compile what the cache lacks; returns the number of failures."""
    from jitmla import compile
    from jitmla.errors import JitmlaError
    from jitmla.store import Store

    def one(choice: Choice) -> int:
        try:
            compile.get_or_compile(choice.key, choice.source, Store())
        except JitmlaError as e:
            print(f"FAILED {choice.key.name} {choice.spec}\n{e}", flush=True)
            return 1
        print(f"{choice.key.digest[:12]} {choice.key.name} {choice.spec}", flush=True)
        return 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(one, choices))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the full product instead of the covering set")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--op", choices=SETS, action="append", default=[], help="only these; repeat it for several")
    parser.add_argument("--arch", help="only this one")
    parser.add_argument("--attention", action="store_true",
                        help="also what cached_mla and mla_prefill_paged take of other ops")
    options = parser.parse_args()
    wanted = (every_choice if options.all else covering_choices)(*options.op)
    wanted += cached_attention() + paged_attention() if options.attention else []
    wanted = [c for c in wanted if options.arch in (None, c.spec.arch)]
    sys.exit(1 if prewarm(wanted, options.jobs) else 0)
