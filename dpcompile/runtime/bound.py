"""C of the steps to come, without compiling anything anew.

A compiled graph clips to the C that it was made for. Clipping g to another one is clipping r g to the graph's, where r
is the ratio of the two, and taking r out of the sum again: ``min(1, C / |g|) g = min(1, C0 / |r g|) r g / r`` with
``r = C0 / C``. Into the graph r gets as loss scales do, by the mask (:mod:`dpcompile.runtime.loss_scale`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpcompile.clipping.groups import Clipping, validate_clipping
from dpcompile.errors import PrivacyError
from dpcompile.runtime.sums import Delivered

__all__ = ["ClipBound", "votes_within"]

_LARGEST_RATIO = 2.0**40  # masks are float32, and weights of narrower dtypes are made with them
_SCALE_FREE = ("flat", "per_layer", "per_block")


def votes_within(norms: Tensor, mask: Tensor, bound: float) -> Tensor:
    """How many examples have a gradient within C, less how many have not: int64 ``[]``.

    Args:
        norms: ``[B]``, before clipping.
        mask: ``[B]``, 0 for padding.
        bound: C.

    **Guarantee.** One example more or less moves the sum by 1, whatever its norm: one that is no number is not within
    (Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", section 3.1).
    """
    within = (norms <= bound).long()
    return ((2 * within - 1) * (mask > 0)).sum()


class ClipBound:
    """Which C a forward is clipped to.

    Args:
        clipping: of the model.
        compiled: C0, of the compiled graphs.

    Attributes:
        now: C of the forwards to come.
    """

    def __init__(self, clipping: Clipping, compiled: float) -> None:
        self._clipping, self._compiled = clipping, float(compiled)
        self.now = self._compiled

    def move(self, value: float, *, under_way: bool) -> None:
        """Take another C from now on.

        Args:
            value: C.
            under_way: sums stand in ``p.grad`` that no step has used.

        Raises:
            PrivacyError: within a logical step; it is no bound, too far from the compiled one, or the clipping is not
                the same function of norms over C for each of them.
        """
        validate_clipping(self._clipping, value)
        if under_way and value != self.now:
            raise PrivacyError(
                f"max_grad_norm was to become {value} between a backward, clipped to {self.now}, and its step",
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
        self.now = float(value)

    def into(self, mask: Tensor) -> Tensor:
        """The mask of a forward that is clipped to C as it is now."""
        ratio = self._ratio(self.now)
        return mask if ratio == 1 else mask * ratio

    def out_of(self, found: Delivered, bound: float) -> Delivered:
        """What that forward's backward came to, in the gradients' own size.

        Raises:
            PrivacyError: another C was taken meanwhile, for which the noise will be.

        **Guarantee.** Sums are clipped to ``bound`` or less, but for the rounding of a float32 product: r is rounded
        up.
        """
        if bound != self.now:
            raise PrivacyError(
                f"max_grad_norm was changed between a forward, which is clipped to {bound}, and its backward: the "
                f"noise would be for {self.now}",
                remedy="change it after optimizer.step(), before the next forward",
            )
        ratio = self._ratio(bound)
        if ratio == 1:
            return found
        sums = [(name, clipped / ratio) for name, clipped in found.sums]
        norms = None if found.norms is None else found.norms / ratio
        return Delivered(norms, found.mask / ratio, found.graph_task, sums)

    def _ratio(self, bound: float) -> float:
        """C0 over C as a float32 number, not rounded down."""
        exact = self._compiled / bound
        rounded = torch.tensor(exact, dtype=torch.float32)
        if rounded.item() < exact:
            rounded = torch.nextafter(rounded, torch.tensor(math.inf))
        return rounded.item()
