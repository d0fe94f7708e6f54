"""Batches joined along the example axis with shared values: whole batches, alike for every example, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dpcompile import ExampleMixingError, dp_compile

B, D = 6, 4


class Joined(nn.Module):
    table: Tensor

    def __init__(self, join: Callable[[Joined, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.row, self.join = nn.Linear(D, 2 * D), nn.Parameter(torch.randn(D)), join
        self.register_buffer("table", torch.randn(B, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


def half(m: Joined, x: Tensor) -> Tensor:
    return m.layer(x)[:, :D]


RIGHT: dict[str, Callable[[Joined, Tensor], Tensor]] = {
    "one of two pieces": lambda m, x: m.layer(x).view(-1, 2, D).transpose(0, 1).unbind(0)[0],
    "zeros behind": lambda m, x: torch.stack([half(m, x), torch.zeros_like(half(m, x))]).sum(0),
    "a row for all": lambda m, x: torch.stack([half(m, x), m.row.expand(len(x), D)]).prod(0),
    "zeros in front": lambda m, x: torch.cat([torch.zeros(2 * len(x), D), half(m, x)]).view(3, -1, D).cos().sum(0),
}
MIXED: dict[str, Callable[[Joined, Tensor], Tensor]] = {
    "row numbers": lambda m, x: (
        torch.cat([half(m, x), torch.arange(len(x)).unsqueeze(1).expand(-1, D) * 1.0]).view(2, -1, D).prod(0)
    ),
    "a row for each": lambda m, x: torch.cat([half(m, x), m.table]).view(2, -1, D).prod(0),
    "half a batch": lambda m, x: torch.cat([half(m, x), torch.zeros(B // 2, D)])[: len(x)],
    "half a batch in front": lambda m, x: torch.cat([torch.zeros(B // 2, D), half(m, x)])[: len(x)],
}


def backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().sum().backward()


@pytest.mark.parametrize("name", RIGHT)
def test_shared_batches_that_are_alike(name: str) -> None:
    torch.manual_seed(0)
    model, x = Joined(RIGHT[name]), torch.randn(B, D)
    norms, total = [], torch.zeros(2 * D, D)
    for row in x.split(1):
        backward(model, row)
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())
        total += model.layer.weight.grad  # type: ignore[arg-type]
    model.zero_grad()
    private = dp_compile(model, max_grad_norm=1e6, loss_reduction="sum", backend="eager")
    backward(private, x)
    torch.testing.assert_close(private.grad_norms, torch.stack(norms), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(private.layer.weight.grad, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXED)
def test_what_differs_by_row_is_refused(name: str) -> None:
    with pytest.raises(ExampleMixingError):
        backward(dp_compile(Joined(MIXED[name]), backend="eager"), torch.randn(B, D))
