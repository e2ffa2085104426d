"""Results as JSON, as a table on the terminal, and as a page of the docs."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# contenders that are no other library: this one, its other forms, and a copy of as many bytes
NO_OTHER_LIBRARY = ("jitmla", "bf16_cache", "mha", "absorbed", "copy")

METHOD = """\
GPU time from the start of a call's first kernel to the end of its last one, from the profiler; CUDA graph replay; cold
and clean L2 (256 MB of something else are read before each call); the contenders of a case take turns inside one
profile; median of 20. Each contender's result is compared with float64 before it is timed. TFLOP/s count
2 * s_q * heads * kv * (2 * kv_lora_rank + qk_rope_head_dim) without a discount for the causal limit; GB/s count cache
rows, q and out once. Ratio: time of the better peer over ours. What peers plan anew for each step is not in their
times: FlashMLA's metadata kernel, FlashInfer's plan() on the host with a copy from the device. Roof: the share of the
roofline, which is the longer of the bytes at the read rate and of the operations at the matmul rate of the same run; of
e4m3 queries the scores count half, because products of 8 bits are twice as fast."""

O_PROJ_METHOD = """\
Output path of DeepSeek-V4 (`o_proj`): the same method, median of 20, or of 10 from 4096 tokens on; results of up to
2^27 values are compared with float64 in the same run, larger ones by the tests. M tokens, G groups, h heads of 512
columns, 1024 rows of weights per group. GB/s count each input and result once. Peers, where they are installed:
DeepGEMM's fp8_einsum, vLLM's Triton quantisation, and for the chain one after the other."""

SPARSE_METHOD = """\
Sparse MLA (`sparse_mla`): the same method; B query tokens or requests, random lists of topk rows of the pool. GB/s
count every attended row, q and out once. FlashMLA has 64 or 128 heads: fewer are padded to 64."""

DSA_METHOD = """\
Second op of a DSA layer (`dsa_layer`): the same method; decode of B requests with the named context, 64 heads of the
indexer. In the peers' chains DeepGEMM's paged logits, torch's or FlashInfer's top-k, and FlashMLA take the places of
jitmla's kernels, and the rest is the same. TFLOP/s and GB/s count logits and attention."""

PREFILL_METHOD = """\
Prefill (`mla_prefill`): the same method, median of 5 to 20; keys in one tensor, log-sum-exp written. S tokens of
each of B requests. TFLOP/s count 2 * heads * (qk + v) for each pair of query and key that is seen; GB/s count q, k, v
and out once. The last rows of the first and last request are compared with float64."""

PREFILL_PAGED_METHOD = """\
Prefill behind a cached prefix (`mla_prefill_paged`): the same method for a whole call with 128 + 64 and 512 columns,
pages of 64, all that it launches and kv_b_proj included; the contenders are its two forms, and ratio is the better
form over what "auto" takes. TFLOP/s count the MHA form's products for each pair that is seen, GB/s the cache rows, q,
out and kv_b_proj once. The last rows of the first request are compared with float64."""

CACHED_METHOD = """\
Attention over a slot cache (`cached_mla`): the same method for GPU times. Eager us is a whole call without a graph,
host and GPU together: the mean of a burst of 100, the best of five. B sequences, each with T new tokens, up to kv in
all; told: the call says that there are no prefixes (max_prefix=0). The peer is plain PyTorch with the lengths known on
the host. TFLOP/s count the form with less arithmetic, whichever is taken. Ratio: the peer's eager time over ours. The
last column leaves out mla_decode, which all launch but the calls that are told of no prefix and take the MHA form."""

INDEXER_METHOD = """\
Around the indexer of DeepSeek Sparse Attention (`indexer`): the same method, 64 heads, top-k of 2048. Rows x keys, or
requests x length; windows are causal and aligned at the end. TFLOP/s count 2 * 64 * 128 a cell of a window, GB/s each
input and result once; dsa_append: tokens x heads of q. Peers, where they are installed: DeepGEMM's logits (the kernel
that plans paged ones is not in its time), torch.topk (unsorted) and FlashInfer's top_k_ragged_transform, by default not
deterministic. Ops that only move bytes stand beside a copy by torch of as many bytes: their ratio is the share of
its speed."""

INTRODUCTION = """\
Generated from the files `*.json` in this folder by `make docs`; `jitmla bench mla_decode --peers --json FILE` makes
such a file. It holds the machine, the date, the commit, the exact command, and the raw samples beside the medians."""


