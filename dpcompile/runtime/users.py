"""Batches of users: so many rows in a row are one user's, and it is the user's gradient that is clipped.

To the proof, the norms and the weights a user is what an example is elsewhere, with k rows in a dimension of it: the
example axis of every input is k times as long as there are users (:class:`dpcompile.graph.labels.Examples`, ``inner``).
So rules that know of positions within an example know of a user's rows, cross terms included, and what mixes users is
refused. Here is what that leaves to do: to check the call, and to leave out of the loss the rows that are none.

Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models" (arXiv:1710.06963), for users
as the unit, one step of gradient descent each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpcompile.errors import DPCompileError, UnsupportedGraphError
from dpcompile.graph.labels import Examples, Label, Summed, Whole
from dpcompile.graph.sizes import divide

__all__ = ["check_rows", "leave_out", "rows_left_out", "users_among"]

_FULL = "give every user of a batch as many rows as examples_per_user says"


def check_rows(dims: Iterable[tuple[str, Tensor, int | None]], examples_per_user: int) -> None:
    """Raise DPCompileError unless the tensors of a call hold whole users."""
    for name, tensor, dim in dims:
        if dim is not None and tensor.shape[dim] % examples_per_user:
            raise DPCompileError(
                f"input '{name}' has {tensor.shape[dim]} rows, which is no multiple of "
                f"examples_per_user={examples_per_user}: its last user would have fewer",
                remedy="give each user of a batch examples_per_user rows, one after the other, and fill up with rows "
                "whose mask is False, as PoissonLoader(groups=...) does; evaluate under torch.no_grad()",
            )


def users_among(rows: Tensor, examples_per_user: int) -> Tensor:
    """The mask of the users ``[U]``, bool: those that have a row, of a mask of rows ``[U * examples_per_user]``."""
    return rows if examples_per_user == 1 else rows.view(-1, examples_per_user).any(1)


def rows_left_out(rows: Tensor | None, examples_per_user: int) -> Tensor | None:
    """The mask of the rows, if some user has rows that are none; else None: users are left out by their weights."""
    if rows is None or examples_per_user == 1:
        return None
    given = rows.view(-1, examples_per_user)
    return None if bool((given.all(1) == given.any(1)).all()) else rows


def leave_out(outputs: Sequence[Any], labels: Sequence[Label], rows: Tensor | None, examples_per_user: int) -> None:
    """Let nothing come back to a user's gradient from rows that are none.

    Args:
        outputs: of a forward with gradients.
        labels: how users lie in them.
        rows: bool ``[U * examples_per_user]``; None: all rows count.
        examples_per_user: k.

    Raises:
        UnsupportedGraphError: an output has no rows of its own for the rows of a user; or it is a loss over all rows,
            and some of them are none.

    The guarantee does not rest on it: such rows are of the user, or of nobody.
    """
    found: dict[int, Label] = {id(x): y for x, y in zip(outputs, labels, strict=False)}
    for output in {id(x): x for x in outputs if isinstance(x, Tensor) and x.grad_fn is not None}.values():
        label = found.get(id(output))
        if isinstance(label, Examples):
            inside = divide(label.inner, examples_per_user)
            if not isinstance(inside, int):
                raise UnsupportedGraphError(
                    f"an output of the model, {list(output.shape)}, has no row for each of the {examples_per_user} "
                    "rows of a user",
                    remedy="return what belongs to a row in a row of its own, or let an example of the dataset hold "
                    "all of a user's, and leave examples_per_user out",
                )
            if rows is not None:
                output.register_hook(partial(_without, rows, label, inside))
        elif rows is not None and isinstance(label, (Summed, Whole)):
            raise UnsupportedGraphError(
                "the model returns a loss over all rows, or the batch is one user, and some rows of a user are none: "
                "they cannot be left out of it",
                remedy=f"return a row for each row of the input, from two users or more, or {_FULL}",
            )


def _without(rows: Tensor, axis: Examples, inside: int, cotangent: Tensor | None) -> Tensor | None:
    """``[.., outer * U * k * inside, ..]`` with zeros for the rows that are none; None: the loss has no use for it."""
    if cotangent is None:
        return None
    apart = cotangent.unflatten(axis.dim, (-1, len(rows), inside))
    keep = rows.to(cotangent.device).view(-1, *([1] * (apart.ndim - axis.dim - 2)))
    return torch.where(keep, apart, 0).flatten(axis.dim, axis.dim + 2)
