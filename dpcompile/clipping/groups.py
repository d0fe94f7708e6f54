"""Which parameters are clipped together, and with which bound."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import TypeAlias

from torch import Tensor

from dpcompile.errors import PrivacyError

__all__ = ["NAMES", "Clipping", "ClippingFunction", "clip_groups", "group_bound", "group_of", "validate_clipping"]

ClippingFunction: TypeAlias = Callable[..., Tensor]
Clipping: TypeAlias = "str | ClippingFunction"

NAMES = ("flat", "automatic", "per_layer", "per_block")


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


def group_bound(max_grad_norm: float, groups: int) -> float:
    """C of each of several groups: their squares add up to that of the whole."""
    return float(max_grad_norm) / max(groups, 1) ** 0.5


def clip_groups(names: Iterable[str], clipping: Clipping) -> dict[str, frozenset[str]]:
    """Clip group -> the parameters in it."""
    found: dict[str, set[str]] = {}
    for name in names:
        found.setdefault(group_of(clipping, name), set()).add(name)
    return {group: frozenset(members) for group, members in found.items()}
