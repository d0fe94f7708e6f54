"""Norms and weighted sums of kept gradients as operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import nn

import dpcompile
from dpcompile.kernels import kept
from dpcompile.kernels.kept import FEW, norms_of_vectors, weighted_sums

dp_compile: Any = dpcompile.dp_compile


@pytest.mark.parametrize(
    "weights", [[0.5, 2.0, 1.0, 3.0], [0.0, 2.0, 0.0, 3.0], [0.0, 2.0, 1.0, 0.0], [1.0, 0.0, 0.0, 2.0], [0.0] * 4]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compiled", [True, False])
def test_weighted_sums_never_read_an_example_of_weight_0(
    weights: list[float], dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(kept, "_library", lambda: None)
    weight = torch.tensor([weights, [1.0, 1.0, 1.0, 1.0]], dtype=dtype)
    each = [torch.randn(4, 3), torch.randn(4, 2, 5), torch.randn(5, 4, 2).permute(1, 2, 0)]
    each = [e.to(dtype) for e in each]
    wanted = [torch.einsum("b,b...->...", w, e) for w, e in zip((weight[0], weight[0], weight[1]), each, strict=True)]
    for gradients in each[:2]:
        gradients[weight[0] == 0] = torch.nan
    found = weighted_sums(weight, [0, 0, 1], each)
    for got, right in zip(found, wanted, strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("number", [1, 3, 4, 5, 9])
def test_weighted_sums_of_long_rows(number: int) -> None:
    """Longer than the piece that is worked on at a time, by any number of examples; the last axes in any order."""
    each, weight = torch.randn(number, 7, 3, 500), torch.rand(1, number)
    wanted = torch.einsum("b,b...->...", weight[0], each)
    for gradients in (each, each.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        (found,) = weighted_sums(weight, [0], [gradients])
        assert found.is_contiguous()
        torch.testing.assert_close(found, wanted)


def test_norms_of_vectors() -> None:
    each = [torch.randn(4, 3), torch.randn(4, 700), torch.randn(5, 4).T]
    torch.testing.assert_close(norms_of_vectors(each), torch.stack([e.double().square().sum(1) for e in each]))
    each[1][2, 0] = torch.inf
    assert not norms_of_vectors(each)[1, 2].isfinite()


class Many(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.randn(3)) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for scale in self.scales:
            x = torch.tanh(x * scale) + x
        return x


@pytest.mark.parametrize("depth", [FEW, FEW + 1])
def test_many_vectors(depth: int) -> None:
    torch.manual_seed(0)
    model, inputs, loss = Many(depth), (torch.randn(4, 3),), PseudoLoss(4)
    truth = clip(per_example_gradients(model, inputs, {}, loss), 1.0)
    private = dp_compile(model, max_grad_norm=1.0, backend="eager")
    train_step(private, inputs, {}, loss)
    assert ("weighted_sums" in private.graph.code) == (depth > FEW)
    assert_right(private, truth, 1e-5)
