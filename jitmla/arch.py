"""GPU architecture names. There is one spelling: `sm_90a`, with the suffix that the code generator needs."""

from __future__ import annotations

from .errors import UnknownArch

# compute capability -> the arch whose instructions a device of that capability runs
BY_CAPABILITY = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_87", (8, 9): "sm_89", (9, 0): "sm_90a",
                 (10, 0): "sm_100a", (10, 3): "sm_103a", (12, 0): "sm_120a", (12, 1): "sm_121a"}
NAMES = tuple(BY_CAPABILITY.values())


def check(name: str) -> str:
    """`name` if it is an arch that jitmla knows; raises UnknownArch."""
    if name in NAMES:
        return name
    near = [n for n in NAMES if n.rstrip("a") == name.rstrip("abcdefghijklmnopqrstuvwxyz").replace("sm90", "sm_90")]
    raise UnknownArch(f"arch {name!r}", supported=", ".join(NAMES),
                      differs=f"{name!r} is not one of them" + (f"; did you mean {near[0]!r}?" if near else ""),
                      remedy="pass one of the supported names, for example --arch sm_90a (H100, H200)")


def of_capability(major: int, minor: int) -> str:
    """The arch name of a device with that compute capability; raises UnknownArch."""
    if (major, minor) in BY_CAPABILITY:
        return BY_CAPABILITY[major, minor]
    raise UnknownArch(f"a device of compute capability {major}.{minor}",
                      supported=", ".join(f"{a}.{b} ({n})" for (a, b), n in BY_CAPABILITY.items()),
                      differs="jitmla has no name for it", remedy="use backend='reference' on this device")
