"""A small classifier and labelled vectors for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["labelled", "net"]


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3))


def labelled(count: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(count, 6), torch.randint(0, 3, (count,))
