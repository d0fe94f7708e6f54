"""A Poisson loader as the DataLoader that the Trainer's loop knows: one item for each logical step.

The loop skips items when it resumes, prefetches some, and stops when it likes. So an item is no data yet: it is the
promise of a draw, whose physical batches are taken when its step runs, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from dpcompile.data.loader import PoissonLoader
from dpcompile.errors import PrivacyError
from dpcompile.optim.optimizer import DPOptimizer

__all__ = ["REAL", "DrawnStep", "MarkedCollate", "loader_of_steps"]

REAL = "__real__"  # the column that tells examples from padding, for the losses that are shown


class MarkedCollate:
    """The Trainer's collation, with a column that is True for examples; padding rows are filled up with False.

    Args:
        collate_fn: of the Trainer: items to a mapping of tensors.
        padding_example: the item that is no example, if there is one.
    """

    def __init__(self, collate_fn: Callable[[Any], Any], padding_example: Any = None) -> None:
        self.collate_fn, self.padding_example = collate_fn, padding_example

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """Collate items of the dataset."""
        batch = self.collate_fn(list(items))
        if not isinstance(batch, Mapping):
            raise PrivacyError(
                f"the data collator returns {type(batch).__name__}: the model is called with names",
                remedy="return a dict of tensors with a row for each example",
            )
        return {**batch, REAL: torch.tensor([item is not self.padding_example for item in items])}


class DrawnStep(dict):  # type: ignore[type-arg]
    """One logical step on its way through the Trainer's loop, which sees an empty batch.

    Args:
        draws: of all steps.
        of_pass: the physical batches of its pass, taken one after the other.
        index: which step of the pass it is.
    """

    def __init__(self, draws: _Draws, of_pass: Iterator[Any], index: int) -> None:
        super().__init__()
        self._draws, self._of_pass, self._index = draws, of_pass, index

    def parts(self) -> Iterator[dict[str, Any]]:
        """The physical batches of the draw.

        Raises:
            PrivacyError: the pass has no draw left, or another has begun.
        """
        more = True
        while more:
            batch = next(self._of_pass, None)
            if batch is None:
                raise PrivacyError(
                    f"step {self._index} of a pass over the training data, and the loader has no draw left for it",
                    remedy="leave the loop to Trainer.train(); a checkpoint is resumed with resume_from_checkpoint",
                )
            more = self._draws.optimizer.accumulating
            yield batch
        if self._index == len(self._draws) - 1:  # let the loader know that the pass was taken whole
            next(self._of_pass, None)


class _Draws(Dataset):  # type: ignore[type-arg]
    """The steps of a pass by number."""

    def __init__(self, loader: PoissonLoader, optimizer: DPOptimizer) -> None:
        self.loader, self.optimizer = loader, optimizer

    def __len__(self) -> int:
        return len(self.loader)

    def __getitem__(self, place: tuple[Iterator[Any], int]) -> DrawnStep:
        return DrawnStep(self, *place)


class _InTurn(Sampler[Any]):
    """Each iteration is a pass, or the rest of one that was resumed: of that the loop skips the numbers before it."""

    def __init__(self, draws: _Draws) -> None:
        self._draws = draws

    def __len__(self) -> int:
        return len(self._draws)

    def __iter__(self) -> Iterator[Any]:
        of_pass = self._draws.loader.parts()
        return iter([(of_pass, index) for index in range(len(self._draws))])


def _only(items: Sequence[DrawnStep]) -> DrawnStep:
    return items[0]


def loader_of_steps(loader: PoissonLoader, optimizer: DPOptimizer) -> DataLoader[Any]:
    """A DataLoader with a :class:`DrawnStep` for each logical step of a pass.

    Args:
        loader: attached to a model and the optimizer.
        optimizer: that steps on its draws.
    """
    draws = _Draws(loader, optimizer)
    one_by_one = BatchSampler(_InTurn(draws), batch_size=1, drop_last=False)
    # A generator of its own: an iterator draws a number from it, and the global one is the model's dropout.
    return DataLoader(draws, batch_sampler=one_by_one, collate_fn=_only, generator=torch.Generator())
