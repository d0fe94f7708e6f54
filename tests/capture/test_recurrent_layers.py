"""Recurrent layers where they cannot be one operation, and where examples do not lie as the layer takes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dpcompile import ExampleMixingError, dp_compile

B, T, D = 5, 3, 4


class Slopes(nn.Module):
    """What a layer's scores change by, of every example."""

    def __init__(self, kind: str, slope: Callable[[Slopes, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.slope = getattr(nn, kind)(D, 4, batch_first=True), nn.Linear(4, 1), slope

    def score(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0].mean(1)).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.slope(self, x)


def penalty(model: Slopes, x: Tensor) -> Tensor:
    return torch.func.grad(lambda a: model.score(a).sum())(x).square().flatten(1).sum(1)


def along(model: Slopes, x: Tensor) -> Tensor:
    return torch.func.jvp(model.score, (x,), (torch.ones_like(x),))[1]


def both(model: Slopes, x: Tensor) -> Tensor:
    return model.score(x) + penalty(model, x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch 2.14 for forward mode itself
@pytest.mark.parametrize(("kind", "slope"), [("LSTM", penalty), ("GRU", along), ("GRU", both)])
def test_under_transforms_a_layer_is_its_steps(kind: str, slope: Callable[[Slopes, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Slopes(kind, slope), torch.randn(B, T, D)
    norms = []
    for row in x.split(1):
        model.zero_grad()
        model(row).square().sum().backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())
    private = dp_compile(model, backend="eager")
    private.zero_grad()
    private(x).square().mean().backward()
    torch.testing.assert_close(private.grad_norms, torch.stack(norms), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(B, T, D), (B, D)])
def test_steps_that_are_examples_are_refused(shape: tuple[int, ...]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(D, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0].flatten(1)

    with pytest.raises(ExampleMixingError, match=r"examples one after another.*with batch_first=True"):
        dp_compile(Model(), backend="eager")(torch.randn(shape)).sum().backward()
