"""Hazards of the memory model that no test on a GPU meets every time: found in the text of the templates."""

import ast

import pytest

from jitmla import registry

READS = ("ldmatrix", "ldsm")  # reads of shared memory whose registers only a product uses
WAITS = {"wait_group", "fence_view_async_shared", "barrier", "sync_threads"}
GIVES = {"mbarrier_arrive", "arrive"}
SOURCES = sorted(p for p in registry.TEMPLATES.rglob("*.py") if "CopyBulkTensor" in p.read_text(encoding="utf-8"))


def given_back_early(source):
    """(function, line) of arrivals at an mbarrier behind a read by ldmatrix, without a wait in between."""
    for function in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)):
        calls = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
        pending = False
        for call in sorted(calls, key=lambda n: (n.end_lineno, n.end_col_offset)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name in WAITS:
                pending = False
            elif name in GIVES and pending:
                yield function.name, call.lineno
            elif name.startswith(READS) or (name == "copy" and call.args and "ldsm" in ast.unparse(call.args[0])):
                pending = True


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_no_buffer_is_given_to_the_tma_engine_while_it_is_read(path):
    assert not list(given_back_early(path.read_text(encoding="utf-8")))


def test_the_search_finds_one():
    early = """
def tile(c):
    cute.copy(c["ldsm"], source, q)
    cute.arch.sync_warp()
    {}
    arrive(bars, lane)
"""
    assert list(given_back_early(early.format("pass"))) == [("tile", 6)]
    assert not list(given_back_early(early.format("warpgroup.wait_group(0)")))
    assert len(SOURCES) >= 10
