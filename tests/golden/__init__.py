"""Rendered sources as they were when last looked at. `python -m tests.golden` writes them; git shows what changed.

    <template>.txt   the code of one Key of each template, without comments, docstrings and empty lines
    constants.txt    the constants of every Key that the cards can give on Hopper

So a change of a helper, of rendering, or of a card shows up as a change of generated code; a comment does not.
"""

from __future__ import annotations

import ast
import functools
import io
import tokenize
from pathlib import Path

from jitmla.registry import Choice

from ..keysets import ARCH, every_choice, golden_choices

FOLDER = Path(__file__).parent


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


@functools.cache
def files() -> dict[str, str]:
    """Name and text of each golden file, as of now."""
    found = {f"{choice.template.name}.txt": normalised(choice.source()) for choice in golden_choices()}
    found["constants.txt"] = "".join(_constants(c) for c in every_choice() if c.spec.arch == ARCH)
    return found


def _constants(choice: Choice) -> str:
    facts = " ".join(f"{k}={v}" for k, v in choice.spec if k not in ("op", "arch", "kv_dtype", "qk_rope_head_dim"))
    return f"{facts}\n    {choice.key.name}: " + " ".join(f"{k}={v!r}" for k, v in choice.key.constants) + "\n"
