"""The Specs and Choices that tests compile and run, and a command that puts their kernels into the cache:

    python -m tests.keysets [--all] [--jobs N]      (JITMLA_CACHE_DIR says where)

GPU tests draw from these Specs alone, so that a prewarmed cache serves them on a machine without the compiler.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from jitmla import registry
from jitmla.layouts import SCALE_MODES
from jitmla.registry import Choice
from jitmla.spec import Spec, fp8_bmm_spec, inv_rope_fp8_quant_spec

ARCH = "sm_90a"
DTYPES, LATENTS, PAGES, ROWS, CAUSAL = ("bf16", "fp16"), (512, 256), (64, 16, 32, 128), (8, 16, 512), (False, True)


def spec(dtype: str, latent: int, page: int, rows: int, causal: bool) -> Spec:
    return Spec.of("mla_decode", arch=ARCH, dtype=dtype, kv_dtype=dtype, kv_lora_rank=latent, qk_rope_head_dim=64,
                   page_size=page, rows=rows, causal=causal)


def covering() -> list[Spec]:
    """Each (template, rows) with every pair of values of its other constants: an orthogonal array of 8 runs
    (OA(8, 4 x 2 x 2 x 2)) for each of the three row buckets, plus the causal kernels of the usual working point.

    The full product is 96 Keys and eight minutes of compiling; what depends on three constants at once is left to it.
    """
    specs = []
    for rows, a, b, c in itertools.product(ROWS, (0, 1), (0, 1), (0, 1)):
        specs.append(spec(DTYPES[c], LATENTS[a ^ c], PAGES[2 * a + b], rows, CAUSAL[b ^ c]))
    specs += [spec("bf16", 512, 64, rows, True) for rows in ROWS]
    return list(dict.fromkeys(specs))


def product() -> list[Spec]:
    """Every Spec that the shipped cards serve."""
    return [spec(*values) for values in itertools.product(DTYPES, LATENTS, PAGES, ROWS, CAUSAL)]


def quant_spec(arch: str, scale_mode: str, neox: bool, positions: str) -> Spec:
    return inv_rope_fp8_quant_spec(arch=arch, dtype="bf16", positions=positions, nope_dim=448, rope_dim=64,
                                   group_size=128, scale_mode=scale_mode, neox=neox)


def o_proj_product(archs: Sequence[str] | None = None) -> list[Choice]:
    """Every Choice of the ops of DeepSeek-V4's output path: every Spec that their cards serve, with every row."""
    (quant,), bmm = registry.templates("inv_rope_fp8_quant"), registry.templates("fp8_bmm")
    specs = [quant_spec(*values) for values in itertools.product(quant.archs, SCALE_MODES, CAUSAL, ("i64", "i32"))]
    specs += [fp8_bmm_spec(arch=arch) for arch in dict.fromkeys(itertools.chain(*(t.archs for t in bmm)))]
    return [c for s in specs if archs is None or s.arch in archs for c in registry.choices(s)]


def o_proj_covering(arch: str = ARCH) -> list[Choice]:
    """On one arch: every variant with every scale mode, each with both pairings and both types of positions; the usual
    working point (power of two, interleaved, int64) of every variant; and every variant of the product."""
    usual = quant_spec(arch, "pow2_f32", False, "i64")
    rows = sorted(c.variant.name for c in registry.choices(usual))
    found = []
    for choice in o_proj_product([arch]):
        if choice.spec.op == "inv_rope_fp8_quant":
            i, j = rows.index(choice.variant.name), SCALE_MODES.index(choice.spec["scale_mode"])
            drawn = (i + j) % 2 == 1, ("i32", "i64")[(i + j) // 2 % 2]
            if (choice.spec["neox"], choice.spec["positions"]) != drawn and choice.spec != usual:
                continue
        found.append(choice)
    return found


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
    parser.add_argument("--op", choices=registry.ops(), action="append", help="only these; repeat it for several")
    options = parser.parse_args()
    wanted = [registry.choose(s) for s in (product() if options.all else covering())]
    wanted += o_proj_product([ARCH]) if options.all else o_proj_covering()
    wanted = [c for c in wanted if not options.op or c.spec.op in options.op]
    sys.exit(1 if prewarm(wanted, options.jobs) else 0)
