"""Bundles: the same entries give the same file, and what differs from what was stated is refused whole."""

import hashlib
import io
import json
import lzma
import os
import tarfile

import pytest

from jitmla import bundle
from jitmla import manifest as manifests
from jitmla.errors import CacheCorrupt, CacheUnwritable, InvalidArgument
from jitmla.key import canonical
from jitmla.store import Entry, Store

from .support.keys import KERNELS, SO_BYTES, SOURCE, make_key, publish
from .support.tree import snapshot

KEYS = [make_key(page_size=page) for page in (16, 32, 64)]


@pytest.fixture
def entries(store):
    return [publish(store, key, so_bytes=SO_BYTES + bytes([i])) for i, key in enumerate(KEYS)]


@pytest.fixture
def file(entries, tmp_path):
    bundle.write(tmp_path / "bundle", entries)
    return tmp_path / "bundle"


@pytest.fixture
def other(tmp_path):
    return Store(tmp_path / "other")


def members(file):
    with lzma.open(file) as raw, tarfile.open(fileobj=raw, mode="r|") as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def written(file, contents, **changes):
    """A bundle with these members, whatever its index says."""
    with tarfile.open(file, "w:xz") as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in changes.get(name, {}).items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return file


def test_what_is_exported_is_imported_to_the_byte(file, entries, store, other):
    done = list(bundle.load(file, other))
    assert [status for _, status in done] == ["imported"] * 3
    for entry in entries:
        found = other.find(entry.key)
        assert (found.so_bytes, found.source, found.manifest) == (entry.so_bytes, SOURCE, entry.manifest)
        assert {p.name: p.read_bytes() for p in found.path.iterdir()} == {
            p.name: p.read_bytes() for p in entry.path.iterdir()}
    assert [status for _, status in bundle.load(file, other)] == ["there"] * 3


def test_the_same_entries_give_the_same_bytes(entries, tmp_path):
    digests = {bundle.write(tmp_path / name, some) for name, some in (("a", entries), ("b", entries[::-1]))}
    assert digests == {hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()}
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "cache"]


def test_it_holds_no_path_owner_or_time(file, tmp_path):
    with tarfile.open(file) as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
    assert str(tmp_path).encode() not in lzma.decompress(file.read_bytes())


def test_the_index_comes_first_and_states_every_file(file):
    contents = members(file)
    assert list(contents)[0] == "bundle.json"
    index = json.loads(contents.pop("bundle.json"))
    stated = {f"{digest}/{name}": what for digest, files in index["entries"].items() for name, what in files.items()}
    assert {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in contents.items()} == stated


def test_an_entry_of_another_version_keeps_its_manifest(other, tmp_path):
    """The manifest names the jitmla version that built it; it is stored as it is."""
    key = KEYS[0]
    manifest = manifests._compose(key, SOURCE.encode(), SO_BYTES, KERNELS, "0.0.9")
    bundle.write(tmp_path / "bundle", [Entry(key, SOURCE, SO_BYTES, manifest, None)])
    list(bundle.load(tmp_path / "bundle", other))
    assert other.find(key).manifest["producer"] == "0.0.9"


def test_an_entry_that_is_there_is_kept_and_other_bytes_are_told(file, other):
    publish(other, KEYS[0], so_bytes=b"mine")
    statuses = {entry.key: status for entry, status in bundle.load(file, other)}
    assert statuses == {KEYS[0]: "there, other bytes", KEYS[1]: "imported", KEYS[2]: "imported"}
    assert other.find(KEYS[0]).so_bytes == b"mine"


def another_index(contents, change):
    index = json.loads(contents["bundle.json"])
    change(index)
    return {**contents, "bundle.json": canonical(index).encode()}


def first(index):
    return next(iter(index["entries"].values()))


def last(contents):
    return list(contents)[-1]


def renamed(contents, name, to):
    return {to if n == name else n: d for n, d in contents.items()}


