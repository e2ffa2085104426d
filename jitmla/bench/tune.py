"""`jitmla tune`: which variants and launch arguments are best for a model on this GPU, as a tunings document.

The variants that serve a Spec are timed against each other over a few batches and lengths; where another one than the
rule picks is faster by GAIN, it is named for the sizes down to the ones measured before. Launch arguments are searched
one after the other from what the rule says, for each class of query rows and of batch sizes; they must be faster by
GAIN in the geometric mean over the lengths, and slower by no more than that at any of them. What is not listed in the
document is left to the rules. Every result is compared with float64 before it counts.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import jitmla

from .. import __version__, dispatch, models, pick, registry, schedule, tune
from ..errors import InvalidTunings, NoTemplate
from ..spec import Spec, mla_decode_spec
from ..testing import Problem, mla_decode_oracle
from .cases import DecodeCase
from .mla_decode import CHECKED, problem_of
from .report import environment, output, rounded
from .timing import Timing, captured, gpu_times

GAIN = 0.02
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # each stands for the sizes down to the one before it
LENGTHS = (1024, 8192, 65536)
MOST_TOKENS = 1 << 20  # of a case: long requests come in small batches
VARIANT_BATCHES = (1, 16, 128)
TRIES = {"fixed": (0, 1, 2, 4, 8), "least": (1, 2, 4, 6, 8), "bias": (0, 3, 8, 16)}

Document = dict[str, Any]
Measure = Callable[[DecodeCase, Mapping[str, Document]], Mapping[str, Timing]]


def measure(case: DecodeCase, documents: Mapping[str, Document]) -> dict[str, Timing]:
    """GPU time of the call under each of these tunings, in turns; raises AssertionError when one computes nonsense."""
    problem, oracle = _posed(case)
    out = torch.empty(problem.out_shape, dtype=problem.dtype, device=problem.device)
    replays = {}
    for name, document in documents.items():
        tune.use_tunings(document)
        replays[name] = captured(lambda: jitmla.mla_decode(*problem.args, **problem.kwargs, out=out))
        out.fill_(float("nan"))
        replays[name]()
        oracle.check(out)
    return gpu_times(replays, graph=False)


@functools.lru_cache(maxsize=4)  # as many as the lengths, which are gone through again and again
def _posed(case: DecodeCase) -> tuple[Problem, Any]:
    problem = problem_of(case)
    last = len(problem.lengths) - 1
    return problem, mla_decode_oracle(problem, sorted({i * last // (CHECKED - 1) for i in range(CHECKED)}))


def device_facts() -> dict[str, Any]:
    """What a tunings document says of the GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    return {"name": torch.cuda.get_device_name(device), "arch": dispatch.arch_of(device),
            "sms": torch.cuda.get_device_properties(device).multi_processor_count}


def clocks() -> dict[str, str]:
    """What nvidia-smi says of them now; right after a measurement, they are those of the measurement."""
    names = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit")
    said = output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader",
                  f"--id={torch.cuda.current_device()}")
    return dict(zip(names, (said or "").split(", "), strict=False))


def mla_decode(model: str, *, tp: int = 1, page_sizes: Sequence[int] = (64,), max_s_q: int = 1,
               dtype: str | None = None, batches: Sequence[int] = BATCHES, lengths: Sequence[int] = LENGTHS,
               gpu: dict[str, Any] | None = None, measure: Measure = measure,
               progress: Callable[[str], None] = lambda text: None) -> Document:
    """The tunings for a model; raises what models.specs_for raises."""
    gpu = gpu or device_facts()
    document = {"format": tune.FORMAT, "gpu": gpu, "jitmla": __version__, "variants": [], "launches": []}
    dims = models.model(model, dtype)
    heads = dims.num_attention_heads // tp
    cases = [DecodeCase(heads, s_q, 1, 1, dims.kv_lora_rank, dims.qk_rope_head_dim, page_size, dims.dtype)
             for page_size in page_sizes for s_q in range(1, max_s_q + 1)]
    specs = models.specs_for(model, tp=tp, arch=gpu["arch"], page_sizes=page_sizes, max_s_q=max_s_q, dtype=dtype)
    try:
        for spec in specs:
            fitting = [case for case in cases if _spec(case, gpu["arch"]) == spec]
            if fitting:
                document["variants"] += _variants(spec, fitting[-1], document, lengths, measure, progress)
        seen = set()
        for case in cases:
            rows = rows_class(case.heads * case.s_q)
            if rows not in seen:
                seen.add(rows)
                document["launches"] += _launches(case, rows, document, batches, lengths, measure, progress)
    finally:
        tune.use_tunings(None)
    return document


