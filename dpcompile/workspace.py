"""Memory for per-example gradients that stays mapped from one step to the next, on CPUs.

A fresh tensor of some megabytes comes from the operating system page by page, and a product that writes it waits for
every fault (`python -m benchmarks.products` prints how long). On CUDA torch's allocator keeps memory in the same way.
"""

from __future__ import annotations

import threading
from math import prod

from torch import Tensor

from dpcompile._torch import uses_of_memory

__all__ = ["Workspace", "kept_gradients"]

_LEAST = 2**20  # bytes; smaller tensors come from memory that the C library keeps mapped


class Workspace:
    """Tensors that are handed out again once nobody holds them.

    **Guarantee.** A tensor that is still referenced anywhere, as itself or as a view, is not handed out: its values do
    not change under whoever holds it.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An empty tensor of this shape, with the dtype and device of ``like``."""
        number = prod(shape)
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
