"""Gradients of filters in full precision, where torch is allowed less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import dpcompile
from dpcompile.kernels import exact_convolution
from dpcompile.kernels.exact_convolution import exact_filters_gradient, filters_gradient
from dpcompile.kernels.filter_op import bounded_filter_norms, grouped_convolution
from dpcompile.norms.convolutions import each_gradient

dp_compile: Any = dpcompile.dp_compile
B = 3


@contextmanager
def allowing(precision: str) -> Iterator[None]:
    convolutions: Any = torch.backends.mkldnn.conv  # type: ignore[attr-defined]
    before, convolutions.fp32_precision = convolutions.fp32_precision, precision
    try:
        yield
    finally:
        convolutions.fp32_precision = before


@pytest.fixture
def narrow() -> Iterator[None]:
    with allowing("bf16"):
        yield


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2), nn.ConvTranspose2d(4, 3, 2)
    )


def operands() -> tuple[Tensor, Tensor, list[int], tuple[Any, ...]]:
    torch.manual_seed(0)
    return torch.randn(B, 6, 4, 4), torch.randn(B, 4, 6, 6), [6, 2, 3, 3], ([1, 1], [0, 0], [1, 1], False, [0, 0], 2)


def test_the_setting_is_not_taken(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed, by_torch = [], exact_convolution._by_torch

    def noting(*args: Any) -> Tensor:
        allowed.append(torch.backends.mkldnn.conv.fp32_precision)  # type: ignore[attr-defined]
        return by_torch(*args)

    monkeypatch.setattr(exact_convolution, "_by_torch", noting)
    cotangent, source, shape, options = operands()
    wanted = torch.ops.aten.convolution_backward(
        cotangent.double(), source.double(), torch.empty(shape).double(), None, *options, [False, True, False]
    )[1]
    found = exact_filters_gradient(cotangent, source, shape, *options)
    assert allowed == ["ieee"]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.backends.mkldnn.conv.fp32_precision == "bf16"  # type: ignore[attr-defined]


def test_whose_operation_it_is() -> None:
    cotangent, source, shape, options = operands()

    def operation(device: str, dtype: torch.dtype = torch.float32) -> bool:
        with torch._subclasses.FakeTensorMode() as mode:
            given = [mode.from_tensor(x).to(device, dtype) for x in (cotangent, source)]
            graph = make_fx(lambda a, b: filters_gradient(a, b, shape, *options))
            return any("exact_filters_gradient" in str(n.target) for n in graph(*given).graph.nodes)

    with allowing("ieee"):
        assert not operation("cpu")
        assert operation("meta") and not operation("meta", torch.float64)  # any device but CPUs
    with allowing("bf16"):
        assert operation("cpu") and not operation("cpu", torch.float64)


@pytest.mark.parametrize("norm", ["auto", "redo", "instantiate"])
def test_models(narrow: None, norm: str) -> None:
    x, loss = torch.randn(B, 4, 9, 9), PseudoLoss(B)
    truth = clip(per_example_gradients(model(), (x,), {}, loss), 0.5)
    private = dp_compile(model(), max_grad_norm=0.5, backend="eager", norm=norm)
    train_step(private, (x,), {}, loss)
    assert_right(private, truth, 1e-4)


def test_dropped_gradients_have_their_bound_added() -> None:
    cotangent, source, shape, options = operands()
    front, images = cotangent.unsqueeze(1), source.unsqueeze(1)
    each = grouped_convolution(front, images, shape, *options)
    squared = each.double().square().sum((1, 2, 3, 4))
    found = bounded_filter_norms(squared, front, images, shape, *options)
    exact = grouped_convolution(front.double(), images.double(), shape, *options).square().sum((1, 2, 3, 4))
    assert (found > squared).all() and (found >= exact).all()
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)


def test_other_devices_take_it() -> None:
    """As they would trace it."""
    from dpcompile.graph.labels import Examples

    cotangent, source, shape, options = operands()
    axis, names = Examples(0), []
    with torch._subclasses.FakeTensorMode() as mode:
        given = [mode.from_tensor(x).to("meta") for x in (cotangent, source)]

        for kept in (True, False):
            both = partial(each_gradient, axis=axis, batch=B, shape=shape, options=options, own=False, reuse=False)
            graph = make_fx(partial(both, kept=kept))(*given).graph
            names.append([str(n.target) for n in graph.nodes])
    assert all(any("exact_filters_gradient" in n for n in of_graph) for of_graph in names)
    assert len(names[1]) > len(names[0])
