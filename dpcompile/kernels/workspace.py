"""Memory that stays mapped from one step to the next, on CPUs; on CUDA torch's own allocator keeps it.

A fresh tensor of some megabytes comes from the operating system page by page, and the kernel that writes it waits for
every fault (`python -m benchmarks.products` prints how long). The C library gives memory back as soon as some tens of
megabytes are free, which a backward with per-example gradients reaches in every step. Nothing here is done under a
memory budget.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from dpcompile._torch.tensors import uses_of_memory

__all__ = ["Workspace", "keep_freed_memory", "kept_gradients"]

_LEAST = 2**20  # bytes; smaller tensors come from memory that the C library keeps mapped


class Workspace:
    """Tensors that are handed out again once nobody holds them.

    **Guarantee.** A tensor that is still referenced anywhere, as itself or as a view, is not handed out: its values do
    not change under whoever holds it.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor of this shape, with the device of ``like``, and its dtype unless there is another."""
        number = prod(shape)
        like = like.new_empty(0, dtype=dtype)
        if number * like.element_size() < _LEAST:
            return like.new_empty(shape)
        with self._lock:
            free = (b for b in self._buffers if self._fits(b, number, like))
            buffer = next(free, None)
            if buffer is None:
                buffer = like.new_empty(number)
                self._buffers.append(buffer)
            return buffer.view(shape)

    def release(self) -> None:
        """Give the memory back; tensors that are still in use stay valid."""
        with self._lock:
            self._buffers.clear()

    @property
    def bytes(self) -> int:
        """How much memory it keeps."""
        return sum(b.numel() * b.element_size() for b in self._buffers)

    @staticmethod
    def _fits(buffer: Tensor, number: int, like: Tensor) -> bool:
        same = buffer.numel() == number and buffer.dtype == like.dtype and buffer.device == like.device
        return same and uses_of_memory(buffer) == 1


kept_gradients = Workspace()

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Ask glibc to keep up to 2 GiB of freed memory instead of some tens of megabytes, for the whole process.

    Returns:
        Whether it was done: not on other systems, nor where the environment sets these thresholds itself.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(_TRIM_THRESHOLD, 2**31 - 1) and library.mallopt(_MMAP_THRESHOLD, 2**25))
