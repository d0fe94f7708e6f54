"""Rows that stand in a dataset more than once: refused, unless they are one user's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split

from dpcompile import PoissonLoader, PrivacyError

BASE = TensorDataset(torch.arange(20.0).unsqueeze(1))


def loader(dataset: Dataset[Any], **options: Any) -> PoissonLoader:
    return PoissonLoader(dataset, expected_batch_size=4, seed=0, **options)


ONCE: dict[str, Dataset[Any]] = {
    "a part": Subset(BASE, [3, 1, 2, 9, -1]),
    "two parts": ConcatDataset(random_split(BASE, [8, 12], torch.Generator().manual_seed(0))),
    "a part of a part": Subset(Subset(BASE, range(10)), [9, 0, 4, 2]),
    "two datasets": ConcatDataset([BASE, TensorDataset(torch.zeros(5, 1))]),
    "parts in turns": Subset(ConcatDataset([BASE, TensorDataset(torch.zeros(5, 1))]), [20, 0, 21, 1, 24, 19]),
    "a part of two": ConcatDataset([Subset(BASE, range(5)), Subset(BASE, range(5, 9))]),
}
AGAIN: dict[str, tuple[Dataset[Any], int, tuple[int, int], int]] = {
    "oversampled": (Subset(BASE, [3, 1, 2, 1, 1]), 1, (1, 3), 2),
    "from behind": (Subset(BASE, [3, 19, 2, 5, -1]), 19, (1, 4), 1),
    "twice": (ConcatDataset([BASE, BASE]), 0, (0, 20), 20),
    "parts that meet": (ConcatDataset([Subset(BASE, range(5)), Subset(BASE, range(4, 9))]), 4, (4, 5), 1),
    "a part of itself": (ConcatDataset([Subset(BASE, [7, 8]), BASE]), 7, (0, 9), 2),
    "a part of a part": (Subset(Subset(BASE, [4, 4, 5, 6]), [0, 2, 1, 3]), 4, (0, 2), 1),
    "in turns": (Subset(ConcatDataset([BASE, TensorDataset(torch.zeros(5, 1))]), [20, 0, 21, 1, 20]), 0, (0, 4), 1),
}


@pytest.mark.parametrize("name", ONCE)
def test_rows_that_stand_once(name: str) -> None:
    loader(ONCE[name])


@pytest.mark.parametrize("name", AGAIN)
def test_rows_that_stand_again(name: str) -> None:
    dataset, row, (first, second), count = AGAIN[name]
    said = f"has row {row} of TensorDataset at place {first} and again at {second}, and {count} such places"
    with pytest.raises(PrivacyError, match=said) as caught:
        loader(dataset)
    assert "leave the copies out (weigh the losses of rare classes instead, by constants)" in str(caught.value)


def test_copies_of_one_user() -> None:
    dataset = Subset(BASE, [3, 1, 2, 1, 1, 4, 5, 6])
    loader(dataset, groups=[0, 1, 2, 1, 1, 3, 4, 0], examples_per_user=3)
    with pytest.raises(
        PrivacyError, match="has row 1 of TensorDataset at place 3 and again at 4, for another user, and 1"
    ):
        loader(dataset, groups=[0, 1, 2, 1, 5, 3, 4, 0], examples_per_user=3)
