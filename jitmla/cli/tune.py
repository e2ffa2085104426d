"""`jitmla tune`: measures in jitmla.bench.tune, which needs torch and a GPU and is imported only then."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..errors import InvalidArgument
from . import output

TUNED = ("mla_decode",)


@output.reports_errors
def tune(
    op: Annotated[str, Argument(metavar="OP", help=f"The op to tune: {', '.join(TUNED)}.")],
    model: Annotated[str, Option(metavar="NAME|PATH", help="A known model, or the path of its Hugging Face "
                                 "config.json.")],
    tp: Annotated[int, Option(metavar="N", min=1, help="Ranks that share the model's heads.")] = 1,
    page_size: Annotated[list[int] | None, Option(metavar="N", min=1, help="Page size of the engine's cache; "
                                                  "repeat it for several. Default: 64.")] = None,
    max_s_q: Annotated[int, Option(metavar="N", min=1, help="Most query tokens per request (1 + draft tokens).")] = 1,
    dtype: Annotated[str | None, Option(metavar="DTYPE", help="bf16 or fp16. Default: the model's.")] = None,
    batch: Annotated[list[int] | None, Option(metavar="N", min=1, help="Batch size to measure; repeat it in rising "
                                              "order. Each stands for those down to the one before it.")] = None,
    file: Annotated[Path | None, Option("--output", metavar="FILE", help="Write the tunings here instead of stdout. "
                                        "What the file says of other shapes stays.")
                    ] = None,
    commit: Annotated[str | None, Option(help="What to record as the commit, where this is a copy without its .git.")
                      ] = None,
) -> None:
    """Measure variants and launch arguments on this GPU.

    The result is a tunings file for JITMLA_TUNINGS and `jitmla.use_tunings`. Takes minutes; the GPU must be idle.
    """
    if op not in TUNED:
        raise InvalidArgument(f"to tune {op!r}", supported=", ".join(TUNED), differs="its choices are not measured",
                              remedy="the rules of jitmla/pick.py decide for the other ops")
    from ..bench import tune as bench

    written = bench.run(op, model, file, " ".join(["jitmla", *sys.argv[1:]]), commit, tp=tp, dtype=dtype,
                        page_sizes=page_size or (64,), max_s_q=max_s_q, batches=batch or bench.BATCHES,
                        progress=lambda said: print(said, file=sys.stderr, flush=True))
    if file is None:
        output.line(written.rstrip("\n"))
