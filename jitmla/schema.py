"""Reads cache_schema.json and checks documents against it.

The checker covers the part of JSON Schema that the file uses, and nothing else: importing the jsonschema package takes
longer (0.1 s) than the whole warm path may (3 ms). `tests/test_schema.py` proves on mutated documents that it accepts
and refuses exactly what jsonschema does, and that the schema uses no keyword that is not covered here.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from .errors import SchemaViolation
from .resources import SCHEMA

ANNOTATIONS = {"$schema", "title", "description", "default", "identity", "definitions"}
KEYWORDS = {"$ref", "oneOf", "const", "enum", "type", "pattern", "minimum", "maximum", "minItems", "items",
            "properties", "required", "additionalProperties", "patternProperties"}
_TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
_DECODER = json.JSONDecoder()


@functools.cache
def _text() -> str:
    return SCHEMA.read_bytes().decode()


@functools.cache
def document() -> dict[str, Any]:
    """The parsed cache_schema.json."""
    return json.loads(_text())


@functools.cache
def definition(name: str) -> dict[str, Any]:
    """One entry of `definitions`; raises KeyError. It is decoded alone: all of the document takes several times longer,
    and every new process needs a few entries on its way to its first kernel."""
    _, found, rest = _text().partition(f'\n    "{name}": ')  # only these entries are indented by four spaces
    if not found:
        raise KeyError(name)
    return _DECODER.raw_decode(rest)[0]


def spec_fields(op: str) -> dict[str, Any]:
    """The fields of a Spec of `op`, with their schemas; raises SchemaViolation for an unknown op."""
    try:
        return definition(f"spec_{op}")["properties"]
    except KeyError:
        known = [d.removeprefix("spec_") for d in document()["definitions"] if d.startswith("spec_")]
        raise SchemaViolation(f"op {op!r}", supported=", ".join(known),
                              differs="cache_schema.json has no such op",
                              remedy="`jitmla kernels` lists the ops") from None


def check(value: Any, name: str) -> None:
    """Raise SchemaViolation unless `value` matches definition `name`."""
    fault = _fault(value, definition(name), name)
    if fault:
        raise SchemaViolation(f"a {name.replace('_', ' ')} that matches cache_schema.json", supported="docs/schema.md",
                              differs=fault,
                              remedy="delete the entry, or run `jitmla prewarm` with this version of jitmla")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _equal(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _fault(value: Any, schema: dict[str, Any], at: str) -> str | None:
    """What is wrong with `value` under `schema`, or None. `at` names the place."""
    if "$ref" in schema:
        return _fault(value, definition(schema["$ref"].removeprefix("#/definitions/")), at)
    if "oneOf" in schema:
        faults = [_fault(value, s, at) for s in schema["oneOf"]]
        return None if faults.count(None) == 1 else next((f for f in faults if f), f"{at}: matches several forms")
    if "const" in schema and not _equal(value, schema["const"]):
        return f"{at}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and not any(_equal(value, v) for v in schema["enum"]):
        return f"{at}: {value!r} is not one of {schema['enum']}"
    kinds = schema.get("type", [])
    if kinds and not any(_is(value, k) for k in ([kinds] if isinstance(kinds, str) else kinds)):
        return f"{at}: {value!r} is not of type {kinds}"
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"].replace("$", r"\Z"), value):
        return f"{at}: {value!r} does not match {schema['pattern']}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value < schema.get("minimum", value) or value > schema.get("maximum", value):
            return f"{at}: {value} is out of range"
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            return f"{at}: fewer than {schema['minItems']} items"
        return next(filter(None, (_fault(v, schema.get("items", {}), f"{at}[{i}]") for i, v in enumerate(value))), None)
    return _object_fault(value, schema, at) if isinstance(value, dict) else None


def _object_fault(value: dict[str, Any], schema: dict[str, Any], at: str) -> str | None:
    missing = [k for k in schema.get("required", ()) if k not in value]
    if missing:
        return f"{at}: {missing[0]!r} is missing"
    for k, v in value.items():
        forms = [s for p, s in schema.get("patternProperties", {}).items() if re.search(p.replace("$", r"\Z"), k)]
        if k in schema.get("properties", {}):
            forms.append(schema["properties"][k])
        if not forms and schema.get("additionalProperties") is False:
            return f"{at}: unknown field {k!r}"
        fault = next(filter(None, (_fault(v, s, f"{at}.{k}") for s in forms)), None)
        if fault:
            return fault
    return None
