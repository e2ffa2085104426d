"""Places where a cache cannot be, or not any more: a clear message, an uncached result, and nothing lost."""

import contextlib
import os
import pwd
import subprocess
import tempfile
import time

import pytest

from jitmla import env
from jitmla.compile import Built, get_or_compile
from jitmla.errors import CacheUntrusted, CacheUnwritable
from jitmla.store import NOWHERE, Store

from ..support.keys import KERNELS, SO_BYTES, SOURCE, make_key, publish
from ..support.tree import snapshot, unprivileged

OTHER = make_key(page_size=16)


def compiled(store, key):
    """The entry that a call gets, with a compiler that takes no time."""
    return get_or_compile(key, lambda: SOURCE, store, builder=lambda *a, **k: Built(SO_BYTES, SOURCE, KERNELS, 0.0))


def uncached(store, key, seen, words):
    """Whether a call gets its kernel although nothing can be stored, and the reason was told."""
    seen.clear()
    entry = compiled(store, key)
    told = [e.fields["reason"] for e in seen if e.kind == "degrade"]
    return entry.path is None and entry.so_bytes == SO_BYTES and any(words in reason for reason in told)


@contextlib.contextmanager
def mounted(folder, options):
    """A disk of its own at `folder`, where this user may mount one."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("cannot mount a disk here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tmp_path, key, seen):
    with mounted(tmp_path, "size=64k"):
        store = Store(tmp_path / "cache")
        made = publish(store, key)
        with contextlib.suppress(OSError), open(tmp_path / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        before = snapshot(made.path)
        with pytest.raises(CacheUnwritable, match="No space left"):
            publish(store, OTHER)
        assert uncached(store, OTHER, seen, "No space left")
        assert store.find(key) == made and snapshot(made.path) == before
        assert os.listdir(store.root / "v1" / ".staging") == []
        (tmp_path / "ballast").unlink()
        assert compiled(store, OTHER).path == store.path(OTHER)


def test_a_read_only_disk(tmp_path, key, seen):
    with mounted(tmp_path, "size=1m"):
        store = Store(tmp_path / "cache")
        made = publish(store, key)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        before = snapshot(store.root)
        assert store.find(key) == made and len(list(store.entries())) == 1
        assert uncached(store, OTHER, seen, "Read-only file system")
        assert snapshot(store.root) == before


def test_a_root_without_permission_to_write(key, seen):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        store = Store(os.path.join(folder, "cache"))
        made = publish(store, key)
        for path, _, _ in os.walk(store.root):
            os.chmod(path, 0o555)
        with unprivileged(store.root):
            assert store.find(key) == made
            assert uncached(store, OTHER, seen, "Permission denied")
        os.chmod(store.root, 0o700)


def test_a_place_that_cannot_be(tmp_path, key, seen):
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below", "/proc/jitmla"):
        assert uncached(Store(root), key, seen, "")


def test_home_is_not_set(monkeypatch, tmp_path):
    """The user's home is then the one of the user database."""
    for name in (env.CACHE_DIR.name, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert Store().root == (tmp_path / Store().root).resolve()
    assert str(Store().root) == os.path.realpath(os.path.join(pwd.getpwuid(os.getuid()).pw_dir, ".cache", "jitmla"))


@pytest.mark.parametrize("cache_home", [None, "", "relative/is/invalid"])
def test_a_user_without_a_home(monkeypatch, tmp_path, key, seen, cache_home):
    """As in a container whose user id is in no database: nothing is written anywhere, layers still work."""
    for name in (env.CACHE_DIR.name, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if cache_home is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    monkeypatch.chdir(tmp_path)
    publish(Store(tmp_path / "layer"), OTHER)
    monkeypatch.setenv(env.CACHE_PATH.name, str(tmp_path / "layer"))
    assert Store().root == NOWHERE
    assert uncached(Store(), key, seen, "no home folder")
    with pytest.raises(CacheUnwritable, match="no home folder") as caught:
        publish(Store(), key)
    assert env.CACHE_DIR.name in caught.value.remedy
    assert compiled(Store(), OTHER).path
    assert os.listdir(tmp_path) == ["layer"] and not NOWHERE.exists()


def test_a_root_that_is_a_dangling_link(tmp_path, key, seen):
    """The folder it leads to is made, if it can be."""
    (tmp_path / "link").symlink_to(tmp_path / "scratch" / "jitmla")
    assert Store(tmp_path / "link").find(key) is None
    assert compiled(Store(tmp_path / "link"), key).path.is_relative_to(tmp_path / "scratch" / "jitmla")
    (tmp_path / "lost").symlink_to("/proc/nowhere/jitmla")
    assert uncached(Store(tmp_path / "lost"), key, seen, "No such file")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises((CacheUntrusted, CacheUnwritable)):
        publish(Store(tmp_path / "circle"), key)


@pytest.mark.parametrize("part", ["v1", "v1/sm_90a", "v1/sm_90a/mla_decode", "v1/.staging", "v1/.locks"])
def test_a_dangling_link_inside_a_root(store, key, part):
    path = store.root / part
    store.root.mkdir(mode=0o700)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/nowhere")
    with pytest.raises(CacheUntrusted, match="symbolic link"):
        compiled(store, key)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("part", [".", "v1", "v1/.locks", "v1/.staging", "v1/.failed"])
def test_a_foreign_owner_of_a_folder_that_is_written(store, key, part):
    publish(store, key)
    for name in (".locks", ".failed"):
        store.side_folder(name)
    os.chown(store.root / part, 12345, -1)
    with pytest.raises(CacheUntrusted, match="12345 owns it"):
        compiled(store, OTHER)
    assert not store.path(OTHER).exists()


@pytest.mark.parametrize("years", [-10, 10])
def test_a_clock_that_is_wrong(store, key, monkeypatch, years):
    """Whatever it says: entries are found, stored, and stay."""
    made = publish(store, key)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + years * 365.25 * 86400)
    assert Store(store.root).find(key) == made
    assert compiled(store, OTHER).path == store.path(OTHER)
    assert len(list(store.entries())) == 2
    monkeypatch.undo()
    assert store.find(key) and store.find(OTHER)
