"""What ranks exchange for the norm of a gradient that is a sum over them: the smaller of two things."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpcompile.graph.sizes import Size, hinted, product, shape_of
from dpcompile.norms.factors import Factored
from dpcompile.norms.over_ranks import all_ranks_positions, is_sum_over_ranks, ranks_of, reduced
from dpcompile.planning.modes import MODES
from dpcompile.planning.situation import Situation
from dpcompile.proof.sites import ParameterGradient

__all__ = ["Exchange", "added_up", "exchange_of"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is exchanged before the clip.

    Attributes:
        gathered: rows and columns of all ranks are brought together; else every example's gradients are added up.
        sent: bytes that each rank hands over.
    """

    gathered: bool
    sent: Size

    def __str__(self) -> str:
        return "rows and columns of all ranks" if self.gathered else "added up over the ranks"


def exchange_of(gradient: ParameterGradient, situation: Situation) -> tuple[Exchange, list[Factored] | None] | None:
    """None for a gradient that no rank has only a share of.

    A ring sends each rank 2 (n-1)/n of a gradient that n ranks add up, and n-1 times its own rows and columns where
    they gather them. Gathered where that is less, or where the mode allows Gram matrices alone.

    Returns:
        The exchange, and the sites over the positions of all ranks where these are gathered.
    """
    if not is_sum_over_ranks(gradient):
        return None
    added, element = added_up(gradient, situation).sent, _element(gradient)
    rules, hints = MODES[situation.mode].rules, situation.hints
    forms = all_ranks_positions(gradient, situation.batch) if "ghost" in rules else None
    if forms is None:
        return Exchange(False, added), None
    everywhere = product([situation.batch, sum((_side_bytes(f, element) for f in forms), start=0)])  # type: ignore[misc]
    if "keep" in rules and hinted(everywhere, hints) >= 2 * hinted(added, hints):
        return Exchange(False, added), None
    return Exchange(True, hinted(everywhere, hints) // ranks_of(gradient)), forms


def added_up(gradient: ParameterGradient, situation: Situation) -> Exchange:
    """Every example's gradients, or what becomes of them in the tail, added up over the ranks."""
    sent = (product([situation.batch, *shape_of(n.meta["val"]), _element(gradient)]) for n in reduced(gradient))
    return Exchange(False, sum(sent, start=0))  # type: ignore[arg-type]


def _element(gradient: ParameterGradient) -> int:
    value: torch.Tensor = gradient.gradient.meta["val"]
    return 8 if value.dtype == torch.float64 else 4


def _side_bytes(form: Factored, element: int) -> Size:
    """Of the rows and columns of one example."""
    k, t, p, d = form.sizes
    rows, cols = product([k, t, p, element]), product([k, t, d, element])
    index = product([t, torch.int64.itemsize])
    if form.one_hot is not None:
        rows, cols = (index, cols) if form.one_hot == "rows" else (rows, index)
    return rows + cols  # type: ignore[operator]
