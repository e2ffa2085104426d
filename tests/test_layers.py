"""Read-only layers: found in order, never written, wherever they were moved."""

import os
import shutil
import subprocess
import sys

import pytest

from jitmla import env, layers
from jitmla.compile import Built, get_or_compile
from jitmla.errors import CacheUntrusted
from jitmla.layer import Layer
from jitmla.store import Store

from .conftest import REPOSITORY
from .support.keys import KERNELS, SO_BYTES, SOURCE, make_key, publish
from .support.tree import snapshot

KEYS = [make_key(page_size=page) for page in (16, 32, 64)]


@pytest.fixture
def below(tmp_path, monkeypatch):
    """Two layers that JITMLA_CACHE_PATH names: the first holds KEYS[0], the second KEYS[0] and KEYS[1]."""
    first, second = Store(tmp_path / "first"), Store(tmp_path / "second")
    publish(first, KEYS[0], so_bytes=b"first")
    for key in KEYS[:2]:
        publish(second, key, so_bytes=b"second")
    monkeypatch.setenv(env.CACHE_PATH.name, f"{first.root}{os.pathsep}{os.pathsep}{second.root}")
    return first, second


def test_the_user_s_cache_comes_first_then_the_layers_in_order(below, store, seen):
    publish(store, KEYS[2])
    assert [store.find(key).so_bytes for key in KEYS] == [b"first", b"second", SO_BYTES]
    assert [e.fields["layer"] for e in seen if e.kind == "hit"] == [str(s.root) for s in (*below, store)]
    publish(store, KEYS[0], so_bytes=b"mine")
    assert store.find(KEYS[0]).so_bytes == b"mine"
    assert [listing.path.parents[3] for listing in store.entries()] == [
        store.root, store.root, below[0].root, below[1].root, below[1].root]
    assert {listing.digest for listing in store.resolve("")} == {key.digest for key in KEYS}
    assert store.resolve(KEYS[0].digest)[0].path.parents[3] == store.root


def test_a_layer_is_neither_written_nor_locked(below, store, seen):
    before = [snapshot(layer.root) for layer in below]
    for key in KEYS:
        get_or_compile(key, lambda: SOURCE, store, builder=lambda *a, **k: Built(SO_BYTES, SOURCE, KERNELS, 0.0))
    list(store.entries()), store.resolve("0"), store.find(make_key(toolchain=False, page_size=32))
    assert [snapshot(layer.root) for layer in below] == before
    assert [e.kind for e in seen if e.kind in ("hit", "compile")] == ["hit", "hit", "compile", "hit"]


def test_a_layer_s_hit_makes_nothing_in_the_user_s_cache(below, store):
    assert store.find(KEYS[0])
    assert not store.root.exists()


def test_a_key_without_toolchain_takes_the_newest_of_the_first_layer_that_has_one(below, store, monkeypatch):
    publish(below[1], make_key(toolchain={"cute_dsl": "4.10.0"}), so_bytes=b"newer")
    publish(below[1], make_key(toolchain={"cute_dsl": "4.9.0"}), so_bytes=b"older")
    found = store.find(make_key(toolchain=False))
    assert found.so_bytes == b"newer"
    publish(store, make_key())
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: pytest.fail("a look at every package"))
    found = store.find(make_key(toolchain=False))
    assert found.path.is_relative_to(store.root) and found.key == make_key()


def test_a_layer_that_others_can_write_stops_it_and_says_who_named_it(below, store):
    below[0].root.chmod(0o777)
    with pytest.raises(CacheUntrusted, match="others can write it") as caught:
        store.find(KEYS[1])
    assert env.CACHE_PATH.name in caught.value.remedy


@pytest.mark.parametrize("make, words", [
    (lambda path: None, "is not there"), (lambda path: path.mkdir(), "holds no kernel cache"),
    (lambda path: path.symlink_to("/nowhere"), "is not there")])
def test_a_layer_that_is_not_there_is_told_once_and_passed_over(store, tmp_path, monkeypatch, seen, make, words):
    make(tmp_path / "layer")
    monkeypatch.setenv(env.CACHE_PATH.name, str(tmp_path / "layer"))
    assert store.find(KEYS[0]) is None and Store().find(KEYS[0]) is None
    [told] = seen
    assert told.kind == "degrade" and words in told.fields["reason"] and env.CACHE_PATH.name in told.fields["reason"]


def test_a_given_root_has_only_the_layers_that_are_given(below, tmp_path):
    assert Store(tmp_path / "own").find(KEYS[0]) is None
    assert Store(tmp_path / "own", [Layer(below[1].root)]).find(KEYS[0]).so_bytes == b"second"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package `kernels_for_tests` whose folder `data` is a layer; importing it fails."""
    site = tmp_path / "site"
    (site / "kernels_for_tests").mkdir(parents=True)
    (site / "kernels_for_tests" / "__init__.py").write_text("raise AssertionError('a layer is not imported')")
    info = site / "kernels_for_tests-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels-for-tests\nVersion: 1.0\n")
    points = "[jitmla.layers]\nkernels = kernels_for_tests.data\ngone = no_such_package\n"
    (info / "entry_points.txt").write_text(points)
    publish(Store(site / "kernels_for_tests" / "data"), KEYS[0], so_bytes=b"wheel")
    monkeypatch.syspath_prepend(str(site))
    return site / "kernels_for_tests" / "data"


def test_the_layer_of_an_installed_package(package, store, seen):
    before = snapshot(package)
    assert store.find(KEYS[0]).so_bytes == b"wheel" and "kernels_for_tests" not in sys.modules
    assert snapshot(package) == before
    assert [e.kind for e in seen] == ["degrade", "hit"] and "'gone'" in seen[0].fields["reason"]
    publish(store, KEYS[0])
    assert store.find(KEYS[0]).so_bytes == SO_BYTES


def test_packages_are_looked_through_only_when_nothing_else_has_it(below, store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(layers, "installed", lambda: pytest.fail("a hit does not look for packages"))
        assert store.find(KEYS[0]) and store.find(KEYS[1])


def pythons():
    """Every Python from 3.10 on that PATH offers and that starts, this one among them."""
    found = {os.path.realpath(sys.executable): sys.executable}
    for path in filter(None, (shutil.which(f"python3.{minor}") for minor in range(10, 16))):
        done = subprocess.run([path, "-c", "import sys; print(sys.executable)"], capture_output=True, text=True)
        if done.returncode == 0:
            found[os.path.realpath(done.stdout.strip())] = path
    return list(found.values())


def test_a_cache_that_was_moved_is_found_by_any_python_all_of_it(tmp_path):
    """Another path, another environment (isolated, without site packages), another version of Python where there is
    one. Nothing but the standard library is needed to find an entry."""
    before = Store(tmp_path / "before")
    for key in KEYS:
        publish(before, key)
    moved = tmp_path / "moved" / "else where"
    shutil.copytree(before.root, moved)
    shutil.rmtree(before.root)
    program = ("import sys; sys.path[:0] = sys.argv[2:]\n"
               "from jitmla.store import Store\n"
               "store = Store(sys.argv[1])\n"
               "print(sum(store.find(listing.key) is not None for listing in store.entries()))")
    for python in pythons():
        done = subprocess.run([python, "-I", "-S", "-c", program, moved, REPOSITORY], capture_output=True, text=True)
        assert done.stdout == f"{len(KEYS)}\n", (python, done.stderr)
