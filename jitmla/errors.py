"""Every error jitmla raises on purpose, and the four parts each one says: asked, supported, differs, remedy.

Each class also derives from the built-in exception that a caller would expect for the kind of mistake, so that
`except ValueError` keeps working. `docs/troubleshooting.md` has a section for each class; a test checks the pairing.
"""

from __future__ import annotations


class JitmlaError(Exception):
    """Base class. `asked`: what was asked; `supported`: what would work; `differs`: where the two differ;
    `remedy`: what mends it."""

    def __init__(self, asked: str, *, supported: str = "", differs: str = "", remedy: str = "") -> None:
        self.asked, self.supported, self.differs, self.remedy = asked, supported, differs, remedy
        parts = [asked]
        parts += [f"  {name}: {text}" for name, text in
                  (("supported", supported), ("differs", differs), ("to mend it", remedy)) if text]
        super().__init__("\n".join(parts))

    def as_dict(self) -> dict[str, str]:
        return {"error": type(self).__name__, "asked": self.asked, "supported": self.supported,
                "differs": self.differs, "remedy": self.remedy}


class InvalidArgument(JitmlaError, ValueError):
    """An argument has a value, shape, stride or device that the op does not accept."""


class InvalidArgumentType(JitmlaError, TypeError):
    """An argument has the wrong type or dtype."""


class NoTemplate(JitmlaError, NotImplementedError):
    """The request is valid, but no template serves it (on this arch, with these dims)."""


class UnknownArch(JitmlaError, ValueError):
    """A GPU architecture name that jitmla does not know."""


class UnknownModel(JitmlaError, ValueError):
    """A model name or config file from which the MLA dimensions cannot be read."""


class InvalidTemplate(JitmlaError, ValueError):
    """A template or its card breaks the template contract."""


class SchemaViolation(JitmlaError, ValueError):
    """A Key or manifest does not match cache_schema.json."""


class InvalidTunings(JitmlaError, ValueError):
    """A tunings file that cannot be read, or says what no kernel can be launched with."""


class MissNotAllowed(JitmlaError, RuntimeError):
    """A kernel is missing or not loaded at a moment when jitmla must not compile or load: during CUDA graph capture,
    after `freeze`, or as JITMLA_ON_MISS says."""


class CompileFailed(JitmlaError, RuntimeError):
    """The child process that compiles a kernel failed, was killed, or ran out of time.

    `lasting`: the source is at fault, so the same toolchain will fail again."""

    lasting = True


class CompileInterrupted(CompileFailed):
    """The child process was killed or ran out of time: the same compile may succeed when it is tried again."""

    lasting = False


class ToolchainMissing(JitmlaError, RuntimeError):
    """CuTe DSL, its runtime library, tvm_ffi or a C linker is needed and not there."""


class LoadFailed(JitmlaError, RuntimeError):
    """A verified kernel cannot be loaded into this process, or not run on this device."""


class CacheUntrusted(JitmlaError, PermissionError):
    """A cache folder or file is owned by someone else or writable by others, so its code is not loaded."""


class CacheCorrupt(JitmlaError, RuntimeError):
    """A cache entry does not match its digests or its schema."""


class CacheUnwritable(JitmlaError, OSError):
    """The cache cannot be written (read-only, full, no such place)."""


# The same request would be answered the same way again: it has to change. Commands then end with 2, else with 1.
MISPUT = (InvalidArgument, InvalidArgumentType, InvalidTunings, NoTemplate, SchemaViolation, UnknownArch, UnknownModel)