def environment(command: str, commit: str | None = None) -> dict[str, Any]:
    """Where and with what a result was measured."""
    import torch
    return {"machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "gpu": torch.cuda.get_device_name(), "driver": output("nvidia-smi", "--query-gpu=driver_version",
                                                                  "--format=csv,noheader", "--id=0"),
            "torch": torch.__version__, "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "commit": commit or commit_here(), "command": command}


def commit_here() -> str | None:
    """The commit of this checkout, marked when files differ from it; None outside of a checkout."""
    root = str(Path(__file__).resolve().parents[2])
    commit = output("git", "-C", root, "rev-parse", "HEAD")
    return commit and commit + (" with changes" if output("git", "-C", root, "status", "--porcelain") else "")


def output(*command: str) -> str | None:
    """What a command prints, or None where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(result: dict[str, Any], path: Path) -> None:
    """As JSON, one line per case."""
    text = json.dumps({**rounded(result), "rows": ["ROW"]}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in rounded(result["rows"]))
    path.write_text(text.replace('"ROW"', rows) + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """With floats to four significant digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def case_name(case: dict[str, Any]) -> str:
    """Short: what differs from bf16, 512 + 64, pages of 64; for the output path, from powers of two in float32; for
    prefill, from causal 192/128."""
    if "tokens" in case and "kv" in case:
        name = f"h{case['heads']} B{case['batch']} T {case['tokens']} kv {case['kv']}"
        return f"{name}, rank {case['kv_lora_rank']}, P {case['qk_nope_head_dim']}, V {case['v_head_dim']}" + (
            ", told" * case.get("told", False))
    if "columns" in case:
        sizes = f"{case['rows']} x {case['columns']}" if case["columns"] else f"{case['rows']}"
        return f"{case['op']} {sizes}" + f", next_n {case['next_n']}" * (case["next_n"] > 1)
    if "topk" in case:
        name = f"{case['part']} h{case['heads']} s_q{case['s_q']} B{case['batch']} topk {case['topk']}"
        return name + f" of {case['rows']}" + ", bf16 rows" * (case["kv_format"] == "bf16")
    if "part" in case:
        name = f"{case['part']} G{case['groups']} h{case['heads']} M {case['tokens']}"
        return name + f", {case['scale_mode']}" * (case["scale_mode"] != "pow2_f32") + ", neox" * case["neox"]
    if "qk_head_dim" in case:
        name = f"h{case['heads']} S {'1..' if case['ragged'] else ''}{case['tokens']}"
        name += f" B{case['batch']}" * (case["batch"] > 1) + ", full" * (not case["causal"])
        dims = case["qk_head_dim"], case["v_head_dim"]
        name += f", {dims[0]}/{dims[1]}" * (dims != (192, 128))
        return name + ", fp16" * (case.get("dtype") == "fp16")
    if "prefix" in case:
        return f"h{case['heads']} B{case['batch']} new {case['new']} prefix {case['prefix']}"
    name = f"h{case['heads']}" + (f" s_q{case['s_q']}" if case["s_q"] > 1 else "") + f" B{case['batch']}"
    name += f" kv {'1..' if case['ragged'] else ''}{case['kv']}"
    usual = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "page_size": 64, "dtype": "bf16"}
    words = {"kv_lora_rank": "rank ", "qk_rope_head_dim": "rope ", "page_size": "page ", "dtype": ""}
    name += "".join(f", {words[f]}{case[f]}" for f in usual if case[f] != usual[f])
    return name + (f", {case['kv_dtype']} cache" if case.get("kv_dtype") else "")


def header(result: dict[str, Any]) -> list[str]:
    peers = [name for name in result["peers"] if name not in result["absent"]]
    if result["op"] == "cached_mla":
        return ["case", "jitmla us", "eager us", "TFLOP/s", "GB/s", *(f"{p} {kind}" for p in peers
                                                                       for kind in ("us", "eager us")), "ratio",
                "kernel"]
    return ["case", "jitmla us", "TFLOP/s", "GB/s", *["roof"] * has_roof(result), *(f"{p} us" for p in peers), "ratio",
            "kernel"]


def has_roof(result: dict[str, Any]) -> bool:
    """Whether the ceilings (a bf16 product, a read) are those of the op."""
    return result["op"] == "mla_decode"


def roof(result: dict[str, Any], case: dict[str, Any], times: dict[str, Any]) -> float:
    """The share of the roofline that a time is: rates over the ceilings of the same run, whichever is nearer."""
    latent, width = case["kv_lora_rank"], case["kv_lora_rank"] + case["qk_rope_head_dim"]
    work = (latent + width / 2) / (latent + width) if case["dtype"] == "e4m3" else 1.0
    return max(times["gbps"] / result["ceilings"]["read"]["gbps"],
               times["tflops"] * work / result["ceilings"]["matmul"]["tflops"])


