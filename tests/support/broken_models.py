"""Models with graph breaks."""

from __future__ import annotations

import torch
from block_models import GPT, D, V
from torch import Tensor, nn

graph_break = torch._dynamo.graph_break


class BrokenGPT(GPT):
    """A tied head behind a break."""

    def __init__(self) -> None:
        super().__init__(2)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        graph_break()
        for block in self.blocks:
            x = block(x, causal=True)
        x = self.norm(x)
        graph_break()
        return self.head(x)
