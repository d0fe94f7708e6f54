"""From sides of a site to the operator that takes their norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dpcompile.kernels.norms import direct_norm, ghost_norm, ghost_norm_one_hot
from dpcompile.norms.ghost import Sides, merge

__all__ = ["fused_norm", "fusible"]


def fusible(rule: str, one_hot: Sequence[str | None]) -> bool:
    """Whether an operator takes the norm of sites with these one-hot sides under ``rule``: all of one kind."""
    kinds = set(one_hot)
    return (rule == "direct" and kinds == {None}) or (rule == "ghost" and len(kinds) == 1)


def fused_norm(rule: str, all_sides: Sequence[Sides]) -> Tensor:
    """The squared norms ``[B]``, by one operator. The sides need not be widened to float32.

    Contract: :func:`fusible` of the rule and the sides.
    """
    (sides,) = merge(all_sides)
    if rule == "direct":
        return direct_norm(sides.rows, sides.cols)
    if sides.one_hot == "rows":
        return ghost_norm_one_hot(sides.rows, sides.cols)
    if sides.one_hot == "cols":
        return ghost_norm_one_hot(sides.cols, sides.rows)
    return ghost_norm(sides.rows, sides.cols)
