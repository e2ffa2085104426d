"""The read-only layers below the user's cache: folders that JITMLA_CACHE_PATH names, then those of installed packages.

A package brings one by an entry point in the group `jitmla.layers` whose value is the dotted name of a folder inside
it, such as `deepseek = "my_kernels.sm90"`. Nothing of the package is imported.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

from . import env
from .events import emit
from .layer import LAYOUT, Layer

GROUP = "jitmla.layers"
_told: set[str] = set()  # what is missing is said once in a process


def named() -> tuple[Layer, ...]:
    """The layers of JITMLA_CACHE_PATH, in its order."""
    paths = filter(None, env.CACHE_PATH.get().split(os.pathsep))
    return tuple(filter(None, (_layer(Path(path), env.CACHE_PATH.name) for path in paths)))


@functools.cache
def installed() -> tuple[Layer, ...]:
    """The layers of installed packages, in the order of their names."""
    import importlib.metadata

    points = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    return tuple(filter(None, (_layer(_folder(point.module), f"the entry point {point.name!r} of {GROUP}")
                               for point in points)))


def _folder(dotted: str) -> Path:
    """Where `package.folder` lies; a path that does not exist when there is no such package."""
    package, *rest = dotted.split(".")
    found = importlib.util.find_spec(package)
    places = list(found.submodule_search_locations or ()) if found else []
    paths = [Path(place, *rest) for place in places]
    return next((path for path in paths if path.is_dir()), Path("/nonexistent", package, *rest))


def _layer(root: Path, origin: str) -> Layer | None:
    layer = Layer(root, origin)
    if os.path.isdir(layer.root / LAYOUT):
        return layer
    if str(root) not in _told:
        _told.add(str(root))
        what = f"holds no kernel cache (no folder {LAYOUT!r})" if os.path.isdir(layer.root) else "is not there"
        emit("degrade", what="layer", reason=f"{root}, which {origin} names, {what}")
    return None
