"""Physical batches of one fixed size: real examples first, then padding examples made of zeros.

Padding happens before collation, so it works for whatever structure the dataset and its ``collate_fn`` have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpcompile.errors import PrivacyError

__all__ = ["PaddedDataset", "Request", "collate_padded", "zero_example"]


class Request(NamedTuple):
    """One physical batch to load: what a batch sampler yields in place of a list of indices."""

    indices: list[int]
    size: int  # of the physical batch, padding included
    step: int  # the logical step it belongs to
    starts_step: bool
    ends_step: bool


def zero_example(example: Any) -> Any:
    """An example of the same structure, shapes and dtypes that holds zeros and empty strings only.

    Raises:
        PrivacyError: a part of a type that has no evident zero.

    **Guarantee.** No value of ``example`` is in the result, only its structure.

    =========================================  =====================================
    part                                       becomes
    =========================================  =====================================
    tensor, numpy array or number              zeros of its shape and dtype
    bool, int, float, complex, str, bytes      False, 0, 0.0, 0j, "", b""
    None                                       None
    mapping, tuple, namedtuple, list           the same of its parts' zeros
    dataclass                                  the same class, field by field
    anything else (a PIL image)                PrivacyError: give ``padding_example``
    =========================================  =====================================
    """
    if isinstance(example, Tensor):
        return torch.zeros_like(example)
    if isinstance(example, np.ndarray):
        return np.zeros_like(example)
    if isinstance(example, np.generic):
        return np.zeros_like(example)[()]
    if example is None:
        return None
    if type(example) in (bool, int, float, complex, str, bytes):
        return type(example)()
    if isinstance(example, Mapping):
        zeros = {key: zero_example(value) for key, value in example.items()}
        return zeros if type(example) is dict else type(example)(zeros)  # type: ignore[call-arg]
    if isinstance(example, tuple) and hasattr(example, "_fields"):
        return type(example)(*map(zero_example, example))
    if isinstance(example, (list, tuple)):
        return type(example)(map(zero_example, example))
    if dataclasses.is_dataclass(example) and not isinstance(example, type):
        fields = [f.name for f in dataclasses.fields(example) if f.init]
        return type(example)(**{name: zero_example(getattr(example, name)) for name in fields})
    raise PrivacyError(
        f"no padding example can be made from a part of type {type(example).__module__}.{type(example).__qualname__}",
        remedy="give PoissonLoader a padding_example: an item of the dataset's structure that is no real example",
    )


class PaddedDataset:
    """The dataset as a DataLoader's workers see it: asked for a :class:`Request`, it gives examples and padding.

    Args:
        dataset: map-style.
        padding_example: what fills up; None: zeros in the structure of the dataset's first example.
    """

    def __init__(self, dataset: Any, padding_example: Any = None) -> None:
        self.dataset = dataset
        self._padding = zero_example(dataset[0]) if padding_example is None else padding_example

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, request: Request) -> tuple[Request, list[Any]]:
        batched = getattr(self.dataset, "__getitems__", None)
        if not request.indices:
            examples = []
        elif batched is not None:
            examples = list(batched(request.indices))
        else:
            examples = [self.dataset[i] for i in request.indices]
        return request, examples + [self._padding] * (request.size - len(examples))


def collate_padded(
    fetched: tuple[Request, list[Any]], *, collate_fn: Callable[[list[Any]], Any]
) -> tuple[Any, Tensor, Request]:
    """``(data, mask [physical batch], request)``: the user's collation, with a mask that is False for padding."""
    request, examples = fetched
    return collate_fn(examples), torch.arange(request.size) < len(request.indices), request
