"""The tiny kernel's source, and Keys that it can be compiled under."""

from pathlib import Path

import pytest

from jitmla import toolchain

from .keys import make_key

SOURCE = (Path(__file__).parent / "tiny_kernel.py").read_text()
needs_compiler = pytest.mark.skipif(toolchain.current() is None or toolchain.linker() is None,
                                    reason="CuTe DSL or a linker is not installed")


def tiny_key(**over):
    """A Key of the tiny kernel for the toolchain that is installed here."""
    return make_key(toolchain=dict(toolchain.current() or ()), **over)
