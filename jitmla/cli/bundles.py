"""`jitmla cache export` and `import`: entries as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .. import bundle, registry
from ..errors import CacheCorrupt, InvalidArgument
from ..store import Entry, Store
from . import output, requests


@output.reports_errors
def export(
    file: Annotated[Path, Argument(metavar="FILE", help="The bundle to write; it is replaced if it exists.")],
    model: Annotated[str | None, Option(metavar="NAME|PATH", help="Every kernel that a model can reach, with --tp and "
                                        "--arch, instead of all.")] = None,
    tp: requests.Tp = 1,
    arch: Annotated[str | None, Option(metavar="ARCH", help="Only kernels of this architecture.")] = None,
    page_size: requests.PageSize = None,
    max_s_q: requests.MaxSQ = None,
    uses: requests.Uses = None,
    dtype: requests.Dtype = None,
    as_json: output.Json = False,
) -> None:
    """Write entries of all layers into one compressed file.

    Every entry is verified first. The same entries give the same bytes; their sha256 is printed."""
    if model is not None and arch is None:
        raise typer.BadParameter("--model needs --arch")
    store = Store()
    if model is None:
        entries = _all(store, arch)
    else:
        asked = (model, tp, arch or "", page_size, max_s_q, dtype, uses)
        specs = requests.of_model(*asked)
        keys = dict.fromkeys(choice.key for spec in specs for choice in registry.choices(spec))
        entries = [entry for entry in map(store.find, keys) if entry is not None]
        if len(entries) < len(keys):
            raise InvalidArgument(f"the {len(keys)} kernels of {model}", supported="those that are stored",
                                  differs=f"{len(keys) - len(entries)} are not",
                                  remedy=requests.command(*asked))
    if not entries:
        raise InvalidArgument("to export kernels", supported="those that are stored", differs="none fits",
                              remedy="`jitmla cache ls` lists what is there")
    try:
        digest = bundle.write(file, entries)
    except OSError as e:
        raise InvalidArgument(f"to write {file}", supported="a path that can be written", differs=str(e),
                              remedy="name another path") from e
    if as_json:
        output.json_line({"file": str(file), "sha256": digest, "bytes": file.stat().st_size,
                          "keys": [entry.key.digest for entry in entries]})
    else:
        output.line(f"{len(entries)} entries, {file.stat().st_size} bytes: {file}\nsha256 {digest}")


def _all(store: Store, arch: str | None) -> list[Entry]:
    """Every entry, each from the first layer that has it; raises CacheCorrupt."""
    found: dict[str, Entry] = {}
    for listing in store.entries():
        if listing.digest in found or (arch is not None and listing.path.parts[-3] != arch):
            continue
        entry = store.find(listing.key) if listing.key is not None else None
        if entry is None:
            raise CacheCorrupt(f"the entry {listing.path}", supported="entries that are whole",
                               differs=listing.fault or "its files do not match their digests",
                               remedy="delete it, or have it built again; `jitmla cache verify` shows all that are bad")
        found[listing.digest] = entry
    return list(found.values())


@output.reports_errors
def load(
    file: Annotated[Path, Argument(metavar="FILE", help="A file that `jitmla cache export` wrote.")],
    sha256: Annotated[str, Option(metavar="HEX", help="Of the file, as export printed it: refuse any other.")] = "",
    as_json: output.Json = False,
) -> None:
    """Store the entries of a bundle in the cache.

    All of it is checked first, and refused if anything differs. A bundle holds code that will run as you: take it only
    from where you would take a program, or name its sha256."""
    counts: dict[str, int] = {}
    store = Store()
    for entry, status in bundle.load(file, store, sha256):
        counts[status] = counts.get(status, 0) + 1
        if as_json:
            output.json_line({"key": entry.key.digest, "name": entry.key.name, "status": status})
        elif status == "there, other bytes":
            output.complain(f"{entry.key.digest[:output.SHORT]} is there with other bytes, and was kept")
    if not as_json:
        output.line((", ".join(f"{count} {status}" for status, count in counts.items()) or "0 entries")
                    + f" in {store.root}")
