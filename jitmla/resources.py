"""Where the package finds its own data: cache_schema.json, templates/ and tunings/.

The first two live beside the package in a checkout and inside it in an installed wheel. This is the one place that
knows.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _locate(name: str) -> Path:
    installed = _PACKAGE / "_data" / name
    return installed if installed.exists() else _PACKAGE.parent / name


SCHEMA = _locate("cache_schema.json")
TEMPLATES = _locate("templates")
TUNINGS = _PACKAGE / "tunings"  # of `jitmla tune`, one file for each kind of GPU
