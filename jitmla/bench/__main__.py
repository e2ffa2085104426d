"""Command line of the benchmarks; `jitmla bench` calls `main` with its arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import JitmlaError
from . import report


def mla_decode(peers: bool, e4m3: bool, json_file: Path | None, commit: str | None, command: str) -> dict[str, Any]:
    """Measure, print the table, and write the JSON file if asked to."""
    import torch

    from ..errors import NoTemplate
    if not torch.cuda.is_available():
        raise NoTemplate("jitmla bench on a machine without an NVIDIA GPU", supported="a CUDA device",
                         differs="torch.cuda.is_available() is false", remedy="run it where the GPU is")
    from . import mla_decode as plain
    from . import mla_decode_e4m3
    from .timing import ceilings
    ours = mla_decode_e4m3 if e4m3 else plain
    found, absent = ours.available() if peers else ([], {})
    result = report.environment(command, commit)
    result |= {"op": "mla_decode", "peers": {p.name: p.note for p in found}, "absent": absent,
               "ceilings": ceilings(), "host": ours.host(found), "rows": []}
    for row in ours.rows(found):
        result["rows"].append(row)
        times = ", ".join(f"{name} {t['us']:.1f} us" for name, t in row["times"].items())
        print(f"{report.case_name(row['case'])}: {times}", file=sys.stderr, flush=True)
    result["toolchain"] = result["rows"][0]["toolchain"]
    report.show(result)
    if json_file:
        report.write(result, json_file)
    return result


def o_proj(peers: bool, sweep: bool, json_file: Path | None, commit: str | None, command: str) -> dict[str, Any]:
    """Measure the output path of DeepSeek-V4, print the table, and write the JSON file if asked to."""
    import torch

    from ..errors import NoTemplate
    if not torch.cuda.is_available():
        raise NoTemplate("jitmla bench on a machine without an NVIDIA GPU", supported="a CUDA device",
                         differs="torch.cuda.is_available() is false", remedy="run it where the GPU is")
    from . import o_proj as ours
    if sweep:
        return ours.sweep(report.environment(command, commit), json_file)
    from .timing import ceilings
    found, absent = ours.available() if peers else ({}, {})
    result = report.environment(command, commit)
    result |= {"op": "o_proj", "peers": {**found}, "absent": absent, "ceilings": ceilings(), "host": ours.host(),
               "rows": []}
    for row in ours.rows(list(found)):
        result["rows"].append(row)
        times = ", ".join(f"{name} {t['us']:.1f} us" for name, t in row["times"].items())
        print(f"{report.case_name(row['case'])}: {times}", file=sys.stderr, flush=True)
    result["toolchain"] = result["rows"][0]["toolchain"]
    if json_file:
        report.write(result, json_file)
    report.show(result)
    return result


def sparse_mla(peers: bool, json_file: Path | None, commit: str | None, command: str) -> dict[str, Any]:
    """Measure sparse MLA and the second op of a DSA layer, print the table, and write the JSON file if asked to."""
    import torch

    from ..errors import NoTemplate
    if not torch.cuda.is_available():
        raise NoTemplate("jitmla bench on a machine without an NVIDIA GPU", supported="a CUDA device",
                         differs="torch.cuda.is_available() is false", remedy="run it where the GPU is")
    from . import sparse_mla as ours
    from .timing import ceilings
    found, absent = ours.available() if peers else ({}, {})
    result = report.environment(command, commit)
    result |= {"op": "sparse_mla", "peers": {**found}, "absent": absent, "ceilings": ceilings(), "host": [], "rows": []}
    for row in ours.rows(found):
        result["rows"].append(row)
        times = ", ".join(f"{name} {t['us']:.1f} us" for name, t in row["times"].items())
        print(f"{report.case_name(row['case'])}: {times}", file=sys.stderr, flush=True)
    result["toolchain"] = result["rows"][0]["toolchain"]
    report.show(result)
    if json_file:
        report.write(result, json_file)
    return result


def cached_mla(peers: bool, json_file: Path | None, commit: str | None, command: str) -> dict[str, Any]:
    """Measure cached_mla, print the table, and write the JSON file if asked to."""
    import torch

    from ..errors import NoTemplate
    if not torch.cuda.is_available():
        raise NoTemplate("jitmla bench on a machine without an NVIDIA GPU", supported="a CUDA device",
                         differs="torch.cuda.is_available() is false", remedy="run it where the GPU is")
    from . import cached_mla as ours
    from .timing import ceilings
    result = report.environment(command, commit)
    result |= {"op": "cached_mla", "peers": ours.NOTES if peers else {}, "absent": {}, "ceilings": ceilings(),
               "host": ours.host(peers), "rows": []}
    for row in ours.rows(peers):
        result["rows"].append(row)
        times = ", ".join(f"{name} {t['us']:.1f} us, eager {t['eager_us']:.1f}" for name, t in row["times"].items())
        print(f"{report.case_name(row['case'])}: {times}", file=sys.stderr, flush=True)
    result["toolchain"] = result["rows"][0]["toolchain"]
    if json_file:
        report.write(result, json_file)
    report.show(result)
    return result


def indexer(peers: bool, json_file: Path | None, commit: str | None, command: str) -> dict[str, Any]:
    """Measure the ops around DSA's indexer, write the JSON file if asked to, and print the table."""
    import torch

    from ..errors import NoTemplate
    if not torch.cuda.is_available():
        raise NoTemplate("jitmla bench on a machine without an NVIDIA GPU", supported="a CUDA device",
                         differs="torch.cuda.is_available() is false", remedy="run it where the GPU is")
    from . import indexer as ours
    from .timing import ceilings
    found, absent = ours.available() if peers else ({}, {})
    result = report.environment(command, commit)
    result |= {"op": "indexer", "peers": found, "absent": absent, "ceilings": ceilings(), "host": ours.host(),
               "rows": []}
    for row in ours.rows(list(found)):
        result["rows"].append(row)
        times = ", ".join(f"{name} {t['us']:.1f} us" for name, t in row["times"].items())
        print(f"{report.case_name(row['case'])}: {times}", file=sys.stderr, flush=True)
    result["toolchain"] = result["rows"][0]["toolchain"]
    if json_file:
        report.write(result, json_file)
    report.show(result)
    return result


