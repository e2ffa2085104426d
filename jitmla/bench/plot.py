"""The picture of a result: GB/s and TFLOP/s of each case against the ceilings of the same run; for the output path, how
much longer the peers take, over the number of tokens.

Needs matplotlib (`pip install 'jitmla[bench]'`), on the machine that draws, which need not be the one that measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument, ToolchainMissing
from . import report

OURS = "jitmla"
MARKERS = "osD^v"
PARTS = {"quantise": "quantisation, beside vLLM's Triton kernel", "product": "grouped product, beside DeepGEMM",
         "chain": "both, beside Triton + DeepGEMM"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the PNG; raises ToolchainMissing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ToolchainMissing("to draw a plot", supported="matplotlib", differs=str(e),
                               remedy="pip install 'jitmla[bench]'") from e
    figure = (_ratios if result["op"] == "o_proj" else _bars)(result, Figure)
    figure.suptitle(f"{result['op']} on {result['gpu']}, {result['date']}")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _bars(result: dict[str, Any], new: Any) -> Any:
    rows = result["rows"][::-1]
    names = [report.case_name(row["case"]) for row in rows]
    figure = new(figsize=(13, 2.5 + 0.3 * len(rows)), layout="constrained")
    for axis, (unit, field, bound, ceiling) in zip(figure.subplots(1, 2, sharey=True), (
            ("GB/s", "gbps", "read", result["ceilings"]["read"]["gbps"]),
            ("TFLOP/s", "tflops", "bf16 matmul", result["ceilings"]["matmul"]["tflops"])), strict=True):
        axis.barh(names, [row["times"][OURS][field] for row in rows], color="#4c78a8", label=OURS)
        for marker, peer in zip(MARKERS, [p for p in result["peers"] if p not in result["absent"]], strict=False):
            points = [(row["times"][peer][field], name) for row, name in zip(rows, names, strict=True)
                      if peer in row["times"]]
            if points:
                axis.scatter(*zip(*points, strict=True), marker=marker, s=22, color="black", label=peer, zorder=3)
        axis.axvline(ceiling, color="#e45756", label=f"{bound}: {ceiling:.0f} {unit}")
        axis.set_xlabel(unit)
        axis.margins(y=0.01)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=1, frameon=False, fontsize="small")
    return figure


def _ratios(result: dict[str, Any], new: Any) -> Any:
    figure = new(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, len(PARTS), sharey=True)
    for axis, (part, title) in zip(axes, PARTS.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in result["rows"]:
            case = row["case"]
            if case["part"] == part and row["ratio"] is not None:
                label = f"G {case['groups']}, K {case['heads'] // case['groups'] * 512}"
                lines.setdefault(label, []).append((case["tokens"], row["ratio"]))
        for label, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=title, xscale="log", xlabel="tokens")
        axis.grid(alpha=0.3)
        if lines:
            axis.legend(fontsize="small")
    axes[0].set_ylabel("time of the peer / time of jitmla")
    return figure


def draw_file(path: Path) -> Path:
    """Draw a result file into a PNG of the same name beside it; raises InvalidArgument, and ToolchainMissing."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or not result.get("rows") or "times" not in result["rows"][0]:
            raise ValueError("it holds no cases with times")
    except (OSError, ValueError) as e:
        raise InvalidArgument(f"to draw {path}", supported="a file that `jitmla bench OP --json FILE` wrote",
                              differs=str(e), remedy="name such a file") from e
    picture = path.with_suffix(".png")
    draw(result, picture)
    return picture
