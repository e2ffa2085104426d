"""Key: what changes its digest is exactly what cache_schema.json marks with `identity`."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitmla import registry, schema
from jitmla.errors import SchemaViolation
from jitmla.key import Key, canonical, diff, leaves

from .documents import SOME_KEY, _valid, get, nearby, replaced, valid
from .keysets import every_choice

DETERMINED = settings(deadline=None, derandomize=True, database=None, max_examples=50)
FEW = settings(DETERMINED, max_examples=6)  # for each field
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


def fields(form: dict, op: str, at: tuple = ()):
    """(place, schema) of every leaf field of a definition, and of whole fields that hold free-form names; of the Specs,
    that of `op`."""
    if "$ref" in form:
        form = {**schema.definition(form["$ref"].rpartition("/")[2]), **form}
    if "oneOf" in form:
        (inner,) = [inner for inner in form["oneOf"] if inner["$ref"].endswith(f"spec_{op}")]
        yield from fields(inner, op, at)
    elif "properties" in form:
        for name, inner in form["properties"].items():
            yield from fields(inner, op, (*at, name))
    else:
        yield at, form


OPS = [name.removeprefix("spec_") for name in schema.document()["definitions"] if name.startswith("spec_")]
KEY_FIELDS = {(op, *place): form for op in OPS for place, form in fields(schema.definition("key"), op)
              if op == "mla_decode" or place[0] == "spec"}


def varies(form: dict) -> bool:
    """Whether the schema knows two values of a field."""
    return "const" not in form and len(form.get("enum", (1, 2))) > 1


MANIFEST_FIELDS = {place: form for place, form in fields(schema.definition("manifest"), OPS[0]) if place[0] != "key"}


def test_the_schema_marks_every_field_of_a_key_and_no_other():
    assert {op for op, *_ in KEY_FIELDS} == set(registry.ops())
    assert {("mla_decode", "spec", "rows"), ("mla_decode", "variant", "constants"), ("fp8_bmm", "spec", "arch"),
            ("inv_rope_fp8_quant", "spec", "scale_mode")} <= set(KEY_FIELDS)
    assert [place for place, form in KEY_FIELDS.items() if form.get("identity") is not True] == []
    assert [place for place, form in MANIFEST_FIELDS.items() if "identity" in form] == []
    assert {("producer",), ("kernels",)} <= set(MANIFEST_FIELDS)


@pytest.mark.parametrize("place", KEY_FIELDS, ids=".".join)
@FEW
@given(st.data())
def test_an_identity_field_changes_the_digest(place, data):
    """And `diff` names it, and nothing else."""
    form, op, place = KEY_FIELDS[place], place[0], place[1:]
    document = replaced(data.draw(valid("key")), ("spec",), data.draw(valid(f"spec_{op}")))
    key = Key.from_dict(document)
    if not varies(form):  # the only value there is now; a later version would have another one
        other = replaced(document, place, 2 if place == ("schema",) else "no_such_op")
        assert canonical(other) != canonical(document)
        with pytest.raises(SchemaViolation):
            Key.from_dict(other)
        return
    old = canonical(get(document, place[:-1]).get(place[-1], form.get("default")))
    value = data.draw(_valid(form).filter(lambda v: canonical(v) != old))
    other = Key.from_dict(replaced(document, place, value))
    assert other.digest != key.digest
    named = {name for name, _, _ in diff(key.as_dict(), other.as_dict())}
    dotted = ".".join(place)
    assert named and all(n == dotted or n.startswith(dotted + ".") for n in named)


@pytest.mark.parametrize("name", SOME_KEY["variant"]["constants"])
def test_every_constant_changes_the_digest(name):
    place = ("variant", "constants", name)
    value = get(SOME_KEY, place)
    others = {canonical(other): other for other in [value, *nearby(value)]}
    digests = {Key.from_dict(replaced(SOME_KEY, place, other)).digest for other in others.values()}
    assert len(digests) == len(others) > 2


@pytest.mark.parametrize("place", MANIFEST_FIELDS, ids=".".join)
@FEW
@given(st.data())
def test_other_manifest_fields_do_not(place, data):
    manifest = data.draw(valid("manifest"))
    old = get(manifest, place)
    value = data.draw(_valid(MANIFEST_FIELDS[place]).filter(lambda v: v != old))
    assert Key.from_dict(replaced(manifest, place, value)["key"]).digest == Key.from_dict(manifest["key"]).digest


@DETERMINED
@given(valid("key"))
def test_round_trip(document):
    key = Key.from_dict(document)
    document = {**document, "spec": dict(key.spec)}  # without facts at their default
    assert key.as_dict() == document
    again = Key.from_dict(json.loads(canonical(key.as_dict())))
    assert again == key and hash(again) == hash(key) and again.digest == key.digest
    assert key.digest == hashlib.sha256(canonical(document).encode("ascii")).hexdigest()


@DETERMINED
@given(JSON, st.randoms(use_true_random=False))
def test_canonical_json(value, rng):
    text = canonical(value)
    assert text.isascii() and json.loads(text) == value

    def shuffled(v):
        if isinstance(v, dict):
            items = [(k, shuffled(child)) for k, child in v.items()]
            rng.shuffle(items)
            return dict(items)
        return [shuffled(child) for child in v] if isinstance(v, list) else v

    assert canonical(shuffled(value)) == text


def test_canonical_json_is_one_text():
    assert canonical({"b": [1, True, None, 0.5], "a": {"é": "/"}}) == '{"a":{"\\u00e9":"/"},"b":[1,true,null,0.5]}'
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            canonical(number)


def test_the_digest_does_not_depend_on_the_process():
    """Nor on its hash seed. The value itself is fixed: when it changes, every cache in the world is cold."""
    code = "import json, sys; from jitmla.key import Key; print(Key.from_dict(json.load(sys.stdin)).digest)"
    path = os.pathsep.join(filter(None, sys.path))
    out = subprocess.run([sys.executable, "-c", code], input=json.dumps(SOME_KEY), capture_output=True, text=True,
                         check=True, env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "12345"}).stdout.strip()
    assert out == Key.from_dict(SOME_KEY).digest == (
        "695a0ba5dfeb2ffd0d8d300a3439cafa5d1acf103ee62db20b7daa4238c58515")


def test_no_path_in_the_key_of_any_shipped_kernel():
    for choice in every_choice():
        for name, value in leaves(choice.key.as_dict()):
            assert "/" not in str(value) and "\\" not in str(value) and ".py" not in str(value), (name, value)


def test_a_key_without_a_toolchain_names_no_binary():
    full = Key.from_dict(SOME_KEY)
    key = Key(full.spec, full.template, full.template_digest, full.variant, full.constants, None)
    for use in (key.as_dict, lambda: key.digest):
        with pytest.raises(ValueError, match="without a toolchain"):
            use()
    assert key.same_but_toolchain(full) and full.same_but_toolchain(key)


OTHER_FIELDS = [place for place, form in KEY_FIELDS.items() if varies(form) and place[1] != "toolchain"]


@pytest.mark.parametrize("place", OTHER_FIELDS, ids=".".join)
@FEW
@given(st.data())
def test_same_but_toolchain(place, data):
    """Everything but the toolchain counts."""
    form, op, place = KEY_FIELDS[place], place[0], place[1:]
    document = replaced(data.draw(valid("key")), ("spec",), data.draw(valid(f"spec_{op}")))
    other = {**document, "toolchain": data.draw(valid("key"))["toolchain"]}
    assert Key.from_dict(document).same_but_toolchain(Key.from_dict(other))
    old = get(document, place[:-1]).get(place[-1], form.get("default"))
    value = data.draw(_valid(form).filter(lambda v: v != old))
    assert not Key.from_dict(document).same_but_toolchain(Key.from_dict(replaced(other, place, value)))


def test_name():
    assert Key.from_dict(SOME_KEY).name == "mla_decode/sm90_swap/triples8"


def test_diff_shows_absent_fields_as_none():
    assert diff({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": 4}) == [("a.x", 1, None), ("a.y", 2, 3), ("b", None, 4)]
