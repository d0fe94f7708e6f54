"""Models beyond the table."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import Case, ViT, cross_entropy, gpt, images, token_cross_entropy

__all__ = ["MORE_CASES"]


class EmbeddingNet(nn.Module):
    """Word vectors, averaged, and two linear layers: the usual first model for IMDb."""

    def __init__(self, vocabulary: int = 10_000, width: int = 64) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(vocabulary, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, 2]``."""
        return self.head(F.relu(self.hidden(self.embedding(ids).mean(1))))


class LSTMNet(nn.Module):
    """Word vectors, an LSTM, and a linear layer on its mean."""

    def __init__(self, vocabulary: int = 10_000, width: int = 64, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, 2]``."""
        return self.head(self.lstm(self.embedding(ids))[0].mean(1))


class StandardisedConv(nn.Conv2d):
    """A convolution with standardised weights (Qiao et al. 2019, arXiv:1903.10520), as BiT-ResNet has them."""

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-10)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class BiTBlock(nn.Module):
    """Pre-activation bottleneck (Kolesnikov et al. 2020, arXiv:1912.11370)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        middle = outside // 4
        self.norm1, self.conv1 = nn.GroupNorm(32, inside), StandardisedConv(inside, middle, 1, bias=False)
        self.norm2 = nn.GroupNorm(32, middle)
        self.conv2 = StandardisedConv(middle, middle, 3, stride, 1, bias=False)
        self.norm3, self.conv3 = nn.GroupNorm(32, middle), StandardisedConv(middle, outside, 1, bias=False)
        self.shortcut = None
        if stride != 1 or inside != outside:
            self.shortcut = StandardisedConv(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C', H / stride, W / stride]``."""
        y = F.relu(self.norm1(x))
        rest = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(F.relu(self.norm2(self.conv1(y))))
        return rest + self.conv3(F.relu(self.norm3(y)))


def bit_resnet() -> nn.Module:
    """BiT-ResNet's blocks, one per stage."""
    stem = [StandardisedConv(3, 64, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)]
    stages = [BiTBlock(64, 256, 1), BiTBlock(256, 512, 2), BiTBlock(512, 1024, 2), BiTBlock(1024, 2048, 2)]
    head = [nn.GroupNorm(32, 2048), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 10)]
    return nn.Sequential(*stem, *stages, *head)


class LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank addition (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, inside: int, outside: int, rank: int = 8) -> None:
        super().__init__()
        self.base = nn.Linear(inside, outside, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(inside, rank, bias=False), nn.Linear(rank, outside, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inside]`` to ``[..., outside]``."""
        return self.base(x) + 2.0 * self.up(self.down(x))


class LlamaBlock(nn.Module):
    """RMSNorm, rotary attention and a gated MLP; the projections of the attention have adapters, the rest is frozen."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        inner = 256 * math.ceil(8 * width / 3 / 256)
        self.norm1, self.norm2 = (nn.RMSNorm(width).requires_grad_(False) for _ in range(2))
        self.q, self.k, self.v, self.out = (LowRank(width, width) for _ in range(4))
        self.gate, self.rise = (nn.Linear(width, inner, bias=False).requires_grad_(False) for _ in range(2))
        self.fall = nn.Linear(inner, width, bias=False).requires_grad_(False)
        self.heads = heads

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """``[B, T, width]`` and the rotary angles ``[T, width / heads / 2]`` to ``[B, T, width]``."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(rotated(q, turn), rotated(k, turn), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.fall(F.silu(self.gate(y)) * self.rise(y))


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) on ``[B, heads, T, width]``."""
    first, second = x.chunk(2, -1)
    cos, sin = turn.cos(), turn.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class LlamaLoRA(nn.Module):
    """Llama-style blocks with frozen weights and adapters; the head is frozen too."""

    def __init__(self, width: int, depth: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width).requires_grad_(False)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width).requires_grad_(False)
        self.head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
        self.frequencies = [10_000.0 ** (-2 * i * heads / width) for i in range(width // heads // 2)]

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, T, vocabulary]``."""
        places = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        turn = torch.outer(places, torch.tensor(self.frequencies, device=ids.device))
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, turn)
        return self.head(self.norm(x))


def fixed_vit() -> nn.Module:
    """Without trained parameters outside of layers, which module hooks do not know."""
    model = ViT(384, 4, 6)
    model.token.requires_grad_(False)
    model.positions.requires_grad_(False)
    return model


def reviews(context: int, vocabulary: int = 10_000) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A batch of random reviews of two classes."""
    return lambda batch: (torch.randint(0, vocabulary, (batch, context)), torch.randint(0, 2, (batch,)))


def words(context: int, vocabulary: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A batch of random tokens and targets."""
    return lambda batch: (
        torch.randint(0, vocabulary, (batch, context)), torch.randint(0, vocabulary, (batch, context))
    )  # fmt: skip


MORE_CASES = {
    "vit_fixed": Case("`vit`, token and positions not trained", fixed_vit, images(3, 224, 224), 16, cross_entropy),
    "gpt_rows": gpt("`gpt`, positions looked up for every example", 512, 3, 256, 8192, 8, rows=True),
    "gpt_long_rows": gpt("`gpt_long`, positions looked up for every example", 256, 2, 1024, 1024, 4, rows=True),
    "imdb": Case("IMDb embedding net, T=256", EmbeddingNet, reviews(256), 64, cross_entropy),
    "lstm": Case("IMDb LSTM, d=64, T=32", LSTMNet, reviews(32), 64, cross_entropy),
    "vit_b": Case(
        "ViT-B shapes (d=768), 2 of 12 layers, T=197",
        lambda: ViT(768, 2, 12), images(3, 224, 224), 8, cross_entropy,
    ),
    "lora": Case(
        "LoRA (rank 8) on Llama blocks, d=512, 2 layers, T=256",
        lambda: LlamaLoRA(512, 2, 8, 1024), words(256, 1024), 8, token_cross_entropy,
    ),
    "bit_resnet": Case("BiT-ResNet-14, weight-standardised", bit_resnet, images(3, 64, 64), 16, cross_entropy),
    "tiny": Case(
        "MLP 4-8-3, for tests and overhead",
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
        lambda batch: (torch.randn(batch, 4), torch.randint(0, 3, (batch,))), 6, cross_entropy,
    ),
}  # fmt: skip
