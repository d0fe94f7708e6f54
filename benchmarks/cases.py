"""Every model by name, also of any size for curves: :func:`find_case`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.layer_models import LAYERS
from benchmarks.models import CASES, Case, ViT, cross_entropy, gpt, images
from benchmarks.more_models import MORE_CASES
from benchmarks.paper_models import PAPER, VISION
from benchmarks.scale.models import LlamaBlock

__all__ = ["FAMILIES", "find_case"]


def _gpt(
    width: int = 256, depth: int = 2, context: int = 256, vocabulary: int = 1024, batch: int = 4, rows: int = 1
) -> Case:
    title = f"GPT d={width}, {depth} layers, T={context}"
    return gpt(title, width, depth, context, vocabulary, batch, rows=bool(rows))


def _mlp(width: int = 512, depth: int = 3, batch: int = 64) -> Case:
    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(width, 10))

    return Case(f"MLP of {depth} layers of {width}", make, images(width), batch, cross_entropy)


def _vit(width: int = 192, depth: int = 2, image: int = 96, batch: int = 8) -> Case:
    heads = max(width // 64, 1)
    make = lambda: ViT(width, depth, heads, image=image)  # noqa: E731
    return Case(f"ViT d={width}, {depth} layers", make, images(3, image, image), batch, cross_entropy)


def _llama_block(
    width: int = 256, heads: int = 4, groups: int = 2, inside: int = 512, context: int = 128, batch: int = 2
) -> Case:
    """One block of Llama 3, in bfloat16, all of it trained; the loss is a square of its outputs."""

    def data(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, context, width).bfloat16(), torch.zeros(count)

    make = lambda: LlamaBlock(width, heads, groups, inside, 0, torch.bfloat16)  # noqa: E731
    loss = lambda outputs, targets: outputs.float().square().mean((1, 2)) + targets  # noqa: E731
    return Case(f"Llama block d={width}, T={context}", make, data, batch, loss)


FAMILIES: dict[str, Callable[..., Case]] = {
    "gpt": _gpt, "llama_block": _llama_block, "mlp": _mlp, "vit": _vit, **LAYERS, **PAPER, **VISION,
}  # fmt: skip


def find_case(name: str) -> Case:
    """A model by name, or a family, with sizes or its own: ``"gpt:width=128,context=512"``, ``"vit_tiny"``.

    Raises:
        ValueError: there is none of this name or size.
    """
    known = {**CASES, **MORE_CASES}
    if name in known:
        return known[name]
    family, _, sizes = name.partition(":")
    if family in FAMILIES:
        pairs = (pair.split("=") for pair in sizes.split(",") if sizes)
        try:
            return FAMILIES[family](**{k: int(v) for k, v in pairs})
        except TypeError as error:
            raise ValueError(f"model {name!r}: {error}") from None
    raise ValueError(f"there is no model {name!r}; there are {', '.join(known)}")
