"""Operators of others, attention with functions, gradients between regions: what the messages say to do, tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from private_steps import X
from remedies import Right, refused, right
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

from dpcompile import dp_compile, register_axis_rule, register_site


def operator(name: str) -> Any:
    """``x * w`` of a library, whose backward sums the gradient of ``w`` over the examples itself."""

    @torch.library.custom_op(f"dpremedies::{name}", mutates_args=())
    def scale(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @torch.library.custom_op(f"dpremedies::{name}_backward", mutates_args=())
    def backward(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return grad * w, (grad * x).sum(0)

    scale.register_fake(lambda x, w: torch.empty_like(x))
    backward.register_fake(lambda grad, x, w: (torch.empty_like(x), torch.empty_like(w)))
    scale.register_autograd(
        lambda ctx, grad: backward(grad.contiguous(), *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return lambda x, w: scale(x, w)


SCALE, STRETCH, TWICE = operator("scale"), operator("stretch"), operator("twice")


class Scaled(nn.Module):
    def __init__(self, scale: Any, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.scale = nn.Linear(5, 5), scale
        self.weight = nn.Parameter(torch.rand(5) + 0.5, requires_grad=not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.inner(x), self.weight).tanh()


def rules(name: str) -> None:
    register_axis_rule(f"dpremedies::{name}", examples={"x": 0})
    register_axis_rule(f"dpremedies::{name}_backward", examples={"grad": 0, "x": 0}, results=(0, "sum"))


def site(name: str, **options: Any) -> None:
    axes = {"grad": 0, "x": 0}
    register_site(f"dpremedies::{name}_backward", result=1, linear_in="grad", examples=axes, **options)


def each(grad: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return grad.flatten(1) * x.flatten(1)


@refused(
    "rewrite it with operations that have a rule; for an operator of your own, dpcompile.register_axis_rule says what "
    "it does to the examples",
    ways=2,
    slow=True,
)
def test_an_operator_without_a_rule(told: int) -> Right:
    if told == 2:
        rules("twice")
        site("twice", per_example=each)
    return right(dp_compile(Scaled(torch.mul if told == 1 else TWICE), backend="eager"), X)


@refused(
    "rewrite the layer so that its gradient ends in a matrix product, a sum, an index-put or a convolution, or say how "
    "it sums with dpcompile.register_site",
    ways=2,
)
def test_an_operator_that_sums(told: int) -> Right:
    rules("scale")
    if told == 2:
        site("scale", per_example=each)
    return right(dp_compile(Scaled(torch.mul if told == 1 else SCALE), backend="eager"), X)


@refused(
    "simplify what stands between the parameter and the layer that uses it, or freeze the parameter; for an operator "
    "of your own mend per_example= of register_site, or leave it out: then torch.vmap runs the operator",
    ways=4,
)
def test_an_operator_without_gradients_per_example(told: int) -> Right:
    wrong = lambda grad, x, w: grad @ x  # noqa: E731
    rules("stretch")
    site("stretch", per_example=(wrong, wrong, wrong, each, None)[told])
    return right(dp_compile(Scaled(torch.mul if told == 1 else STRETCH, frozen=told == 2), backend="eager"), X)


# --- attention ------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention whose options are made in the forward by ``options(module, ids)``."""

    def __init__(self, options: Callable[..., dict[str, Any]], frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.qkv = nn.Linear(4, 3 * 2 * 4)
        self.slopes, self.options = nn.Parameter(torch.rand(2), requires_grad=not frozen), options

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        options = self.options(self, ids)
        if "attn_mask" in options:
            return nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
        return flex.flex_attention(q, k, v, **options).transpose(1, 2)  # type: ignore[union-attr]


def attended(options: Callable[..., dict[str, Any]], frozen: bool = False) -> Right:
    generator = torch.Generator().manual_seed(2)
    x, ids = torch.randn(3, 16, 4, generator=generator), torch.arange(16).repeat(3, 1) // torch.tensor([[5], [8], [3]])
    return right(dp_compile(Attention(options, frozen), backend="eager"), x, ids)


@pytest.fixture
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses flex_attention's backward on a CPU."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)


IN_STEPS = [
    pytest.mark.usefixtures("_on_cpu"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]


def in_steps(test: Any) -> Any:
    for mark in IN_STEPS:
        test = mark(test)
    return test


@in_steps
@refused("freeze that tensor, or add it to the scores as attn_mask of scaled_dot_product_attention", ways=2, slow=True)
def test_a_captured_parameter(told: int) -> Right:
    def slopes(module: Any, ids: Tensor) -> dict[str, Any]:
        place = torch.arange(16)
        if told == 2:
            return {"attn_mask": -module.slopes[:, None, None] * (place[:, None] - place).abs()}
        return {"score_mod": lambda score, b, h, i, j: score - module.slopes[h] * (i - j).abs()}

    return attended(slopes, frozen=told == 1)


@in_steps
@refused("let it read what belongs to an example from a tensor with an example axis, as lengths[b]", slow=True)
def test_scores_by_the_number_of_the_example(told: int) -> Right:
    def scores(module: Any, ids: Tensor) -> dict[str, Any]:
        even = ids[:, -1] % 2 == 0
        return {"score_mod": lambda score, b, h, i, j: torch.where(even[b] if told else b % 2 == 0, score, 0.5 * score)}

    return attended(scores)


# --- regions --------------------------------------------------------------------------------------------------------


class Pooled(torch.autograd.Function):
    """The identity, whose gradient is one for all examples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0].sum(0, keepdim=True).expand(g[0].shape)


class Averaged(Pooled):
    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0].mean(1, keepdim=True).expand(g[0].shape)


@refused("give every example its own gradient in the backward of a custom autograd.Function, or in a hook", ways=2)
def test_a_gradient_of_all_examples_between_regions(told: int) -> Right:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            h = self.blocks[0](x)
            if told < 2:
                return self.blocks[1]((Averaged if told else Pooled).apply(h))
            if h.requires_grad:
                h.register_hook(lambda g: 0.5 * g)
            return self.blocks[1](h)

    return right(dp_compile(Model(), regions="blocks", backend="eager"), X)
