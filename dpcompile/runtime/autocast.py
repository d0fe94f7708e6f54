"""Autocast as it was when a model was called, for running it again in a backward, which most loops do outside of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Autocast"]


@dataclass(frozen=True, slots=True)
class Autocast:
    """What autocast does to the operations of some kinds of devices.

    Attributes:
        kinds: for each device type whether it is enabled, and the dtype that it casts to.
        cache: whether casts of parameters are kept while it is on.
    """

    kinds: tuple[tuple[str, bool, torch.dtype], ...]
    cache: bool

    @classmethod
    def now(cls, tensors: Iterable[object]) -> Autocast:
        """The state for the CPU and for the devices on which these tensors lie."""
        used = {"cpu"} | {x.device.type for x in tensors if isinstance(x, Tensor) and x.device.type != "meta"}
        kinds = tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in sorted(used))
        return cls(kinds, torch.is_autocast_cache_enabled())

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same state, whatever it is outside; afterwards that of outside."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self.kinds:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.cache))
            yield
