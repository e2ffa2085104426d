"""What may happen when a kernel is not loaded: the policy, and the error of those who ask for more than it allows.

    compile   (default) take it from the cache, or compile it
    load      take it from the cache, never compile
    error     neither: only what jitmla.warm loaded can be used; what `jitmla.freeze()` sets for the rest of the process
"""

from __future__ import annotations

from collections.abc import Iterable

from . import env
from .errors import InvalidArgument, MissNotAllowed
from .key import diff
from .spec import Spec

POLICIES = ("compile", "load", "error")
NEAREST = 3

_frozen = False


def policy() -> str:
    """One of POLICIES; raises InvalidArgument when the environment says something else."""
    if _frozen:
        return "error"
    named = env.ON_MISS.get()
    if named not in POLICIES:
        raise InvalidArgument(f"{env.ON_MISS.name}={named}", supported=", ".join(POLICIES),
                              differs="it is none of them", remedy=f"correct or unset {env.ON_MISS.name}")
    return named


def frozen() -> bool:
    return _frozen


def set_frozen(value: bool) -> None:
    global _frozen
    _frozen = value


def reason() -> str:
    """What made the policy "error"."""
    return "after jitmla.freeze()" if _frozen else f"with {env.ON_MISS.name}=error"


def prewarm_command(spec: Spec) -> str:
    """The command line that puts the kernel of `spec` into the cache."""
    facts = " ".join(f"--spec {name}={str(value).lower()}" for name, value in spec if name not in ("op", "arch"))
    return f"jitmla prewarm --op {spec.op} --arch {spec.arch} {facts}"


def not_loaded(spec: Spec, when: str, loaded: Iterable[Spec], first: str) -> MissNotAllowed:
    """The error for a kernel that is not loaded at a moment when it cannot be. `first`: what would have avoided it."""
    return MissNotAllowed(f"{spec} {when}", supported="kernels that this process has loaded before",
                          differs=difference(spec, loaded),
                          remedy=f"{first}; to have it on disk: {prewarm_command(spec)}")


def not_stored(spec: Spec, root: str) -> MissNotAllowed:
    """The error for a kernel that is not in the cache, when it must not be compiled."""
    return MissNotAllowed(f"{spec} with {env.ON_MISS.name}={policy()}", supported=f"kernels that are in {root}",
                          differs="this one is not there, and must not be compiled here",
                          remedy=prewarm_command(spec))


def difference(spec: Spec, loaded: Iterable[Spec]) -> str:
    """Field by field, how `spec` differs from the nearest ones that are loaded."""
    found = sorted((len(fields), [f"{name}: {asked} asked, {has} loaded" for name, asked, has in fields])
                   for fields in (diff(spec.as_dict(), other.as_dict()) for other in set(loaded)))
    if not found:
        return "none is loaded on this device"
    nearest = dict.fromkeys(", ".join(texts) for count, texts in found if count == found[0][0])
    return "; or ".join(list(nearest)[:NEAREST]) or "what is loaded of it is another variant, or for another backend"
