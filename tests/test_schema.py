"""jitmla.schema against the jsonschema package, which is the judge of what the schema means."""

import copy
import json

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitmla import schema
from jitmla.errors import SchemaViolation
from jitmla.resources import SCHEMA

from .documents import SOME_KEY, get, mutated, places, replaced, valid

FEW = settings(max_examples=30, deadline=None, derandomize=True, database=None)
MANY = settings(FEW, max_examples=120)
SPECS = tuple(name for name in schema.document()["definitions"] if name.startswith("spec_"))
DEFINITIONS = ("manifest", "key", *SPECS, "name")  # the other ones are part of a manifest
JUDGES = {name: jsonschema.Draft7Validator({"$ref": f"#/definitions/{name}",
                                            "definitions": schema.document()["definitions"]}) for name in DEFINITIONS}


def accepts(value, name):
    try:
        schema.check(value, name)
    except SchemaViolation:
        return False
    return True


def keywords(form):
    """Every keyword used in a schema; names of properties and definitions are not keywords."""
    for word, inner in form.items():
        yield word
        if word in ("properties", "patternProperties", "definitions"):
            for child in inner.values():
                yield from keywords(child)
        elif word == "oneOf":
            for child in inner:
                yield from keywords(child)
        elif isinstance(inner, dict):
            yield from keywords(inner)


def test_the_schema_is_a_draft_7_schema():
    jsonschema.Draft7Validator.check_schema(json.loads(SCHEMA.read_text(encoding="utf-8")))


def test_the_schema_uses_only_what_is_covered():
    used = set(keywords(schema.document()))
    assert used <= schema.KEYWORDS | schema.ANNOTATIONS, used - schema.KEYWORDS - schema.ANNOTATIONS
    assert used >= schema.KEYWORDS, f"covered, but not used: {schema.KEYWORDS - used}"


def test_what_the_root_describes_is_a_manifest():
    assert schema.document()["$ref"] == "#/definitions/manifest"


@pytest.mark.parametrize("name", DEFINITIONS)
@FEW
@given(st.data())
def test_valid_documents_are_accepted(name, data):
    document = data.draw(valid(name))
    schema.check(document, name)
    assert JUDGES[name].is_valid(document)


@pytest.mark.parametrize("name", DEFINITIONS)
@MANY
@given(st.data())
def test_the_same_documents_are_accepted_and_refused(name, data):
    document = data.draw(mutated(name))
    assert accepts(document, name) == JUDGES[name].is_valid(document), document


MANIFEST = {
    "key": SOME_KEY, "digest": "0" * 64, "producer": "0.1", "manifest_sha256": "1" * 64,
    "files": {name: {"sha256": "a" * 64, "bytes": 1} for name in ("kernel.py", "kernel.so")},
    "kernels": [{"name": "k", "registers": 255, "spill_bytes": 0, "stack_bytes": 0}]}
VALUES = [None, True, False, 0, 1, -1, 8, 64, 255, 256, 512, 1.0, 64.0, 0.5, "", "1", "a", "A", "bf16", "sm_90a",
          "cu13", "0" * 64, "g" * 64, "0" * 63, [], [1], {}, {"a": 1}, {"A": 1}, {"A": []}]


@pytest.mark.parametrize("place", places(MANIFEST)[1:], ids=lambda p: ".".join(map(str, p)))
def test_every_value_at_every_place(place):
    """What the drawn mutations may happen to miss: each place of one manifest, with each kind of value, and without."""
    schema.check(MANIFEST, "manifest")
    documents = [replaced(MANIFEST, place, value) for value in VALUES]
    without = copy.deepcopy(MANIFEST)
    del get(without, place[:-1])[place[-1]]
    for document in [*documents, without]:
        assert accepts(document, "manifest") == JUDGES["manifest"].is_valid(document), get(document, place[:-1])


@pytest.mark.parametrize("name, value", [
    ("sha256", "0" * 64), ("name", "a_name")])
def test_a_trailing_newline_is_refused(name, value):
    """Python's `$`, and so the jsonschema package, would let it pass; JSON Schema's `$` does not."""
    assert accepts(value, name)
    assert not accepts(value + "\n", name)


@pytest.mark.parametrize("change, words", [
    (lambda d: d.pop("rows"), "'rows' is missing"),
    (lambda d: d.update(batch=3), "unknown field 'batch'"),
    (lambda d: d.update(page_size=1), "spec_mla_decode.page_size: 1 is not one of [0, 16, 32, 64, 128]"),
    (lambda d: d.update(page_size="64"), "'64' is not one of"),
    (lambda d: d.update(causal=1), "1 is not of type boolean"),
    (lambda d: d.update(dtype="bf8"), "'bf8' is not one of ['bf16', 'fp16', 'e4m3']"),
    (lambda d: d.update(op="mla"), "'mla' is not 'mla_decode'"),
])
def test_the_error_names_the_field(change, words):
    document = {"op": "mla_decode", "arch": "sm_90a", "dtype": "bf16", "kv_dtype": "bf16", "kv_lora_rank": 512,
                "qk_rope_head_dim": 64, "page_size": 64, "rows": 16, "causal": False}
    schema.check(document, "spec_mla_decode")
    change(document)
    with pytest.raises(SchemaViolation) as caught:
        schema.check(document, "spec_mla_decode")
    assert words in caught.value.differs
    assert "delete the entry" in caught.value.remedy


def test_the_fields_of_an_unknown_op():
    with pytest.raises(SchemaViolation, match="op 'mla_encode'") as caught:
        schema.spec_fields("mla_encode")
    assert caught.value.supported == ", ".join(name.removeprefix("spec_") for name in SPECS)


def test_a_definition_alone_is_that_of_the_document():
    definitions = schema.document()["definitions"]
    assert {name: schema.definition(name) for name in definitions} == definitions
    with pytest.raises(KeyError):
        schema.definition("title")
