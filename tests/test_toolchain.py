"""Which compiler a Key names, and which of its libraries is loaded."""

import ctypes
import importlib.metadata
import shutil
import sys
import types

import pytest

from jitmla import toolchain
from jitmla.errors import ToolchainMissing


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs flavors of the compiler, and nothing else: (names) -> the folder that they are in."""
    def make(*flavors, version="4.8.2"):
        for flavor in flavors:
            library = tmp_path / "nvidia_cutlass_dsl" / flavor / "lib" / toolchain.RUNTIME
            library.parent.mkdir(parents=True)
            library.touch()
        info = tmp_path / f"nvidia_cutlass_dsl-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {toolchain.DSL}\nVersion: {version}\n\ntext\n")
        return tmp_path

    def forget():
        toolchain._runtimes.cache_clear(), toolchain.current.cache_clear()

    with monkeypatch.context() as patched:
        patched.setattr(sys, "path", [str(tmp_path)])
        patched.delitem(sys.modules, "nvidia_cutlass_dsl", raising=False)
        importlib.invalidate_caches()
        forget()
        yield make
    forget()


def driver(monkeypatch, version, status=0):
    """A driver that runs this version of CUDA, such as 12090; none for None."""
    def get(pointer):
        pointer._obj.value = version
        return status

    def load(name):
        if version is None:
            raise OSError(f"{name}: cannot open shared object file")
        assert name == "libcuda.so.1"
        return types.SimpleNamespace(cuDriverGetVersion=get)

    monkeypatch.setattr(ctypes, "CDLL", load)


@pytest.mark.parametrize("version, flavor", [(12090, "cu12"), (13000, "cu13"), (14010, "cu13"), (None, "cu13"),
                                             (11080, "cu12")])
def test_of_two_flavors_the_one_that_the_driver_runs(install, monkeypatch, version, flavor):
    """As the compiler itself takes it; one that the driver is too old for says so when it is loaded."""
    folder = install("cu12", "cu13")
    driver(monkeypatch, version)
    assert dict(toolchain.current())["cuda"] == flavor
    assert toolchain.runtime_library() == folder / "nvidia_cutlass_dsl" / flavor / "lib" / toolchain.RUNTIME


def test_a_driver_that_does_not_say_its_version(install, monkeypatch):
    install("cu12", "cu13")
    driver(monkeypatch, 12090, status=1)
    assert dict(toolchain.current())["cuda"] == "cu13"


@pytest.mark.parametrize("flavor", toolchain.FLAVORS)
def test_the_only_flavor_needs_no_driver_to_choose(install, monkeypatch, flavor):
    install(flavor)
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert dict(toolchain.current("--opt-level 2")) == {
        "cute_dsl": "4.8.2", "cuda": flavor, "host": toolchain.host(), "options": "--opt-level 2"}


def test_nothing_installed(install):
    assert toolchain.current() is None
    with pytest.raises(ToolchainMissing, match="not installed"):
        toolchain.require_compiler()
    with pytest.raises(ToolchainMissing, match=toolchain.RUNTIME):
        toolchain.runtime_library()


def test_a_package_without_its_libraries(install):
    install()
    assert toolchain.current() is None


def test_the_version_of_a_compiler_whose_metadata_do_not_lie_beside_it(install, monkeypatch):
    """As where it was installed twice, or for development: what importlib.metadata finds counts."""
    folder = install("cu12")
    (folder / "nvidia_cutlass_dsl-4.8.0.dist-info").mkdir()
    stated = types.SimpleNamespace(read_text=lambda name: f"Name: {toolchain.DSL}\nVersion: 4.9\n")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: stated if name == toolchain.DSL else None)
    assert dict(toolchain.current())["cute_dsl"] == "4.9"


def test_a_compiler_that_pip_does_not_know(install):
    shutil.rmtree(next(install("cu12").glob("*.dist-info")))
    assert toolchain.current() is None
