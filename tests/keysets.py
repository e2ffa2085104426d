"""The Specs that tests compile and run, and a command that puts their kernels into the cache:

    python -m tests.keysets [--all] [--jobs N]      (JITMLA_CACHE_DIR says where)

GPU tests draw from these Specs alone, so that a prewarmed cache serves them on a machine without the compiler.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from jitmla import registry, schema
from jitmla.spec import Spec

ARCH = "sm_90a"
DTYPES, LATENTS, PAGES, CAUSAL = ("bf16", "fp16"), (512, 256), (64, 16, 32, 128), (False, True)
ROWS = tuple(schema.spec_fields("mla_decode")["rows"]["enum"])


def spec(dtype: str, latent: int, page: int, rows: int, causal: bool) -> Spec:
    return Spec.of("mla_decode", arch=ARCH, dtype=dtype, kv_dtype=dtype, kv_lora_rank=latent, qk_rope_head_dim=64,
                   page_size=page, rows=rows, causal=causal)


def covering() -> list[Spec]:
    """For each template every pair of values of its constants: an orthogonal array of 8 runs, OA(8, 4 x 2 x 2 x 2 x 2),
    for page size, dtype, latent, causal and (two by two) the row buckets that it serves. And the usual working point,
    bf16 with latent 512 and pages of 64, for each row bucket and causal or not.

    What depends on three constants at once is left to the full product, which takes five times as long.
    """
    specs = []
    for rows, a, b, c in itertools.product(_pairs_of_rows(), (0, 1), (0, 1), (0, 1)):
        specs.append(spec(DTYPES[c], LATENTS[a ^ c], PAGES[2 * a + b], rows[(a ^ b ^ c) % len(rows)], CAUSAL[b ^ c]))
    specs += [spec("bf16", 512, 64, rows, causal) for rows in ROWS for causal in CAUSAL]
    return list(dict.fromkeys(specs))


def _pairs_of_rows() -> list[tuple[int, ...]]:
    """The row buckets of each template, at most two together."""
    served: dict[str, list[int]] = {}
    for rows in ROWS:
        served.setdefault(registry.choose(spec("bf16", 512, 64, rows, False)).template.name, []).append(rows)
    return [tuple(rows[i:i + 2]) for rows in served.values() for i in range(0, len(rows), 2)]


def product() -> list[Spec]:
    """Every Spec that the shipped cards serve."""
    return [spec(*values) for values in itertools.product(DTYPES, LATENTS, PAGES, ROWS, CAUSAL)]


def only_when_asked(config) -> None:
    """Skip the full product, which takes minutes, unless the -m of the command line names `slow`."""
    import pytest

    expression = config.getoption("markexpr") or ""
    if "slow" not in expression.replace("not slow", ""):
        pytest.skip(f"the full product of {len(product())} Keys takes minutes: run it with -m slow")


def prewarm(specs: list[Spec], jobs: int) -> int:
    """Compile what the cache lacks; returns the number of failures."""
    from jitmla import compile
    from jitmla.errors import JitmlaError
    from jitmla.store import Store

    def one(spec: Spec) -> int:
        choice = registry.choose(spec)
        try:
            compile.get_or_compile(choice.key, choice.source, Store())
        except JitmlaError as e:
            print(f"FAILED {choice.key.name} {spec}\n{e}", flush=True)
            return 1
        print(f"{choice.key.digest[:12]} {choice.key.name} {spec}", flush=True)
        return 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(one, specs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the full product instead of the covering set")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    sys.exit(1 if prewarm(product() if options.all else covering(), options.jobs) else 0)
