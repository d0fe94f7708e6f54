"""Optimizers that are no DPOptimizer, on clipped sums."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import dpcompile
from dpcompile import DPOptimizer, PrivacyError, PrivacyWarning

dp_compile: Any = dpcompile.dp_compile


def private() -> Any:
    return dp_compile(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), backend="eager")


def backward(model: Any) -> None:
    model(torch.randn(5, 3)).square().sum(1).mean().backward()


def owned(model: Any, inner: torch.optim.Optimizer) -> DPOptimizer:
    return DPOptimizer(inner, model, noise_multiplier=1.0, expected_batch_size=5, seed=1)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_another_optimizer_over_the_same_parameters(kind: Any) -> None:
    model = private()
    optimizer, other = owned(model, torch.optim.SGD(model.parameters(), lr=0.1)), kind(model.parameters(), lr=0.1)
    backward(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(PrivacyError, match=rf"{kind.__name__}.step\(\) on the clipped sum of parameter '0.weight'"):
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.step()


def test_over_one_of_them_and_after_the_owner_is_gone() -> None:
    model = private()
    optimizer = owned(model, torch.optim.SGD(model.parameters(), lr=0.1))
    del optimizer
    gc.collect()
    backward(model)
    with pytest.raises(PrivacyError, match="on the clipped sum of parameter '2.bias'"):
        torch.optim.SGD([model.get_parameter("2.bias")], lr=0.1).step()


def test_without_a_private_one_it_is_told_once() -> None:
    model = private()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    with pytest.warns(PrivacyWarning, match=r"no noise\. Right if you add noise of your own.*DPOptimizer\(sgd, model"):
        other.step()
    other.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model)
        other.step()


def test_what_has_its_noise_or_is_public_may_be_used() -> None:
    net = nn.Linear(3, 2)
    model = dp_compile(net, backend="eager")
    optimizer, other = owned(model, torch.optim.SGD(net.parameters(), lr=0.1)), torch.optim.SGD(net.parameters(), 0.1)
    backward(model)
    optimizer.step()
    other.step()
    optimizer.zero_grad()
    net(torch.randn(5, 3)).sum().backward()
    other.step()
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    frozen = nn.Linear(2, 2)
    frozen(torch.randn(5, 2)).sum().backward()
    torch.optim.SGD(frozen.parameters(), lr=0.1).step()


def test_two_private_models_over_one_module() -> None:
    net = nn.Linear(3, 2)
    first = dp_compile(net, backend="eager")
    optimizer = owned(first, torch.optim.SGD(net.parameters(), lr=0.1))
    second = dp_compile(net, backend="eager")
    backward(first)
    with pytest.raises(PrivacyError, match="SGD.step.* on the clipped sum of parameter 'weight'"):
        torch.optim.SGD(second.parameters(), lr=0.1).step()
    optimizer.step()