def mla_prefill(peers: bool, json_file: Path | None, commit: str | None, command: str) -> dict[str, Any]:
    """Measure prefill, print the table, and write the JSON file if asked to."""
    import torch

    from ..errors import NoTemplate
    if not torch.cuda.is_available():
        raise NoTemplate("jitmla bench on a machine without an NVIDIA GPU", supported="a CUDA device",
                         differs="torch.cuda.is_available() is false", remedy="run it where the GPU is")
    from . import prefill as ours
    from .timing import ceilings
    found, absent = ours.available() if peers else ({}, {})
    result = report.environment(command, commit)
    result |= {"op": "mla_prefill", "peers": {**found}, "absent": absent, "ceilings": ceilings(),
               "host": ours.host(list(found)), "rows": []}
    for row in ours.rows(list(found)):
        result["rows"].append(row)
        times = ", ".join(f"{name} {t['us']:.1f} us" for name, t in row["times"].items())
        print(f"{report.case_name(row['case'])}: {times}", file=sys.stderr, flush=True)
    result["toolchain"] = result["rows"][0]["toolchain"]
    report.show(result)
    if json_file:
        report.write(result, json_file)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of `python -m jitmla.bench ...`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m jitmla.bench", description="Measure jitmla's kernels on this GPU.")
    commands = parser.add_subparsers(dest="op", required=True)
    op = commands.add_parser("mla_decode", help="paged MLA decode")
    op.add_argument("--peers", action="store_true", help="measure FlashMLA and FlashInfer as well, where they are")
    op.add_argument("--e4m3", action="store_true", help="the cases with an e4m3 cache")
    op.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    op.add_argument("--commit", help="what to record as the commit, where this is a copy without its .git")
    op.add_argument("--plot", type=Path, metavar="PNG", help="draw GB/s and TFLOP/s against the ceilings here")
    picture = commands.add_parser("plot", help="draw results that were measured before, each into a PNG beside it")
    picture.add_argument("files", type=Path, nargs="+", metavar="RESULT.json")
    path = commands.add_parser("o_proj", help="DeepSeek-V4's output path: quantisation, grouped FP8 product, both")
    path.add_argument("--peers", action="store_true", help="measure DeepGEMM and vLLM's quantisation, where they are")
    path.add_argument("--sweep", action="store_true", help="all variants over numbers of tokens, and what is picked")
    path.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    path.add_argument("--commit", help="what to record as the commit, where this is a copy without its .git")
    prefill = commands.add_parser("mla_prefill", help="varlen prefill, keys and values expanded per head")
    prefill.add_argument("--peers", action="store_true", help="measure FlashAttention-3 and FlashInfer as well")
    prefill.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    prefill.add_argument("--commit", help="what to record as the commit, where this is a copy without its .git")
    cached = commands.add_parser("cached_mla", help="attention over a slot cache, with append and projections")
    cached.add_argument("--peers", action="store_true", help="measure plain PyTorch as well")
    cached.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    cached.add_argument("--commit", help="what to record as the commit, where this is a copy without its .git")
    lists = commands.add_parser("sparse_mla", help="MLA over lists of rows, and the second op of a DSA layer")
    lists.add_argument("--peers", action="store_true", help="measure FlashMLA and DeepGEMM as well, where they are")
    lists.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    lists.add_argument("--commit", help="what to record as the commit, where this is a copy without its .git")
    around = commands.add_parser("indexer", help="DSA's indexer: prologue, caches, logits, top-k")
    around.add_argument("--peers", action="store_true", help="measure DeepGEMM, torch and FlashInfer, where they are")
    around.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    around.add_argument("--commit", help="what to record as the commit, where this is a copy without its .git")
    options = parser.parse_args(argv)
    command = " ".join(["jitmla bench", *argv])
    try:
        if options.op == "plot":
            from . import plot
            print("\n".join(str(plot.draw_file(file)) for file in options.files))
        elif options.op == "mla_prefill":
            mla_prefill(options.peers, options.json, options.commit, command)
        elif options.op == "cached_mla":
            cached_mla(options.peers, options.json, options.commit, command)
        elif options.op == "o_proj":
            o_proj(options.peers, options.sweep, options.json, options.commit, command)
        elif options.op == "indexer":
            indexer(options.peers, options.json, options.commit, command)
        elif options.op == "sparse_mla":
            sparse_mla(options.peers, options.json, options.commit, command)
        else:
            result = mla_decode(options.peers, options.e4m3, options.json, options.commit, command)
            if options.plot:
                from . import plot
                plot.draw(result, options.plot)
    except JitmlaError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
