"""Whether all ranks read the same examples: a few of them are compared before the first draw."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpcompile.distributed.ranks import gathered
from dpcompile.errors import PrivacyError

__all__ = ["refuse_other_examples"]

_SIMPLE = (str, bytes, int, float, complex, bool, type(None))


def refuse_other_examples(dataset: Any, size: int) -> None:
    """Compare the first, the middle and the last item over the ranks; every rank must call this, and all raise.

    An item that this rank reads otherwise a second time (augmentation), or that is made of unknown objects, is not
    compared. Random numbers are left as they were.

    Args:
        dataset: map-style.
        size: how many items it has.

    Raises:
        PrivacyError: they are not the same on all ranks: an index that is drawn would mean another example on each.
    """
    places = sorted({0, size // 2, size - 1}) if size else []
    everywhere = gathered([_steady(dataset, place) for place in places])
    for place, found in zip(places, zip(*everywhere, strict=True), strict=True):
        if len({value for value in found if value is not None}) > 1:
            raise PrivacyError(
                f"the ranks read different examples: item {place} of the dataset is not the same on all of them",
                remedy="give every rank the whole dataset, in one order (sort what a directory lists, shuffle with one "
                "seed): the loader deals each draw out to the ranks itself",
            )


def _steady(dataset: Any, place: int) -> str | None:
    """A digest of an item; None if it changes from one reading to the next, or is not known."""
    with _random_numbers_kept():
        first, second = (_digest(dataset[place]) for _ in range(2))
    return first if first == second else None


def _digest(item: Any) -> str | None:
    found = hashlib.sha256()
    return found.hexdigest() if all(part is not None and not found.update(part) for part in _parts(item)) else None


def _parts(item: Any) -> Iterator[bytes | None]:
    """The bytes that an item is made of; None for what is not known."""
    if isinstance(item, _SIMPLE):
        yield repr(item).encode()
    elif isinstance(item, Mapping):
        for name in sorted(item, key=repr):
            yield repr(name).encode()
            yield from _parts(item[name])
    elif isinstance(item, (list, tuple)):
        yield f"{len(item)} of".encode()
        for part in item:
            yield from _parts(part)
    elif isinstance(item, Tensor) and item.layout is torch.strided:
        array = item.detach().cpu().contiguous()
        yield f"{array.dtype} {list(array.shape)}".encode()
        yield array.view(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b""
    elif isinstance(item, (np.ndarray, np.generic)) and not item.dtype.hasobject:
        yield f"{item.dtype} {list(item.shape)}".encode() + item.tobytes()
    else:
        yield None


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
