"""What is remembered of a failed compile: by every process, for that toolchain, with its error; a killed one is not."""

import json
import os
import shutil

import pytest

from jitmla import _child, bounds, compile, failures
from jitmla.compile import Built, build, get_or_compile
from jitmla.errors import CompileFailed, CompileInterrupted
from jitmla.store import Store

from .support.keys import KERNELS, SO_BYTES, SOURCE, make_key, publish
from .support.tiny import SOURCE as TINY
from .support.tiny import needs_compiler, tiny_key


def failing(error):
    def builder(key, source, store=None):
        raise error
    return builder


def works(key, source, store=None):
    return Built(SO_BYTES, source, KERNELS, 0.0)


def never(*args, **kwargs):
    raise AssertionError("this must not be called")


def fails(store, key, error):
    with pytest.raises(type(error)) as caught:
        get_or_compile(key, lambda: SOURCE, store, builder=failing(error))
    compile.forget_failures()  # as in a new process
    return caught.value


def test_another_process_gets_the_error_without_compiling(store, key):
    fails(store, key, CompileFailed("to compile it", supported="good ones", differs="bad layout", remedy="read"))
    with pytest.raises(CompileFailed) as caught:
        get_or_compile(key, never, Store(store.root), builder=never)
    e = caught.value
    assert (e.asked, e.supported, e.differs) == ("to compile it", "good ones", "bad layout")
    assert e.remedy.startswith("read; ") and "jitmla cache gc --failed" in e.remedy
    compile.forget_failures()
    bounds.sweep(store.root, failures=True)
    assert get_or_compile(key, lambda: SOURCE, store, builder=works).path


@pytest.mark.parametrize("error", [CompileInterrupted("killed"), CompileInterrupted("out of time")])
def test_a_compile_that_was_killed_is_tried_again(store, key, error):
    fails(store, key, error)
    assert failures.recall(store, key) is None
    assert get_or_compile(key, lambda: SOURCE, store, builder=works).path


def test_another_toolchain_template_or_version_of_jitmla_tries_again(store, key, monkeypatch):
    fails(store, key, CompileFailed("to compile it"))
    for other in (make_key(toolchain={"cute_dsl": "4.8.2"}), make_key(template_digest="cd" * 32)):
        assert failures.recall(store, other) is None
    assert failures.recall(store, key) is not None
    monkeypatch.setattr(failures, "__version__", "99")
    assert failures.recall(store, key) is None


def test_the_remedy_names_where_the_source_is_now(store, key, tmp_path):
    folder = store.root / "v1" / ".failed" / key.digest
    fails(store, key, CompileFailed("to compile it", remedy=f"read {folder}/kernel.py"))
    shutil.move(store.root, tmp_path / "moved")
    moved = failures.recall(Store(tmp_path / "moved"), key)
    assert f"read {tmp_path}/moved/v1/.failed/{key.digest}/kernel.py" in moved.remedy


def test_an_entry_wins_over_the_memory_of_a_failure(store, key):
    fails(store, key, CompileFailed("to compile it"))
    publish(store, key)
    assert get_or_compile(key, never, store, builder=never)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"asked": "x"}', "null", '"x"'])
def test_a_damaged_note_is_no_note(store, key, text):
    fails(store, key, CompileFailed("to compile it"))
    (store.root / "v1" / ".failed" / key.digest / "error.json").write_text(text)
    assert failures.recall(store, key) is None


def test_a_note_that_was_never_finished_is_no_note(store, key, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *a, **k: (_ for _ in ()).throw(OSError("killed here")))
        failures.remember(store, key, CompileFailed("to compile it"))
    assert failures.recall(store, key) is None
    failures.remember(store, key, CompileFailed("to compile it"))
    assert failures.recall(store, key) is not None


def test_where_nothing_can_be_written_it_is_told_and_the_error_stays_the_error(tmp_path, key, seen):
    (tmp_path / "a file").touch()
    store = Store(tmp_path / "a file")
    assert fails(store, key, CompileFailed("to compile it")).asked == "to compile it"
    assert "memory of a failed compile" in [e.fields.get("what") for e in seen if e.kind == "degrade"]


@pytest.mark.parametrize("error, lasting", [
    (ValueError("no such layout"), True), (_child.Failed("ptxas: slow", ""), True), (SyntaxError("x"), True),
    (_child.FailedHere("no linker", ""), False), (OSError("disk full"), False), (MemoryError(), False),
    (ImportError("half an installation"), False)])
def test_which_errors_of_the_compiler_say_something_about_the_source(error, lasting):
    assert isinstance(error, _child.PASSING) is not lasting


@needs_compiler
def test_a_linker_that_fails_is_not_held_against_the_source(store, monkeypatch):
    monkeypatch.setenv("JITMLA_CC", "false")
    with pytest.raises(CompileFailed) as caught:
        get_or_compile(tiny_key(), lambda: TINY, store)
    assert not caught.value.lasting and failures.recall(store, tiny_key()) is None


@needs_compiler
def test_what_the_compiler_says_about_a_source_lasts(store):
    with pytest.raises(CompileFailed) as caught:
        build(tiny_key(), "raise ValueError('no such layout')", store)
    assert caught.value.lasting
    failures.remember(store, tiny_key(), caught.value)
    note = json.loads((store.root / "v1" / ".failed" / tiny_key().digest / "error.json").read_text())
    assert str(store.root) not in note["remedy"] and "{folder}/kernel.py" in note["remedy"]
    assert str(store.root) in failures.recall(store, tiny_key()).remedy
