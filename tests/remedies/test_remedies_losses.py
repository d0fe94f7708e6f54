"""Losses outside the model: what their messages say to do, tried."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from private_steps import X, Y
from remedies import Right, plain, refused, right
from torch import Tensor

from dpcompile import dp_compile
from dpcompile.losses import per_example_cross_entropy


@refused("make a loss of each example's own outputs, [B], and call backward on their mean")
def test_a_loss_of_all_examples(told: int) -> Right:
    def loss(outputs: Tensor, rows: Any) -> Tensor:
        centre = 0.5 if told else outputs.mean(0)
        return (outputs - centre).square().sum(1)

    return right(dp_compile(plain(), backend="eager"), X, loss=loss)


@refused("call the loss with reduction='none' and take the mean of what it returns: the weights stay in it")
def test_weights_of_classes(told: int) -> Right:
    def loss(outputs: Tensor, rows: Any) -> Tensor:
        weight = torch.tensor([0.1, 1.0, 3.0])
        return F.cross_entropy(outputs, Y[rows], weight=weight, reduction="none" if told else "mean")

    return right(dp_compile(plain(), backend="eager"), X, loss=loss)


@refused(
    "take the mean of dpcompile.losses.per_example_cross_entropy(outputs, targets), or of another loss of each "
    "example, [B]",
    ways=2,
)
def test_targets_that_are_ignored_by_some(told: int) -> Right:
    targets = torch.where(Y > 1, -100, Y)

    def loss(outputs: Tensor, rows: Any) -> Tensor:
        if told == 1:
            return per_example_cross_entropy(outputs, targets[rows])
        return F.cross_entropy(outputs, targets[rows], reduction="none" if told else "mean")

    return right(dp_compile(plain(), backend="eager"), X, loss=loss)
