"""Helpers for serving engines. They have no kernels and no policy of their own."""

from __future__ import annotations

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name != "piecewise":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has piecewise")
    return importlib.import_module(f"{__name__}.{name}")