def rows_class(rows: int) -> tuple[int, int]:
    """The range of row counts that share launch arguments with `rows`: up to a power of two, then whole row tiles."""
    if rows > schedule.TILE_ROWS:
        top = -(-rows // schedule.TILE_ROWS) * schedule.TILE_ROWS
        return top - schedule.TILE_ROWS + 1, top
    top = next(n for n in (8, 16, 32, schedule.TILE_ROWS) if rows <= n)
    return (1 if top == 8 else top // 2 + 1), top


def _spec(case: DecodeCase, arch: str) -> Spec:
    return mla_decode_spec(arch=arch, dtype=case.dtype, kv_lora_rank=case.kv_lora_rank,
                           qk_rope_head_dim=case.qk_rope_head_dim, page_size=case.page_size, s_q=case.s_q,
                           heads=case.heads, causal=True)


def _sized(case: DecodeCase, batch: int, lengths: Iterable[int]) -> list[DecodeCase]:
    """The case at these lengths, as far as the batch allows, and once with mixed ones."""
    def sized(kv: int, ragged: bool) -> DecodeCase:
        return DecodeCase(case.heads, case.s_q, batch, kv, case.kv_lora_rank, case.qk_rope_head_dim, case.page_size,
                          case.dtype, ragged)

    lengths = [kv for kv in lengths if kv * batch <= MOST_TOKENS] or [min(lengths)]
    return [sized(kv, False) for kv in lengths] + ([sized(max(lengths), True)] if batch > 1 else [])


def _variants(spec: Spec, case: DecodeCase, document: Document, lengths: Sequence[int], measure: Measure,
              progress: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """An entry for each range of sizes in which the rule of jitmla.pick can be beaten."""
    names = [choice.name for choice in registry.choices(spec) if choice.template.arguments == "plain"]
    if not names:
        raise NoTemplate(str(spec), supported="see `jitmla kernels`", differs="no template serves it",
                         remedy=f"jitmla cache explain --arch {spec.arch} --op {spec.op} says why")
    if len(names) == 1:
        return
    facts = {name: value for name, value in spec if name != "arch"}
    rows = case.heads * case.s_q
    fewer = 0
    for batch in VARIANT_BATCHES:
        shorter = 0
        for kv in [kv for kv in sorted(lengths) if kv * batch <= MOST_TOKENS] or [min(lengths)]:
            sizes = {"rows": rows, "batch": batch, "tokens": kv, "sms": document["gpu"]["sms"]}
            ruled, _ = pick.best(spec.op, names, sizes)
            entries = {name: {"spec": facts, "variant": name, "sizes": {
                "rows": list(rows_class(rows)), "batch": [fewer + 1, batch], "tokens": [shorter + 1, kv]}}
                for name in (ruled, *(name for name in names if name != ruled))}
            documents = {name: {**document, "variants": [entry], "launches": []} for name, entry in entries.items()}
            sized, *_ = _sized(case, batch, [kv])
            results = [measure(sized, documents)]
            best = _best(results, list(entries))
            progress(f"{spec}, batch {batch}, {kv} tokens: "
                     + ", ".join(f"{name} {us:.2f} us" for name, us in _means(results, names).items()))
            if best != ruled:
                yield {**entries[best], **_evidence(results, {"tuned": best, "rule": ruled})}
            shorter = kv
        fewer = batch


def _launches(case: DecodeCase, rows: tuple[int, int], document: Document, batches: Sequence[int],
              lengths: Sequence[int], measure: Measure, progress: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """An entry for each class of batch sizes in which the rule can be beaten."""
    below = 0
    for batch in batches:
        entry = {"kv_lora_rank": case.kv_lora_rank, "rows": list(rows), "batch": [below + 1, batch]}
        rule = schedule.launch_args.__wrapped__(case.heads * case.s_q, batch, document["gpu"]["sms"], case.kv_lora_rank)
        start = {name: getattr(rule, name) for name in tune.ARGUMENTS}
        cases = _sized(case, batch, lengths)

        def timed(tries: Sequence[dict[str, int]], entry: dict[str, Any] = entry, cases: list[DecodeCase] = cases
                  ) -> list[Mapping[str, Timing]]:
            documents = {str(i): {**document, "launches": [{**entry, "launch": t}]} for i, t in enumerate(tries)}
            return [measure(c, documents) for c in cases]

        best = dict(start)
        for name in tune.ARGUMENTS:
            others = _values(name, best[name], rows, document["gpu"]["sms"])
            tries = [best] + [{**best, name: value} for value in others]
            results = timed(tries)
            best = tries[int(_best(results, [str(i) for i in range(len(tries))]))]
        if best != start:
            results = timed([start, best])  # once more, side by side: the best of many is partly luck
            if _best(results, ["0", "1"]) == "1":
                yield {**entry, "launch": best, **_evidence(results, {"tuned": "1", "rule": "0"})}
            else:
                best = start
        [us] = _means(results, ["0" if best == start else "1"]).values()
        progress(f"rows {rows[0]} to {rows[1]}, batch {below + 1} to {batch}: "
                 f"{f'the rule, {start}' if best == start else best}, {us:.2f} us")
        below = batch


def _values(name: str, at: int, rows: tuple[int, int], sms: int) -> list[int]:
    """What else to try for a launch argument."""
    if name != "parts":
        return [value for value in TRIES[name] if value != at]
    most = min(schedule.MAX_PARTS, max(1, sms // -(-rows[1] // schedule.TILE_ROWS)))
    return sorted({max(1, min(most, n)) for n in (most, most * 8 // 11, most // 2, at + 2, at - 2)} - {at})


def _best(results: Sequence[Mapping[str, Timing]], names: Sequence[str]) -> str:
    """The name with the least geometric mean of those that are nowhere slower than the first one by more than GAIN; the
    first one, unless that is better by GAIN."""
    first = names[0]
    names = [name for name in names if all(r[name].us <= r[first].us * (1 + GAIN) for r in results)]
    means = _means(results, names)
    best = min(names, key=means.__getitem__)
    return best if means[best] <= means[first] * (1 - GAIN) else first


def _means(results: Sequence[Mapping[str, Timing]], names: Sequence[str]) -> dict[str, float]:
    """Geometric means over the cases."""
    return {name: math.exp(statistics.fmean(math.log(r[name].us) for r in results)) for name in names}


def _evidence(results: Sequence[Mapping[str, Timing]], names: Mapping[str, str]) -> dict[str, Any]:
    """Medians in the order of the cases, the largest spread (interquartile range over median), and the day."""
    chosen = [r[name] for r in results for name in names.values()]
    spread = max((lambda q: (q[2] - q[0]) / q[1])(statistics.quantiles(t.samples, n=4)) for t in chosen)
    return {"us": rounded({label: [r[name].us for r in results] for label, name in names.items()}),
            "spread": rounded(spread), "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}


def described(document: Document, command: str, commit: str | None = None) -> Document:
    """The document, with clocks, driver, machine, commit and command; to be called right after measuring."""
    speed, facts = clocks(), environment(command, commit)
    return {**document, "gpu": {**document["gpu"], "driver": facts["driver"], "clocks": speed},
            **{name: value for name, value in facts.items() if name not in ("gpu", "driver")}}


def merged(old: Document, new: Document) -> Document:
    """`new`, with those choices of `old` that it does not make again; raises InvalidTunings for another kind of GPU."""
    if [old["gpu"][f] for f in ("name", "sms")] != [new["gpu"][f] for f in ("name", "sms")]:
        raise InvalidTunings(f"tunings of {old['gpu']['name']}", supported=f"a file of {new['gpu']['name']}",
                             differs="they were measured on another kind of GPU", remedy="write to another file")
    both = {name: {json.dumps([e.get(f) for f in ("spec", "sizes", "kv_lora_rank", "rows", "batch")]): e
                   for e in [*old[name], *new[name]]} for name in ("variants", "launches")}
    return {**new, **{name: [entries[k] for k in sorted(entries)] for name, entries in both.items()}}


def run(op: str, model: str, file: Path | None, command: str, commit: str | None, **options: Any) -> str:
    """Measure, and write `file` (what else it holds stays) if one is given; returns the document's text."""
    if not torch.cuda.is_available():
        raise NoTemplate("jitmla tune on a machine without an NVIDIA GPU", supported="a CUDA device",
                         differs="torch.cuda.is_available() is false", remedy="run it where the GPU is")
    old = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.exists() else None
    document = described({"mla_decode": mla_decode}[op](model, **options), command, commit)
    written = text(merged(old, document) if old else document)
    if file is not None:
        file.write_text(written, encoding="utf-8")
    return written


def text(document: Document) -> str:
    """As JSON that a person can diff: one line for each choice."""
    lists = {name: document[name] for name in ("variants", "launches")}
    body = json.dumps({**document, **{name: name.upper() for name in lists}}, indent=1)
    for name, entries in lists.items():
        lines = ",\n  ".join(json.dumps(entry) for entry in entries)
        body = body.replace(f'"{name.upper()}"', f"[\n  {lines}\n ]" if entries else "[]")
    return body + "\n"
