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
_KEY = re.compile(r"([{,][ \t]*)([\w-]+)[ \t]*=[ \t]*", re.ASCII)  # in an inline table
_COMMENT = re.compile(r'[ \t]+#[^"\n]*$')
_OTHER = re.compile(r'null|NaN|Infinity|"[ \t]*:|\\')  # JSON that is not TOML, and escapes, which differ
_END = "\x7f"  # of a value; in no TOML
_HEADER = re.compile(r"\[([\w.-]+)\]|\[\[([\w.-]+)\]\]", re.ASCII)


class _Other(ValueError):
    """TOML of another form than cards have."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Other("a key that comes twice")
    return found


_DECODE = json.JSONDecoder(object_pairs_hook=_once).decode
_BETWEEN = f',"{_END}",'


def loads(text: str) -> dict[str, Any]:
    """The document in `text`; raises TOMLDecodeError."""
    try:
        return _quick(text)
    except ValueError:  # of json as well
        return tomllib.loads(text)


def _quick(text: str) -> dict[str, Any]:
    if _OTHER.search(text) or _END in text:
        raise _Other("not a card")
    root: dict[str, Any] = {}
    table = root
    places, values = [], []
    for line in text.split("\n"):
        if not line or line[0] == "#":
            continue
        if line[0] == "[":
            table = _open(root, line)
            continue
        name, _, value = line.partition(" = ")
        if name in table or not (name.isidentifier() and name.isascii()):
            raise _Other(line)
        table[name] = None
        places.append((table, name))
        values.append(_as_json(value))
    found = _DECODE(f'[{_BETWEEN.join(values)}]')
    if len(found) != max(2 * len(values) - 1, 0) or any(mark != _END for mark in found[1::2]):
        raise _Other("values that reach across lines")
    for (table, name), value in zip(places, found[::2], strict=True):
        table[name] = value
    return root


def _as_json(value: str) -> str:
    """Without a comment behind it, and with JSON's keys. In a string that looks like a key, the quotation marks end the
    string, and what follows is no JSON."""
    if " #" in value:
        value = _COMMENT.sub("", value)
    if "{" not in value:
        return value
    parts = _KEY.split(value)  # `sub` expands its template in Python, for each key
    return parts[0] + "".join([f'{before}"{key}":{rest}' for before, key, rest in
                               zip(parts[1::3], parts[2::3], parts[3::3], strict=True)])


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
