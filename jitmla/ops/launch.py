"""How a call of an op becomes a launch: from memory if one like it was made before, else checked and chosen first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import dispatch, env
from ..errors import NoTemplate
from . import checks

# Their kernels compile, and have not run on a GPU yet: whoever wants one names its backend. To be emptied when
# tests/kernels/test_indexer.py has passed there.
UNCHECKED = frozenset(("indexer_prologue", "cat_quant_fp8", "indexer_k_scatter", "indexer_k_gather", "kv_row_pack",
                       "local_to_global"))


def run(op: str, calls: dispatch.Remembered, like: Any, first: Tensor, backend: str, check: Callable[[], None],
        plan: Callable[[], Callable[..., None]], args: Callable[[], tuple[Any, ...]], reference: Callable[[], None]
        ) -> None:
    """Launch, or compute with the reference.

    like: what decides the kernel of a call; `calls` remembers its plan() under it. first: the tensor whose device
    serves the call. check: raises what is wrong with the arguments; it is called when there is no plan yet, and when
    the compiled wrapper refused a layout, to say which one.
    """
    function = calls.get(like)
    if function is None:
        check()
        if checks.chooses_reference(op, backend, first):
            reference()
            return
        if backend == "auto" and op in UNCHECKED and not env.UNCHECKED.get():
            raise NoTemplate(f"{op} on {first.device} with backend='auto'", supported="backend='simt' or 'reference'",
                             differs="its kernel has not been checked on a GPU yet, so it is no default",
                             remedy=f"name the backend, or set {env.UNCHECKED.name}=1; see docs/notes/dsa_indexer.md")
        function = plan()
        calls[like] = function
    given = args()
    try:
        function(*given)
    except Exception:
        # Nothing was launched. The stride of a dimension of size 1 means nothing, but the wrapper looks at it.
        check()
        usual = tuple(checks.usual_strides(x) if isinstance(x, Tensor) else x for x in given)
        if all(a is b for a, b in zip(usual, given, strict=True)):
            raise
        function(*usual)
