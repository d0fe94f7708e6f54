"""Ranks that read different examples are told so; augmentation and unknown objects are not taken for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dpcompile import PrivacyError
from dpcompile.data import same_examples
from dpcompile.data.same_examples import refuse_other_examples


def compare(monkeypatch: pytest.MonkeyPatch, *datasets: Any) -> None:
    """As rank 0 of as many as there are datasets."""
    found: list[Any] = []

    def alone(value: Any) -> list[Any]:
        found.append(value)
        return [value]

    monkeypatch.setattr(same_examples, "gathered", alone)
    for dataset in datasets:
        refuse_other_examples(dataset, len(dataset))
    monkeypatch.setattr(same_examples, "gathered", lambda _: found)
    refuse_other_examples(datasets[0], len(datasets[0]))


ITEMS: dict[str, Callable[[int], Any]] = {
    "tensor": lambda i: torch.tensor([float(i), 2.0]),
    "dict": lambda i: {"input_ids": [i, 2], "label": 1},
    "tuple": lambda i: (torch.tensor(i), "a word", None, 0.5),
    "array": lambda i: np.array([i, 3], dtype=np.int16),
    "bfloat16": lambda i: torch.tensor([i], dtype=torch.bfloat16),
    "text": lambda i: f"text {i}",
}


@pytest.mark.parametrize("kind", ITEMS)
def test_each_kind_of_item(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    item = ITEMS[kind]
    compare(monkeypatch, [item(i) for i in range(7)], [item(i) for i in range(7)])
    for changed in (0, 3, 6):
        other = [item(i) for i in range(7)]
        other[changed] = item(8)
        with pytest.raises(PrivacyError, match=f"item {changed} of the dataset is not the same on all"):
            compare(monkeypatch, [item(i) for i in range(7)], other)


def test_other_orders_and_other_layouts_of_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PrivacyError, match="item 0 of the dataset"):
        compare(monkeypatch, [1, 2, 3], [3, 2, 1])
    with pytest.raises(PrivacyError, match="item 0 of the dataset"):
        compare(monkeypatch, [torch.zeros(2, 3)], [torch.zeros(3, 2)])
    compare(monkeypatch, [{"a": 1, "b": 2}], [{"b": 2, "a": 1}])
    compare(monkeypatch, [torch.arange(6.0).view(2, 3).T], [torch.arange(6.0).view(2, 3).T.contiguous()])


def test_augmentation_is_no_difference_and_moves_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Augmented(list):  # type: ignore[type-arg]
        def __getitem__(self, i: Any) -> Any:
            return torch.rand(1), random.random(), np.random.rand()

    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    compare(monkeypatch, Augmented([1, 2]), Augmented([1, 2]), Augmented([1, 2]))
    assert torch.equal(torch.rand(1), expected) and random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]
    compare(monkeypatch, [object(), 1, object()], [object(), 1, object()])
    compare(monkeypatch, [], [])
