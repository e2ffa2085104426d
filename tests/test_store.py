"""The store: what an entry is, what is refused, what is not trusted, and what happens when nothing can be written."""

import dataclasses
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time

import pytest

from jitmla import bounds, layer, toolchain, trusted
from jitmla.errors import CacheUntrusted, CacheUnwritable, SchemaViolation
from jitmla.key import canonical
from jitmla.store import Store

from .support.keys import KERNELS, SO_BYTES, SOURCE, TOOLCHAIN, make_key, publish
from .support.tree import snapshot, unprivileged

FILES = ("kernel.py", "kernel.so", "manifest.json")


def kinds(seen):
    return [event.kind for event in seen]


# ------------------------------------------------------------------------------------------------- an entry


def test_what_is_published_is_found(store, key, seen):
    assert store.find(key) is None
    made = publish(store, key)
    found = Store(store.root).find(key)
    assert found == made
    assert (found.source, found.so_bytes, found.key) == (SOURCE, SO_BYTES, key)
    assert found.path == store.root / "v1" / "sm_90a" / "mla_decode" / key.digest
    assert sorted(p.name for p in found.path.iterdir()) == list(FILES)
    assert found.manifest["kernels"] == KERNELS
    assert kinds(seen) == ["publish", "hit"]


def test_an_entry_has_the_same_bytes_anywhere_and_holds_no_path(tmp_path, key):
    first, second = (publish(Store(tmp_path / name), key) for name in ("one", "two"))
    for name in FILES:
        data = (first.path / name).read_bytes()
        assert data == (second.path / name).read_bytes()
        assert str(tmp_path).encode() not in data and os.path.expanduser("~").encode() not in data


def test_the_manifest_is_canonical_and_names_its_own_digest(entry):
    raw = (entry.path / "manifest.json").read_bytes()
    manifest = json.loads(raw)
    assert raw == (canonical(manifest) + "\n").encode()
    stated = manifest.pop("manifest_sha256")
    assert stated == hashlib.sha256(canonical(manifest).encode()).hexdigest()
    assert manifest["files"]["kernel.so"] == {"sha256": hashlib.sha256(SO_BYTES).hexdigest(), "bytes": len(SO_BYTES)}


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_nobody_else_can_write_what_is_made_whatever_the_umask(tmp_path, key, umask):
    before = os.umask(umask)
    try:
        publish(Store(tmp_path / "new"), key)
    finally:
        os.umask(before)
    for mode, *_ in snapshot(tmp_path / "new").values():
        assert not mode & 0o022
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert Store(tmp_path / "new").find(key)


def test_reading_writes_nothing(store, entry, key):
    before = snapshot(store.root)
    store.find(key), store.find(make_key(page_size=16)), list(store.entries()), store.resolve("00")
    assert snapshot(store.root) == before


def test_looking_into_an_absent_root_does_not_make_it(store, key):
    assert store.find(key) is None and list(store.entries()) == [] and store.resolve("") == []
    assert not store.root.exists()


def test_publishing_again_keeps_what_is_there(store, entry, key, seen):
    inode = entry.path.stat().st_ino
    assert publish(store, key, so_bytes=b"a loser's bytes") == entry
    assert entry.path.stat().st_ino == inode
    assert os.listdir(store.root / "v1" / ".staging") == []
    assert "publish" not in kinds(seen)


def test_what_does_not_match_the_schema_is_not_stored(store, key):
    with pytest.raises(SchemaViolation):
        store.publish(key, SOURCE, SO_BYTES, [])
    assert not store.root.exists()


def test_left_staging_folders_are_swept(store, key):
    staging = store.root / "v1" / ".staging"
    publish(store, key)
    for name, age in (("old", 2 * bounds.STALE_SECONDS), ("new", 1.0)):
        (staging / name).mkdir()
        (staging / name / "kernel.so").write_bytes(b"half")
        os.utime(staging / name, (time.time() - age,) * 2)
    publish(store, make_key(page_size=16))
    assert os.listdir(staging) == ["new"]


