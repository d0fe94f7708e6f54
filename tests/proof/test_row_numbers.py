"""What an example gets may not depend on its row number; and what only looks as if it did is right."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn

import dpcompile
from dpcompile import DPCompileError, ExampleMixingError

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have

B, T, D = 4, 3, 6


class Net(nn.Module):
    """A linear layer, and what the test does with its output ``[B, T, D]``."""

    table: Tensor

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(D, D), function
        self.register_buffer("table", torch.randn(8, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.layer(x))


def positions_of_the_other_layout(net: Net, x: Tensor) -> Tensor:
    return x + net.table[: x.size(0), None]


def row_numbers(net: Net, x: Tensor) -> Tensor:
    return x + torch.arange(len(x)).view(-1, 1, 1)


def first_half(net: Net, x: Tensor) -> Tensor:
    return torch.where(torch.arange(len(x)).view(-1, 1, 1) < len(x) // 2, x, 0.0)


def counted_up(net: Net, x: Tensor) -> Tensor:
    return x * torch.ones(len(x)).cumsum(0).view(-1, 1, 1)


def triangle(net: Net, x: Tensor) -> Tensor:
    return x.flatten(1).tril()


def rows_of_a_table(net: Net, x: Tensor) -> Tensor:
    return x + nn.functional.embedding(torch.arange(len(x)), net.table)[:, None]


def narrow_numbers(net: Net, x: Tensor) -> Tensor:
    return x[torch.arange(len(x)).clamp(max=2)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("function", "source"),
    [
        (positions_of_the_other_layout, "'table'"),
        (row_numbers, "`arange` "),
        (first_half, "`arange` "),
        (counted_up, "`cumsum` "),
        (triangle, "row number"),
        (rows_of_a_table, "`arange` "),
        (narrow_numbers, "by an index"),
    ],
)
def test_row_numbers_are_refused(function: Callable[[Any, Tensor], Tensor], source: str, dynamic: bool) -> None:
    private = dp_compile(Net(function), backend="eager", dynamic=dynamic)
    with pytest.raises(ExampleMixingError, match=source) as refused:
        private(torch.randn(B, T, D))
    text = str(refused.value)
    assert re.search(rf"test_row_numbers\.py:\d+, in {function.__name__}", text) and "what to do: " in text, text


def expanded_positions(net: Net, x: Tensor) -> Tensor:
    return x + net.table[: x.size(1)].expand(len(x), -1, -1).clone()


def tiled_positions(net: Net, x: Tensor) -> Tensor:
    b, t, d = x.shape
    return (x.reshape(b * t, d) + net.table[:t].repeat(b, 1) + (torch.arange(b * t) % t)[:, None]).view(b, t, d)


def causal(net: Net, x: Tensor) -> Tensor:
    mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril().expand(len(x), 1, -1, -1)
    q = x.unsqueeze(1)
    return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask).squeeze(1)


def own_last(net: Net, x: Tensor) -> Tensor:
    return x[torch.arange(len(x)), (x.detach().sum((1, 2)) > 0).long()]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("batch", [B, T])
@pytest.mark.parametrize("function", [expanded_positions, tiled_positions, causal, own_last])
def test_look_alikes_are_right(function: Callable[[Any, Tensor], Tensor], batch: int, dynamic: bool) -> None:
    """With as many examples as positions, too."""
    model, x, loss = Net(function), torch.randn(batch, T, D), PseudoLoss(batch)
    private = dp_compile(copy.deepcopy(model), backend="eager", dynamic=dynamic)
    train_step(private, (x,), {}, loss)
    assert_right(private, clip(per_example_gradients(model, (x,), {}, loss), 1.0), 1e-4)


def noisy(net: Net, x: Tensor) -> Tensor:
    drop = torch.rand(len(x), 1, 1) > 0.3
    return nn.functional.dropout(x * drop + 0.1 * torch.randn_like(x), 0.2) + torch.randn(D)


def first_draw(net: Net, x: Tensor) -> Tensor:
    draw = torch.rand(len(x), 1, 1)
    return x * draw + (draw == draw[:1])


def sorted_draws(net: Net, x: Tensor) -> Tensor:
    return x + torch.rand(len(x), 1, 1).sort(0).values


def test_draws_for_each_example_are_right() -> None:
    """Noise, dropout, stochastic depth; one draw for all."""
    private = dp_compile(Net(noisy), backend="eager")
    train_step(private, (torch.randn(B, T, D),), {}, PseudoLoss(B))
    assert torch.isfinite(private.grad_norms).all()


@pytest.mark.parametrize("function", [first_draw, sorted_draws])
def test_draws_that_tell_rows_apart_are_refused(function: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(ExampleMixingError):
        dp_compile(Net(function), backend="eager")(torch.randn(B, T, D))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.float32])
def test_own_position_counts_as_far_as_its_dtype(dtype: torch.dtype) -> None:
    """Few examples are told apart; with symbolic sizes nobody knows how many there are."""

    def own(net: Net, x: Tensor) -> Tensor:
        return x[torch.arange(len(x)).to(dtype).long()]

    few = torch.randn(B, T, D)
    assert dp_compile(Net(own), backend="eager", dynamic=False)(few).shape == few.shape
    with pytest.raises(ExampleMixingError, match="by an index"):
        dp_compile(Net(own), backend="eager", dynamic=True)(few)
    if dtype != torch.float32:
        with pytest.raises(ExampleMixingError, match="by an index"):
            dp_compile(Net(own), backend="eager", dynamic=False)(torch.randn(2100, 1, D))


def test_clipping_by_row_number_is_refused() -> None:
    clipping = lambda norms, c: (c / norms).clamp(max=1) * torch.linspace(0, 1, len(norms))  # noqa: E731
    private = dp_compile(nn.Linear(D, 2), clipping=clipping, backend="eager")
    with pytest.raises(DPCompileError):
        train_step(private, (torch.randn(B, D),), {}, PseudoLoss(B))


class Blocks(nn.Module):
    """A mask, or something else, made around the blocks that use it."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks, self.make = nn.ModuleList([Block(), Block()]), make

    def forward(self, x: Tensor) -> Tensor:
        given = self.make(x)
        for block in self.blocks:
            x = block(x, given)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        return self.layer(x).tanh() + given


def test_between_regions_what_is_the_same_for_all_stays_so() -> None:
    """A value made in one region and used in another."""
    model = Blocks(lambda x: torch.arange(T * 1.0)[:, None].expand(len(x), T, 1).clone())
    x, loss = torch.randn(B, T, D), PseudoLoss(B)
    private = dp_compile(copy.deepcopy(model), backend="eager", regions="blocks")
    train_step(private, (x,), {}, loss)
    assert_right(private, clip(per_example_gradients(model, (x,), {}, loss), 1.0), 1e-4)
    numbered = dp_compile(
        Blocks(lambda x: torch.arange(len(x) * 1.0)[:, None, None]), backend="eager", regions="blocks"
    )
    with pytest.raises(ExampleMixingError, match="row number"):
        numbered(x)
