"""The errors, and a warning. Each says what happened, where in the user's code, and what to do."""

from __future__ import annotations

__all__ = ["DPCompileError", "ExampleMixingError", "PrivacyError", "PrivacyWarning", "UnsupportedGraphError"]


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


class UnsupportedGraphError(DPCompileError):
    """The graph holds something that cannot be proved: no rule, a graph break, an uncovered path."""


class ExampleMixingError(DPCompileError):
    """Examples of one batch influence each other, so no example has a gradient of its own."""


class PrivacyError(DPCompileError):
    """The guarantee would be broken at run time, or a privacy parameter makes no sense."""


class PrivacyWarning(UserWarning):
    """What is right for an experiment that is repeated, and wrong for models that are published."""
