"""Backwards that are not linear in their cotangents: right if the loss is a sum, refused under a mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn

import dpcompile
from dpcompile import UnsupportedGraphError
from dpcompile.module import engine_of

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

Backward = Callable[[Tensor, Tensor], Tensor]
B = 4
PROPORTIONAL: dict[str, Backward] = {
    "reversed": lambda g, x: -0.5 * g,
    "straight through": lambda g, x: torch.where(x.abs() < 1, g, 0.0),
    "guided": lambda g, x: g.clamp(min=0) * (x > 0) * (g > 0),
    "by their own norm": lambda g, x: g * g / (g * g).sum(1, keepdim=True).sqrt(),
}
NOT: dict[str, tuple[str, Backward]] = {
    "signs": ("`sign`", lambda g, x: g.sign()),
    "squares": ("`mul`", lambda g, x: g * g),
    "clamped": ("`clamp", lambda g, x: g.clamp(-0.1, 0.1)),
    "normalised": ("`div`", lambda g, x: g / g.norm(dim=1, keepdim=True)),
    "with a part of its own": ("`add`", lambda g, x: g + x),
    "by a threshold": ("`gt`", lambda g, x: g * (g.abs() > 0.01)),
    "something else": ("proportion", lambda g, x: x * 2),
}


class Net(nn.Module):
    """A backward between two layers, in a Function or in a hook."""

    def __init__(self, backward: Backward, hook: bool) -> None:
        super().__init__()
        self.first, self.second, self.backward, self.hook = nn.Linear(5, 3), nn.Linear(3, 2), backward, hook

        class Between(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
                ctx.save_for_backward(x)
                return x.clone()

            @staticmethod
            def backward(ctx: Any, *g: Tensor) -> Tensor:
                return backward(g[0], *ctx.saved_tensors)

        self.between = Between

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if not self.hook:
            h = self.between.apply(h)
        elif h.requires_grad:
            h.register_hook(lambda g: self.backward(g, h.detach()))
        return self.second(h)


def assert_trains(backward: Backward, hook: bool, **options: Any) -> None:
    model, x, loss = Net(backward, hook), torch.randn(B, 5), PseudoLoss(B)
    truth = clip(per_example_gradients(model, (x,), {}, loss), 1.0)
    fresh = Net(backward, hook)
    fresh.load_state_dict(model.state_dict())
    private = dp_compile(fresh, backend="eager", **options)
    train_step(private, (x,), {}, loss, reduction=options.get("loss_reduction", "mean"))
    assert_right(private, truth, 1e-4)


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("name", PROPORTIONAL)
def test_what_grows_with_the_cotangents_is_right(name: str, hook: bool) -> None:
    assert_trains(PROPORTIONAL[name], hook)


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("name", NOT)
def test_what_does_not_needs_a_sum(name: str, hook: bool) -> None:
    """The remedy works."""
    operation, backward = NOT[name]
    with pytest.raises(UnsupportedGraphError, match=f"{operation}.*1/B of a mean loss") as refused:
        assert_trains(backward, hook)
    assert "loss_reduction='sum'" in str(refused.value) and "test_scaling.py:" in str(refused.value)
    assert_trains(backward, hook, loss_reduction="sum")


def test_a_second_backward_needs_proportion_whatever_the_loss() -> None:
    """It runs on the cotangents times the clip weights."""
    with pytest.raises(UnsupportedGraphError, match="`sign`.*second backward"):
        assert_trains(NOT["signs"][1], False, loss_reduction="sum", norm="ghost_clipping")
    assert_trains(PROPORTIONAL["guided"], False, loss_reduction="sum", norm="ghost_clipping")


@pytest.mark.parametrize(("loss", "said"), [("mean", "sum"), ("sum", "mean")])
def test_a_wrong_loss_reduction_never_exceeds_the_bound(loss: str, said: str) -> None:
    """A weight times a norm is at most C either way."""
    bound, x, y = 0.1, 10 * torch.randn(B, 5), torch.randint(0, 3, (B,))
    private: Any = dpcompile.dp_compile(nn.Linear(5, 3), backend="eager", max_grad_norm=bound, loss_reduction=said)
    for i in range(B):
        engine_of(private).set_mask(torch.arange(B) == i)
        torch.nn.functional.cross_entropy(private(x), y, reduction=loss).backward()
        assert torch.cat([p.grad.flatten() for p in private.parameters()]).norm() <= bound * (1 + 1e-6)
        private.zero_grad()
