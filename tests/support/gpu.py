"""A GPU for tests on machines without one: an H200 as far as torch.cuda and the loader are asked, and kernels in C."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from jitmla import dispatch, load, misses, toolchain, tune

from .keys import KERNELS


def c_library(folder):
    """The bytes of a library whose functions run without a GPU."""
    if toolchain.linker() is None:
        pytest.skip("no C compiler")
    source = Path(__file__).parent / "ffi.c"
    subprocess.run([toolchain.linker(), "-shared", "-fPIC", "-nostdlib", "-o", folder / "ffi.so", source], check=True)
    return (folder / "ffi.so").read_bytes()


def publish_all(store, keys, library):
    """Entries for `keys` whose libraries do the same and are not the same."""
    for key in keys:
        store.publish(key, "# a kernel\n", library + key.digest.encode(), KERNELS)


class Gpu:
    """What was asked of it: `driver` has (library, device index) of each load into the driver."""

    def __init__(self, patch, capability=(9, 0), name="NVIDIA H200", sms=132):
        import torch

        self.driver, self.capturing = [], False
        properties = SimpleNamespace(name=name, multi_processor_count=sms)
        for where, what, answer in (
                (torch.cuda, "get_device_capability", lambda device: capability),
                (torch.cuda, "get_device_properties", lambda device: properties),
                (torch.cuda, "is_available", lambda: True), (torch.cuda, "current_device", lambda: 0),
                (torch.cuda, "is_current_stream_capturing", lambda: self.capturing),
                (load, "_load_into_driver", lambda library, index: self.driver.append((library, index))),
                (load, "_modules", {}), (load, "_ready", set()), (dispatch, "_plans", {}), (dispatch, "_loaded", {}),
                (tune, "_adopted", {})):
            patch.setattr(where, what, answer)
        self._forget()

    @staticmethod
    def _forget():
        misses.set_frozen(False)
        dispatch.arch_of.cache_clear()
        dispatch.sm_count.cache_clear()

    def close(self):
        """The process is as it was, frozen no more; the patches are undone by whoever made them."""
        self._forget()
        dispatch.forget()
