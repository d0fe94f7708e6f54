"""The errors, and a warning. Each says what happened, where in the user's code, and what to do."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig

__all__ = [
    "DPCompileError",
    "ExampleMixingError",
    "NotReadyError",
    "PrivacyError",
    "PrivacyWarning",
    "UnsupportedGraphError",
    "running_line",
]


class DPCompileError(Exception):
    """Anything dpcompile refuses.

    The message is built from up to three parts, so that every refusal reads alike:
    what happened, where in the user's code, and what to do about it.

    Args:
        what: the fact, naming the parameter, the operation or the value.
        where: ``file:line`` and the source text of the user's own line, if known.
        remedy: one imperative sentence.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        parts = [what]
        if where:
            parts.append(f"  at {where}")
        if remedy:
            parts.append(f"  what to do: {remedy}")
        super().__init__("\n".join(parts))


class NotReadyError(DPCompileError, AttributeError):
    """An attribute that a call or a backward is to give its value; to ``hasattr`` and its kin it is not there yet."""


class UnsupportedGraphError(DPCompileError):
    """The graph holds something that cannot be proved: no rule, a graph break, an uncovered path."""


class ExampleMixingError(DPCompileError):
    """Examples of one batch influence each other, so no example has a gradient of its own."""


class PrivacyError(DPCompileError):
    """The guarantee would be broken at run time, or a privacy parameter makes no sense."""


class PrivacyWarning(UserWarning):
    """What is right for an experiment that is repeated, and wrong for models that are published."""


_HERE = os.path.dirname(__file__) + os.sep
_INSTALLED = tuple({sysconfig.get_path(k) + os.sep for k in ("purelib", "platlib", "stdlib", "platstdlib")})
_TYPED_IN = ("<stdin>", "<string>", "<ipython")


def running_line() -> str | None:
    """``file:line, in function: source`` of the innermost frame outside this package and what is installed, or None."""
    frame = sys._getframe(1)
    while frame is not None:
        file, line, function = frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        generated = file.startswith("<") and not file.startswith(_TYPED_IN)
        if not generated and not file.startswith((_HERE, *_INSTALLED)):
            source = linecache.getline(file, line, frame.f_globals).strip()
            return f"{file}:{line}, in {function}" + (f": {source}" if source else "")
        frame = frame.f_back
    return None
