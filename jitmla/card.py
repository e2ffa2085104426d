"""Reads the TOML that template cards are written in: `loads`, the same as tomllib's, in a fifth of its time.

Every process reads a card on its way from a Spec to a kernel, which may take 3 ms in all; tomllib alone takes 2 ms for
a long one. The values of a card are JSON, apart from the keys of inline tables, and JSON is read in C. What is not of
that form is left to tomllib; `tests/test_card.py` proves that what is not left to it comes out as from it.
"""

from __future__ import annotations

import json
import re
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

TOMLDecodeError = tomllib.TOMLDecodeError
_COMMENT = re.compile(r'[ \t]+#[^"\n]*$')
_COLON = re.compile(r'"[ \t]*:')
_OTHER = ("null", "NaN", "Infinity", "\\")  # JSON that is not TOML, as a key with a colon is, and escapes, which differ
_MARK = "\x7f"  # of a line; in no TOML
_HEADER = re.compile(r"\[([\w.-]+)\]|\[\[([\w.-]+)\]\]", re.ASCII)


class _Other(ValueError):
    """TOML of another form than cards have."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Other("a key that comes twice")
    return found


_DECODE = json.JSONDecoder(object_pairs_hook=_once).decode


def loads(text: str) -> dict[str, Any]:
    """The document in `text`; raises TOMLDecodeError."""
    try:
        return _quick(text)
    except ValueError:  # of json as well
        return tomllib.loads(text)


def _quick(text: str) -> dict[str, Any]:
    """All lines are decoded at once, each as a name and a value; the marks show that they come apart again."""
    if _MARK in text or any(other in text for other in _OTHER) or _COLON.search(text):
        raise _Other("not a card")
    names, values = [], []
    for line in text.split("\n"):
        if line and line[0] == "[":
            names.append(line)
            values.append("null")
        elif line and line[0] != "#":
            name, _, value = line.partition(" = ")
            names.append(name)
            values.append(_as_json(value) if "{" in value or "#" in value else value)
    marked = [_MARK + name for name in names]
    found = _DECODE("[" + ",".join([f'"{name}",{value}' for name, value in zip(marked, values, strict=True)]) + "]")
    if found[::2] != marked or len(found) != 2 * len(marked) or not text.isascii():
        raise _Other("values that reach across lines")
    root: dict[str, Any] = {}
    table = root
    for name, value in zip(names, found[1::2], strict=True):
        if name[:1] == "[":
            table = _open(root, name)
        elif name in table or not name.isidentifier():
            raise _Other(name)
        else:
            table[name] = value
    return root


def _as_json(value: str) -> str:
    """Without a comment behind it, and with JSON's keys. In a string that looks like a key, the quotation marks end the
    string, and what follows is no JSON."""
    if "#" in value:
        value = _COMMENT.sub("", value)
    *keyed, last = value.split(" = ")
    parts = []
    for before, space, key in [part.rpartition(" ") for part in keyed]:
        if not key.isidentifier():
            raise _Other(value)
        parts.append(f'{before}{space}"{key}":')
    return "".join(parts) + last


def _open(root: dict[str, Any], line: str) -> dict[str, Any]:
    """The table that begins with `line`."""
    found = _HEADER.fullmatch(line)
    if found is None:
        raise _Other(line)
    *path, last = (found[1] or found[2]).split(".")
    at: Any = root
    for name in path:
        at = at.get(name)
        at = at[-1] if isinstance(at, list) and at else at
        if not isinstance(at, dict):
            raise _Other(line)
    if found[1] and last not in at:
        at[last] = {}
        return at[last]
    if found[2] and isinstance(at.setdefault(last, []), list):
        at[last].append({})
        return at[last][-1]
    raise _Other(line)
