"""Hypothesis strategies, made from cache_schema.json itself: documents that it accepts, and mutations of them."""

from __future__ import annotations

import copy
import json

from hypothesis import strategies as st

from jitmla import schema

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 600), st.floats(allow_nan=False, allow_infinity=False),
                    st.sampled_from([1.0, 64.0, "", "mla_decode", "bf16", "sm_90", "x", "0" * 64, "A", "a", "/tmp/x"]),
                    st.text(max_size=5).filter(lambda s: not s.endswith("\n")))
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.sampled_from(["a", "A", "x"]), SCALARS))

# An arbitrary Key, as a document.
SOME_KEY = {"schema": 1, "spec": {"op": "mla_decode", "arch": "sm_90a", "dtype": "bf16", "kv_dtype": "bf16",
                                  "kv_lora_rank": 512, "qk_rope_head_dim": 64, "page_size": 64, "rows": 16,
                                  "causal": False},
            "template": {"name": "sm90_swap", "digest": "a" * 64},
            "variant": {"name": "triples8", "constants": {"RING": 8, "DTYPE": "bf16", "CAUSAL": False, "SCALE": 0.5}},
            "toolchain": {"cute_dsl": "4.8.1", "cuda": "cu12", "host": "linux-x86_64", "options": ""}}


def valid(name: str) -> st.SearchStrategy:
    """Documents that match definition `name`."""
    return _valid({"$ref": f"#/definitions/{name}"})


def _valid(form: dict) -> st.SearchStrategy:
    if "$ref" in form:
        return _valid(schema.definition(form["$ref"].rpartition("/")[2]))
    if "oneOf" in form:
        return st.one_of([_valid(f) for f in form["oneOf"]])
    if "const" in form:
        return st.just(form["const"])
    if "enum" in form:
        return st.sampled_from(form["enum"])
    if form.get("pattern") == "^[0-9a-f]{64}$":  # drawing it from the regex takes 20 times as long
        return st.integers(0, 2**256 - 1).map("{:064x}".format)
    if "pattern" in form:
        return st.from_regex(form["pattern"].replace("$", r"\Z"))
    if isinstance(form["type"], list):
        return st.one_of([_valid({"type": kind}) for kind in form["type"]])
    if form["type"] == "object":
        if "patternProperties" in form:
            ((pattern, inner),) = form["patternProperties"].items()
            return st.dictionaries(st.from_regex(pattern.replace("$", r"\Z")), _valid(inner), max_size=4)
        optional = {name for name, inner in form["properties"].items() if "default" in inner}
        assert set(form["required"]) == set(form["properties"]) - optional, "a field is required, or has a default"
        return st.fixed_dictionaries({n: _valid(f) for n, f in form["properties"].items() if n not in optional},
                                     optional={n: _valid(form["properties"][n]) for n in optional})
    if form["type"] == "array":
        return st.lists(_valid(form["items"]), min_size=form.get("minItems", 0), max_size=3)
    if form["type"] == "integer":
        return st.integers(form.get("minimum"), form.get("maximum", 2**40))
    return {"string": st.text(max_size=8), "boolean": st.booleans(),
            "number": st.floats(allow_nan=False, allow_infinity=False)}[form["type"]]


def places(value: object, at: tuple = ()) -> list[tuple]:
    """The path of every node of a document, the root first."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] + [p for name, child in children for p in places(child, (*at, name))]


def get(value, place: tuple):
    for step in place:
        value = value[step]
    return value


def replaced(document: dict, place: tuple, value: object) -> dict:
    """A copy of the document with another value at `place`."""
    document = copy.deepcopy(document)
    get(document, place[:-1])[place[-1]] = value
    return document


@st.composite
def mutated(draw, name: str):
    """A valid document with up to two changes, each of which may or may not break it."""
    document = {"root": draw(valid(name))}
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from(places(document)[1:]))
        inner = get(document, place)
        change = draw(st.sampled_from(["replace", "replace", "drop", "add", "perturb"]))
        if change == "replace":
            document = replaced(document, place, draw(VALUES))
        elif change == "drop" and len(place) > 1:
            document = copy.deepcopy(document)
            del get(document, place[:-1])[place[-1]]
        elif change == "add" and isinstance(inner, dict):
            name = draw(st.sampled_from(["extra", "A", "a", "A1", "key"]))
            document = replaced(document, (*place, name), draw(VALUES))
        elif change == "add" and isinstance(inner, list):
            document = replaced(document, place, [*inner, draw(VALUES)])
        elif change == "perturb" and isinstance(inner, (str, int, float)):
            document = replaced(document, place, draw(st.sampled_from(nearby(inner))))
    return json.loads(json.dumps(document["root"]))


def nearby(value: str | int | float) -> list:
    """Values that look like `value`."""
    if isinstance(value, bool):
        return [not value, int(value), str(value)]
    if isinstance(value, str):
        return [value + "_", "_" + value, value.upper(), value[:-1], value + "\u0660", " " + value, value + " "]
    return [value + 1, value - 1, -value, float(value), str(value), bool(value), value + 0.5]
