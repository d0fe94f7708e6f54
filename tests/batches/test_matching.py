"""What a loop trains on in the place of the batch that was drawn, and rows that it moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import PrivacyError, compile_step, make_private
from dpcompile.batches.draws import Draws
from dpcompile.batches.row_keys import row_keys

N, D = 40, 4
Batch = tuple[Tensor, Tensor]


def private(physical: int = 16, x: Tensor | None = None) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))
    data = TensorDataset(torch.randn(N, D) if x is None else x, torch.randint(0, 3, (N,)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loader = DataLoader(data, batch_size=8)
    options = {"noise_multiplier": 1.0, "seed": 3, "backend": "eager", "physical_batch_size": physical}
    return make_private(net, optimizer, loader, max_grad_norm=1.0, **options)  # type: ignore[arg-type]


def train(loop: Any, choose: Callable[[Batch, Batch, Any], Batch], change: Callable[[Tensor], Tensor]) -> int:
    """Four passes on what is chosen of (the batch, the first batch, the data)."""
    model, optimizer, loader = loop
    first = next(iter(loader))
    for _ in range(4):
        for batch in loader:
            x, y = choose(tuple(batch), tuple(first), loader.dataset.tensors)
            F.cross_entropy(model(change(x)), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return optimizer.logical_step


def as_it_is(x: Tensor) -> Tensor:
    return x


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def signs(x: Tensor) -> Tensor:
    return (x > 0).float()


def noisy(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


@pytest.mark.parametrize("change", [as_it_is, doubled, signs, noisy])
def test_the_batch_itself_computed_anew(change: Any) -> None:
    assert train(private(), lambda batch, first, data: batch, change) == 20


@pytest.mark.parametrize("physical", [16, N])
@pytest.mark.parametrize("change", [as_it_is, doubled])
def test_the_first_batch_for_ever(change: Any, physical: int) -> None:
    with pytest.raises(PrivacyError, match=r"rows that came with other batches(.*\n)+.*on this batch"):
        train(private(physical), lambda batch, first, data: first, change)


@pytest.mark.parametrize("change", [as_it_is, doubled])
def test_all_of_the_data(change: Any) -> None:
    with pytest.raises(PrivacyError, match="rows that came with other batches|have moved"):
        train(private(N), lambda batch, first, data: data, change)


def test_rows_that_the_loop_picks() -> None:
    def picked(batch: Batch, first: Batch, data: Any) -> Batch:
        rows = torch.randint(0, N, (len(batch[0]),))
        return data[0][rows], data[1][rows]

    with pytest.raises(PrivacyError, match="rows that came with other batches|have moved"):
        train(private(), picked, as_it_is)


# --- rows that move ---


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of the calls."""
    found: list[Tensor] = []
    claim = Draws.claim

    def noted(self: Draws, tensors: Any) -> Any:
        result = claim(self, tensors)
        if result.mask is not None:
            found.append(result.mask)
        return result

    monkeypatch.setattr(Draws, "claim", noted)
    return found


def in_place(x: Tensor, y: Tensor, order: Tensor) -> Batch:
    return x.copy_(x[order].clone()), y.copy_(y[order].clone())


def by_numpy(x: Tensor, y: Tensor, order: Tensor) -> Batch:
    x.numpy()[:], y.numpy()[:] = x.numpy()[order.numpy()], y.numpy()[order.numpy()]
    return x, y


def copied(x: Tensor, y: Tensor, order: Tensor) -> Batch:
    return x[order], y[order]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("move", [copied, in_place, by_numpy])
def test_the_mask_follows(move: Any, compiled: bool, masks: list[Tensor]) -> None:
    """Labels are few and alike: the inputs tell where a row went."""
    model, optimizer, loader = private(24)
    step = compile_step(model, F.cross_entropy, optimizer)
    for x, y in loader:
        real = (x != 0).any(1)
        order = torch.randperm(len(x))
        x, y = move(x, y, order)
        if compiled:
            step(x, y)
        else:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(masks[-1], real[order])


def test_rows_that_moved_beside_inputs_computed_anew() -> None:
    model, optimizer, loader = private(24)
    step = compile_step(model, F.cross_entropy, optimizer)
    x, y = next(iter(loader))
    order = torch.randperm(len(x))
    with pytest.raises(PrivacyError, match="what is left as drawn does not tell padding from examples|have moved"):
        step(2 * x[order], y[order])


class Steps(nn.Module):
    """Inputs, and a number for each that the loop draws, as the time of a diffusion model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(D, 3), nn.Embedding(3, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) + self.times(t)


@pytest.mark.parametrize("copy", [False, True])
def test_random_numbers_beside_inputs_as_drawn(copy: bool) -> None:
    """That some are alike is chance, and no sign that rows moved."""
    torch.manual_seed(0)
    net, data = Steps(), TensorDataset(torch.randn(N, D))
    model, optimizer, loader = make_private(
        net, torch.optim.SGD(net.parameters(), lr=0.1), DataLoader(data, batch_size=8), noise_multiplier=1.0,
        max_grad_norm=1.0, seed=3, backend="eager", physical_batch_size=24,
    )  # fmt: skip
    for _ in range(3):
        for (x,) in loader:
            model(x.clone() if copy else x, torch.randint(0, 3, (len(x),))).square().sum(1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.logical_step == 15


def test_rows_in_different_orders() -> None:
    model, optimizer, loader = private(24)
    step = compile_step(model, F.cross_entropy, optimizer)
    x, y = next(iter(loader))
    with pytest.raises(PrivacyError, match="rows of a batch in different orders"):
        step(x.flip(0), y)


# --- keys ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize(("shape", "dim"), [((9, 3), 0), ((9, 100, 7), 0), ((5, 9, 6), 1), ((9,), 0), ((9, 0), 0)])
def test_keys_go_with_the_rows(dtype: torch.dtype, shape: Any, dim: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 50).to(dtype) if dtype != torch.bool else torch.randn(shape) > 0
    order = torch.randperm(9)
    keys = row_keys(x, dim)
    assert keys.shape == (9,) and keys.dtype == torch.int64
    assert torch.equal(row_keys(x.index_select(dim, order), dim), keys[order])
    if x.numel() >= 27 and dtype != torch.bool:
        assert len(set(keys.tolist())) == 9


def test_keys_of_complex_rows_and_of_elements_that_changed_places() -> None:
    x = torch.randn(6, 5, dtype=torch.complex64)
    assert not torch.equal(row_keys(x, 0), row_keys(x.conj(), 0))
    assert not bool((row_keys(x, 0) == row_keys(x.flip(1), 0)).any())
