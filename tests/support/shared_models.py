"""Models that use a parameter in several blocks."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from block_models import GPT, D, V, dp_compile
from torch import Tensor, nn


class Tied(GPT):
    """A head tied to the embedding, with blocks between them."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.tokens.weight


def private(model: nn.Module, **options: Any) -> Any:
    return dp_compile(model, **{"max_grad_norm": 0.5, "backend": "eager", "regions": "blocks", **options})


def twice(m: Any, blocks: Any, x: Tensor) -> Tensor:
    return blocks[1](blocks[0](blocks[0](x).tanh()))


def in_two_pieces(m: Any, blocks: Any, x: Tensor) -> Tensor:
    return blocks[1](blocks[0](x * m.free)) * m.free


def in_a_piece_and_in_a_block(m: Any, blocks: Any, x: Tensor) -> Tensor:
    return blocks[1](F.linear(blocks[0](x), blocks[1].weight))


def elementwise_and_in_a_block(m: Any, blocks: Any, x: Tensor) -> Tensor:
    return blocks[1](blocks[0](x) * blocks[1].weight[0])


def transposed(m: Any, blocks: Any, x: Tensor) -> Tensor:
    return blocks[1](F.linear(blocks[0](x), blocks[0].weight.t()))


def one_use_without_gradient(m: Any, blocks: Any, x: Tensor) -> Tensor:
    h = blocks[1](blocks[0](x * m.free))
    return h + (h * m.free).detach()


USES = [twice, in_two_pieces, in_a_piece_and_in_a_block, elementwise_and_in_a_block, transposed,
        one_use_without_gradient]  # fmt: skip


class Peeking(nn.Module):
    """A block that reads the other's weight, which no module tells."""

    def __init__(self, other: list[nn.Linear]) -> None:
        super().__init__()
        self.other, self.own = other, nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.own(x).tanh(), self.other[0].weight)
