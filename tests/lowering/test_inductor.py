"""The rewritten graph through Inductor: the same numbers as one backward per example."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import CASES
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn

import dpcompile
from dpcompile import ExampleMixingError
from dpcompile.module import engine_of

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have


def check(
    name: str, *, batch: int = 5, dtype: torch.dtype = torch.float32, tolerance: float = 1e-4, **options: Any
) -> Any:
    case = CASES[name]
    torch.manual_seed(1)
    model = case.make().to(dtype)
    args, kwargs = case.call(batch, dtype)
    loss = PseudoLoss(batch, case.out_dim)
    gradients = per_example_gradients(model, args, kwargs, loss, in_dims=case.in_dims)
    bound = clip(gradients, 1.0).norms.median().item()
    private = dp_compile(copy.deepcopy(model), max_grad_norm=bound, in_dims=case.in_dims, backend="inductor", **options)
    train_step(private, args, kwargs, loss)
    assert_right(private, clip(gradients, bound), tolerance)
    return private


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("MLP", "auto"), ("CNN", "auto"), ("SDPA", "auto"), ("TiedOnly", "ghost"), ("LSTM", "auto"),
        ("LanguageModel", "ghost"), ("PaddedEmbedding", "redo"),
    ],
)  # fmt: skip
def test_inductor(name: str, norm: str) -> None:
    check(name, norm=norm, dynamic=False)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["auto", "ghost", "instantiate", "redo", "direct"])
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_inductor_on_the_whole_zoo(name: str, norm: str) -> None:
    check(name, norm=norm, dynamic=False)


@pytest.mark.full
def test_dynamic_batch() -> None:
    """One compilation serves all batch sizes."""
    private = check("MLP", dynamic=True)
    compiled = engine_of(private).transformed
    model = engine_of(private).module
    for batch in (3, 9):
        x = torch.randn(batch, 6)
        private.zero_grad()
        gradients = per_example_gradients(model, (x,), {}, PseudoLoss(batch))
        train_step(private, (x,), {}, PseudoLoss(batch))
        assert_right(private, clip(gradients, engine_of(private).max_grad_norm), 1e-4)
    assert engine_of(private).transformed is compiled


@pytest.mark.full
def test_float64() -> None:
    check("SDPA", dtype=torch.float64, tolerance=1e-9, norm="ghost")


def test_mask_and_bad_example() -> None:
    torch.manual_seed(1)
    model, x = CASES["MLP"].make(), torch.randn(5, 6)
    gradients = per_example_gradients(model, (x,), {}, PseudoLoss(5))
    private = dp_compile(copy.deepcopy(model), max_grad_norm=0.5, backend="inductor")
    mask = torch.tensor([True, True, False, True, True])
    spoiled = x.clone()
    spoiled[4] = float("nan")
    engine_of(private).set_mask(mask)
    with pytest.warns(RuntimeWarning, match="1 of 4"):
        train_step(private, (spoiled,), {}, PseudoLoss(5))
    mask[4] = False
    truth = clip(gradients, 0.5, mask=mask)
    for n, p in private.named_parameters():
        torch.testing.assert_close(p.grad.double(), truth.sums[n], rtol=1e-4, atol=1e-5)


def test_refusal_through_inductor() -> None:
    class Centred(CASES["MLP"].make):  # type: ignore[misc, name-defined]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x - x.mean(0))

    private = dp_compile(Centred(), backend="inductor")
    with pytest.raises(ExampleMixingError, match=r"test_inductor\.py"):
        private(torch.randn(5, 6))


def test_evaluation_through_inductor() -> None:
    model, x = CASES["CNN"].make(), torch.randn(3, 2, 6, 6)
    private = dp_compile(model, backend="inductor")
    with torch.no_grad():
        torch.testing.assert_close(private(x), model(x), rtol=1e-4, atol=1e-5)


class Filters(nn.Module):
    """Filters that train, one that does not, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(4, 4, 3, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.frozen(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.up(h))).mean((2, 3))


@pytest.mark.full
def test_parts_share_filters_with_their_channels_last() -> None:
    """In every step anew: what the parts take is what the optimizer left. Gradients lie as their parameters do."""
    torch.manual_seed(0)
    model, x, loss = Filters(), torch.randn(8, 3, 6, 6), PseudoLoss(8)
    private = dp_compile(model, max_grad_norm=0.5, memory_budget=0.8, backend="inductor", dynamic=False)
    for _ in range(2):
        truth = clip(per_example_gradients(model, (x,), {}, loss), 0.5)
        train_step(private, (x,), {}, loss)
        assert private.plan.parts > 1
        assert_right(private, truth, 1e-4)
        assert all(p.grad is None or p.grad.stride() == p.stride() for p in model.parameters())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        private.zero_grad()
