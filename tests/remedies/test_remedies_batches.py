"""Which batch of the loader a call trains on: what the messages about it say to do, tried."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from private_steps import backward, over
from remedies import Right, data, plain, private, refused, sgd, stepped, trains
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import PoissonLoader, make_private
from dpcompile.module import engine_of

WHOLE: dict[str, Any] = {"physical_batch_size": 24}  # every draw has padding


def before(model: Any) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(2 * x)


def turned(items: Any) -> Any:
    return torch.utils.data.default_collate(items[::-1])


def doubled(items: Any) -> Any:
    return torch.stack([2 * x for x, _ in items]), torch.stack([y for _, y in items])


@refused(
    "call the model on the batch's own tensors, or copies on another device; compute new ones (normalise, augment, "
    "cast) in the dataset, in collate_fn or in the model",
    ways=4,
    slow=True,
)
def test_batches_of_users_changed_in_the_loop(told: int) -> Right:
    source: Any = data(batch_size=4, collate_fn=doubled if told == 3 else None)
    if told == 2:
        x, y = source.dataset.tensors
        source = DataLoader(TensorDataset(2 * x, y), batch_size=4)
    users = {"groups": [i // 2 for i in range(24)], "examples_per_user": 2}
    model, optimizer, loader = private(source, Doubling() if told == 4 else None, **users)
    return trains(model, optimizer, loader, loss=lambda m, b: F.cross_entropy(m(b[0] if told else 2 * b[0]), b[1]))


@refused("call optimizer.discard(), then go on with the next batch")
def test_a_step_after_a_backward_that_failed(told: int) -> Right:
    x, y = data().dataset.tensors  # type: ignore[attr-defined]
    x[0, 0] = torch.nan  # such an example warns, and here warnings are errors
    model, optimizer, loader = private(DataLoader(TensorDataset(x, y), batch_size=8), physical_batch_size=4)
    weights, taken = before(model), 0
    for _ in range(4):
        for batch in loader:
            try:
                backward(model, *batch)
            except RuntimeWarning:
                if told:
                    optimizer.discard()
                    continue
            optimizer.step()
            optimizer.zero_grad()
            taken += 1
    assert taken < 12
    return stepped(model, optimizer, weights, taken)


@refused(
    "step the optimizer that the loader is attached to; or loader.attach(model, optimizer) with this one",
    ways=2,
    slow=True,
)
def test_a_second_optimizer_beside_the_loader(told: int) -> Right:
    model, optimizer, loader = private()
    second = over(model)
    if told == 2:
        loader.attach(model, second)
    return trains(model, optimizer if told == 1 else second, loader)


@refused(
    "load the loader's state too (loader.load_state_dict, or load_checkpoint with the loader), or give the loader "
    "another seed",
    ways=2,
    slow=True,
)
def test_resuming_on_the_draws_of_before(told: int) -> Right:
    def made(seed: int) -> Any:
        return private(PoissonLoader(data().dataset, expected_batch_size=8, seed=seed))

    first = made(5)
    trains(*first)
    states = [part.state_dict() for part in first]
    engine_of(first[0]).feed = None  # as in a new process
    model, optimizer, loader = made(6 if told == 2 else 5)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    if told == 1:
        loader.load_state_dict(states[2])
    return trains(model, optimizer, loader)


@refused("leave the order of the rows as it is, or reorder them in collate_fn (padding comes after it)", ways=2)
def test_rows_that_are_computed_and_turned_round(told: int) -> Right:
    model, optimizer, loader = private(data(collate_fn=turned if told == 2 else None), **WHOLE)
    weights = before(model)
    for x, y in loader:
        rows = x if told else x.flip(0)
        backward(model, 2 * rows, y)
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, weights, 3)


class Two(nn.Module):
    """Of numbers, and of a kind that each example is of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kinds = plain(), nn.Embedding(3, 3)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        return self.linear(x) + self.kinds(kind)


def of_two(**options: Any) -> Any:
    torch.manual_seed(2)
    rows = torch.randn(24, 5), torch.randint(0, 3, (24,)), torch.randint(0, 3, (24,))
    model = Two()
    return make_private(
        model, sgd(model), DataLoader(TensorDataset(*rows), batch_size=8, **options), noise_multiplier=1.0,
        backend="eager", accountant="rdp", **WHOLE,
    )  # fmt: skip


@refused("pass tensors of one batch")
def test_inputs_of_two_batches(told: int) -> Right:
    model, optimizer, loader = of_two()
    weights, batches = before(model), iter(loader)
    first, second = next(batches), next(batches)
    F.cross_entropy(model(first[0], (first if told else second)[1]), first[2]).backward()
    optimizer.step()
    return stepped(model, optimizer, weights, 1)


class OfKind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.linear = nn.Embedding(3, 3), plain()

    def forward(self, kind: Tensor, x: Tensor | None = None) -> Tensor:
        return self.kinds(kind) if x is None else self.kinds(kind) + self.linear(x)


@refused("where batches are taken ahead, pass at least one tensor by which they can be told apart")
def test_batches_ahead_that_are_alike(told: int) -> Right:
    torch.manual_seed(2)
    rows = torch.randn(24, 5), torch.zeros(24, dtype=torch.long), torch.randint(0, 3, (24,))
    model = OfKind()
    if not told:
        model.linear.requires_grad_(False)
    model, optimizer, loader = make_private(
        model, sgd(model), DataLoader(TensorDataset(*rows), batch_size=8), noise_multiplier=1.0, backend="eager",
        accountant="rdp", **WHOLE,
    )  # fmt: skip
    weights, batches = before(model), iter(loader)
    for x, kind, y in [next(batches), next(batches)]:
        out = model(kind.clone(), x) if told else model(kind.clone())
        F.cross_entropy(out, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, weights, 2)


@refused("reorder all tensors of a batch alike")
def test_inputs_in_two_orders(told: int) -> Right:
    model, optimizer, loader = of_two()
    weights = before(model)
    for x, kind, y in loader:
        F.cross_entropy(model(x.flip(0), kind.flip(0) if told else kind), y.flip(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, weights, 3)


@refused("leave the order of the rows as it is, or reorder them in collate_fn (padding comes after it)", ways=2)
def test_kinds_in_another_order_beside_inputs_computed_anew(told: int) -> Right:
    model, optimizer, loader = of_two(collate_fn=turned if told == 2 else None)
    weights = before(model)
    for x, kind, y in loader:
        order = torch.arange(24) if told else torch.randperm(24)
        F.cross_entropy(model(x[order] + torch.randn(24, 5), kind[order]), y[order]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, weights, 3)


@refused(
    "iterate over the loader that make_private returned, and call the model with gradients once per batch, on this "
    "batch (other calls under torch.no_grad())",
)
def test_the_first_batch_again_and_again(told: int) -> Right:
    model, optimizer, loader = private(data(60), seed=3)
    first = next(iter(loader))

    def loss(model: Any, batch: Any) -> Tensor:
        x, y = batch if told else first
        return F.cross_entropy(model(2 * x), y)

    return trains(model, optimizer, loader, passes=2, loss=loss)
