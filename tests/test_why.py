"""Explain: who serves a Spec, which layer holds the kernel, and on a miss what differs from what is stored."""

import dataclasses

import pytest

import jitmla
from jitmla import compile, models, registry, toolchain, why
from jitmla.errors import CompileFailed, NoTemplate
from jitmla.spec import Spec
from jitmla.store import Store

from .support.keys import FACTS, KERNELS, SO_BYTES, make_key, publish


def spec(**facts):
    return Spec.of("mla_decode", **{**FACTS, **facts})


def stored(store, **facts):
    choice = registry.choose(spec(**facts))
    return store.publish(choice.key, choice.source(), SO_BYTES, KERNELS)


def test_jitmla_explain_is_this():
    assert jitmla.explain is why.explain


def test_a_hit_names_the_layer(tmp_path, store):
    below = Store(tmp_path / "below")
    entry = stored(below)
    found = why.explain(spec(), store=Store(store.root, [below.user]))
    assert found["cached"] and found["layer"] == str(below.root) and found["path"] == str(entry.path)
    assert found["key"] == entry.key.digest and found["nearest"] == [] and found["failed"] is None
    choice = registry.choose(spec())
    assert (found["template"], found["variant"]) == (choice.template.name, choice.variant.name)
    assert found["supported"]["arch"] == choice.template.archs


def test_why_others_were_passed_over():
    found = why.explain(spec(rows=8))
    assert any("rows=8" in reason for reasons in found["passed_over"].values() for reason in reasons)


def test_a_miss_names_the_nearest_and_every_field_that_differs(store):
    near, far = stored(store, page_size=128), stored(store, page_size=128, dtype="fp16", kv_dtype="fp16")
    found = why.explain(spec(page_size=64), store=store)
    assert not found["cached"] and found["layer"] is None
    assert [row["key"] for row in found["nearest"]] == [near.key.digest, far.key.digest]
    assert found["nearest"][0]["differs"] == [{"field": "spec.page_size", "wanted": 64, "stored": 128}]
    assert {d["field"] for d in found["nearest"][1]["differs"]} == {"spec.page_size", "spec.dtype", "spec.kv_dtype"}


@pytest.mark.parametrize("change, expected", [
    (lambda k: dataclasses.replace(k, template_digest="0" * 64), "template.digest"),
    (lambda k: dataclasses.replace(k, toolchain=tuple({**dict(k.toolchain), "cute_dsl": "9.9"}.items())),
     "toolchain.cute_dsl"),
    (lambda k: dataclasses.replace(k, constants=(("FACTOR", 3.0),)), "variant.constants.FACTOR")])
def test_each_part_of_a_key_is_told(store, key, change, expected):
    other = change(key)
    publish(store, other)
    [row] = why.nearest(key, store)
    assert [d["field"] for d in row["differs"]] == [expected] and row["layer"] == str(store.root)


def test_nearest_looks_through_all_layers_and_counts_a_key_once(tmp_path, store):
    below = Store(tmp_path / "below")
    for page in (0, 16, 32, 128):
        publish(below, make_key(page_size=page))
    publish(store, make_key(page_size=16))
    rows = why.nearest(make_key(), Store(store.root, [below.user]))
    assert len(rows) == 3 and len({row["key"] for row in rows}) == 3
    layers = {row["key"]: row["layer"] for row in why.nearest(make_key(), Store(store.root, [below.user]), 9)}
    assert layers.pop(make_key(page_size=16).digest) == str(store.root)
    assert set(layers.values()) == {str(below.root)} and len(layers) == 3


def test_a_corrupt_entry_is_no_neighbour(store, key):
    (publish(store, make_key(page_size=16)).path / "manifest.json").write_bytes(b"{}")
    assert why.nearest(key, store) == []


def test_without_a_compiler(store, monkeypatch):
    monkeypatch.setattr(toolchain, "current", lambda options="": None)
    publish(store, make_key(page_size=16))
    found = why.explain(spec(), store=store)
    assert found["key"] is None and "toolchain" not in str(found["nearest"])


def test_a_compile_that_failed_before_is_told(store):
    choice = registry.choose(spec())

    def failing(*args, **kwargs):
        raise CompileFailed("to compile", differs="bad layout")

    with pytest.raises(CompileFailed):
        compile.get_or_compile(choice.key, lambda: "", store, builder=failing)
    assert why.explain(spec(), store=store)["failed"]["differs"] == "bad layout"


def test_what_nothing_serves(without_portable):
    with pytest.raises(NoTemplate, match="sm_80"):
        why.explain(spec(arch="sm_80"))


def test_every_key_of_a_model_can_be_explained(store):
    for each in models.specs_for("kimi-k2", tp=8, arch="sm_90a"):
        assert why.explain(each, store=store)["template"]
