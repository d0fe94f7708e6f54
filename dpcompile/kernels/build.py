"""C++ of `kernels/cpp`: compiled when first needed, and believed once it has given known values."""

from __future__ import annotations

import ctypes
import pathlib
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

from dpcompile._torch.native import compile_cpp
from dpcompile.progress import working

__all__ = ["Library", "kernel"]

Library = Callable[[], ctypes.CDLL | None]

_FOLDER = pathlib.Path(__file__).parent / "cpp"
_TOGETHER = ("onednn", "gram", "squares", "kept", "by_index")  # one program: starting the compiler takes longest


def kernel(
    name: str, *, contract: bool = False, else_told: str | None = None
) -> Callable[[Callable[[ctypes.CDLL], bool]], Library]:
    """Make a self-test the way to its kernel: a function that returns the library, or None where there is none.

    **Guarantee.** No kernel is used that did not compile, or whose self-test raised or returned False on this machine.
    Both are found out once in a process.

    Args:
        name: of the file in `kernels/cpp`.
        contract: whether the compiler may round a product and a sum once.
        else_told: what there is to tell the user where there is no kernel: what is done instead. Without it nothing is
            told: torch's own operations are right too.
    """

    def decorate(gives_known_values: Callable[[ctypes.CDLL], bool]) -> Library:
        @lru_cache(maxsize=1)
        def library() -> ctypes.CDLL | None:
            try:
                # A thread has none of the modes that its starter traces under.
                with working("compiling kernels, once on this machine"), ThreadPoolExecutor(1) as apart:
                    compiled, right = apart.submit(_made, name, contract, gives_known_values).result()
            except Exception as error:
                if else_told is not None:
                    warnings.warn(
                        f"the {name} kernel could not be compiled ({type(error).__name__}): {else_told}, which is "
                        "slower. Install a C++ compiler, or set CXX to one.",
                        stacklevel=2,
                    )
                return None
            if not right and else_told is not None:
                warnings.warn(
                    f"the compiled {name} kernel gives wrong numbers, so it is not used: {else_told}, which is slower. "
                    "Set CXX to another C++ compiler.",
                    stacklevel=2,
                )
            return compiled if right else None

        library.__doc__ = gives_known_values.__doc__
        return library

    return decorate


def _made(name: str, contract: bool, gives_known_values: Callable[[ctypes.CDLL], bool]) -> tuple[ctypes.CDLL, bool]:
    compiled = compile_cpp(_program(name), contract=contract)
    with torch.no_grad():
        return compiled, gives_known_values(compiled)


def _program(name: str) -> str:
    names = _TOGETHER if name in _TOGETHER else (name,)
    return "\n".join((_FOLDER / f"{n}.cpp").read_text() for n in names)