def test_the_root_is_the_environment_s_or_the_platform_s(monkeypatch, tmp_path):
    monkeypatch.setenv("JITMLA_CACHE_DIR", str(tmp_path / "named"))
    assert Store().root == tmp_path / "named"
    monkeypatch.delenv("JITMLA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Store().root == tmp_path / "xdg" / "jitmla"


def test_the_root_itself_may_be_reached_through_a_link(tmp_path, key):
    (tmp_path / "scratch").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    publish(Store(tmp_path / "link"), key)
    assert Store(tmp_path / "link").find(key).path.is_relative_to(tmp_path / "scratch")


# ------------------------------------------------------------------------------------------------- integrity


def refused(store, key, seen):
    """Whether `key` is not found and the refusal was told."""
    seen.clear()
    return store.find(key) is None and kinds(seen) == ["refuse"] and bool(seen[0].fields["reason"])


def rebuilt(store, key):
    """Whether publishing replaces what is there by a valid entry."""
    return publish(store, key).so_bytes == SO_BYTES and store.find(key).so_bytes == SO_BYTES


def overwrite(path, data):
    path.write_bytes(data)


def other_spelling(raw):
    return json.dumps(json.loads(raw), sort_keys=True).encode() + b"\n"


def signed_again(raw, **changes):
    """The manifest with other fields and a self digest that fits them: a forger's work."""
    manifest = {**json.loads(raw), **changes}
    manifest.pop("manifest_sha256")
    manifest["manifest_sha256"] = hashlib.sha256(canonical(manifest).encode()).hexdigest()
    return (canonical(manifest) + "\n").encode()


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:-1], lambda raw: raw[: len(raw) // 2], lambda raw: raw + b" ", other_spelling,
    lambda raw: b"[" * 100000, lambda raw: b"\xff" + raw, lambda raw: b"null\n", lambda raw: b"NaN\n",
    lambda raw: raw.replace(b'"producer"', b'"producer":"x","producer"'),
    lambda raw: signed_again(raw, digest="0" * 64), lambda raw: signed_again(raw, note="unknown field"),
    lambda raw: signed_again(raw, key=make_key(page_size=16).as_dict()),
    lambda raw: signed_again(raw, key=make_key(page_size=16).as_dict(), digest=make_key(page_size=16).digest),
], ids=range(14))
def test_a_damaged_manifest_is_refused(store, entry, key, seen, damage):
    path = entry.path / "manifest.json"
    overwrite(path, damage(path.read_bytes()))
    assert refused(store, key, seen)
    assert rebuilt(store, key)


@pytest.mark.parametrize("name", FILES)
def test_missing_cut_or_strange_files_are_refused(store, entry, key, seen, name):
    path = entry.path / name
    data = path.read_bytes()
    for damage in (path.unlink, lambda: overwrite(path, data[:-1]), lambda: overwrite(path, data + b"\0"),
                   lambda: (path.unlink(), path.mkdir()), lambda: (path.unlink(), os.mkfifo(path, 0o600))):
        damage()
        assert refused(store, key, seen)
        assert rebuilt(store, key)


def test_an_entry_in_another_s_place_is_refused(store, entry, seen):
    other = make_key(page_size=16)
    shutil.copytree(entry.path, store.path(other))
    assert refused(store, other, seen)
    assert rebuilt(store, other)


def test_a_file_in_the_place_of_an_entry_is_refused_and_replaced(store, key, seen):
    publish(store, make_key(page_size=16))
    overwrite(store.path(key), b"not a folder")
    assert refused(store, key, seen)
    assert rebuilt(store, key)


def test_an_entry_that_is_being_replaced_is_looked_at_again(store, entry, key, monkeypatch, seen):
    (entry.path / "kernel.so").unlink()
    real, calls = trusted.read_file, []

    def replaced_meanwhile(folder, path, *stated):
        calls.append(path.name)
        if len(calls) == 3:
            try:
                return real(folder, path, *stated)
            finally:
                rebuilt(Store(store.root), key)
        return real(folder, path, *stated)

    monkeypatch.setattr(layer, "read_file", replaced_meanwhile)
    assert store.find(key).so_bytes == SO_BYTES
    assert "refuse" not in kinds(seen)


