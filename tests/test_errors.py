"""Errors: one tree, four parts each."""

import ast
import copy
import inspect
import pickle
from pathlib import Path

import pytest

from jitmla import errors
from jitmla.errors import JitmlaError

PACKAGE = Path(errors.__file__).parent
PARTS = {"supported", "differs", "remedy"}
CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, JitmlaError)]


def test_there_are_some():
    assert len(CLASSES) > 10


@pytest.mark.parametrize("kind", CLASSES)
def test_one_sentence_says_when(kind):
    assert inspect.getdoc(kind).endswith(".")


@pytest.mark.parametrize("kind", [c for c in CLASSES if c is not JitmlaError])
def test_each_is_also_what_a_caller_would_expect(kind):
    built_in = [base for base in kind.__mro__ if base.__module__ == "builtins" and base not in (Exception, object,
                                                                                               BaseException)]
    assert built_in, f"{kind.__name__} derives from JitmlaError alone"


@pytest.mark.parametrize("kind", CLASSES)
def test_four_parts(kind):
    error = kind("what was asked", supported="what works", differs="where they differ", remedy="what mends it")
    assert str(error) == ("what was asked\n  supported: what works\n  differs: where they differ\n"
                          "  to mend it: what mends it")
    assert error.as_dict() == {"error": kind.__name__, "asked": "what was asked", "supported": "what works",
                               "differs": "where they differ", "remedy": "what mends it"}


def _raised():
    """(file:line, keywords) of every error that jitmla makes."""
    names = {kind.__name__ for kind in CLASSES}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in names:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", {keyword.arg for keyword in node.keywords}


def test_every_error_that_is_raised_has_all_parts():
    raised = dict(_raised())
    assert len(raised) > 100
    assert [at for at, given in raised.items() if None not in given and not PARTS <= given] == []  # None: **parts


def test_empty_parts_are_left_out():
    assert str(JitmlaError("asked", remedy="mend")) == "asked\n  to mend it: mend"


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("move", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"])
def test_errors_survive_the_way_to_another_process(kind, move):
    """Worker processes of engines send exceptions to their parent with pickle."""
    error = kind("asked", supported="s", differs="d", remedy="r")
    again = move(error)
    assert type(again) is kind and str(again) == str(error) and again.as_dict() == error.as_dict()
