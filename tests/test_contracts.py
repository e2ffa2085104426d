"""The contract of an op is its docstring: it names every argument and every error, and says what is returned."""

import inspect
import re

import pytest

import jitmla


@pytest.mark.parametrize("op", jitmla.OPS)
def test_an_op_names_every_argument_and_its_errors(op):
    function = getattr(jitmla, op)
    contract = inspect.getdoc(function)
    missing = [name for name in inspect.signature(function).parameters if not re.search(rf"\b{name}\b", contract)]
    assert not missing and "Raises" in contract
    assert re.search(r"\b(returns?|writ\w+|mutated)\b|->", contract, re.I), "what comes out"


@pytest.mark.parametrize("name", sorted(set(jitmla.__all__) - set(jitmla.OPS)))
def test_everything_public_says_what_it_is(name):
    assert inspect.getdoc(getattr(jitmla, name))
    if inspect.isfunction(getattr(jitmla, name)):
        function = getattr(jitmla, name)
        missing = [p for p in inspect.signature(function).parameters if not re.search(rf"\b{p}\b", function.__doc__)]
        assert not missing
