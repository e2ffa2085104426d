"""The contract of an op is its docstring: it names every argument and every error, and says what is returned."""

import inspect
import re
import subprocess
import sys

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


def test_packages_come_without_an_import_of_their_own(python_env):
    """As the docs name them, after `import jitmla` alone; and a wrong name says what there is."""
    code = ("import sys, jitmla\n"
            "assert 'torch' not in sys.modules and {'compat', 'dsa', 'engines'} <= set(dir(jitmla))\n"
            "jitmla.dsa.Layer, jitmla.compat.flash_mla.get_mla_metadata, jitmla.engines.piecewise.Backend\n"
            "for package in (jitmla, jitmla.compat, jitmla.engines):\n"
            "    try:\n        package.nonsense\n"
            "    except AttributeError as error:\n        print(error)\n")
    done = subprocess.run([sys.executable, "-c", code], env=python_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 3 and "compat, dsa, engines" in said[0] and "flash_mla" in said[1] and "piecewise" in said[2]
