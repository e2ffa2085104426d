"""Rendered sources as they were when last looked at. `python -m tests.golden` writes them; git shows what changed.

    <template>.txt   the code of one Key of each template, without comments, docstrings and empty lines
    constants.txt    the constants of every Key that the cards can give

So a change of a helper, of rendering, or of a card shows up as a change of generated code; a comment does not.
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

from jitmla import registry

from ..keysets import o_proj_product, product, quant_spec, spec

FOLDER = Path(__file__).parent
SAMPLES = {"sm90_swap": spec("bf16", 512, 64, 16, False), "sm90_seesaw": spec("bf16", 512, 64, 512, True)}


def normalised(source: str) -> str:
    """Code alone: what the compiler sees. Same text under every version of Python."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            for i in range(body[0].lineno - 1, body[0].end_lineno):
                lines[i] = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT and lines[row - 1]:
            lines[row - 1] = lines[row - 1][:column]
    return "".join(line.rstrip() + "\n" for line in lines if line.strip())


def samples() -> dict[str, registry.Choice]:
    """One Choice of each template."""
    found = {name: registry.choose(s) for name, s in SAMPLES.items()}
    (bmm,) = {c.spec for c in o_proj_product(["sm_90a"]) if c.spec.op == "fp8_bmm"}
    return found | {"warp_rows": registry.choose(quant_spec("sm_90a", "pow2_f32", False, "i64"), "auto", "t8h8"),
                    "sm90_tiles": registry.choose(bmm, "auto", "m128n256"),
                    "sm90_stream": registry.choose(bmm, "auto", "t64r64")}


def files() -> dict[str, str]:
    """Name and text of each golden file, as of now."""
    found = {f"{name}.txt": normalised(choice.source()) for name, choice in samples().items()}
    choices = [*map(registry.choose, product()), *o_proj_product(["sm_90a"])]
    found["constants.txt"] = "".join(map(_constants, choices))
    return found


def _constants(choice: registry.Choice) -> str:
    facts = " ".join(f"{k}={v}" for k, v in choice.spec if k not in ("op", "arch", "kv_dtype", "qk_rope_head_dim"))
    return f"{facts}\n    {choice.key.name}: " + " ".join(f"{k}={v!r}" for k, v in choice.key.constants) + "\n"
