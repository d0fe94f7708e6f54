"""A small language model, and low-rank adapters for its linear layers, in a page."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPT", "LoRA", "adapted"]


class LoRA(nn.Module):
    """A frozen linear layer, and a trained one of low rank beside it (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inside]`` to ``[..., outside]``."""
        return self.base(x) + 2.0 * F.linear(F.linear(x, self.down), self.up)


class Block(nn.Module):
    """Causal attention and a feed-forward network, each added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rise, self.fall = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = width // 32

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same."""
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.fall(F.gelu(self.rise(self.norm_2(x))))


class GPT(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to logits ``[B, T, vocabulary]``."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight, self.bias)


def adapted(model: GPT, rank: int) -> GPT:
    """The model with its matrices frozen, and adapters beside those of its blocks; biases and norms go on learning."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias") or "norm" in name)
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(block, name, LoRA(layer, rank))
    return model
