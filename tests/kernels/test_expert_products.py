"""Products of rows with the matrices of experts, their sums, and norms that are right or too large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dpcompile.graph.expert_products import each_expert_sum, expert_products, expert_sums
from dpcompile.kernels.expert_norms import expert_norms

B, T, E = 3, 7, 5


def values(p: int = 4, d: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and experts; one expert is asked for by nobody, another by one example only."""
    torch.manual_seed(0)
    expert = torch.randint(0, E - 2, (B, T))
    expert[1, 2] = E - 1
    return torch.randn(B, T, p), torch.randn(B, T, d), expert


def each_gradient(left: Tensor, right: Tensor, expert: Tensor) -> Tensor:
    """``[B, E, P, D]``, float64, row by row."""
    total = torch.zeros(B, E, left.shape[2], right.shape[2], dtype=torch.float64)
    for b in range(B):
        for t in range(expert.shape[1]):
            total[b, expert[b, t]] += left[b, t].double()[:, None] * right[b, t].double()
    return total


def test_products_and_sums() -> None:
    left, right, expert = values()
    matrices = torch.randn(E, 4, 6)
    rows, chosen = left.flatten(0, 1), expert.flatten()
    wanted = torch.stack([r @ matrices[e] for r, e in zip(rows, chosen, strict=True)])
    torch.testing.assert_close(expert_products(rows, matrices, chosen), wanted)
    gradients = each_gradient(left, right, expert)
    torch.testing.assert_close(each_expert_sum(left, right, expert, E).double(), gradients, rtol=1e-5, atol=1e-6)
    sums = expert_sums(rows, right.flatten(0, 1), chosen, E)
    torch.testing.assert_close(sums.double(), gradients.sum(0), rtol=1e-5, atol=1e-6)
    assert not sums[E - 2].any()


@pytest.mark.parametrize(("p", "d"), [(4, 6), (32, 48)])  # by products, by Gram matrices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norms(p: int, d: int, dtype: torch.dtype) -> None:
    left, right, expert = values(p, d)
    left, right = left.to(dtype), right.to(dtype)
    wanted = each_gradient(left, right, expert).square().sum((1, 2, 3))
    found = expert_norms(left, right, expert, E)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    assert (found >= wanted * (1 - 1e-15)).all()


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-8, 0.0])
def test_norms_of_terms_that_cancel(scale: float) -> None:
    """Two rows of one expert, the second nearly the first's opposite."""
    torch.manual_seed(0)
    base, col = torch.randn(B, 1, 32).double(), torch.randn(B, 1, 48).double()
    left = torch.cat([base, -base * (1 + scale)], 1)
    right = torch.cat([col, col], 1)
    expert = torch.ones(B, 2, dtype=torch.long)
    sums = left.mT @ right
    wanted = sums.square().sum((1, 2))
    size = base.square().sum((1, 2)) * col.square().sum((1, 2)) * 4
    found = expert_norms(left, right, expert, E)
    assert (found >= wanted).all() and (found <= wanted * (1 + 1e-6) + 1e-25 * size).all()


def test_what_is_not_a_number_stays_in_its_example() -> None:
    left, right, expert = values(32, 48)
    wanted = expert_norms(left, right, expert, E)
    left[1, 0, 0], right[2, 1, 1] = torch.nan, torch.inf
    found = expert_norms(left, right, expert, E)
    assert found[0] == wanted[0] and not found[1:].isfinite().any()
    matrices = torch.randn(E, 32, 48)
    assert expert_products(left.flatten(0, 1), matrices, expert.flatten()).isfinite().all(1).sum() == B * T - 1


@pytest.mark.parametrize("place", [0, T, B * T - 1])
def test_no_such_expert(place: int) -> None:
    left, right, expert = values()
    expert.flatten()[place] = -1
    rows, cols, chosen = left.flatten(0, 1), right.flatten(0, 1), expert.flatten()
    for call in (
        lambda: expert_products(rows, torch.randn(E, 4, 6), chosen),
        lambda: expert_sums(rows, cols, chosen, E),
        lambda: each_expert_sum(left, right, expert, E),  # -1 of one example is no expert of the one before
        lambda: expert_norms(left, right, expert, E),
    ):
        with pytest.raises(IndexError, match="a number below 0"):
            call()


@pytest.mark.parametrize("number", [E, E + 3, B * E])
def test_rows_of_no_expert(number: int) -> None:
    """As if they were not there, also where they would be an expert of the next example."""
    left, right, expert = values(32, 48)
    expert[0, 1], expert[1, 0], expert[2] = number, number, number
    kept = expert < E
    zeroed = torch.where(kept.unsqueeze(2), left, 0.0)
    inside = torch.where(kept, expert, 0)
    rows, cols, chosen = left.flatten(0, 1), right.flatten(0, 1), expert.flatten()
    products = expert_products(rows, torch.randn(E, 32, 48), chosen)
    assert not products[~kept.flatten()].any() and products[kept.flatten()].any(1).all()
    wanted = each_gradient(zeroed, right, inside)
    torch.testing.assert_close(each_expert_sum(left, right, expert, E).double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expert_sums(rows, cols, chosen, E).double(), wanted.sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expert_norms(left, right, expert, E), wanted.square().sum((1, 2, 3)))


def test_shapes_that_the_compiler_is_told() -> None:
    left, right, expert = values()
    rows, cols, chosen = left.flatten(0, 1), right.flatten(0, 1), expert.flatten()
    checks: Any = ("test_schema", "test_faketensor")
    torch.library.opcheck(expert_products, (rows, torch.randn(E, 4, 6), chosen), test_utils=checks)
    torch.library.opcheck(expert_sums, (rows, cols, chosen, E), test_utils=checks)
    torch.library.opcheck(expert_norms, (left, right, expert, E), test_utils=checks)
