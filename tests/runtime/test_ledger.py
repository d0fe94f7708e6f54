"""The ledger's table of edge cases, one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dpcompile.errors import PrivacyError
from dpcompile.runtime.ledger import GradientLedger


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
        lambda p: p.grad.data.mul_(2**-16),
        lambda p: p.grad.numpy().__imul__(0.5),
        lambda p: p.grad.data[:2].neg_(),
        lambda p: p.grad.data[2].fill_(1 + 2**-23),
        lambda p: torch._foreach_mul_([p.grad.data], 3.0),  # type: ignore[reportPrivateImportUsage]
        lambda p: torch._amp_foreach_non_finite_check_and_unscale_(  # type: ignore[reportPrivateImportUsage]
            [p.grad], torch.zeros(()), torch.full((), 1 / 1024)
        ),
    ],
)
def test_any_other_change_is_seen(ledger: GradientLedger, parameter: nn.Parameter, change) -> None:
    ledger.deliver(ones(), graph_task=1)
    change(parameter)
    with pytest.raises(PrivacyError, match="parameter 'w' did not come out of the clipped backward alone"):
        ledger.verify(["w"])
    with pytest.raises(PrivacyError, match="parameter 'w' did not come out of the clipped backward alone"):
        ledger.deliver(ones(), graph_task=2)


def test_swapped_elements_are_seen() -> None:
    parameter = nn.Parameter(torch.zeros(5))
    ledger = GradientLedger({"w": parameter})
    ledger.deliver([("w", torch.arange(5.0))], graph_task=1)
    parameter.grad.data[:] = parameter.grad[[0, 3, 2, 1, 4]].clone()  # type: ignore[union-attr,index]
    with pytest.raises(PrivacyError, match="did not come out of the clipped backward alone"):
        ledger.verify(["w"])


@pytest.mark.parametrize(
    "change",
    [
        lambda p: torch.nn.utils.clip_grad_norm_([p], float("inf")),
        lambda p: torch.nn.utils.clip_grad_norm_([p], 100.0),
        lambda p: torch.nn.utils.clip_grad_value_([p], 100.0),
        lambda p: p.grad.mul_(1.0),
        lambda p: p.grad.detach_(),
    ],
)
def test_what_changes_nothing_is_accepted(ledger: GradientLedger, parameter: nn.Parameter, change) -> None:
    ledger.deliver(ones(), graph_task=1)
    change(parameter)
    ledger.deliver(ones(), graph_task=2)
    change(parameter)
    ledger.verify(["w"])
    assert torch.equal(ledger.total("w"), torch.full((3,), 2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("taken", [lambda p: setattr(p, "grad", None), lambda p: p.grad.zero_()])
def test_taken_out_before_the_step(ledger: GradientLedger, parameter: nn.Parameter, taken) -> None:
    ledger.deliver(ones(), graph_task=1)
    taken(parameter)
    with pytest.raises(PrivacyError, match=r"clipped sum of parameter 'w' was taken out of p.grad.*\n.*autograd.grad"):
        ledger.verify(["w"])


def test_kept_sums_survive_none_and_not_zeroing(ledger: GradientLedger, parameter: nn.Parameter) -> None:
    ledger.deliver(ones(), graph_task=1)
    ledger.keep()
    parameter.grad = None
    ledger.deliver(ones(), graph_task=2)
    ledger.verify(["w"])
    assert torch.equal(ledger.total("w"), torch.full((3,), 2.0))  # type: ignore[arg-type]
    parameter.grad.zero_()  # type: ignore[attr-defined]
    with pytest.raises(PrivacyError, match=r"zero_grad\(\) within a logical step.*\n.*DPOptimizer"):
        ledger.deliver(ones(), graph_task=3)


def test_an_alias_of_kept_sums_is_watched(ledger: GradientLedger, parameter: nn.Parameter) -> None:
    ledger.deliver(ones(), graph_task=1)
    ledger.keep()
    alias, parameter.grad = parameter.grad, None
    alias.mul_(5)  # type: ignore[union-attr]
    with pytest.raises(PrivacyError, match="zero_grad|clipped backward alone"):
        ledger.deliver(ones(), graph_task=2)


def test_a_delivery_that_failed_half_way_stays_refused() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    ledger = GradientLedger({"a": first, "b": second})
    second.grad = torch.ones(2)
    for task in (1, 2):
        with pytest.raises(PrivacyError, match="'b' did not come out of the clipped backward alone"):
            ledger.deliver([("a", torch.ones(2)), ("b", torch.ones(2))], graph_task=task)
        with pytest.raises(PrivacyError, match="'b' did not come out of the clipped backward alone"):
            ledger.verify(["a", "b"])


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
