"""The models of the papers' experiments, layer by layer, of any batch: families for :func:`benchmarks.cases.find_case`.

The four end-to-end models of Yousefpour et al. 2021 ("Opacus", arXiv:2109.12298) are those of Subramani et al. 2020
(arXiv:2010.09063), whose code has the layers (github.com/TheSalon/fast-dpsgd, pytorch.py). ViT and BiT-ResNet are the
kinds of models of Beltran et al. 2024 (arXiv:2406.17298): Dosovitskiy et al. 2020 (arXiv:2010.11929), table 1, the two
small ones of Touvron et al. 2020 (arXiv:2012.12877); Kolesnikov et al. 2020 (arXiv:1912.11370).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import CNN, Case, ViT, cross_entropy, images
from benchmarks.more_models import BiTBlock, StandardisedConv, reviews

__all__ = ["DATASETS", "PAPER", "VISION", "Embedded", "MnistCNN", "WordLSTM", "bit"]

WORDS = 10_004  # ten thousand of IMDb's, and four marks
LENGTH = 256  # of a review, in words
DATASETS = {"opacus_mnist": 60_000, "opacus_cifar": 50_000, "opacus_embedding": 25_000, "opacus_lstm": 25_000}


class MnistCNN(nn.Module):
    """26,010 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 8, 2, padding=3), nn.Conv2d(16, 32, 4, 2)
        self.hidden, self.head = nn.Linear(512, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 1, 28, 28]`` to ``[B, 10]``."""
        for convolution in (self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(convolution(x)), 2, 1)
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Embedded(nn.Module):
    """160,098 parameters: the mean of word vectors, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, 2]``."""
        return self.head(self.words(ids).mean(1))


class WordLSTM(nn.Module):
    """1,081,002 trained parameters: word vectors, an LSTM, and a linear layer on the mean of its outputs.

    That number has one bias for each gate. ``nn.LSTM`` has two, which do the same: its second one is frozen at zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(WORDS, 100), nn.LSTM(100, 100, batch_first=True)
        self.head = nn.Linear(100, 2)
        second = self.lstm.get_parameter("bias_hh_l0").requires_grad_(False)
        nn.init.zeros_(second)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, 2]``."""
        return self.head(self.lstm(self.words(ids))[0].mean(1))


class Sizes(NamedTuple):
    """Of a ViT."""

    width: int
    depth: int
    heads: int
    patch: int = 16


VITS = {
    "tiny": Sizes(192, 12, 3), "small": Sizes(384, 12, 6), "base": Sizes(768, 12, 12), "large": Sizes(1024, 24, 16),
    "huge": Sizes(1280, 32, 16, 14),
}  # fmt: skip
_STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BITS = ((50, 1), (101, 1), (50, 3), (101, 3), (152, 4))  # layers, and times the width


def bit(layers: int, times: int, classes: int = 10) -> nn.Module:
    """BiT-ResNet: pre-activation bottlenecks with GroupNorm and standardised weights, all so many times as wide."""
    parts: list[nn.Module] = [StandardisedConv(3, 64 * times, 7, 2, 3, bias=False)]
    parts += [nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2)]
    inside = 64 * times
    for stage, blocks in enumerate(_STAGES[layers]):
        outside = 256 * times << stage
        for i in range(blocks):
            parts.append(BiTBlock(inside, outside, 2 if stage and not i else 1))
            inside = outside
    parts += [nn.GroupNorm(32, inside), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(inside, classes))


def _paper(
    title: str, make: Callable[[], nn.Module], data: Callable[[int], tuple[Tensor, Tensor]]
) -> Callable[..., Case]:
    return lambda batch=64: Case(title, make, data, batch, cross_entropy)


def _vit(name: str, sizes: Sizes) -> Callable[..., Case]:
    def case(batch: int = 8, image: int = 224, depth: int = sizes.depth) -> Case:
        make = lambda: ViT(sizes.width, depth, sizes.heads, image, sizes.patch)  # noqa: E731
        return Case(f"ViT-{name}/{sizes.patch}", make, images(3, image, image), batch, cross_entropy)

    return case


def _bit(layers: int, times: int) -> Callable[..., Case]:
    def case(batch: int = 8, image: int = 224) -> Case:
        return Case(f"BiT-{layers}x{times}", lambda: bit(layers, times), images(3, image, image), batch, cross_entropy)

    return case


PAPER: dict[str, Callable[..., Case]] = {
    "opacus_mnist": _paper("MNIST CNN", MnistCNN, images(1, 28, 28)),
    "opacus_cifar": _paper("CIFAR-10 CNN", CNN, images(3, 32, 32)),
    "opacus_embedding": _paper("IMDb embedding", Embedded, reviews(LENGTH, WORDS)),
    "opacus_lstm": _paper("IMDb LSTM", WordLSTM, reviews(LENGTH, WORDS)),
}
VISION: dict[str, Callable[..., Case]] = {
    **{f"vit_{name}": _vit(name, sizes) for name, sizes in VITS.items()},
    **{f"bit_{layers}x{times}": _bit(layers, times) for layers, times in BITS},
}
