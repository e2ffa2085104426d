"""Imports point inwards only: rings 1 and 2 load no torch, tvm_ffi or cutlass; only the child loads cutlass."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jitmla"
HEAVY = ("torch", "tvm_ffi", "cutlass")
# Rings 1 (pure) and 2 (disk and processes). Everything else in jitmla/ is ring 3 and may use a device.
INNER = ["jitmla", *(f"jitmla.{name}" for name in (
    "arch", "card", "env", "errors", "events", "key", "layouts", "misses", "models", "pick", "registry", "render",
    "resources", "schedule", "schema", "spec", "spec_indexer", "toolchain", "tune", "bounds", "bundle", "compile",
    "failures", "layer", "layers", "lock", "manifest", "pool", "prewarm", "store", "trusted", "why", "cli"))]
RING_3 = {"__main__", "_child", "bench", "compat", "dispatch", "dsa", "engines", "load", "ops", "testing",
          "testing_cached", "testing_dsa", "testing_features", "testing_indexer", "testing_logits", "testing_memory",
          "testing_o_proj", "testing_prefill", "testing_sparse", "torch_ops", "torch_ops_cached", "torch_ops_indexer",
          "torch_ops_o_proj", "torch_ops_prefill", "torch_ops_sparse", "workspace"}
# importing these modules of ring 3 is itself part of a promise: pages of docs are made without torch
ALSO_LIGHT = ["jitmla.load", "jitmla.bench.report", "jitmla.bench.cases"]


def sources():
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "templates").rglob("*.py")])


def imported(path):
    """Top-level package of every absolute import, late ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]


def test_every_module_has_a_ring():
    names = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir()
             if p.suffix == ".py" or (p / "__init__.py").is_file()} - {"__init__"}
    assert names - RING_3 == {name.partition(".")[2] for name in INNER} - {""}


def test_inner_rings_in_a_fresh_interpreter():
    """One after the other in one process: as long as nothing heavy is there, order and company do not matter, and the
    first one that brings it is named."""
    code = ("import importlib, sys\n"
            f"for name in {INNER + ALSO_LIGHT}:\n"
            "    importlib.import_module(name)\n"
            f"    heavy = [m for m in {HEAVY} if m in sys.modules]\n"
            "    if heavy: sys.exit(f'{name} imports {heavy}')\n")
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_who_imports_what(path):
    names, place = set(imported(path)), path.relative_to(ROOT)
    if place.parts[0] == "templates":
        assert not names & {"torch", "jitmla", "tvm_ffi"}, "templates run in the child"
    elif place != Path("jitmla/_child.py"):
        assert not names & {"cutlass", "cuda"}
        if place.parts[1].removesuffix(".py") not in RING_3:
            assert not names & set(HEAVY), "not even late"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_caught_blindly(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]
    assert bare == []


def test_public_names_come_late_and_all_exist():
    code = ("import sys, jitmla\n"
            "assert 'jitmla.spec' not in sys.modules\n"
            "assert jitmla.__all__ == sorted(jitmla.__all__) and set(jitmla.__all__) <= set(dir(jitmla))\n"
            "for name in jitmla.__all__: assert getattr(jitmla, name) is getattr(jitmla, name), name\n"
            "try: jitmla.nothing\n"
            "except AttributeError as e: assert 'mla_decode' in str(e)\n"
            "else: sys.exit('jitmla.nothing exists')\n")
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
