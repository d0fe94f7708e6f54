"""Products of rows with the matrices of their experts, on one rank; on several: tests/distributed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpcompile import DPCompileError, dp_compile
from dpcompile.experts import products_of_experts

N, P, D, E = 7, 3, 5, 4
EXPERTS = torch.tensor([3, 0, 3, 9, 1, 4, 0])  # none asks for 2; 4 and 9 are no experts


def by_loop(rows: Tensor, matrices: Tensor, expert: Tensor) -> Tensor:
    """The same, row by row."""
    made = [r @ matrices[e] if e < E else r.new_zeros(D) for r, e in zip(rows, expert.tolist(), strict=True)]
    return torch.stack(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(dtype: torch.dtype) -> None:
    rows, matrices = torch.randn(N, P, dtype=dtype), torch.randn(E, P, D, dtype=dtype)
    cotangents = torch.randn(N, D, dtype=dtype)
    found = []
    compiled: Any = torch.compile(products_of_experts, backend="aot_eager")
    for function in (products_of_experts, by_loop, compiled):
        own = [rows.clone().requires_grad_(), matrices.clone().requires_grad_()]
        result = function(own[0], own[1], EXPERTS)
        (result * cotangents).sum().backward()
        found.append([result.detach(), *(x.grad for x in own)])
    for other in found[:1] + found[2:]:
        for value, wanted in zip(other, found[1], strict=True):
            torch.testing.assert_close(value, wanted)


def test_forward_mode_derivatives_are_refused() -> None:
    """They would be zero: operators drop them in silence."""
    rows, matrices = torch.randn(N, P), torch.randn(E, P, D)
    with pytest.raises(NotImplementedError, match="a product with experts' matrices has no forward-mode derivative"):
        torch.func.jvp(lambda r: products_of_experts(r, matrices, EXPERTS), (rows,), (rows,))


def test_rows_are_taken_in_the_dtype_of_the_matrices() -> None:
    result = products_of_experts(torch.randn(N, P).bfloat16(), torch.randn(E, P, D), EXPERTS)
    assert result.dtype == torch.float32 and not result[EXPERTS >= E].any()


def test_what_does_not_belong_together_is_refused() -> None:
    rows, matrices = torch.randn(N, P), torch.randn(E, P, D)
    wrong: list[tuple[Any, ...]] = [(rows, matrices.mT, EXPERTS), (rows, matrices, EXPERTS[1:]), (rows, rows, EXPERTS)]
    for given in wrong:
        with pytest.raises(ValueError, match="do not belong together"):
            products_of_experts(*given)
    with pytest.raises(IndexError, match="below 0"):
        products_of_experts(rows, matrices, EXPERTS - 1)


class Layer(nn.Module):
    """Two rows of each example go to an expert each."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(E, P, D))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        chosen = (x.sum(-1) * 3).long().abs() % (E + 1)
        return products_of_experts(x.flatten(0, 1), self.matrices, chosen.flatten()).view(len(x), -1)


def test_norms_and_sums_are_those_of_one_backward_for_each_example() -> None:
    model: Any = Layer()
    x, wanted, norms = torch.randn(6, 2, P), torch.zeros(E, P, D), []
    for row in x.split(1):
        model.zero_grad()
        model(row).square().sum().backward()
        norms.append(model.matrices.grad.norm())
        wanted += model.matrices.grad * (0.5 / norms[-1]).clamp(max=1.0)
    private = dp_compile(model, max_grad_norm=0.5, backend="eager", loss_reduction="sum")
    model.zero_grad()
    private(x).square().sum().backward()
    torch.testing.assert_close(model.matrices.grad, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(private.grad_norms, torch.stack(norms), rtol=1e-5, atol=1e-6)


def test_matrices_of_examples_are_refused() -> None:
    class Mixing(Layer):
        def forward(self, x: Tensor) -> Tensor:
            chosen = torch.zeros_like(x[:, 0, 0], dtype=torch.int64)
            return products_of_experts(x[:, 0], self.matrices * x.mean(), chosen)

    with pytest.raises(DPCompileError, match="mixes examples"):
        dp_compile(Mixing(), backend="eager")(torch.randn(6, 2, P)).sum().backward()
