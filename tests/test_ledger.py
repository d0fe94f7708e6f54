"""The ledger's table of edge cases, one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dpcompile.errors import PrivacyError
from dpcompile.ledger import GradientLedger


@pytest.fixture
def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


@pytest.fixture
def ledger(parameter: nn.Parameter) -> GradientLedger:
    return GradientLedger({"w": parameter})


def ones() -> list[tuple[str, Tensor]]:
    return [("w", torch.ones(3))]


def test_sums_add_up_over_backwards(ledger: GradientLedger, parameter: nn.Parameter) -> None:
    ledger.deliver(ones(), graph_task=1)
    ledger.deliver(ones(), graph_task=2)
    ledger.verify(["w"])
    assert torch.equal(parameter.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
    assert torch.equal(ledger.total("w"), torch.full((3,), 2.0))  # type: ignore[arg-type]


def test_none_or_zeroed_starts_anew(ledger: GradientLedger, parameter: nn.Parameter) -> None:
    ledger.deliver(ones(), graph_task=1)
    parameter.grad.zero_()  # type: ignore[union-attr]
    ledger.deliver(ones(), graph_task=2)
    parameter.grad = None
    ledger.deliver(ones(), graph_task=3)
    ledger.verify(["w"])
    assert torch.equal(parameter.grad, torch.ones(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.square().sum().backward(),
        lambda p: p.grad.mul_(0.5),
        lambda p: torch.nn.utils.clip_grad_norm_([p], 0.1),
        lambda p: setattr(p, "grad", p.grad.clone()),
    ],
)
def test_any_other_change_is_seen(ledger: GradientLedger, parameter: nn.Parameter, change) -> None:
    ledger.deliver(ones(), graph_task=1)
    change(parameter)
    with pytest.raises(PrivacyError, match="parameter 'w' did not come out of the clipped backward alone"):
        ledger.verify(["w"])
    with pytest.raises(PrivacyError, match="parameter 'w' did not come out of the clipped backward alone"):
        ledger.deliver(ones(), graph_task=2)


def test_unclipped_gradient_first(ledger: GradientLedger, parameter: nn.Parameter) -> None:
    parameter.sum().backward()
    with pytest.raises(PrivacyError, match="did not come out of the clipped backward alone"):
        ledger.deliver(ones(), graph_task=1)
    with pytest.raises(PrivacyError, match="did not come out of the clipped backward alone"):
        ledger.verify(["w"])
    parameter.grad = None
    ledger.clear()
    ledger.deliver(ones(), graph_task=2)
    ledger.verify(["w"])


def test_step_without_backward(ledger: GradientLedger) -> None:
    with pytest.raises(PrivacyError, match="without a clipped backward since the last step"):
        ledger.verify(["w"])


def test_second_step_and_leftover(ledger: GradientLedger) -> None:
    ledger.deliver(ones(), graph_task=1)
    ledger.spend()
    with pytest.raises(PrivacyError, match="second optimizer step on the same gradients"):
        ledger.verify(["w"])
    with pytest.raises(PrivacyError, match="gradient of the last step is still in parameter 'w'"):
        ledger.deliver(ones(), graph_task=2)


def test_two_graphs_in_one_backward(ledger: GradientLedger) -> None:
    ledger.deliver(ones(), graph_task=1)
    with pytest.raises(PrivacyError, match="called twice before one backward"):
        ledger.deliver(ones(), graph_task=1)
    with pytest.raises(PrivacyError, match="called twice before one backward"):
        ledger.verify(["w"])


def test_narrow_parameters_keep_a_wide_total() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ledger = GradientLedger({"w": parameter})
    for task in range(300):
        ledger.deliver(ones(), graph_task=task)
    assert parameter.grad is not None and parameter.grad.dtype == torch.bfloat16
    assert torch.equal(ledger.total("w"), torch.full((3,), 300.0))  # type: ignore[arg-type]
