"""Key: the identity of a binary. Spec + template + variant + toolchain, as canonical JSON, and its sha256.

A Key holds no path, no address and no time: the same Key and the same toolchain give the same bytes anywhere.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import schema
from .spec import Spec

SCHEMA_VERSION = 1


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted names, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True)
class Key:
    """What one binary was made from, all of it: equal Keys name the same kernel. `digest` is its name on disk.

    constants: of the template, with their values. template_digest: sha256 of its code, all that it inlines included.
    toolchain: versions and options of the compiler; None where none is installed: such a Key finds entries of any
    toolchain and names none."""

    spec: Spec
    template: str
    template_digest: str
    variant: str
    constants: tuple[tuple[str, Any], ...]
    toolchain: tuple[tuple[str, str], ...] | None

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON, and the name of the entry's folder."""
        return hashlib.sha256(canonical(self.as_dict()).encode()).hexdigest()

    @property
    def choice(self) -> str:
        """As tunings and the rules of jitmla.pick have it."""
        return f"{self.template}/{self.variant}"

    @property
    def name(self) -> str:
        """A name for people and profilers, not unique."""
        return f"{self.spec.op}/{self.choice}"

    def as_dict(self) -> dict[str, Any]:
        if self.toolchain is None:
            raise ValueError("a Key without a toolchain names no binary")
        return {"schema": SCHEMA_VERSION, "spec": self.spec.as_dict(),
                "template": {"name": self.template, "digest": self.template_digest},
                "variant": {"name": self.variant, "constants": dict(self.constants)},
                "toolchain": dict(self.toolchain)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Key:
        """The Key with these fields; raises SchemaViolation when they do not match cache_schema.json."""
        schema.check(fields, "key")
        return cls(Spec.from_dict(fields["spec"]), fields["template"]["name"], fields["template"]["digest"],
                   fields["variant"]["name"], tuple(sorted(fields["variant"]["constants"].items())),
                   tuple(sorted(fields["toolchain"].items())))

    def same_but_toolchain(self, other: Key) -> bool:
        """Whether both name the same source."""
        return (self.spec, self.template, self.template_digest, self.variant, self.constants) == (
            other.spec, other.template, other.template_digest, other.variant, other.constants)


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, scalar) of every leaf of nested dicts."""
    if isinstance(value, dict):
        for name in sorted(value):
            yield from leaves(value[name], f"{at}.{name}" if at else name)
    else:
        yield at, value


def diff(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, value in a, value in b) wherever two Keys (as dicts) differ; None where a field is absent."""
    left, right = dict(leaves(a)), dict(leaves(b))
    return [(n, left.get(n), right.get(n)) for n in sorted(left.keys() | right.keys()) if left.get(n) != right.get(n)]
