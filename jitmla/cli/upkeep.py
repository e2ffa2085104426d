"""`jitmla cache verify`, `gc`, `pin` and `unpin`: that the cache is whole, and not too large."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer import Argument, Option

from .. import bounds, compile, registry, toolchain
from ..errors import CacheCorrupt, CacheUntrusted, CompileFailed, InvalidArgument, NoTemplate
from ..layer import Layer
from ..store import Entry, Store
from . import output
from .cache import only

BAD = ("corrupt", "untrusted", "differs")


@output.reports_errors
def verify(
    rebuild: Annotated[bool, Option("--rebuild", help="Compile each entry again and compare the bytes.")] = False,
    as_json: output.Json = False,
) -> None:
    """Read every entry of every layer again.

    Prints one line for each: ok, corrupt, untrusted; with --rebuild also same, differs (other bytes from the same Key)
    and skipped (made by another toolchain). Exit code 1 when one is corrupt, untrusted or differs."""
    counts: dict[str, int] = {}
    for layer in Store().layers():
        for row in _verified(layer, rebuild):
            counts[row["status"]] = counts.get(row["status"], 0) + 1
            if as_json:
                output.json_line(row)
            else:
                output.line(f"{row['status']:<9} {row['key'][:output.SHORT]:<{output.SHORT}} {row['path']}"
                            + (f"\n          {row['reason']}" if row["reason"] else ""))
    if not as_json:
        output.line(", ".join(f"{count} {status}" for status, count in counts.items()) or "no entries")
    if any(status in counts for status in BAD):
        raise typer.Exit(1)


def _verified(layer: Layer, rebuild: bool) -> Iterator[dict[str, Any]]:
    """What became of each entry of a layer; a folder that cannot be trusted counts as one."""
    try:
        places = list(layer.places())
    except CacheUntrusted as e:
        yield {"status": "untrusted", "key": "", "path": str(layer.root), "reason": str(e)}
        return
    for arch, op, digest in places:
        path = layer.root / "v1" / arch / op / digest
        row = {"status": "ok", "key": digest, "path": str(path), "reason": ""}
        try:
            listing = layer.listing(arch, op, digest)
            if listing is not None and listing.key is None:
                row |= {"status": "corrupt", "reason": listing.fault}
            entry = layer.read(listing.key) if listing is not None and listing.key is not None else None
            if entry is not None and rebuild:
                row |= _rebuilt(entry)
        except CacheCorrupt as e:
            row |= {"status": "corrupt", "reason": e.differs}
        except CacheUntrusted as e:
            row |= {"status": "untrusted", "reason": f"{e.asked}: {e.differs}"}
        yield row


def _rebuilt(entry: Entry) -> dict[str, str]:
    """How an entry compares with what its Key gives here and now."""
    key = entry.key
    if toolchain.current(dict(key.toolchain or ())["options"]) != key.toolchain:
        return {"status": "skipped", "reason": "made by another toolchain than the one installed here"}
    try:
        if any(choice.key == key and choice.source() != entry.source for choice in registry.choices(key.spec)):
            return {"status": "differs", "reason": "the template gives another source now"}
    except NoTemplate:  # of a template that is gone: its source is in the entry
        pass
    try:
        built = compile.build(key, entry.source)
    except CompileFailed as e:
        return {"status": "differs", "reason": f"it does not compile: {e.differs}"}
    if built.so_bytes != entry.so_bytes:
        return {"status": "differs", "reason": "compiled again, it has other bytes"}
    return {"status": "same"}


@output.reports_errors
def gc(
    max_size: Annotated[str | None, Option(metavar="SIZE", help="Such as 2GiB, or `unlimited`. Default: "
                                           "JITMLA_CACHE_SIZE.")] = None,
    failed: Annotated[bool, Option("--failed", help="Also forget failed compiles, so that they are tried again.")
                      ] = False,
    as_json: output.Json = False,
) -> None:
    """Trim the cache to a size, and sweep what killed processes left.

    The least recently used entries go first, pinned ones stay. Read-only layers are not touched."""
    limit = bounds.size_of(max_size, "--max-size") if max_size is not None else bounds.default_limit()
    store = Store()
    store.side_folder(bounds.STAGING)
    evicted = bounds.trim(store.root, limit)
    if evicted:
        time.sleep(bounds.GRACE + 0.1)  # for those who read them now
    bounds.sweep(store.root, failures=failed)
    left = bounds.residents(store.root)
    size, pinned = sum(r.bytes for r in left), sum(r.bytes for r in left if r.pinned)
    if as_json:
        output.json_line({"evicted": [{"key": r.digest, "bytes": r.bytes} for r in evicted], "bytes": size,
                          "entries": len(left), "pinned_bytes": pinned, "limit": limit})
        return
    for resident in evicted:
        output.line(f"evicted {resident.digest[:output.SHORT]} {resident.bytes} bytes")
    output.line(f"{len(left)} entries, {size} bytes, {pinned} of them pinned, in {store.root}")
    if limit is not None and size > limit:
        output.complain(f"{size - limit} bytes more than {limit}: pinned entries stay; see `jitmla cache unpin`")


@output.reports_errors
def pin(keys: Annotated[list[str], Argument(metavar="KEY...", help="Digests, or their first digits.")]) -> None:
    """Keep entries from being evicted. `jitmla prewarm` pins what it was asked for."""
    _pin(keys, True)


@output.reports_errors
def unpin(
    keys: Annotated[list[str] | None, Argument(metavar="KEY...", help="Digests, or their first digits.")] = None,
    every: Annotated[bool, Option("--all", help="All entries.")] = False,
) -> None:
    """Let entries be evicted when the cache is full and they are the least recently used."""
    if every == bool(keys):
        raise typer.BadParameter("give either Keys or --all")
    _pin([r.digest for r in bounds.residents(Store().root) if r.pinned] if every else keys or [], False)


def _pin(prefixes: list[str], pinned: bool) -> None:
    store = Store()
    there = {resident.digest for resident in bounds.residents(store.root)}
    for digest in [only(prefix).digest for prefix in prefixes]:
        if digest not in there:
            raise InvalidArgument(f"to pin {digest[:output.SHORT]}", supported=f"an entry of {store.root}",
                                  differs="a read-only layer holds it, where nothing is evicted", remedy="none needed")
        store.pin(digest, pinned)
        output.line(f"{'pinned' if pinned else 'unpinned'} {digest[:output.SHORT]}")
