""".ci/setup, which makes the environment of a checkout: what it says where it cannot, and which torch it takes."""

import importlib.machinery
import importlib.util
import sys

import pytest

from .conftest import REPOSITORY


@pytest.fixture
def setup():
    """.ci/setup as a module."""
    loader = importlib.machinery.SourceFileLoader("ci_setup", str(REPOSITORY / ".ci" / "setup"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("ci_setup", loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def pip(tmp_path):
    """A pip that finds the given versions of torch, has none installed, and keeps what it is asked to install."""
    def make(versions, fails=False):
        program = tmp_path / "pip.py"
        program.write_text(
            "import sys\n"
            "if sys.argv[1] == 'index':\n"
            f"    print('Available versions: ' + {versions!r}); sys.exit({int(fails)})\n"
            "if sys.argv[1] == 'show':\n"
            "    sys.exit(1)\n"
            f"open({str(tmp_path / 'installed')!r}, 'w').write(' '.join(sys.argv[2:]))\n")
        return [sys.executable, str(program)]
    make.installed = tmp_path / "installed"
    return make


@pytest.mark.parametrize("gpu, versions, fails, installed, said", [
    (False, "2.15.0, 2.14.1, 2.13.0+cpu, 2.13.0, 2.12.0+cpu", False, "torch==2.13.0+cpu", "a CPU build"),
    (False, "2.15.0, 2.14.1", False, "torch", "finds no CPU build"),
    (False, "2.4.1+cpu, 1.13.0+cpu", False, "torch", "finds no CPU build"),
    (False, "", True, "torch", "finds no CPU build"),
    (True, "2.15.0, 2.13.0+cpu", False, "torch", "default build"),
])
def test_which_torch(setup, pip, monkeypatch, capsys, gpu, versions, fails, installed, said):
    monkeypatch.setattr(setup, "has_gpu", lambda: gpu)
    setup.install_torch(pip(versions, fails))
    assert pip.installed.read_text() == installed and said in capsys.readouterr().out


def test_an_installed_torch_is_kept(setup, tmp_path):
    program = tmp_path / "pip.py"
    program.write_text("import sys; sys.exit(0 if sys.argv[1] == 'show' else 'nothing else may be asked')")
    setup.install_torch([sys.executable, str(program)])


def test_old_python(setup, monkeypatch):
    monkeypatch.setattr(setup.sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(SystemExit, match="Python 3.10 or newer is needed"):
        setup.check_python()


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_python_without_venv(setup, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=f"no module '{module}'.*python3-venv"):
        setup.check_python()
