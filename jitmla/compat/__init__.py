"""jitmla's ops under the names, signatures and tensor layouts of other libraries, to replace them one for one."""

from __future__ import annotations

import importlib
from types import ModuleType

LIBRARIES = ("deep_gemm", "flash_mla", "flashinfer", "trtllm", "vllm")


def __getattr__(name: str) -> ModuleType:
    if name not in LIBRARIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(LIBRARIES)}")
    return importlib.import_module(f"{__name__}.{name}")
