"""Writes the pages that are generated: docs/kernels.md, docs/env.md, docs/schema.md, docs/benchmarks/README.md, the
support matrix and the speed in README.md, the figures in docs/cache.md, the calls in docs/coming_from.md, in the notes
the cases in which another library is faster, and in templates/README.md what is in common.

`make docs` runs it; tests/test_docs.py fails when a page differs from what this would write.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jitmla import env, registry, schema
from jitmla.bench import report

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "comparisons" / "budget.json"
CACHES = ROOT / "docs" / "comparisons" / "caches.json"
BEGIN, END = "<!-- support matrix: written by `make docs` -->", "<!-- end of support matrix -->"
# whose calls each module of jitmla.compat has, and where they are there
ORIGINS = {"flash_mla": ("FlashMLA", "flash_mla"), "flashinfer": ("FlashInfer", "flashinfer.mla"),
           "deep_gemm": ("DeepGEMM", "deep_gemm"), "vllm": ("vLLM", "vllm.v1.attention.ops.deepseek_v4_ops"),
           "trtllm": ("TensorRT-LLM", "torch.ops.auto_deploy")}
CACHES_BEGIN, CACHES_END = "<!-- caches: written by `make docs` -->", "<!-- end of caches -->"
CALLS_BEGIN, CALLS_END = "<!-- calls: written by `make docs` -->", "<!-- end of calls -->"
SPEED_BEGIN, SPEED_END = "<!-- speed: written by `make docs` -->", "<!-- end of speed -->"
COMMON_BEGIN, COMMON_END = "<!-- common modules: written by `make docs` -->", "<!-- end of common modules -->"
BEHIND_BEGIN, BEHIND_END = "<!-- behind: written by `make docs` -->", "<!-- end of behind -->"
# the notes that list where another library is faster, and the results that say so
NOTES = {"mla_decode_sm90": "mla_decode_h200", "mla_decode_e4m3": "mla_decode_e4m3_h200",
         "mla_prefill_sm90": "mla_prefill_h200", "o_proj_sm90": "o_proj_h200", "sparse_mla_sm90": "sparse_mla_h200",
         "dsa_indexer": "indexer_h200"}
FIGURES_BEGIN, FIGURES_END = "<!-- figures: written by `make docs` -->", "<!-- end of figures -->"


def pages() -> dict[Path, str]:
    """Every generated page and its text."""
    readme = ROOT / "README.md"
    cache = ROOT / "docs" / "cache.md"
    coming_from = ROOT / "docs" / "coming_from.md"
    templates = ROOT / "templates"
    benchmarks = ROOT / "docs" / "benchmarks"
    measured = report.read(benchmarks)
    return {benchmarks / "README.md": report.page(measured), ROOT / "docs" / "env.md": env.as_markdown(),
            ROOT / "docs" / "schema.md": schema_page(), ROOT / "docs" / "kernels.md": kernels_page(),
            readme: _filled(readme, (BEGIN, END, matrix()), (SPEED_BEGIN, SPEED_END, report.summary(measured))),
            cache: _filled(cache, (FIGURES_BEGIN, FIGURES_END, figures()), (CACHES_BEGIN, CACHES_END, caches())),
            coming_from: _filled(coming_from, (CALLS_BEGIN, CALLS_END, calls())),
            templates / "README.md": _filled(templates / "README.md",
                                             (COMMON_BEGIN, COMMON_END, common_modules(templates / "common"))),
            **{ROOT / "docs" / "notes" / f"{note}.md": behind(ROOT / "docs" / "notes" / f"{note}.md",
                                                              benchmarks / f"{result}.json")
               for note, result in NOTES.items()}}


def _filled(page: Path, *parts: tuple[str, str, str]) -> str:
    """A page with, for each (begin, end, text), `text` between the marks `begin` and `end`."""
    found = page.read_text(encoding="utf-8")
    for begin, end, text in parts:
        head, rest = found.split(begin)
        found = f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return found


def common_modules(folder: Path) -> str:
    """A row for each module that templates share: the first sentence of its docstring."""
    rows = [["module", "has"]]
    for module in sorted(folder.glob("*.py")):
        docstring = str(ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))))
        said = " ".join(docstring.partition("\n\n")[0].split())
        rows.append([f"`{module.name}`", re.split(r"\.(?= [A-Z`]|$)", said)[0].replace("|", "\\|")])
    return _markdown(rows)


def behind(note: Path, result: Path) -> str:
    measured = json.loads(result.read_text(encoding="utf-8"))
    return _filled(note, (BEHIND_BEGIN, BEHIND_END, report.behind(measured)))


def figures() -> str:
    """What `make budget` measured, beside what is promised."""
    measured = json.loads(FIGURES.read_text(encoding="utf-8"))
    machine = measured["machine"]
    rows = [["promise", "at most", "measured", ""]]
    rows += [[f["promise"], f"{f['limit']:g}", f"{f['value']:.2f}", f["unit"]] for f in measured["figures"]]
    return _markdown(rows) + (
        f"\n\n{machine['cores']} cores ({machine['processor']}) with a load of {machine['load']:.1f}, Python "
        f"{machine['python']}, CuTe DSL {dict(machine['toolchain'])['cute_dsl']}, {machine['date']}; "
        f"`{measured['command']}` at commit {measured['commit'] or 'unknown'}.")


def caches() -> str:
    """What tests/comparisons/caches.py found: a row for each trial, a column for each cache."""
    said = json.loads(CACHES.read_text(encoding="utf-8"))
    found = said["caches"]

    def outcomes(counts: dict[str, int]) -> str:
        words = {"would compile": "refused", "loaded": "**loaded**"}
        return ", ".join(f"{counts[what]} {words.get(what, 'crashed')}" for what in sorted(counts, reverse=True))

    def left(counts: dict[str, int]) -> str:
        later = counts.get("left over after the next store, two hours later")
        return f"{counts['left over']} left over" + ("" if later is None else f" ({later})")

    rows = [["", *(f"{name} {cache['version']}" for name, cache in found.items())],
            [f"{said['flips']} times one bit flipped in what is stored",
             *(outcomes(c["flips"]) for c in found.values())],
            [f"killed at {said['kills']} random moments of storing", *(left(c["kills"]) for c in found.values())]]
    for part in ("relocations", "archs", "owners"):
        rows += [[trial, *(cache[part][trial].replace("would compile", "compiles") for cache in found.values())]
                 for trial in next(iter(found.values()))[part]]
    return (_markdown(rows)
            + f"\n\n{said['host']}, Python {said['python']}, CuTe DSL {said['cute_dsl']}, {said['date']}.")


def calls() -> str:
    """A row for each call of jitmla.compat: where it is in both libraries, and its parameters."""
    rows = [["from", "there", "here", "parameters"]]
    for name, (library, place) in ORIGINS.items():
        module = importlib.import_module(f"jitmla.compat.{name}")
        for call in module.__all__:
            made = getattr(module, call)
            methods = [made.__init__, made.plan, made.run] if inspect.isclass(made) else [made]
            parameters = "; ".join(f"`{_parameters(method)}`" for method in methods)
            rows.append([library, f"`{place}.{call}`", f"`jitmla.compat.{name}.{call}`", parameters])
    return _markdown(rows)


def _parameters(function: Any) -> str:
    """Names and defaults, without types."""
    signature = inspect.signature(function)
    kept = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"]
    name = "" if function.__name__ == "__init__" or "." not in function.__qualname__ else function.__name__
    return name + str(signature.replace(parameters=kept, return_annotation=signature.empty))


def matrix() -> str:
    """A row for each op, a column for each group of architectures that the cards treat alike."""
    archs = dict.fromkeys(arch for op in registry.ops() for t in registry.templates(op) for arch in t.archs)
    serving = {arch: tuple(tuple(t.backend for t in registry.templates(op) if arch in t.archs) for op in registry.ops())
               for arch in sorted(archs, key=lambda arch: int(re.sub(r"\D", "", arch)))}
    groups: dict[Any, list[str]] = {}
    for arch, backends in serving.items():
        groups.setdefault(backends, []).append(arch)
    rows = [["op", *(", ".join(group) for group in groups.values())]]
    rows += [[f"`{op}`", *(", ".join(dict.fromkeys(backends[i])) or "-" for backends in groups)]
             for i, op in enumerate(registry.ops())]
    return _markdown(rows)


def kernels_page() -> str:
    """One table for each op: a row for each template, a column for each field that its cards restrict."""
    parts = ["# Kernels", "Generated from the template cards (`templates/*/card.toml`); `jitmla kernels` prints the "
             "same. A page size of 0 stands for any that is not listed.", *(_table_of(op) for op in registry.ops())]
    return "\n\n".join(parts) + "\n"


def _table_of(op: str) -> str:
    templates = registry.templates(op)
    fields = list(dict.fromkeys(field for t in templates for field in t.supports))
    rows = [["arch", "backend", "template", *(_title(f) for f in fields)]]
    rows += [[", ".join(t.archs), t.backend, t.name, *(_values(op, f, t.supports.get(f, ["any"])) for f in fields)]
             for t in templates]
    return f"## {op}\n\n" + _markdown(rows)


def _title(field: str) -> str:
    return "s_q * heads" if field == "rows" else field


def _values(op: str, field: str, values: list[Any]) -> str:
    """The values, or for buckets the range that they stand for."""
    if field != "rows":
        return ", ".join(str(v).lower() for v in values)
    below = [bucket for bucket in schema.spec_fields(op)[field]["enum"] if bucket < min(values)]
    return f"{max(below, default=0) + 1} to {max(values)}"


def schema_page() -> str:
    """Every field of a manifest, and of a Spec of each op."""
    document = schema.document()
    parts = ["# Fields of a cache entry", "Generated from `cache_schema.json`.", document["description"],
             "## Manifest", _fields(schema.definition("manifest"))]
    for name in document["definitions"]:
        if name.startswith("spec_"):
            definition = schema.definition(name)
            parts += [f"## Spec of `{name.removeprefix('spec_')}`", definition["description"], _fields(definition)]
    return "\n\n".join(parts) + "\n"


def _fields(definition: dict[str, Any]) -> str:
    rows = [["field", "value", "identity", "meaning"]]
    for name, field in _walk(definition):
        rows.append([f"`{name}`", _kind(field), "yes" if field.get("identity") else "", field.get("description", "")])
    return _markdown(rows)


def _walk(definition: dict[str, Any], at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted name, schema) of every field; a Spec is left to its own section."""
    for name, field in definition.get("properties", {}).items():
        resolved = {**schema.definition(field["$ref"].rpartition("/")[2]), **field} if "$ref" in field else field
        inner = resolved["items"] if resolved.get("type") == "array" else resolved
        dotted = f"{at}.{name}" if at else name
        if "properties" in inner:
            yield from _walk(inner, dotted + ("[]" if inner is not resolved else ""))
        else:
            yield dotted, resolved


def _kind(field: dict[str, Any]) -> str:
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "oneOf" in field:
        return "one of the Specs below"
    if "patternProperties" in field:
        return "constants by name"
    limits = [str(field[limit]) for limit in ("minimum", "maximum") if limit in field]
    if "pattern" in field:
        limits = [f"`{field['pattern']}`".replace("|", "\\|")]
    return field["type"] + (f" ({' to '.join(limits)}{' or more' if 'minimum' in field and len(limits) == 1 else ''})"
                            if limits else "")


def _markdown(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
