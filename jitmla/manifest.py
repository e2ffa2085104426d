"""The manifest of an entry: the Key, sha256 and size of both files, and what ptxas reported.

An entry is valid when its manifest is, to the byte, what `publish` writes for its Key and its files. `verified` checks
just that: it composes the manifest again and compares. What is wrong with one that differs is worked out only then.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from . import __version__, schema
from .errors import CacheCorrupt, SchemaViolation
from .key import Key, canonical
from .trusted import corrupt, read_file

SOURCE, LIBRARY, MANIFEST = "kernel.py", "kernel.so", "manifest.json"


def manifest_of(key: Key, source: str, so_bytes: bytes, kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of an entry; raises SchemaViolation."""
    manifest = _compose(key, source.encode(), so_bytes, kernels, __version__)
    schema.check(manifest, "manifest")
    return manifest


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The one form in which a manifest is stored."""
    return canonical(manifest).encode() + b"\n"


def verified(key: Key, raw: bytes, source: bytes, so_bytes: bytes, path: Path) -> dict[str, Any]:
    """The manifest in `raw`, when it is the one of this Key and these files; raises CacheCorrupt."""
    try:
        manifest = json.loads(raw)
        kernels, producer = manifest["kernels"], manifest["producer"]
        schema.check(kernels, "kernels")
        if isinstance(producer, str) and raw == manifest_bytes(_compose(key, source, so_bytes, kernels, producer)):
            return manifest
    except (ValueError, TypeError, LookupError, RecursionError):  # SchemaViolation is a ValueError
        pass
    raise _fault(key, raw, source, so_bytes, path)


def parse(raw: bytes, path: Path) -> dict[str, Any]:
    """The manifest in `raw`, checked against schema, its own digest and the name of its folder `path`, not against the
    files; raises CacheCorrupt."""
    try:
        manifest = json.loads(raw)
        schema.check(manifest, "manifest")
        faithful = manifest_bytes(manifest) == raw and _self_digest(manifest) == manifest["manifest_sha256"]
    except (ValueError, RecursionError) as e:
        reason = e.differs if isinstance(e, SchemaViolation) else str(e)
        raise corrupt(path / MANIFEST, f"not a manifest: {reason}") from e
    if not faithful:
        raise corrupt(path / MANIFEST, "it does not match its own digest")
    if not manifest["digest"] == path.name == hashlib.sha256(canonical(manifest["key"]).encode()).hexdigest():
        raise corrupt(path / MANIFEST, "its Key does not match the name of its folder")
    return manifest


def read_manifest(folder: int, path: Path, mention: str = "") -> dict[str, Any]:
    """The manifest of the entry at `path`, as `parse` checks it; empty when it does not contain the text `mention`."""
    raw = read_file(folder, path / MANIFEST)
    return parse(raw, path) if mention.encode() in raw else {}


def _compose(key: Key, source: bytes, so_bytes: bytes, kernels: list[dict[str, Any]], producer: str) -> dict[str, Any]:
    files = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
             for name, data in ((SOURCE, source), (LIBRARY, so_bytes))}
    manifest = {"key": key.as_dict(), "digest": key.digest, "files": files, "kernels": kernels, "producer": producer}
    manifest["manifest_sha256"] = _self_digest(manifest)
    return manifest


def _self_digest(manifest: dict[str, Any]) -> str:
    body = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(canonical(body).encode()).hexdigest()


def _fault(key: Key, raw: bytes, source: bytes, so_bytes: bytes, path: Path) -> CacheCorrupt:
    """What is wrong with an entry that `verified` refuses."""
    try:
        manifest = parse(raw, path)
    except CacheCorrupt as e:
        return e
    if canonical(manifest["key"]) != canonical(key.as_dict()):
        return corrupt(path / MANIFEST, "it names another Key")
    for name, data in ((SOURCE, source), (LIBRARY, so_bytes)):
        stated = manifest["files"][name]
        if len(data) != stated["bytes"]:
            return corrupt(path / name, f"it has {len(data)} bytes, its manifest says {stated['bytes']}")
        if hashlib.sha256(data).hexdigest() != stated["sha256"]:
            return corrupt(path / name, "its sha256 is not the one in its manifest")
    return corrupt(path / MANIFEST, "it is not the manifest that these files have")
