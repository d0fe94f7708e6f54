"""C of the steps to come, without compiling anything anew.

A compiled graph clips to the C that it was made for. Clipping g to another one is clipping r g to the graph's, where r
is the ratio of the two, and taking r out of the sum again: ``min(1, C / |g|) g = min(1, C0 / |r g|) r g / r`` with
``r = C0 / C``. Into the graph r gets as loss scales do, by the mask (:mod:`dpcompile.runtime.loss_scale`). What each of
several clip groups has of C is an input of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dpcompile.clipping.groups import SEVERAL, Bounds, Clipping, validate_clipping
from dpcompile.errors import PrivacyError
from dpcompile.kernels.handed import handed
from dpcompile.runtime.sums import Delivered

__all__ = ["ClipBound", "bounds_of", "votes_within"]

_LARGEST_RATIO = 2.0**40  # masks are float32, and weights of narrower dtypes are made with them
_SCALE_FREE = ("flat", *SEVERAL)


def votes_within(norms: Mapping[str, Tensor], mask: Tensor, bounds: Bounds) -> Tensor:
    """For each clip group, how many examples have a gradient within its bound, less how many have not: int64 ``[K]``.

    Args:
        norms: of the groups, ``[B]``, before clipping; 0 for a group without a gradient.
        mask: ``[B]``, 0 for padding.
        bounds: of which the groups are.

    **Guarantee.** One example more or less moves each of the K numbers by 1, whatever its norms: one that is no number
    is not within (Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", section 3.1).
    """
    real = mask > 0
    found = []
    for group, bound in bounds.of(tuple(bounds.shares)).items():
        own = norms.get(group)
        within = torch.ones_like(real) if own is None else own <= bound
        found.append(((2 * within.long() - 1) * real).sum())
    return torch.stack(found)


def bounds_of(bounds: Mapping[str, float], groups: Sequence[str], mask: Tensor) -> Tensor:
    """Bounds of clip groups as a graph takes them: float64 ``[groups, B]``, for the rows of a mask.

    Groups without one have no gradient there.
    """
    values = handed(torch.tensor([[bounds.get(group, 0.0)] for group in groups], dtype=torch.float64), mask.device)
    return values.expand(-1, len(mask)).contiguous()


class ClipBound:
    """Which C a forward is clipped to.

    Args:
        clipping: of the model.
        compiled: C0, of the compiled graphs.

    Attributes:
        now: C of the forwards to come, and of their clip groups.
    """

    def __init__(self, clipping: Clipping, compiled: float) -> None:
        self._clipping, self._compiled = clipping, float(compiled)
        self.now = Bounds(self._compiled)

    def in_graph(self, bounds: Bounds) -> Bounds:
        """What graphs clip to in a forward that is clipped to these."""
        return bounds.times(self._compiled)

    def move(self, bounds: Bounds, *, under_way: bool) -> None:
        """Take another C, or other parts of it, from now on.

        Args:
            bounds: C and its parts.
            under_way: sums stand in ``p.grad`` that no step has used.

        Raises:
            PrivacyError: within a logical step; it is no bound, too far from the compiled one, or the clipping is not
                the same function of norms over C for each of them.
        """
        value = bounds.total
        validate_clipping(self._clipping, value)
        if under_way and bounds != self.now:
            raise PrivacyError(
                f"max_grad_norm was to become {value} between a backward, clipped to {self.now.total}, and its step",
                remedy="change it after optimizer.step(), before the next forward",
            )
        if self._clipping not in _SCALE_FREE:
            name = repr(self._clipping) if isinstance(self._clipping, str) else "a function"
            raise PrivacyError(
                f"max_grad_norm of a model with clipping={name} was to change: its weights are not a function of the "
                "norms divided by C",
                remedy=f"use one of {', '.join(map(repr, _SCALE_FREE))}, or compile the model with the other C",
            )
        if not 1 / _LARGEST_RATIO <= value / self._compiled <= _LARGEST_RATIO:
            raise PrivacyError(
                f"max_grad_norm {value} is more than {_LARGEST_RATIO:.0e} times away from {self._compiled}, which the "
                "model was compiled with",
                remedy="compile the model with a C of about the size that it will have",
            )
        self.now = bounds.times(float(value))

    def into(self, mask: Tensor) -> Tensor:
        """The mask of a forward that is clipped to C as it is now."""
        ratio = self._ratio(self.now.total)
        return mask if ratio == 1 else mask * ratio

    def out_of(self, found: Delivered, bound: Bounds) -> Delivered:
        """What that forward's backward came to, in the gradients' own size.

        Raises:
            PrivacyError: another C was taken meanwhile, for which the noise will be.

        **Guarantee.** Sums are clipped to ``bound`` or less, but for the rounding of a float32 product: r is rounded
        up.
        """
        if bound != self.now:
            raise PrivacyError(
                f"max_grad_norm was changed between a forward, which is clipped to {bound.total}, and its backward: "
                f"the noise would be for {self.now.total}",
                remedy="change it after optimizer.step(), before the next forward",
            )
        ratio = self._ratio(bound.total)
        if ratio == 1:
            return found
        sums = [(name, clipped / ratio) for name, clipped in found.sums]
        norms = None if found.norms is None else found.norms / ratio
        by_group = {group: own / ratio for group, own in found.by_group.items()}
        return Delivered(norms, found.mask / ratio, found.graph_task, sums, by_group)

    def _ratio(self, bound: float) -> float:
        """C0 over C as a float32 number, not rounded down."""
        return _rounded_up(self._compiled / bound)


@lru_cache(maxsize=64)
def _rounded_up(exact: float) -> float:
    rounded = torch.tensor(exact, dtype=torch.float32)
    if rounded.item() < exact:
        rounded = torch.nextafter(rounded, torch.tensor(math.inf))
    return rounded.item()
