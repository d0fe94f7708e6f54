"""A private model and its optimizer without a loader, and steps of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from remedies import Right, plain, stepped
from torch import Tensor, nn

from dpcompile import DPOptimizer, dp_compile

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
Y = torch.arange(8) % 3


def parts(model: nn.Module | None = None, **options: Any) -> tuple[Any, DPOptimizer]:
    private_model: Any = dp_compile(plain() if model is None else model, backend="eager")
    return private_model, over(private_model, **options)


def over(model: Any, parameters: Any = None, **options: Any) -> DPOptimizer:
    inner = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr=0.1)
    return DPOptimizer(inner, model, **{"noise_multiplier": 1.0, "expected_batch_size": 8, **options})


def backward(model: Any, x: Tensor = X, y: Tensor = Y) -> None:
    F.cross_entropy(model(x), y).backward()


def steps(model: Any, optimizer: Any, count: int = 1) -> Right:
    before, begun = [p.detach().clone() for p in model.parameters() if p.requires_grad], optimizer.logical_step
    for _ in range(count):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, before, begun + count)