# ----------------------------------------------------------------------------------------------------- trust


LEVELS = {"root": ".", "layout": "v1", "arch": "v1/sm_90a", "op": "v1/sm_90a/mla_decode"}
PLACES = [*LEVELS, "entry", *FILES]


def place(store, entry, name):
    if name in LEVELS:
        return store.root / LEVELS[name]
    return entry.path if name == "entry" else entry.path / name


def assert_untrusted(store, key, path, word):
    before = snapshot(store.root)
    for attempt in (store.find, lambda k: store.find(make_key(toolchain=False))):
        with pytest.raises(CacheUntrusted, match=word) as caught:
            attempt(key)
        assert str(path) in caught.value.asked and caught.value.remedy
    assert isinstance(caught.value, PermissionError)
    assert snapshot(store.root) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", PLACES)
def test_what_another_user_owns_is_not_trusted(store, entry, key, name):
    os.chown(place(store, entry, name), 12345, -1)
    assert_untrusted(store, key, place(store, entry, name), "12345 owns it")


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("bit", [0o020, 0o002])
def test_what_others_can_write_is_not_trusted(store, entry, key, name, bit):
    path = place(store, entry, name)
    path.chmod(path.stat().st_mode | bit)
    assert_untrusted(store, key, path, "others can write it")


@pytest.mark.parametrize("name", PLACES[1:])
def test_symbolic_links_are_not_trusted(store, entry, key, name, tmp_path):
    path = place(store, entry, name)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert_untrusted(store, key, path, "symbolic link")


def test_a_user_who_is_not_the_owner_is_refused(store, entry, key, monkeypatch):
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:  # what root owns may be read by everybody
        assert store.find(key) == entry
    else:
        assert_untrusted(store, key, store.root, f"user id {owner} owns it")


def test_nothing_is_published_into_an_untrusted_cache(store, entry, key):
    store.root.chmod(0o777)
    for attempt in (lambda: publish(store, make_key(page_size=16)), lambda: store.side_folder(".locks")):
        with pytest.raises(CacheUntrusted, match="others can write it"):
            attempt()
    assert not store.path(make_key(page_size=16)).exists()


def test_an_untrusted_entry_is_not_replaced(store, entry, key):
    entry.path.chmod(0o777)
    with pytest.raises(CacheUntrusted):
        publish(store, key)
    assert entry.path.exists()


# -------------------------------------------------------------------------------------------------- no writing


