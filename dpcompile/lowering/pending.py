"""What a region's compiled backward leaves when it has run: clipped sums, or how to compute them.

Autograd hands on tensors alone. So what is left of one backward is found by the norms that it returned, in the object
that stands for the region's backward: there is one of these for every compiled region, and no table for all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpcompile._torch.tensors import WeakTensorKeyDictionary, memory_of
from dpcompile.options import DEFERRED, TWO_PASS, Lowering

__all__ = ["Late", "LoweredBackward", "PendingSums"]


@dataclass(frozen=True, slots=True)
class PendingSums:
    """What is left of one backward that has run: the clipped sums, or how to compute them.

    Attributes:
        run: from a list of values and the weights to clipped sums.
        live: the values that are kept for it.
        handed: row of a parameter that other regions use too -> what its norm is taken of, over all regions.
    """

    run: Callable[[list[Any], Tensor | None], list[Tensor | None]]
    live: list[Any]
    handed: dict[int, list[Tensor]] = field(default_factory=dict)

    def __call__(self, weights: Tensor | None) -> list[Tensor | None]:
        """Clipped sums of the parameters for weights ``[parameters, B]``; to be called once, it frees the values.

        Where the sums are there already, the weights are None.
        """
        self.handed.clear()
        return self.run(self.live, weights)

    def preview(self, weights: Tensor) -> list[Tensor | None]:
        """The same, and the values stay."""
        return self.run(list(self.live), weights)

    def protect(self, memory: Collection[int]) -> None:
        """Copy what lies in memory that will not last: parameters of a shard that are gathered for a while."""
        for values in (self.live, *self.handed.values()):
            for i, value in enumerate(values):
                if isinstance(value, Tensor) and memory_of(value) in memory:
                    values[i] = value.clone()


@dataclass(frozen=True, slots=True)
class Late:
    """What a lowered backward has besides what it returned.

    Attributes:
        sums: the clipped sums, in the order of the parameters.
        handed: see :class:`PendingSums`.
        weights: what they were computed for; None if the graph had the weights itself.
        again: this was the second of two passes, which returns the weights in place of norms.
    """

    sums: list[Tensor | None]
    handed: dict[int, list[Tensor]]
    weights: Tensor | None
    again: bool = False


class LoweredBackward:
    """The backward of one compiled region, and what is left of its runs until it is taken.

    Attributes:
        lowering: which one it is.
    """

    def __init__(self, lowering: Lowering) -> None:
        self.lowering = lowering
        self._pending: Any = WeakTensorKeyDictionary()  # by the norms that a run returned
        self._second: dict[int, Tensor] = {}  # memory of what stands in for clip weights -> the weights

    def leave(self, norms: Tensor, sums: PendingSums) -> None:
        """A run that returns ``norms`` leaves this."""
        self._pending[norms] = sums

    def take(self, norms: Tensor) -> PendingSums:
        """What is left of the run that returned these norms; it is given out once."""
        return self._pending.pop(norms)

    def take_sums(self, marker: Tensor) -> list[Tensor | None]:
        """The clipped sums of the second pass that returned this in place of norms; none if it asked for no weight."""
        pending = self._pending.pop(marker, None)
        return [] if pending is None else pending(None)

    @contextmanager
    def second_pass(self, stand_in: Tensor, weights: Tensor) -> Iterator[None]:
        """Within it, a run that was given ``stand_in`` for clip weights computes clipped sums for ``weights``.

        It returns the weights in place of norms, and :meth:`take_sums` has the sums.
        """
        self._second[memory_of(stand_in)] = weights
        try:
            yield
        finally:
            del self._second[memory_of(stand_in)]

    def weights_for(self, stand_in: Tensor) -> Tensor | None:
        """The weights of the second pass that is running; None in a first one."""
        return self._second.get(memory_of(stand_in))

    def late(self, norms: Tensor, mask: Tensor) -> Late | None:
        """The clipped sums of the run that returned these norms, of which nothing is taken away.

        Where the weights are not known yet, they are for weights that differ from example to example, and that give
        each of them about the same say. None after the first of two passes.
        """
        pending: PendingSums | None = self._pending.get(norms)
        if pending is None:
            return None
        if self.lowering.kind == DEFERRED:
            total = norms.sum(0)
            usable = torch.isfinite(total) & (total > 0) & (mask > 0)
            uneven = torch.linspace(1.0, 0.5, max(len(total), 1), dtype=norms.dtype, device=norms.device)
            weights = torch.where(usable, uneven / total.clamp_min(torch.finfo(norms.dtype).tiny).sqrt(), 0.0)
            weights = weights.expand(norms.shape).contiguous()
            return Late(pending.preview(weights), pending.handed, weights)
        again = self.lowering.kind == TWO_PASS
        return Late(list(pending.live), {}, norms if again else None, again)
