"""Operators that are not torch's: refused by name, right with rules registered, never taken for torch's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn

import dpcompile
from dpcompile import DPCompileError, UnsupportedGraphError, extending, register_axis_rule, register_site
from dpcompile.graph.labels import Examples, Label
from dpcompile.proof import site_kinds
from dpcompile.proof.rules import Call, registry

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have

B, T, D = 5, 3, 6


@torch.library.custom_op("dptest::scale", mutates_args=())
def scale(x: Tensor, w: Tensor) -> Tensor:
    return x * w


@scale.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("dptest::scale_backward", mutates_args=())
def scale_backward(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return grad * w, (grad * x).reshape(-1, x.shape[-1]).sum(0)


@scale_backward.register_fake
def _(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(w)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


scale.register_autograd(lambda ctx, grad: scale_backward(grad.contiguous(), *ctx.saved_tensors), setup_context=_save)


@torch.library.custom_op("dptest::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


twice.register_autograd(lambda ctx, grad: grad * 2)


@torch.library.custom_op("dptest::zeros_like", mutates_args=())
def disguised(x: Tensor) -> Tensor:
    """Called like a factory, and a leak if it were taken for one."""
    return x.cumsum(0)


@disguised.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


disguised.register_autograd(lambda ctx, grad: grad.flip(0).cumsum(0).flip(0))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.weight = nn.Linear(D, D), nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return scale(self.inner(x), self.weight).tanh()


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return twice(self.inner(x))


class Disguised(Doubled):
    def forward(self, x: Tensor) -> Tensor:
        return disguised(self.inner(x))


@pytest.fixture(autouse=True)
def _nothing_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(site_kinds, "_REGISTERED", {})
    monkeypatch.setattr(extending, "_registered", set())
    yield


def register_scale(**options: Any) -> None:
    register_axis_rule("dptest::scale", examples={"x": 0})
    register_axis_rule("dptest::scale_backward", examples={"grad": 0, "x": 0}, results=(0, "sum"))
    register_site(
        "dptest::scale_backward", result=1, linear_in="grad", examples={"grad": 0, "x": 0}, **options
    )  # fmt: skip


def each(grad: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return (grad * x).reshape(len(x), -1, x.shape[-1]).sum(1)


def assert_model_is_right(model: nn.Module, x: Tensor, **options: Any) -> Any:
    loss = PseudoLoss(len(x))
    truth = clip(per_example_gradients(model, (x,), {}, loss), 1.0)
    private = dp_compile(copy.deepcopy(model), **{"backend": "eager", **options})
    train_step(private, (x,), {}, loss)
    assert_right(private, truth, 1e-4)
    return private


@pytest.mark.parametrize("norm", ["auto", "redo"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(B, D), (B, T, D)])
def test_registered_operator(norm: str, dynamic: bool, shape: tuple[int, ...]) -> None:
    register_scale(per_example=each)
    private = assert_model_is_right(Scaled(), torch.randn(shape), norm=norm, dynamic=dynamic)
    assert "dptest::scale_backward" in str(private.plan)


def test_positions_folded_into_the_example_axis() -> None:
    class Folded(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(0, 1)).view_as(x)

    register_scale(per_example=each)
    assert_model_is_right(Folded(), torch.randn(B, T, D))


def test_without_a_function_vmap_is_used() -> None:
    def batched(info: Any, dims: Any, grad: Tensor, x: Tensor, w: Tensor) -> Any:
        grad, x = grad.movedim(dims[0], 0), x.movedim(dims[1], 0)
        return (grad * w, (grad * x).flatten(1, -2).sum(1)), (0, 0)

    register_scale()
    torch.library.register_vmap("dptest::scale_backward", batched)
    assert_model_is_right(Scaled(), torch.randn(B, D))


def test_an_operator_without_a_rule_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedGraphError) as caught:
        dp_compile(Doubled(), backend="eager")(torch.randn(B, D))
    text = str(caught.value)
    assert "`dptest::twice` is not understood" in text and "test_extending.py" in text
    assert "register_axis_rule" in text


def test_a_sum_without_a_site_is_refused() -> None:
    register_axis_rule("dptest::scale", examples={"x": 0})
    register_axis_rule("dptest::scale_backward", examples={"grad": 0, "x": 0}, results=(0, "sum"))
    with pytest.raises(UnsupportedGraphError, match=r"'weight'.*`dptest::scale_backward`, which has no norm rule") as e:
        dp_compile(Scaled(), backend="eager")(torch.randn(B, D))
    assert "register_site" in str(e.value)


def test_a_function_of_the_wrong_shape_is_refused() -> None:
    register_scale(per_example=lambda grad, x, w: (grad * x).sum())
    with pytest.raises(UnsupportedGraphError, match=r"registered for `dptest::scale_backward` gave \(\), not \(5, 6\)"):
        dp_compile(Scaled(), backend="eager")(torch.randn(B, D))


def test_pointwise_and_functions() -> None:
    register_axis_rule(twice, "pointwise")
    assert_model_is_right(Doubled(), torch.randn(B, D))

    @register_axis_rule(torch.ops.dptest.twice.default)
    def like_its_operand(call: Call) -> Label:
        label = call.label(call["x"])
        return label if isinstance(label, Examples) else call.mixes("it takes examples only")

    assert_model_is_right(Doubled(), torch.randn(B, D))


def test_examples_elsewhere_than_registered() -> None:
    class Turned(Doubled):
        def forward(self, x: Tensor) -> Tensor:
            return twice(self.inner(x).T).T

    register_axis_rule("dptest::twice", examples={"x": 0})
    with pytest.raises(DPCompileError, match="`x` holds the examples on dim 1; it was registered with dim 0"):
        dp_compile(Turned(), backend="eager")(torch.randn(B, D))


def test_examples_in_a_shared_operand() -> None:
    class Swapped(Doubled):
        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return scale(x, x)

    register_axis_rule("dptest::scale", examples={"x": 0})
    with pytest.raises(DPCompileError, match="operand `w` holds examples; it was registered as shared"):
        dp_compile(Swapped(), backend="eager")(torch.randn(B, D))


def test_torchs_names_do_not_rub_off() -> None:
    """``dptest::zeros_like`` reads its operand."""
    with pytest.raises(UnsupportedGraphError, match="`dptest::zeros_like` is not understood"):
        dp_compile(Disguised(), backend="eager")(torch.randn(B, D))


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda: register_axis_rule("dptest::nothing", "pointwise"), "there is no operator 'dptest::nothing'"),
        (lambda: register_axis_rule("aten::mm", "pointwise"), "`mm` has a rule of dpcompile's own"),
        (lambda: register_axis_rule("dptest::twice", examples={"y": 0}), "no operand 'y'; it has x"),
        (lambda: register_axis_rule("dptest::twice", examples={"x": 0}, results=(0, 0)), "has 1 results.* says 2"),
        (lambda: register_axis_rule("dptest::twice", examples={"x": 0}, results="mean"), "a dimension, 'sum' or None"),  # type: ignore
        (lambda: register_axis_rule("dptest::twice", "pointwise", examples={"x": 0}), "not both"),
        (lambda: register_axis_rule("dptest::twice", 3), "a function or 'pointwise', not 3"),  # type: ignore
        (lambda: register_site("dptest::twice", linear_in="x", examples={}), "one of the operands with examples"),
        (lambda: register_site("dptest::twice", linear_in="x", examples={"x": 0}, result=1), "has 1 results, no res"),
        (lambda: register_site("aten::mm", linear_in="self", examples={"self": 1}), "`mm` is torch's own"),
    ],
)  # fmt: skip
def test_registrations_that_cannot_be(register: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register()
