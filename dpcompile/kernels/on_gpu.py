"""Triton kernels: which devices they are for, and believed there once they have given known values."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache

import torch

__all__ = ["captured", "has_triton", "proven", "runs_triton"]


_DEVICES = {"cuda"}  # ROCm's too, which torch calls so


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels are for this device, and Triton is installed."""
    return device.type in _DEVICES and has_triton()


def captured() -> bool:
    """Whether what is called now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def proven(name: str, *, else_told: str) -> Callable[[Callable[[torch.device], bool]], Callable[[torch.device], bool]]:
    """Make a self-test on a device the answer to whether its kernels are used there.

    **Guarantee.** No kernel is used that could not be compiled or started on the device, or whose self-test raised or
    returned False there. Both are found out once for each device of a process, which waits for the device; nothing
    after that does.

    Args:
        name: of the kernels, as the user is told.
        else_told: what is done where there are none.
    """

    def decorate(gives_known_values: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
        @cache
        def tried(device: torch.device) -> bool:
            try:
                with ThreadPoolExecutor(1) as apart:  # a thread has none of the modes that its starter traces under
                    right = apart.submit(_tried, gives_known_values, device).result()
            except Exception as error:
                warnings.warn(
                    f"the Triton kernels of {name} do not run on {device} ({type(error).__name__}): {else_told}, which "
                    "is slower. Triton needs a C compiler: install one, or set CC to one.",
                    stacklevel=2,
                )
                return False
            if not right:
                warnings.warn(
                    f"the Triton kernels of {name} give wrong numbers on {device}, so they are not used: {else_told}, "
                    "which is slower. Install another release of Triton.",
                    stacklevel=2,
                )
            return right

        def answer(device: torch.device) -> bool:
            return runs_triton(device) and tried(device)

        answer.__doc__ = gives_known_values.__doc__
        answer.tried = tried  # type: ignore[attr-defined]
        return answer

    return decorate


def _tried(gives_known_values: Callable[[torch.device], bool], device: torch.device) -> bool:
    with torch.no_grad():
        return gives_known_values(device)