@pytest.fixture
def public():
    """A store in a folder that every user can reach."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Store(os.path.join(folder, "cache"))


def test_a_root_that_cannot_be_opened_is_not_trusted(public, key):
    publish(public, key)
    public.root.chmod(0o000)
    with unprivileged(), pytest.raises(CacheUntrusted, match="cannot open it"):
        public.find(key)
    public.root.chmod(0o700)


def test_a_read_only_cache_can_be_read_and_says_when_it_cannot_be_written(public, key):
    made = publish(public, key)
    for folder, _, files in os.walk(public.root):
        os.chmod(folder, 0o555)
        for name in files:
            os.chmod(os.path.join(folder, name), 0o444)
    with unprivileged(public.root):
        assert public.find(key) == made
        before = snapshot(public.root)
        with pytest.raises(CacheUnwritable, match="Permission denied") as caught:
            publish(public, make_key(page_size=16))
        assert "JITMLA_CACHE_DIR" in caught.value.remedy and isinstance(caught.value, OSError)
        assert snapshot(public.root) == before
    os.chmod(public.root, 0o755)


def test_a_place_where_no_folder_can_be_made(tmp_path, key):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below", "/proc/jitmla"):
        assert Store(root).find(key) is None
        with pytest.raises(CacheUnwritable):
            publish(Store(root), key)


def test_a_full_disk_leaves_nothing_behind(store, entry, key):
    other = make_key(page_size=16)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = snapshot(entry.path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # the library is longer
    try:
        with pytest.raises(CacheUnwritable, match="File too large"):
            publish(store, other)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not store.path(other).exists() and os.listdir(store.root / "v1" / ".staging") == []
    assert snapshot(entry.path) == before
    assert rebuilt(store, other)


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_whatever_the_system_refuses_the_cache_is_unwritable_and_clean(store, entry, key, monkeypatch, call, number):
    other = make_key(page_size=16)

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(CacheUnwritable, match=os.strerror(number)):
        publish(store, other)
    monkeypatch.undo()
    assert os.listdir(store.root / "v1" / ".staging") == []
    assert store.find(other) is None and store.find(key) == entry


# --------------------------------------------------------------------------- without a compiler, and for the CLI


def test_a_key_without_toolchain_takes_the_newest_that_fits(store, seen):
    versions = [("4.9.0", "cu13"), ("4.10.0", "cu12"), ("4.10.0", "cu13"), ("4.8.1", "cu13")]
    for i, (version, cuda) in enumerate(versions):
        publish(store, make_key(toolchain={"cute_dsl": version, "cuda": cuda}), so_bytes=bytes([i + 1]))
    publish(store, make_key(toolchain={"cute_dsl": "99.0", "host": "linux-another"}), so_bytes=b"foreign")
    publish(store, make_key(toolchain={"cute_dsl": "99.0"}, template_digest="cd" * 32), so_bytes=b"another template")
    publish(store, make_key(toolchain={"cute_dsl": "99.0"}, constants=(("FACTOR", 3.0),)), so_bytes=b"another variant")
    publish(store, make_key(toolchain={"cute_dsl": "99.0"}, page_size=16), so_bytes=b"another spec")
    wanted = make_key(toolchain=False)
    seen.clear()
    found = store.find(wanted)
    assert found.so_bytes == b"\x03" and found.key.same_but_toolchain(wanted)
    assert kinds(seen) == ["hit"] and seen[0].fields["toolchain"] == "4.10.0-cu13"
    overwrite(found.path / "kernel.so", b"\x99")
    assert store.find(wanted).so_bytes == b"\x02"
    assert kinds(seen) == ["hit", "refuse", "hit"]
    assert store.find(make_key(toolchain=False, page_size=128)) is None


def test_entries_lists_all_of_them_without_reading_their_files(store, entry):
    others = [publish(store, make_key(arch=a, page_size=p)) for a, p in (("sm_100a", 64), ("sm_90a", 16))]
    (others[0].path / "kernel.so").unlink()
    overwrite(others[1].path / "manifest.json", b"{}")
    (store.root / "v1" / "sm_90a" / "mla_decode" / "README").write_text("not an entry")
    found = {listing.digest: listing for listing in store.entries()}
    assert len(found) == 3
    assert found[entry.key.digest].key == entry.key and found[entry.key.digest].manifest == entry.manifest
    assert found[others[0].key.digest].key == others[0].key
    broken = found[others[1].key.digest]
    assert broken.key is None and broken.manifest is None and "missing" in broken.fault and broken.path.is_dir()


def test_resolve_finds_by_the_beginning_of_the_digest(store, entry):
    other = publish(store, make_key(page_size=16))
    assert [found.path for found in store.resolve(entry.key.digest[:8])] == [entry.path]
    assert {found.path for found in store.resolve("")} == {entry.path, other.path}
    assert store.resolve("xyz") == []


# ------------------------------------------------------------------------------------------------------ weight


def test_ring_2_imports_neither_torch_nor_the_compiler_nor_what_it_needs_late(python_env):
    late = ("torch", "tvm_ffi", "cutlass", "filelock", "numpy")
    code = f"import sys, jitmla.store, jitmla.lock, jitmla.compile; print([m for m in {late} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=python_env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_warm_find_takes_well_under_a_millisecond(store, key):
    publish(store, key, so_bytes=random.Random(3).randbytes(200_000))
    times = []
    for _ in range(50):
        start = time.process_time()
        assert store.find(key)
        times.append(time.process_time() - start)
    assert min(times) < 1e-3


def test_the_toolchain_of_test_keys_is_this_machine_s():
    assert TOOLCHAIN["host"] == toolchain.host()
    assert dataclasses.replace(make_key(), toolchain=None) == make_key(toolchain=False)
