"""Norms over several uses of a head's matrix, without its logits: two heads, or tables that are tied to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dpcompile.norms.factors import Factored
from dpcompile.norms.heads import HeadRows, norms_of_head

__all__ = ["norms_by_parts"]


def norms_by_parts(forms: Sequence[Factored]) -> Callable[..., Tensor] | None:
    """The norms of heads of one matrix, and of tables tied to it, without the logits; None if it is something else.

    **Guarantee.** None also where a head's own norms are not to be taken: its positions are those of several ranks.

    Returns:
        From the values of all forms' operands, one after the other, and B to ``[B]``, float64.
    """
    heads = [f for f in forms if f.site.form == "head"]
    shared = {(f.site.operands["weight"], f.site.operands.get("bias"), f.site.operation.args[6]) for f in heads}
    tables = [f for f in forms if f not in heads]
    if len(shared) != 1 or any(f.one_hot != "rows" for f in tables) or any(f.ghost is None for f in heads):
        return None
    of_bias = bool(heads[0].site.operation.args[6])

    def norms(*values: Any) -> Tensor:
        *remaining, b = values
        rows, looked_up = [], []
        for form in forms:
            own = [remaining.pop(0) for _ in form.operands]
            if form in heads:
                rows.append(HeadRows(own, next(iter(form.site.axes.values())), b))
            else:
                index, cotangents = form.build(*own, b)
                looked_up.append((index, cotangents.squeeze(1)))
        return norms_of_head(rows, of_bias, looked_up)

    return norms