def cells(result: dict[str, Any]) -> list[list[str]]:
    """The rows of the table, as text."""
    peers = [name for name in result["peers"] if name not in result["absent"]]
    lines = []
    for row in result["rows"]:
        ours = row["times"]["jitmla"]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        if result["op"] == "cached_mla":
            both = [f"{row['times'][p][kind]:.1f}" for p in peers for kind in ("us", "eager_us")]
            lines.append([case_name(row["case"]), f"{ours['us']:.1f}", f"{ours['eager_us']:.1f}",
                          f"{ours['tflops']:.0f}", f"{ours['gbps']:.0f}", *both, ratio,
                          " + ".join(key.partition("/")[2] for key in row["kernel"].split(" + "))])
            continue
        lines.append([case_name(row["case"]), f"{ours['us']:.1f}", f"{ours['tflops']:.0f}", f"{ours['gbps']:.0f}",
                      *([f"{roof(result, row['case'], ours):.0%}"] if has_roof(result) else []),
                      *(f"{row['times'][p]['us']:.1f}" if p in row["times"] else "-" for p in peers), ratio,
                      " + ".join(key.partition("/")[2] for key in row["kernel"].split(" + "))])
    return lines


def ceilings_text(result: dict[str, Any]) -> str:
    c = result["ceilings"]
    if not c:
        return "What the GPU can do at all was not measured in this run."
    return (f"In the same run: copy {c['copy']['gbps']:.0f} GB/s (read + written), read {c['read']['gbps']:.0f} GB/s, "
            f"bf16 matmul 8192 {c['matmul']['tflops']:.0f} TFLOP/s.")


def host_text(result: dict[str, Any]) -> str:
    if not result["host"]:
        return "Host times are not part of this run."
    return "Host time of one eager call, out given: " + "; ".join(
        f"{case_name(h['case'])}: " + ", ".join(f"{name} {us:.1f} us" for name, us in h["us"].items())
        for h in result["host"]) + "."


def ratios_text(result: dict[str, Any]) -> str:
    """How the times compare with the best peer's, over all cases in which there is one."""
    found = {case_name(row["case"]): row["ratio"] for row in result["rows"] if row["ratio"] is not None}
    if not found:
        return "No peer was measured."
    least = min(found, key=found.__getitem__)
    mean = math.exp(sum(map(math.log, found.values())) / len(found))
    return f"Ratios of {len(found)} cases: geometric mean {mean:.3f}, least {found[least]:.3f} ({least})."


def show(result: dict[str, Any]) -> None:
    """Print a result to the terminal."""
    from rich.console import Console
    from rich.table import Table
    console = Console()
    table = Table(title=f"{result['op']} on {result['gpu']}, {result['date']}")
    for i, name in enumerate(header(result)):
        table.add_column(name, justify="left" if i == 0 or name == "kernel" else "right")
    for line in cells(result):
        table.add_row(*line)
    console.print(table)
    console.print(ratios_text(result))
    console.print(ceilings_text(result))
    console.print(host_text(result))
    for name, reason in result["absent"].items():
        console.print(f"{name}: not measured: {reason}")


