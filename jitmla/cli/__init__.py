"""The `jitmla` command. Each subcommand lives in its own module; this one names them and starts the program.

Starting it loads neither torch nor the compiler. Results go to stdout, everything else to stderr. Exit codes: 0 done,
1 something failed, 2 the request cannot be served as it was put, 3 part of it cannot (prewarm), 130 interrupted.
"""

from __future__ import annotations

from typing import Annotated

import typer

from . import bench, bundles, cache, doctor, explain, kernels, output, prewarm, tune, upkeep

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Kernels for Multi-head Latent Attention, compiled once and cached on disk.")
app.command("prewarm")(prewarm.prewarm)
app.command("kernels")(kernels.kernels)
app.add_typer(cache.app, name="cache")
for _name, _command in (("explain", explain.explain), ("verify", upkeep.verify), ("gc", upkeep.gc), ("pin", upkeep.pin),
                        ("unpin", upkeep.unpin), ("export", bundles.export), ("import", bundles.load)):
    cache.app.command(_name)(_command)
app.command("tune")(tune.tune)
app.command("doctor")(doctor.doctor)
# its own parser reads the arguments, --help included
app.command("bench", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
            )(bench.bench)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__
        output.line(f"jitmla {__version__}")
        raise typer.Exit()


@app.callback()
def _top(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                               help="Print the version and exit.")] = False) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="jitmla")
