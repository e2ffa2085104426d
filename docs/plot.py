"""Draws docs/benchmarks/o_proj_h200.png from o_proj_h200.json beside it: `python docs/plot.py` (needs matplotlib)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "benchmarks"
PARTS = {"quantise": "quantisation, beside vLLM's Triton kernel", "product": "grouped product, beside DeepGEMM",
         "chain": "both, beside Triton + DeepGEMM"}


def ratios(result: dict[str, Any], part: str) -> dict[str, list[tuple[int, float]]]:
    """label -> (tokens, time of the peer over ours), for cases that have a peer."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in result["rows"]:
        case = row["case"]
        if case["part"] == part and row["ratio"] is not None:
            label = f"G {case['groups']}, K {case['heads'] // case['groups'] * 512}"
            lines.setdefault(label, []).append((case["tokens"], row["ratio"]))
    return {label: sorted(points) for label, points in lines.items()}


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads((FOLDER / "o_proj_h200.json").read_text(encoding="utf-8"))
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    for axis, (part, title) in zip(axes, PARTS.items(), strict=True):
        for label, points in ratios(result, part).items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=title, xscale="log", xlabel="tokens")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("time of the peer / time of jitmla")
    figure.suptitle(f"DeepSeek-V4's output path on {result['gpu']}, {result['date']}")
    figure.tight_layout()
    figure.savefig(FOLDER / "o_proj_h200.png", dpi=110)


if __name__ == "__main__":
    main()
