"""Data that are put together of parts: a row of another dataset that stands in them more than once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from dpcompile.errors import PrivacyError

__all__ = ["refuse_repeated"]


def refuse_repeated(dataset: Any, of_examples: Tensor | None = None) -> None:
    """Refuse a Subset or ConcatDataset in which one row stands several times, as oversampling makes it.

    Each place is drawn by itself, so that such a row would be in more steps than the accountant counts, or several
    times in one. What copies rows by itself (a list, a class of one's own) is not seen.

    Args:
        dataset: map-style.
        of_examples: whose each is, ``[len(dataset)]``: places of one user may have the same row. None: each is drawn
            by itself.

    Raises:
        PrivacyError: a row that stands several times, or for several users.
    """
    if not isinstance(dataset, (Subset, ConcatDataset)):
        return
    parts: dict[int, tuple[Any, list[Tensor], list[Tensor]]] = {}
    whole = torch.arange(len(dataset))
    for base, rows, place in _rows(dataset, whole, whole):
        _, found, places = parts.setdefault(id(base), (base, [], []))
        found.append(rows)
        places.append(place)
    for base, found, places in parts.values():
        rows, order = torch.cat(found).sort(stable=True)
        again = (rows[1:] == rows[:-1]).nonzero().flatten()
        place = torch.cat(places)[order]
        if of_examples is not None:
            owners = of_examples[place]
            again = again[owners[again] != owners[again + 1]]
        if len(again):
            row, first, second = int(rows[again[0]]), int(place[again[0]]), int(place[again[0] + 1])
            raise PrivacyError(
                f"the dataset has row {row} of {type(base).__name__} at place {first} and again at {second}"
                + (", for another user" if of_examples is not None else "")
                + f", and {len(again)} such places in all: it would be drawn more often than the accountant counts",
                remedy="leave the copies out (weigh the losses of rare classes instead, by constants), or name their "
                "owner: groups=, with copies of a row in one group, and examples_per_user=",
            )


def _rows(dataset: Any, rows: Tensor, places: Tensor) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """``(dataset, its rows, places)``: what these places read, which have these rows of a dataset made of others."""
    if isinstance(dataset, Subset):
        indices = torch.as_tensor(list(dataset.indices), dtype=torch.int64)[rows]
        length = len(dataset.dataset)  # type: ignore[arg-type]
        yield from _rows(dataset.dataset, torch.where(indices < 0, indices + length, indices), places)
    elif isinstance(dataset, ConcatDataset):
        ends = torch.tensor(dataset.cumulative_sizes)
        owners = torch.searchsorted(ends, rows, right=True)
        for part, (own, end) in enumerate(zip(dataset.datasets, ends.tolist(), strict=True)):
            here = owners == part
            yield from _rows(own, rows[here] - (end - len(own)), places[here])  # type: ignore[arg-type]
    else:
        yield dataset, rows, places
