"""What datasets and collation make of examples: what their messages say to do, tried."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from remedies import Right, private, refused, trains
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import DataLoader


class Words(torch.utils.data.Dataset[Any]):
    """Sequences of several lengths."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Any:
        return torch.randn(2 + i % 3, 5, generator=torch.Generator().manual_seed(i)), i % 3


def collated(collate_fn: Any, model: nn.Module | None = None, loss: Any = None, **options: Any) -> Right:
    loader: DataLoader[Any] = DataLoader(Words(), batch_size=8, collate_fn=collate_fn)
    return trains(*private(loader, model, **options), loss=loss)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        keep = torch.arange(x.shape[1]) < lengths[:, None]
        return (self.linear(x) * keep[..., None]).sum(1)


def masked_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0], batch[1]), batch[2])


def padded(items: list[Any]) -> Any:
    x = pad_sequence([x for x, _ in items], batch_first=True)
    return x, torch.tensor([len(x) for x, _ in items]), torch.tensor([y for _, y in items])


@refused(
    "return the padded tensor and the lengths (pad_sequence), and mask what is behind the end of each",
)
def test_a_collation_that_packs(told: int) -> Right:
    def packed(items: list[Any]) -> Any:
        return pack_sequence([x for x, _ in items], enforce_sorted=False), torch.tensor([y for _, y in items])

    return collated(padded if told else packed, Masked(), masked_loss)


def mean_of_each(items: list[Any]) -> Any:
    return torch.stack([x.mean(0) for x, _ in items]), torch.tensor([y for _, y in items])


@refused("return one row for each example, along one dimension")
def test_a_collation_of_examples_by_examples(told: int) -> Right:
    def square(items: list[Any]) -> Any:
        x, y = mean_of_each(items)
        return (x if told else x @ x.T), y

    return collated(square)


@refused("return one row for each example; what belongs to one example may be a dimension within the row")
def test_a_collation_of_two_rows_for_an_example(told: int) -> Right:
    def twice(items: list[Any]) -> Any:
        x, y = mean_of_each(items)
        views = torch.stack([x, -x], 1)
        return (views if told else views.flatten(0, 1)), y

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).mean(1), batch[1])

    return collated(twice, loss=loss)


@refused("return the same nested tuples, lists and dicts for every batch")
def test_a_collation_of_other_structures(told: int) -> Right:
    def sometimes(items: list[Any]) -> Any:
        x, y = mean_of_each(items)
        return (x, y) if told or len(items) % 2 else (x, y, {"odd": y})

    return collated(sometimes, loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))


@refused("return tensors with a row for each example")
def test_a_collation_without_rows(told: int) -> Right:
    def means(items: list[Any]) -> Any:
        x, y = mean_of_each(items)
        return (x, y) if told else (x.mean(0), y.float().mean())

    return collated(means)


@refused("give a padding_example that is no longer than the shortest example")
def test_a_padding_example_that_is_too_long(told: int) -> Right:
    padding = (torch.zeros(2 if told else 9, 5), 0)
    return collated(padded, Masked(), masked_loss, padding_example=padding)


class Several(torch.utils.data.Dataset[Any]):
    def __init__(self, told: int) -> None:
        self.told = told

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Any:
        x = torch.randn(2, 5, generator=torch.Generator().manual_seed(i))
        return (x if self.told == 1 else x[0]), i % 3

    def __getitems__(self, indices: list[int]) -> list[Any]:
        items = [self[i] for i in indices]
        return items if self.told else items + items


@refused(
    "give one item for each index; what belongs to one index may be a dimension within the item (then a sum "
    "or mean over it in the model), or expand the dataset first and count each piece",
    ways=2,
    slow=True,
)
def test_a_dataset_that_gives_two_items(told: int) -> Right:
    def loss(model: Any, batch: Any) -> Tensor:
        out = model(batch[0])
        return F.cross_entropy(out.mean(1) if told == 1 else out, batch[1])

    return trains(*private(DataLoader(Several(told), batch_size=8)), loss=loss)
