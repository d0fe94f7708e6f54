"""Which parameters are clipped together, and with which bound."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import Tensor

from dpcompile.errors import PrivacyError

__all__ = ["NAMES", "SEVERAL", "Bounds", "Clipping", "ClippingFunction", "clip_groups", "group_of", "validate_clipping"]

ClippingFunction: TypeAlias = Callable[..., Tensor]
Clipping: TypeAlias = "str | ClippingFunction"

NAMES = ("flat", "automatic", "per_layer", "per_block")
SEVERAL = ("per_layer", "per_block")  # which have several groups


def validate_clipping(clipping: Clipping, max_grad_norm: float) -> None:
    """Refuse what is no clipping.

    Raises:
        PrivacyError: an unknown name, or a bound that is not a positive finite number.
    """
    number = isinstance(max_grad_norm, (int, float)) and not isinstance(max_grad_norm, bool)
    if not (number and math.isfinite(max_grad_norm) and max_grad_norm > 0):
        raise PrivacyError(
            f"max_grad_norm must be a positive finite number, got {max_grad_norm!r}",
            remedy="it is C, the largest norm one example's gradient may have; 1.0 is a common choice",
        )
    if not callable(clipping) and clipping not in NAMES:
        raise PrivacyError(
            f"unknown clipping {clipping!r}",
            remedy=f"use one of {', '.join(map(repr, NAMES))}, or a function from norms [B] to weights [B]",
        )


def group_of(clipping: Clipping, parameter: str) -> str:
    """Which parameters are clipped together: all, those of one layer, or those of one block.

    A block is an element of the outermost numbered container (``blocks.3``), else the outermost module.
    """
    return _group(clipping, parameter) if isinstance(clipping, str) else ""


@functools.lru_cache(maxsize=1 << 16)
def _group(clipping: str, parameter: str) -> str:
    path = parameter.split(".")[:-1]
    if clipping == "per_layer":
        return ".".join(path)
    if clipping == "per_block":
        numbered = next((i for i, part in enumerate(path) if part.isdigit()), 0)
        return ".".join(path[: numbered + 1])
    return ""


@dataclass(frozen=True, slots=True)
class Bounds:
    """C, and what each clip group has of it.

    Attributes:
        total: C of the whole gradient.
        shares: clip group -> its own C, as a part of ``total``; empty: those groups that a forward has get equal parts.

    **Guarantee.** The squares of the groups' bounds add up to that of C, or less, but for rounding: a gradient whose
    groups are clipped to theirs has a norm of at most C.
    """

    total: float
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = self.shares.values()
        if self.shares and not (all(0 < s < math.inf for s in values) and math.hypot(*values) <= 1 + 1e-9):
            raise PrivacyError(
                f"the bounds of the clip groups are {dict(self.shares)!r} times C: parts must be above 0, and their "
                "squares add up to 1 at most",
                remedy="for one group leave them out, for several give DPOptimizer adaptive_clip=AdaptiveClip(...), "
                "which begins with equal parts; load a state as DPOptimizer.state_dict() returned it",
            )

    @classmethod
    def each(cls, bounds: Mapping[str, float]) -> Bounds:
        """From the groups' own bounds: C is the root of the sum of their squares."""
        total = math.hypot(*bounds.values())
        return cls(total, {group: bound / total for group, bound in bounds.items()})

    @classmethod
    def equal(cls, total: float, groups: Collection[str]) -> Bounds:
        """The same for each of these groups."""
        part = 1 / max(len(groups), 1) ** 0.5
        return cls(total, {group: part for group in groups})

    def times(self, total: float) -> Bounds:
        """With another C, and the same parts of it."""
        return replace(self, total=total)

    def of(self, groups: Collection[str]) -> dict[str, float]:
        """C of each of the groups of a forward.

        Raises:
            PrivacyError: one of them has no bound.
        """
        missing = [group for group in groups if self.shares and group not in self.shares]
        if missing:
            raise PrivacyError(
                f"no bound is known for the clip group {missing[0]!r}: each of the others has one that follows its own "
                "quantile",
                remedy="make the DPOptimizer when everything that is to be trained has requires_grad=True, and a new "
                "one after unfreezing a layer or a block",
            )
        whole = float(self.total)
        if not self.shares:
            return {group: whole / max(len(groups), 1) ** 0.5 for group in groups}
        return {group: whole * self.shares[group] for group in groups}


def clip_groups(names: Iterable[str], clipping: Clipping) -> dict[str, frozenset[str]]:
    """Clip group -> the parameters in it."""
    found: dict[str, set[str]] = {}
    for name in names:
        found.setdefault(group_of(clipping, name), set()).add(name)
    return {group: frozenset(members) for group, members in found.items()}
