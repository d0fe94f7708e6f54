"""The models of the table: name -> model, loss and a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "CASES", "CNN", "GPT", "Attention", "BasicBlock", "Block", "Case", "ViT", "cross_entropy", "gpt", "images", "text",
    "token_cross_entropy",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table.

    Attributes:
        title: what the table calls it.
        make: the model, given nothing.
        data: inputs and targets of a batch of the given size.
        batch: examples per step.
        loss: one value per example, from the model's outputs and the targets.
    """

    title: str
    make: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    batch: int
    loss: Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """``[B, classes]`` to ``[B]``."""
    return F.cross_entropy(outputs, targets, reduction="none")


def token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """``[B, T, V]`` to the mean over every example's own tokens, ``[B]``."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean(1)


def mlp() -> nn.Module:
    """784-1024-1024-10."""
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


class CNN(nn.Module):
    """The CIFAR-10 network of Papernot et al. 2021 (arXiv:2007.14191), 605,226 parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in (32, 64, 128):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
            before = width
        layers += [nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 10, 3, padding=1)]
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, 32, 32]`` to ``[B, 10]``."""
        return self.features(x).mean((2, 3))


class BasicBlock(nn.Module):
    """Two convolutions with GroupNorm and a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(16, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(16, outside)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inside == outside
            else nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.GroupNorm(16, outside))
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C', H / stride, W / stride]``."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet10() -> nn.Module:
    """One block per stage, GroupNorm, for 64 x 64 images."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.GroupNorm(16, 64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    stages = [BasicBlock(64, 64, 1), BasicBlock(64, 128, 2), BasicBlock(128, 256, 2), BasicBlock(256, 512, 2)]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Attention(nn.Module):
    """Self-attention with separate projections."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block with the norms in front."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer."""

    def __init__(
        self, width: int, depth: int, heads: int, image: int = 224, patch: int = 16, classes: int = 10
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, image, image]`` to ``[B, classes]``."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class GPT(nn.Module):
    """A language model with learned positions and a head of its own.

    Args:
        width: d.
        depth: layers.
        heads: of every layer.
        context: T.
        vocabulary: V.
        rows: look the positions up for every example, as module hooks need it, instead of once for the batch.
    """

    def __init__(
        self, width: int, depth: int, heads: int, context: int, vocabulary: int, *, rows: bool = False
    ) -> None:
        super().__init__()
        self.rows = rows
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, T, vocabulary]``."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(places.expand_as(ids) if self.rows else places)
        return self.head(self.norm(self.blocks(x)))


def images(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A batch of noise images of ten classes."""
    return lambda batch: (torch.randn(batch, *shape), torch.randint(0, 10, (batch,)))


def text(context: int, vocabulary: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A batch of random tokens, and the next ones."""

    def draw(batch: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(0, vocabulary, (batch, context + 1))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    return draw


def gpt(title: str, width: int, depth: int, context: int, vocabulary: int, batch: int, *, rows: bool = False) -> Case:
    """A language model of these sizes, heads of 64; ``rows`` as in :class:`GPT`."""
    heads = max(width // 64, 1)
    return Case(
        title,
        lambda: GPT(width, depth, heads, context, vocabulary, rows=rows),
        text(context, vocabulary),
        batch,
        token_cross_entropy,
    )


CASES = {
    "mlp": Case("MLP 784-1024-1024-10", mlp, images(784), 256, cross_entropy),
    "cnn": Case("CIFAR CNN, 605k", CNN, images(3, 32, 32), 64, cross_entropy),
    "resnet": Case("ResNet-10 with GroupNorm", resnet10, images(3, 64, 64), 16, cross_entropy),
    "vit": Case("ViT, d=384, 4 layers, T=197", lambda: ViT(384, 4, 6), images(3, 224, 224), 16, cross_entropy),
    "gpt": gpt("GPT, d=512, 3 layers, T=256, V=8192", 512, 3, 256, 8192, 8),
    "gpt_long": gpt("GPT, d=256, 2 layers, T=1024, V=1024", 256, 2, 1024, 1024, 4),
}
