"""How a call of an op becomes a launch: from memory if one like it was made before, else checked and chosen first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import dispatch
from . import checks


def rows(x: Any) -> int:
    """The first size of a tensor; -1 of anything else."""
    return x.shape[0] if isinstance(x, Tensor) and x.dim() else -1


def run(op: str, calls: dispatch.Remembered, like: Any, first: Tensor, backend: str, check: Callable[[], None],
        plan: Callable[[], Callable[..., None]], args: Callable[[], tuple[Any, ...]], reference: Callable[[], None],
        fits: bool = True) -> None:
    """Launch, or compute with the reference.

    like: what decides the kernel of a call; `calls` remembers its plan() under it. first: the tensor whose device
    serves the call. check: raises what is wrong with the arguments; it is called when there is no plan yet, and when
    the compiled wrapper refused a layout, to say which one. fits: whether sizes that belong together, and that the
    wrapper does not compare, do so in this call; if not, check() says which.
    """
    function = calls.get(like) if fits else None
    if function is None:
        check()
        if checks.chooses_reference(op, backend, first):
            reference()
            return
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
