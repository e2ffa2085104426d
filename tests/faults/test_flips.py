"""A single changed byte, anywhere in an entry or a bundle: refused, and built again."""

import os
import random

import pytest

from jitmla import bundle
from jitmla.errors import CacheCorrupt
from jitmla.store import Store

from ..support.keys import make_key, publish

LIBRARY = random.Random(11).randbytes(20_000)


def refused(store, key, seen):
    """Whether `key` is not found, and the refusal was told with its reason."""
    seen.clear()
    return store.find(key) is None and [e.kind for e in seen] == ["refuse"] and bool(seen[0].fields["reason"])


def rebuilt(store, key):
    """Whether publishing replaces what is there by a valid entry."""
    return publish(store, key, so_bytes=LIBRARY).so_bytes == LIBRARY and store.find(key).so_bytes == LIBRARY


def flip(path, i, mask):
    with open(path, "r+b", buffering=0) as file:
        [byte] = os.pread(file.fileno(), 1, i)
        os.pwrite(file.fileno(), bytes([byte ^ mask]), i)


def test_every_byte_of_the_manifest(in_memory, store, key, seen):
    path = publish(store, key, so_bytes=LIBRARY).path / "manifest.json"
    raw = path.read_bytes()
    choose = random.Random(1)
    for i in range(len(raw)):
        for mask in (0x20, choose.randrange(1, 256)):  # 0x20: the other case of a letter
            flip(path, i, mask)
            assert refused(store, key, seen), (i, mask)
            if i % 10:
                flip(path, i, mask)
            else:
                assert rebuilt(store, key), i
        assert path.read_bytes() == raw


@pytest.mark.parametrize("name, count, rebuild", [("kernel.so", 2000, 10), ("kernel.py", 200, 10),
                                                  pytest.param("kernel.so", 2000, 1, marks=pytest.mark.slow)])
def test_random_bytes_of_the_files(in_memory, store, key, seen, name, count, rebuild):
    """Each is refused; each n-th is left as it is, and built again, and the others are put right."""
    path = publish(store, key, so_bytes=LIBRARY).path / name
    size = path.stat().st_size
    choose = random.Random(2)
    for number in range(count):
        i, mask = choose.randrange(size), 1 << choose.randrange(8)
        flip(path, i, mask)
        assert refused(store, key, seen), (i, mask)
        if number % rebuild:
            flip(path, i, mask)
        else:
            assert rebuilt(store, key), i
    assert store.find(key).so_bytes == LIBRARY


def test_every_byte_of_a_bundle(in_memory, store, key, tmp_path):
    """Of a small one; nothing of it gets into a cache."""
    file = tmp_path / "bundle"
    bundle.write(file, [publish(store, key, so_bytes=b"x" * 50)])
    for i in range(file.stat().st_size):
        flip(file, i, 1 << (i % 8))
        with pytest.raises(CacheCorrupt):
            list(bundle.load(file, Store(tmp_path / "other")))
        flip(file, i, 1 << (i % 8))
    assert not (tmp_path / "other").exists()
    assert [status for _, status in bundle.load(file, Store(tmp_path / "other"))] == ["imported"]


def test_a_flip_in_a_layer_is_refused_there_and_mended_in_the_user_s_cache(tmp_path, key, seen):
    below = Store(tmp_path / "below")
    flip(publish(below, key).path / "kernel.so", 7, 1)
    store = Store(tmp_path / "user", [below.user])
    assert refused(store, key, seen)
    publish(store, make_key())
    assert store.find(key).path.is_relative_to(tmp_path / "user")
