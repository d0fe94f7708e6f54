"""Convolutions whose filters are larger than all patches: their clipped sums are matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from standardised import ByBatchNorm, StandardisedConv
from torch import Tensor, nn

import dpcompile

dp_compile: Any = dpcompile.dp_compile


class Twice(nn.Module):
    """One convolution, two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(96, 96, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.conv(x)))


class Frames(nn.Module):
    """Several images of an example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 80, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


class Masked(nn.Conv2d):
    """Behind a tail that works element by element."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones_like(self.weight).triu()
        return nn.functional.conv2d(x, self.weight * mask, self.bias, self.stride, self.padding)


# model, size of an input, how many of its filters' sums are products
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "plain": (lambda: nn.Conv2d(5, 64, 3, padding=1), (5, 3, 3), 1),
    "strided": (lambda: nn.Conv2d(5, 64, 3, 2, 1), (5, 5, 5), 1),
    "uneven": (lambda: nn.Conv2d(5, 64, (3, 1), (2, 1), (1, 0)), (5, 4, 3), 1),
    "dilated": (lambda: nn.Conv2d(5, 64, 3, dilation=2, padding=2), (5, 3, 3), 1),
    "pointwise": (lambda: nn.Conv2d(40, 64, 1), (40, 3, 3), 1),
    "one dimension": (lambda: nn.Conv1d(5, 64, 3), (5, 9), 1),
    "three dimensions": (lambda: nn.Conv3d(2, 64, (1, 2, 3)), (2, 2, 3, 5), 1),
    "transposed": (lambda: nn.ConvTranspose2d(64, 6, 3, 2, 1, 1), (64, 2, 2), 1),
    "grouped": (lambda: nn.Conv2d(8, 128, 3, padding=1, groups=2), (8, 3, 3), 0),
    "many positions": (lambda: nn.Conv2d(5, 8, 3), (5, 9, 9), 0),
    "two in a row": (lambda: nn.Sequential(nn.Conv2d(5, 70, 3), nn.GELU(), nn.Conv2d(70, 80, 3)), (5, 5, 5), 2),
    "twice": (Twice, (96, 2, 2), 1),
    "frames": (Frames, (2, 3, 4, 4), 1),
    "standardised": (lambda: StandardisedConv(5, 64, 3, padding=1), (5, 3, 3), 1),
    "flattened": (lambda: ByBatchNorm(5, 64, 3, padding=1), (5, 3, 3), 2),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(5, 64, 3, padding=1)), (5, 3, 3), 2),
    "masked": (lambda: Masked(5, 64, 3, padding=1), (5, 3, 3), 0),
    "one position": (lambda: nn.Conv2d(5, 64, 3), (5, 3, 3), 1),
}


def case(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, size, _ = MODELS[name]
    x = torch.randn(4, *size)
    x[1] *= 20  # examples are clipped unlike each other
    return make(), x


@pytest.mark.parametrize("norm", ["ghost", "redo", "two_pass"])
@pytest.mark.parametrize("name", list(MODELS))
def test_against_one_backward_for_each_example(name: str, norm: str) -> None:
    net, x = case(name)
    loss = PseudoLoss(len(x))
    truth = clip(per_example_gradients(net, (x,), {}, loss), 1.0)
    private = dp_compile(net, max_grad_norm=1.0, norm=norm, backend="eager")
    train_step(private, (x,), {}, loss)
    assert_right(private, truth, 1e-4 if norm in ("redo", "two_pass") else 1e-5)


@pytest.mark.parametrize("name", list(MODELS))
def test_where_sums_are_products(name: str) -> None:
    net, x = case(name)
    private = dp_compile(net, max_grad_norm=1.0, norm="ghost", backend="eager")
    private.trace(x)
    of_filters = [c for c in private.plan.choices if c.patched]
    assert len(of_filters) == MODELS[name][2]


@pytest.mark.parametrize("name", ["strided", "transposed", "frames", "standardised", "flattened", "one dimension"])
def test_compiled_and_in_bfloat16(name: str) -> None:
    net, x = case(name)
    loss = PseudoLoss(len(x))
    truth = clip(per_example_gradients(net, (x,), {}, loss), 1.0)
    private = dp_compile(net, max_grad_norm=1.0, norm="ghost")
    train_step(private, (x,), {}, loss)
    assert_right(private, truth, 1e-5)
    private.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train_step(private, (x,), {}, loss)
    assert_right(private, truth, 5e-2)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("strided", "inductor"), ("standardised", "inductor"), ("frames", "eager")],  # of frames Inductor fails by itself
)
def test_of_any_batch_size(name: str, backend: str) -> None:
    """Planned for the first batch; a later one has more patches than the filters are."""
    net, x = case(name)
    private = dp_compile(net, max_grad_norm=1.0, norm="ghost", backend=backend, dynamic=True)
    for batch in (7, 6, 40):
        x = torch.randn(batch, *x.shape[1:])
        loss = PseudoLoss(batch)
        private.zero_grad()
        train_step(private, (x,), {}, loss)
        assert_right(private, clip(per_example_gradients(net, (x,), {}, loss), 1.0), 1e-5)


def test_an_example_that_is_not_finite_leaves_no_trace() -> None:
    net, x = case("strided")
    loss = PseudoLoss(len(x))
    finite = clip(per_example_gradients(net, (x,), {}, loss), 1.0, mask=torch.tensor([True, True, False, True]))
    x[2, 0, 0, 0] = torch.inf
    private = dp_compile(net, max_grad_norm=1.0, norm="ghost", backend="eager")
    with pytest.warns(RuntimeWarning, match="1 of 4 examples had a gradient that is NaN"):
        train_step(private, (x,), {}, loss)
    for name, p in private.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad.double(), finite.sums[name], rtol=1e-4, atol=1e-5)


def test_whatever_precision_products_are_allowed() -> None:
    """A sum in bfloat16 is not the sum that norms were taken of."""
    net, x = case("pointwise")
    loss = PseudoLoss(len(x))
    truth = clip(per_example_gradients(net, (x,), {}, loss), 1.0)
    private = dp_compile(net, max_grad_norm=1.0, norm="ghost", backend="eager")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        train_step(private, (x,), {}, loss)
    finally:
        torch.set_float32_matmul_precision(before)
    assert [c.patched for c in private.plan.choices if c.forms] == [True]
    assert_right(private, truth, 1e-5)
