"""Whose each row of a collated batch is: row i is what the collation makes of example i alone, and filling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpcompile.errors import PrivacyError

__all__ = ["Leaf", "refuse_other_rows"]

Leaf = tuple[str, Any, int]  # where in the batch, what is there, and the dimension of the examples; -1 for none


def refuse_other_rows(leaves: Sequence[Leaf], examples: Sequence[Any], alone: Callable[[Any], list[Any]]) -> None:
    """Raise PrivacyError unless rows are the examples', in order.

    Args:
        leaves: of the batch.
        examples: of which it was collated.
        alone: the same leaves of a batch of one example.

    **Guarantee.** Of what passes, row i holds all that the collation makes of example i alone, before or behind it one
    number, the same in all rows of a leaf: nothing of another example but that number. What has no rows may tell how
    long the longest is; no floating-point number in it is another one for one example alone.

    ======================================================  ===========================================
    edge case                                               outcome
    ======================================================  ===========================================
    sequences padded to the longest, left or right          right
    rows filled up with rows of others, with positions      refused: filling is one number
    an example twice in the batch, as one object            collated alone once
    a collation with randomness of its own                  refused: rows differ from time to time
    texts, and other rows that are no tensors               compared with ``==``
    a mean of the batch beside the rows                     refused
    a length beside the rows, or what is made of it         right; a count of examples or tokens is not seen
    ======================================================  ===========================================
    """
    found: dict[int, list[Any]] = {}
    fillings: list[list[Any]] = [[] for _ in leaves]
    for i, example in enumerate(examples):
        if id(example) not in found:
            found[id(example)] = [_row(x, 0, dim) for x, (_, _, dim) in zip(alone(example), leaves, strict=True)]
        for (path, leaf, dim), own, filling in zip(leaves, found[id(example)], fillings, strict=True):
            if dim < 0:
                _refuse_other_number(path, leaf, own)
            elif not _holds(_row(leaf, i, dim), own, filling):
                raise PrivacyError(
                    f"row {i} of what collate_fn returns{f' at {path}' if path else ''} is not example {i}: with "
                    "groups it must be known whose each row is",
                    remedy="let collate_fn keep the order of the examples, make each row of its example alone, and "
                    "fill up with one number; sort, augment and mix in the dataset or in the model",
                )


def _refuse_other_number(path: str, shared: Any, own: Any) -> None:
    """Floating-point numbers that go by which examples there are, in what all of them share."""
    numbers = [torch.as_tensor(x) for x in (shared, own) if isinstance(x, (Tensor, np.ndarray, np.floating, float))]
    if len(numbers) < 2 or not numbers[0].is_floating_point() or numbers[0].shape != numbers[1].shape:
        return
    if not torch.equal(_of_number(numbers[0]), _of_number(numbers[1])):
        raise PrivacyError(
            f"what collate_fn returns{f' at {path}' if path else ''} has no row for each example, and is another for "
            "one example alone: with groups nothing may be made of the examples of several users",
            remedy="compute it in the model, where what mixes is refused, or of public data, once for all",
        )


def _row(leaf: Any, index: int, dim: int) -> Any:
    if dim < 0:
        return leaf
    if isinstance(leaf, (list, tuple)):
        return leaf[index]
    return torch.as_tensor(leaf).select(dim, index)


def _holds(row: Any, own: Any, filling: list[Any]) -> bool:
    """Whether a row is its example's; ``filling`` holds what rows were filled up with, once one was."""
    if not isinstance(row, Tensor):
        return bool(row == own)
    sizes = list(zip(row.shape, own.shape, strict=False))
    if row.dtype != own.dtype or row.ndim != own.ndim or any(a < b for a, b in sizes):
        return False
    row, own = _of_number(row), _of_number(own)
    for place in (tuple(slice(b) for _, b in sizes), tuple(slice(a - b, None) for a, b in sizes)):
        around = torch.ones(row.shape, dtype=torch.bool)
        around[place] = False
        rest = row[around]
        number = filling or rest[:1].tolist()
        if torch.equal(row[place], own) and bool((rest == number[0] if number else rest != rest).all()):
            filling[:] = number
            return True
    return False


def _of_number(x: Tensor) -> Tensor:
    return x.nan_to_num() if x.is_floating_point() else x
