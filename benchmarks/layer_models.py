"""One layer each, for the micro-benchmarks; sizes as in Opacus' own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.models import Case

__all__ = ["LAYERS"]


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of a sequence with itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same."""
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    """The outputs of an ``nn.LSTM``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same."""
        return self.lstm(x)[0]


def weighed(outputs: Tensor, weights: Tensor) -> Tensor:
    """A loss of every output entry: ``[B, ...]`` and ``[B]`` to ``[B]``."""
    return weights * outputs.flatten(1).square().sum(1)


def _layer(title: str, make: Callable[[], nn.Module], *shape: int, words: int = 0) -> Callable[..., Case]:
    def data(batch: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randint(0, words, (batch, *shape)) if words else torch.randn(batch, *shape)
        return inputs, torch.rand(batch)

    def case(batch: int = 32) -> Case:
        return Case(title, make, data, batch, weighed)

    return case


LAYERS: dict[str, Callable[..., Case]] = {
    "linear": _layer("Linear 512-512", lambda: nn.Linear(512, 512), 512),
    "conv": _layer("Conv2d 64-64, 3x3, 32x32", lambda: nn.Conv2d(64, 64, 3, padding=1), 64, 32, 32),
    "embedding": _layer("Embedding 20000 x 100, T=64", lambda: nn.Embedding(20_000, 100), 64, words=20_000),
    "layer_norm": _layer("LayerNorm 64, T=256", lambda: nn.LayerNorm(64), 256, 64),
    "group_norm": _layer("GroupNorm 16, 256 channels, 16x16", lambda: nn.GroupNorm(16, 256), 256, 16, 16),
    "attention": _layer("MultiheadAttention 128, 4 heads, T=64", lambda: SelfAttention(128, 4), 64, 128),
    "lstm_layer": _layer("LSTM 64, T=16", lambda: Recurrent(64), 16, 64),
}
