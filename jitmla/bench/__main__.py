"""Command line of the benchmarks; `jitmla bench` calls `main` with its arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import MISPUT, JitmlaError, NoTemplate
from . import report


def _measured(op: str, peers: dict[str, str], absent: dict[str, str], host: Callable[[], list[dict[str, Any]]],
              rows: Callable[[], Iterable[dict[str, Any]]], options: argparse.Namespace, command: str
              ) -> dict[str, Any]:
    """Measure, write the JSON file if asked to, and print the table. peers: their names, and how they are called."""
    from .timing import ceilings
    result = report.environment(command, options.commit)
    result |= {"op": op, "peers": peers, "absent": absent, "ceilings": ceilings(), "host": host(), "rows": []}
    for row in rows():
        result["rows"].append(row)
        times = ", ".join(f"{name} {t['us']:.1f} us" + (f", eager {t['eager_us']:.1f}" if "eager_us" in t else "")
                          for name, t in row["times"].items())
        print(f"{report.case_name(row['case'])}: {times}", file=sys.stderr, flush=True)
    result["toolchain"] = result["rows"][0]["toolchain"]
    if options.json:
        report.write(result, options.json)
    report.show(result)
    return result


def mla_decode(options: argparse.Namespace, command: str) -> None:
    from . import mla_decode as plain
    from . import mla_decode_e4m3
    if options.sweep:
        plain.sweep(report.environment(command, options.commit), options.json)
        return
    ours = mla_decode_e4m3 if options.e4m3 else plain
    found, absent = ours.available() if options.peers else ([], {})
    result = _measured("mla_decode", {p.name: p.note for p in found}, absent, lambda: ours.host(found),
                       lambda: ours.rows(found), options, command)
    if options.plot:
        from . import plot
        plot.draw(result, options.plot)


def o_proj(options: argparse.Namespace, command: str) -> None:
    from . import o_proj as ours
    if options.sweep:
        ours.sweep(report.environment(command, options.commit), options.json)
        return
    found, absent = ours.available() if options.peers else ({}, {})
    _measured("o_proj", found, absent, ours.host, lambda: ours.rows(list(found)), options, command)


def sparse_mla(options: argparse.Namespace, command: str) -> None:
    from . import sparse_mla as ours
    found, absent = ours.available() if options.peers else ({}, {})
    _measured("sparse_mla", found, absent, list, lambda: ours.rows(found), options, command)


def dsa_layer(options: argparse.Namespace, command: str) -> None:
    from . import dsa_layer as ours
    found, absent = ours.available() if options.peers else ({}, {})
    _measured("dsa_layer", found, absent, list, lambda: ours.rows(found), options, command)


def cached_mla(options: argparse.Namespace, command: str) -> None:
    from . import cached_mla as ours
    _measured("cached_mla", ours.NOTES if options.peers else {}, {}, lambda: ours.host(options.peers),
              lambda: ours.rows(options.peers), options, command)


def indexer(options: argparse.Namespace, command: str) -> None:
    from . import indexer as ours
    found, absent = ours.available() if options.peers else ({}, {})
    _measured("indexer", found, absent, ours.host, lambda: ours.rows(list(found)), options, command)


def mla_prefill(options: argparse.Namespace, command: str) -> None:
    from . import prefill as ours
    found, absent = ours.available() if options.peers else ({}, {})
    _measured("mla_prefill", found, absent, lambda: ours.host(list(found)), lambda: ours.rows(list(found)), options,
              command)


def mla_prefill_paged(options: argparse.Namespace, command: str) -> None:
    from . import prefill_paged as ours
    _measured("mla_prefill_paged", ours.FORMS if options.peers else {}, {}, lambda: ours.host(options.peers),
              lambda: ours.rows(options.peers), options, command)


OPS = {op.__name__: op for op in (mla_decode, mla_prefill, mla_prefill_paged, cached_mla, o_proj, sparse_mla, indexer,
                                   dsa_layer)}


def _require_gpu() -> None:
    import torch
    if not torch.cuda.is_available():
        raise NoTemplate("jitmla bench on a machine without an NVIDIA GPU", supported="a CUDA device",
                         differs="torch.cuda.is_available() is false", remedy="run it where the GPU is")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of `jitmla bench ...`, and of `python -m jitmla.bench ...`, which needs nothing of the command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="jitmla bench", description="Measure jitmla's kernels on this GPU.")
    commands = parser.add_subparsers(dest="op", metavar="OP", required=True)

    def measuring(name: str, what: str, peers: str) -> argparse.ArgumentParser:
        op = commands.add_parser(name, help=what)
        op.add_argument("--peers", action="store_true", help=f"measure {peers}")
        op.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
        op.add_argument("--commit", help="what to record as the commit, where this is a copy without its .git")
        return op

    op = measuring("mla_decode", "paged MLA decode", "FlashMLA and FlashInfer as well, where they are")
    op.add_argument("--sweep", action="store_true", help="all variants over batches and lengths, and what is picked")
    op.add_argument("--e4m3", action="store_true", help="the cases with an e4m3 cache")
    op.add_argument("--plot", type=Path, metavar="PNG", help="draw GB/s and TFLOP/s against the ceilings here")
    picture = commands.add_parser("plot", help="draw results that were measured before, each into a PNG beside it")
    picture.add_argument("files", type=Path, nargs="+", metavar="RESULT.json")
    op = measuring("o_proj", "DeepSeek-V4's output path: quantisation, grouped FP8 product, both",
                   "DeepGEMM and vLLM's quantisation, where they are")
    op.add_argument("--sweep", action="store_true", help="all variants over numbers of tokens, and what is picked")
    measuring("mla_prefill", "varlen prefill, keys and values expanded per head",
              "FlashAttention-3 and FlashInfer as well")
    measuring("mla_prefill_paged", "prefill behind a cached prefix", "each of its two forms as well")
    measuring("cached_mla", "attention over a slot cache, with append and projections", "plain PyTorch as well")
    measuring("sparse_mla", "MLA over lists of rows", "FlashMLA as well, where it is")
    measuring("dsa_layer", "the second op of a DSA layer, in decode",
              "chains of DeepGEMM's, torch's or FlashInfer's, and FlashMLA's kernels as well")
    measuring("indexer", "DSA's indexer: prologue, caches, logits, top-k",
              "DeepGEMM, torch and FlashInfer, where they are")
    options = parser.parse_args(argv)
    command = " ".join(["jitmla bench", *(Path(word).name for word in argv)])  # where files lay is nobody's business
    try:
        if options.op == "plot":
            from . import plot
            print("\n".join(str(plot.draw_file(file)) for file in options.files))
        else:
            _require_gpu()
            OPS[options.op](options, command)
    except JitmlaError as e:
        print(f"jitmla: {e}", file=sys.stderr)
        return 2 if isinstance(e, MISPUT) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
