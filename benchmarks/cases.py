"""Every model by name, also of any size for curves: :func:`find_case`."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from benchmarks.layer_models import LAYERS
from benchmarks.models import CASES, Case, ViT, cross_entropy, gpt, images
from benchmarks.more_models import MORE_CASES

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


FAMILIES: dict[str, Callable[..., Case]] = {"gpt": _gpt, "mlp": _mlp, "vit": _vit, **LAYERS}


def find_case(name: str) -> Case:
    """A model by name, or a family with sizes: ``"gpt:width=128,context=512"``.

    Raises:
        ValueError: there is none of this name or size.
    """
    known = {**CASES, **MORE_CASES}
    if name in known:
        return known[name]
    family, _, sizes = name.partition(":")
    if family in FAMILIES and sizes:
        try:
            return FAMILIES[family](**{k: int(v) for k, v in (pair.split("=") for pair in sizes.split(","))})
        except TypeError as error:
            raise ValueError(f"model {name!r}: {error}") from None
    raise ValueError(f"there is no model {name!r}; there are {', '.join(known)}")
