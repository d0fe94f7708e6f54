"""Every example's gradient of a head whose logits are made in parts, and its norm; a table tied to it, too.

Shape letters as in :mod:`dpcompile.norms.factors`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpcompile.graph.labels import Examples
from dpcompile.graph.slices import in_front
from dpcompile.kernels.head import head_gradients, whole_slopes
from dpcompile.kernels.head_norms import head_norms
from dpcompile.kernels.kept import squared_norms

__all__ = ["HeadRows", "head_each", "head_sides", "norms_of_head"]


class HeadRows:
    """The operands of one head, ``cotangent, hidden, weight, (bias,) labels, totals``, with the examples in front."""

    def __init__(self, values: Sequence[Tensor], axis: Examples, batch: int) -> None:
        cotangent, hidden, weight, *bias, labels, totals = values
        self.weight, self.bias = weight, bias[0] if bias else None
        self.rows = [in_front(x, axis.at(0), batch) for x in (cotangent, hidden, labels, totals)]

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """As the operators take them."""
        cotangent, hidden, labels, totals = self.rows
        return cotangent, hidden, self.weight, self.bias, labels, totals


def head_sides(heads: HeadRows, of_bias: bool) -> tuple[Tensor, Tensor]:
    """The logits' gradients ``[B, 1, T, V]``, all of them, and what they are multiplied with."""
    slope, columns = whole_slopes(*heads.arguments())
    columns = torch.ones_like(columns[..., :1]) if of_bias else columns
    return slope.unsqueeze(1), columns.unsqueeze(1)


def head_each(heads: HeadRows, of_bias: bool) -> tuple[Tensor, Tensor]:
    """Every example's gradient ``[B, V, D]`` or ``[B, V]``, and its squared norm ``[B]``."""
    each = head_gradients(*heads.arguments(), of_bias)
    return each, squared_norms(each)


def norms_of_head(heads: Sequence[HeadRows], of_bias: bool, tables: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
    """Squared norms of the sum of the gradients, without the gradients: ``[B]``, float64.

    Args:
        heads: of one matrix and one bias; their rows are those of one head.
        of_bias: whether the bias's gradient is meant.
        tables: index ``[B, S]`` and cotangents ``[B, S, D]`` of look-ups in the same matrix.
    """
    columns = [[h.rows[i] for h in heads] for i in range(4)]
    cotangent, hidden, labels, totals = (torch.cat(c, 1) if len(c) > 1 else c[0] for c in columns)
    index = torch.cat([i for i, _ in tables], 1) if tables else None
    looked_up = torch.cat([c for _, c in tables], 1) if tables else None
    first = heads[0]
    return head_norms(cotangent, hidden, first.weight, first.bias, labels, totals, of_bias, index, looked_up)