def markdown(result: dict[str, Any]) -> str:
    """One section of the docs page."""
    names, lines = header(result), cells(result)
    toolchain = ", ".join(f"{k} {v}" for k, v in sorted(result["toolchain"].items()) if v)
    text = [f"## {result['op']} on {result['gpu']}, {result['date']}", "",
            f"`{result['command']}` at commit {result['commit'] or 'unknown'}; driver {result['driver'] or 'unknown'}, "
            f"torch {result['torch']}; kernels built by {toolchain or 'an unknown toolchain'}; {result['machine']}.",
            "",
            "| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 2) + "---|"]
    text += ["| " + " | ".join(line) + " |" for line in lines]
    if "plot" in result:
        text += ["", f"![Plot of {result['op']}]({result['plot']})"]
    text += ["", ratios_text(result), "", ceilings_text(result), "", host_text(result)]
    text += [f"\n{name}: not measured ({reason})." for name, reason in result["absent"].items()]
    return "\n".join(text) + "\n"


def sweep_lines(result: dict[str, Any]) -> list[str]:
    """A markdown table: what is picked at each point, beside the fastest."""
    lines = ["| case | picked | us | fastest | us | loss |", "|---|---|---:|---|---:|---:|"]
    for row in result["rows"]:
        best = min(row["us"], key=row["us"].__getitem__)
        lines.append(f"| {case_name(row['case'])} | {row['picked']} | {row['us'][row['picked']]:.1f} | {best} | "
                     f"{row['us'][best]:.1f} | {row['loss'] * 100:.1f} % |")
    return lines


def sweep_markdown(result: dict[str, Any]) -> str:
    worst = max(result["rows"], key=lambda row: row["loss"])
    over = sum(row["loss"] > 0.03 for row in result["rows"])
    return "\n".join([
        f"## {result['op']} on {result['gpu']}, {result['date']}", "",
        f"`{result['command']}` at commit {result['commit'] or 'unknown'}; driver {result['driver'] or 'unknown'}, "
        f"torch {result['torch']}; {result['machine']}.", "",
        f"Every variant at every point, in turns in one profile. What is picked is more than 3 % behind the "
        f"fastest at {over} of {len(result['rows'])} points, at most {worst['loss'] * 100:.1f} % "
        f"({case_name(worst['case'])}).", "", *sweep_lines(result)]) + "\n"


def others(row: dict[str, Any]) -> list[str]:
    """The other libraries that a case's ratio is about."""
    return [] if row["ratio"] is None else [name for name in row["times"] if name not in NO_OTHER_LIBRARY]


def summary(results: Sequence[dict[str, Any]]) -> str:
    """A markdown table: for each op (or part of one), how its times compare with the best other library's, over all
    cases. What stands beside another form of this library, a copy of as many bytes, or nothing is left out."""
    ratios: dict[tuple[str, str], list[float]] = {}
    beside: dict[tuple[str, str], dict[str, None]] = {}
    for result in results:
        for row in result["rows"] if not result["op"].endswith("sweep") else ():
            if not others(row):
                continue
            case = row["case"]
            at = case.get("op") or " ".join(filter(None, (result["op"], case.get("part")))), result["gpu"]
            ratios.setdefault(at, []).append(row["ratio"])
            beside.setdefault(at, {}).update(dict.fromkeys(others(row)))
    lines = ["| op | GPU | beside | cases | geometric mean | least | most |", "|---|---|---|---:|---:|---:|---:|"]
    for (name, gpu), found in sorted(ratios.items()):
        mean = math.exp(sum(map(math.log, found)) / len(found))
        lines.append(f"| {name} | {gpu} | {', '.join(beside[name, gpu])} | {len(found)} | {mean:.2f} | "
                     f"{min(found):.2f} | {max(found):.2f} |")
    return "\n".join(lines)


def behind(result: dict[str, Any]) -> str:
    """A markdown table: the cases in which another library is faster, the worst first; or that there is none."""
    compared = [row for row in result["rows"] if others(row)]
    slower = sorted((row for row in compared if row["ratio"] < 1), key=lambda row: row["ratio"])
    of = f"of {len(compared)} cases on {result['gpu']}, {result['date']}"
    if not slower:
        return f"Behind another library in none {of}."
    lines = [f"Behind another library in {len(slower)} {of}:", "",
             "| case | jitmla us | best other us | ratio |", "|---|---:|---:|---:|"]
    for row in slower:
        ours = row["times"]["jitmla"]["us"]
        lines.append(f"| {case_name(row['case'])} | {ours:.1f} | {ours * row['ratio']:.1f} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def page(results: Sequence[dict[str, Any]]) -> str:
    """docs/benchmarks/README.md: all results, newest first."""
    newest = sorted(results, key=lambda r: (r["date"], r["command"]), reverse=True)
    sections = [(sweep_markdown if r["op"].endswith("sweep") else markdown)(r) for r in newest]
    sections = sections or ["There are no results yet.\n"]
    more = {"o_proj": O_PROJ_METHOD, "sparse_mla": SPARSE_METHOD, "dsa_layer": DSA_METHOD, "cached_mla": CACHED_METHOD,
            "mla_prefill": PREFILL_METHOD, "mla_prefill_paged": PREFILL_PAGED_METHOD, "indexer": INDEXER_METHOD}
    methods = [METHOD, *(text for op, text in more.items() if any(r["op"] == op for r in results))]
    return "\n".join(["# Benchmarks", "", INTRODUCTION, "", "\n\n".join(methods), "", *sections])


def read(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, each with the name of its plot (`jitmla bench plot`), where there is one."""
    return [{**json.loads(path.read_text(encoding="utf-8")),
             **({"plot": path.with_suffix(".png").name} if path.with_suffix(".png").exists() else {})}
            for path in sorted(folder.glob("*.json"))]
