"""`jitmla cache path`, `ls` and `show`: what is on disk. They only read; the other commands have their own modules."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import CacheCorrupt, InvalidArgument
from ..key import leaves
from ..store import Listing, Store
from . import output

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The kernel cache: what is in it, and its upkeep.")


@app.command("path")
@output.reports_errors
def path() -> None:
    """Print the folder of the cache, whether it exists or not."""
    output.line(str(Store().root))


@app.command("ls")
@output.reports_errors
def ls(as_json: output.Json = False) -> None:
    """List the entries. Manifests are verified; binaries are when they are loaded."""
    found = {layer.root: list(layer.entries()) for layer in Store().layers()}
    if as_json:
        for root, listings in found.items():
            for listing in listings:
                output.json_line(summary(listing) | {"layer": str(root)})
        return
    for number, (root, listings) in enumerate(found.items()):
        if listings:
            if len(found) > 1:
                output.line(("\n" if number else "") + str(root))
            output.table(("key", "kernel", "serves", "toolchain", "KiB"), [_row(listing) for listing in listings])
        else:
            output.line(f"no kernels in {root}")


@app.command("show")
@output.reports_errors
def show(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The digest of a Key, or its first digits.")],
    source: Annotated[bool, typer.Option("--source", help="Print the rendered source instead.")] = False,
    as_json: output.Json = False,
) -> None:
    """Show one entry: its manifest, and where its source lies."""
    listing = only(key)
    if source:
        entry = Store().find(listing.key) if listing.key is not None else None
        if entry is None:
            raise _corrupt(listing)
        output.line(entry.source.rstrip("\n"))
        return
    if listing.manifest is None:
        raise _corrupt(listing)
    if as_json:
        output.json_line(summary(listing) | {"manifest": listing.manifest})
        return
    output.line(f"source    {listing.path / 'kernel.py'}\nbinary    {listing.path / 'kernel.so'}\n")
    facts = {name: value for name, value in listing.manifest.items() if name != "kernels"}
    output.table(("field", "value"), [(name, str(value)) for name, value in leaves(facts)])
    output.line("")
    output.table(("registers", "spilled bytes", "stack bytes", "device function"),
                 [(str(k["registers"]), str(k["spill_bytes"]), str(k["stack_bytes"]), k["name"])
                  for k in listing.manifest["kernels"]])


def only(prefix: str) -> Listing:
    """The one entry whose digest begins with `prefix`; raises InvalidArgument."""
    store = Store()
    found = store.resolve(prefix.lower())
    if len(found) == 1:
        return found[0]
    near = ", ".join(listing.digest[:output.SHORT] for listing in found[:8])
    raise InvalidArgument(f"the entry {prefix!r} of {store.root}", supported="the first digits of one digest",
                          differs=f"{len(found)} entries begin so: {near}" if found else "no entry begins so",
                          remedy="`jitmla cache ls` lists what is there")


def _corrupt(listing: Listing) -> Exception:
    return CacheCorrupt(f"the entry {listing.path}", supported="the bytes that its manifest names",
                        differs=listing.fault or "its files do not match their digests",
                        remedy="none needed: it is built again when it is next asked for")


def summary(listing: Listing) -> dict[str, Any]:
    """What a script wants of an entry."""
    known: dict[str, Any] = {"key": listing.digest, "path": str(listing.path),
                             "source": str(listing.path / "kernel.py"), "fault": listing.fault or None}
    if listing.key is not None and listing.manifest is not None:
        known |= {"name": listing.key.name, "spec": listing.key.spec.as_dict(),
                  "toolchain": dict(listing.key.toolchain or ()),
                  "bytes": sum(file["bytes"] for file in listing.manifest["files"].values())}
    return known


def _row(listing: Listing) -> tuple[str, ...]:
    known = summary(listing)
    if listing.manifest is None:
        return (listing.digest[:output.SHORT], "corrupt", listing.fault, "", "")
    spec = known["spec"]
    facts = output.facts({name: value for name, value in spec.items() if name != "op"})
    toolchain = f"{known['toolchain']['cute_dsl']} {known['toolchain']['cuda']}"
    return (listing.digest[:output.SHORT], known["name"], facts, toolchain, str(-(-known["bytes"] // 1024)))