DAMAGES = {
    "a file changed": lambda c: {**c, last(c): c[last(c)][:-1] + b"?"},
    "a file cut": lambda c: {**c, last(c): c[last(c)][:-1]},
    "a file missing": lambda c: {n: d for n, d in c.items() if n != last(c)},
    "an entry missing": lambda c: dict(list(c.items())[:-3]),
    "a file more": lambda c: {**c, "more": b"x"},
    "another order": lambda c: dict([*list(c.items())[1:], list(c.items())[0]]),
    "a path upwards": lambda c: renamed(c, last(c), "../../evil"),
    "an absolute path": lambda c: renamed(c, last(c), "/tmp/evil"),
    "another format": lambda c: another_index(c, lambda i: i.update(format=2)),
    "no format": lambda c: another_index(c, lambda i: i.pop("format")),
    "no entries": lambda c: another_index(c, lambda i: i.pop("entries")),
    "a list": lambda c: {**c, "bundle.json": b"[]"},
    "no JSON": lambda c: {**c, "bundle.json": b"{"},
    "spaces in the index": lambda c: {**c, "bundle.json": c["bundle.json"] + b" "},
    "a digest that is a path": lambda c: another_index(c, lambda i: i["entries"].update({"../x": first(i)})),
    "another file name": lambda c: another_index(c, lambda i: first(i).update({"evil.so": {}})),
    "a size that is none": lambda c: another_index(c, lambda i: first(i)["kernel.so"].update(bytes="x")),
    "signed anew, another library": lambda c: resigned(c),
}


def resigned(contents):
    """A library changed, with an index that fits it: the entry's own manifest does not."""
    name = last(contents)
    data = b"evil" + contents[name]
    digest, file = name.split("/")

    def change(index):
        index["entries"][digest][file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    return another_index({**contents, name: data}, change)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_whatever_differs_is_refused_whole(file, other, damage, tmp_path):
    bad = written(tmp_path / "bad", damage(members(file)))
    with pytest.raises(CacheCorrupt, match="bad") as caught:
        list(bundle.load(bad, other))
    assert caught.value.differs and "nothing of it was stored" in caught.value.remedy
    assert not other.root.exists()


@pytest.mark.parametrize("kind, target", [(tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "bundle.json"),
                                          (tarfile.DIRTYPE, ""), (tarfile.FIFOTYPE, "")])
def test_links_and_folders_are_refused(file, other, kind, target, tmp_path):
    contents = members(file)
    bad = written(tmp_path / "bad", contents, **{last(contents): {"type": kind, "linkname": target, "size": 0}})
    with pytest.raises(CacheCorrupt):
        list(bundle.load(bad, other))
    assert not other.root.exists()


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[:-1], lambda d: d + b"\0", lambda d: d[: len(d) // 2],
                                    lambda d: b"no xz", lambda d: d + d, lambda d: lzma.compress(b"no tar")])
def test_a_file_that_is_cut_or_longer_or_something_else_is_refused(file, other, damage):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CacheCorrupt):
        list(bundle.load(file, other))
    assert not other.root.exists()


def test_the_sha256_that_its_origin_told(file, other):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(CacheCorrupt, match="its sha256 is"):
        list(bundle.load(file, other, "0" * 64))
    assert not other.root.exists()
    assert len(list(bundle.load(file, other, digest.upper()))) == 3


def test_a_file_that_is_not_there(other, tmp_path):
    with pytest.raises(InvalidArgument, match="No such file"):
        list(bundle.load(tmp_path / "none", other))


def test_a_cache_that_cannot_be_written(file, tmp_path):
    (tmp_path / "a file").touch()
    with pytest.raises(CacheUnwritable):
        list(bundle.load(file, Store(tmp_path / "a file")))


def test_writing_that_fails_leaves_the_old_file(entries, file, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        bundle.write(file, entries[:1])
    assert file.read_bytes() == before and list(file.parent.glob("*.partial")) == []


def test_importing_does_not_touch_other_entries(file, other):
    mine = publish(other, make_key(page_size=128))
    before = snapshot(mine.path)
    list(bundle.load(file, other))
    assert snapshot(mine.path) == before
