"""Compilers that Inductor needs and does not find: said so that a user can act on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from dpcompile.errors import UnsupportedGraphError

__all__ = ["explained"]

_REMEDY = (
    "install a C++ compiler (g++ or clang++; Debian: apt-get install g++), or set the environment variable CXX to one; "
    "or do without: backend='eager' of dp_compile and make_private runs the rewritten graph uncompiled"
)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Around what Inductor compiles.

    Raises:
        UnsupportedGraphError: there is no C++ compiler, or it fails on Inductor's code.
    """
    try:
        yield
    except Exception as error:
        for cause in _causes(error):
            if isinstance(cause, InvalidCxxCompiler):
                raise UnsupportedGraphError("Inductor needs a C++ compiler, and finds none", remedy=_REMEDY) from None
            if isinstance(cause, CppCompileError):
                raise UnsupportedGraphError(
                    f"the C++ compiler that Inductor finds does not compile its code: {_said(cause)}", remedy=_REMEDY
                ) from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was made of."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__, getattr(one, "inner_exception", None)]


def _said(error: BaseException) -> str:
    """The line of a compiler's output that says what is wrong, or its first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower() and "CppCompileError" not in line), lines[0])[:300]
