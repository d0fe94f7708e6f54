"""What Dynamo and Inductor get wrong is mended while they compile for us, and for nobody else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import ALL
from models.autograd import Reverse
from oracle import PseudoLoss, clip, error_of, per_example_gradients, train_step
from torch import Tensor, nn
from torch._dynamo.variables import TensorVariable
from torch._inductor.loop_body import LoopBody
from torch._inductor.scheduler import SchedulerNode

import dpcompile
from dpcompile._torch import mended_inductor

dp_compile: Any = dpcompile.dp_compile


def masked_softmax(x: Tensor) -> Tensor:
    """A mask written by index: the softmax reads it under the name that it had before."""
    mask = torch.full((8, 8), -10000.0)
    mask[torch.arange(8).unsqueeze(0), torch.arange(8).unsqueeze(1)] = 0
    return torch.softmax(x + mask, dim=-1)


@pytest.mark.full
def test_a_value_written_in_place_is_no_threads_own() -> None:
    """A plain compilation ends in a KeyError here."""
    x = torch.randn(8, 8)
    with mended_inductor.mended():
        found = torch.compile(masked_softmax)(x)
    torch.testing.assert_close(found, masked_softmax(x))


def test_only_our_compilations_are_mended() -> None:
    before = SchedulerNode.recompute_size_and_body, LoopBody.get_read_expr
    with pytest.raises(ZeroDivisionError), mended_inductor.mended():
        assert LoopBody.get_read_expr is not before[1]
        assert (SchedulerNode.recompute_size_and_body is not before[0]) == (torch.__version__ < "2.14")
        raise ZeroDivisionError
    assert before == (SchedulerNode.recompute_size_and_body, LoopBody.get_read_expr)


def multiplied(y: Tensor, w: Tensor) -> Tensor:
    y.unsqueeze(0).mul_(w)
    return Reverse.apply(y, 0.7)  # type: ignore[return-value]


def multiplied_below_a_view(y: Tensor, w: Tensor) -> Tensor:
    z = y.transpose(0, 1)
    y.mul_(w)
    return Reverse.apply(z, 0.7).transpose(0, 1)  # type: ignore[union-attr]


def copied_to_a_part(y: Tensor, w: Tensor) -> Tensor:
    y[:, 0].copy_(w.expand(len(y)))
    return Reverse.apply(y, 0.7)  # type: ignore[return-value]


def asked(y: Tensor, w: Tensor) -> Tensor:
    y.unsqueeze(0).mul_(w)
    return y * 2 if y.requires_grad else y * 3


class Written(nn.Module):
    def __init__(self, write: Any) -> None:
        super().__init__()
        self.weight, self.write = nn.Parameter(torch.tensor(1.3)), write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(x * 1.0, self.weight)


@pytest.mark.parametrize("write", [multiplied, multiplied_below_a_view, copied_to_a_part, asked])
def test_a_gradient_that_came_in_through_a_view(write: Any) -> None:
    """Dynamo takes the tensor not to need one, and drops the backward of the Function behind it."""
    model, x, loss = Written(write), torch.randn(5, 3), PseudoLoss(5)
    private = dp_compile(copy.deepcopy(model), max_grad_norm=0.1, backend="eager")
    train_step(private, (x,), {}, loss)
    assert max(error_of(private, clip(per_example_gradients(model, (x,), {}, loss), 0.1))) < 1e-5
    own = "requires_grad" in vars(TensorVariable)
    assert not own


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ >= "2.14", reason="mended in torch")
def test_unmended_the_network_of_the_tutorials_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models' suite holds the same network, mended."""
    monkeypatch.setattr(mended_inductor, "FORGETS_WRITES", False)
    case = next(c for c in ALL if c.name == "TutorialCNN")
    model, (x,), loss = case.make(), case.call(5)[0], PseudoLoss(5)
    private: Any = dp_compile(copy.deepcopy(model), max_grad_norm=0.1, norm="redo", dynamic=False, verify=False)
    try:
        train_step(private, (x,), {}, loss)
    except UnboundLocalError:
        return
    assert max(error_of(private, clip(per_example_gradients(model, (x,), {}, loss), 0.1))) > 1e-2
