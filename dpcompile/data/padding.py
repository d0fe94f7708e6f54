"""Batches of a fixed size: collated from real examples alone, then filled up with padding rows.

A collation may sort, and may compute from its examples (the longest length, say): it sees the examples that were drawn
and nothing else, and what it returns is filled up at the end of each tensor's example dimension. Which dimension that
is, is found by collating one example more and looking at what grows.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import default_collate

from dpcompile.data.own_rows import refuse_other_rows
from dpcompile.errors import PrivacyError

__all__ = ["Collated", "PaddedCollate", "Request", "RequestedExamples", "rows_of"]


class Request(NamedTuple):
    """One batch to load: what a batch sampler yields in place of a list of indices."""

    indices: list[int]
    size: int  # of the batch, padding included
    step: int  # the logical step it belongs to
    part: int = 0  # of the logical step's batches
    parts: int = 1
    counted: list[bool] | None = None  # of users: which rows are no repetition, and rows keep their order; None: all
    each: int = 0  # of users: how many of the indices, in a row, are one's

    @property
    def starts_step(self) -> bool:
        """It is the first of its logical step."""
        return self.part == 0

    @property
    def ends_step(self) -> bool:
        """It is the last of its logical step."""
        return self.part == self.parts - 1


class Collated(NamedTuple):
    """What :class:`PaddedCollate` returns; a named tuple, so that memory is pinned inside it.

    Attributes:
        data: what the user's collation made of the examples, filled up.
        mask: bool ``[size]``, False for padding.
        dims: for every tensor of ``data``, in the order of :func:`rows_of`, its example dimension; -1 for none.
        request: what was asked for.
    """

    data: Any
    mask: Tensor
    dims: tuple[int, ...]
    request: Request


class RequestedExamples:
    """The dataset as a DataLoader's workers see it: asked for a :class:`Request`, it gives these examples.

    Args:
        dataset: map-style.
        padding_example: an item of the dataset's structure that is no real example, or None.

    Raises:
        PrivacyError: a dataset whose ``__getitems__`` does not give one item for each index.
    """

    def __init__(self, dataset: Any, padding_example: Any = None) -> None:
        self.dataset, self.padding_example = dataset, padding_example

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, request: Request) -> tuple[Request, list[Any], Any]:
        """The request, its examples, and an item to learn the structure from where none was drawn."""
        every, each = request.indices, request.each or len(request.indices) or 1
        of_index: dict[int, Any] = {}
        for start in range(0, len(every), each):  # a user at a time: the items of a call may come in another order
            of_index |= self._examples(list(dict.fromkeys(every[start : start + each])))
        spare = self.padding_example
        if spare is None and not of_index:
            spare = self.dataset[0]
        return request, [of_index[i] for i in request.indices], spare

    def _examples(self, indices: list[int]) -> dict[int, Any]:
        batched = getattr(self.dataset, "__getitems__", None)
        examples = list(batched(indices)) if batched is not None else [self.dataset[i] for i in indices]
        if len(examples) != len(indices):
            raise PrivacyError(
                f"the dataset's __getitems__ gave {len(examples)} items for {len(indices)} indices: one index is one "
                "example, and epsilon is for one example",
                remedy="give one item for each index; what belongs to one index may be a dimension within the item "
                "(then a sum or mean over it in the model), or expand the dataset first and count each piece",
            )
        return dict(zip(indices, examples, strict=True))


class PaddedCollate:
    """The user's collation, on real examples only, filled up to the size that was asked for.

    Args:
        collate_fn: of the user.
        padding_example: whose collated values fill up; None: zeros, and for a tensor with one integer per example (a
            label, a length, an index) the smallest that was drawn, so that a length stays a length.

    **Guarantee.** Row i of the mask is True exactly if row i of the batch is one of the drawn examples, whatever order
    the collation put them in, and every drawn example has one row.

    ==========================================================  ==========================================
    edge case                                                   outcome
    ==========================================================  ==========================================
    nothing drawn                                               padding rows alone
    a collation that sorts or shuffles                          right: padding comes after it
    one that gives several rows for an example, or drops some   refused
    one that returns a matrix of examples by examples           refused: it mixes them
    a ``PackedSequence``                                        refused: pass padded tensors and lengths
    sequences padded to the longest                             right: the longest of those drawn
    ==========================================================  ==========================================
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any], padding_example: Any = None) -> None:
        self.collate_fn, self.padding_example = collate_fn, padding_example
        self._dims: dict[Any, tuple[int, ...]] = {}  # by structure; found once in each worker

    def __call__(self, fetched: tuple[Request, list[Any], Any]) -> Collated:
        """Collate what :class:`RequestedExamples` gave."""
        request, examples, spare = fetched
        real = len(examples)
        seen = examples or [spare]
        data = self.collate_fn(seen)
        dims = self._example_dims(data, seen)
        _refuse_other_count(data, dims, len(seen))
        if request.counted is not None and self.collate_fn is not default_collate:
            leaves = [(path, leaf, dim) for (path, leaf), dim in zip(_leaves(data), dims, strict=True)]
            refuse_other_rows(leaves, seen, self._alone)
        filling = None if self.padding_example is None else self.collate_fn([self.padding_example])
        values = iter([None] * len(dims) if filling is None else [leaf for _, leaf in _leaves(filling)])
        along = iter(dims)
        padded = _mapped(data, lambda leaf: _filled(leaf, next(along), real, request.size, next(values)))
        tensors = tuple(d for (_, leaf), d in zip(_leaves(data), dims, strict=True) if isinstance(leaf, Tensor))
        mask = torch.arange(request.size) < real
        if request.counted is not None:
            mask[:real] = torch.tensor(request.counted, dtype=torch.bool)
        return Collated(padded, mask, tensors, request)

    def _alone(self, example: Any) -> list[Any]:
        return [leaf for _, leaf in _leaves(self.collate_fn([example]))]

    def _example_dims(self, data: Any, seen: list[Any]) -> tuple[int, ...]:
        """For every leaf of the collated data the dimension that holds the examples, or -1."""
        structure = tuple((path, type(leaf), getattr(leaf, "ndim", None)) for path, leaf in _leaves(data))
        if structure not in self._dims:
            more = list(_leaves(self.collate_fn([*seen, seen[0]])))
            if [path for path, _ in more] != [path for path, _, _ in structure]:
                raise PrivacyError(
                    "collate_fn returns another structure for one example more: its rows cannot be told from padding",
                    remedy="return the same nested tuples, lists and dicts for every batch",
                )
            pairs = zip(_leaves(data), more, strict=True)
            self._dims[structure] = tuple(_grown(path, a, b, len(seen)) for (path, a), (_, b) in pairs)
            if all(dim < 0 for dim in self._dims[structure]):
                raise PrivacyError(
                    "nothing that collate_fn returns grows with the number of examples",
                    remedy="return tensors with a row for each example",
                )
        return self._dims[structure]


def rows_of(data: Any) -> list[Tensor]:
    """The tensors of a batch, in the order of :attr:`Collated.dims`."""
    return [leaf for _, leaf in _leaves(data) if isinstance(leaf, Tensor)]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors, arrays, lists of texts and numbers, and whatever else stands in a batch, with their places."""
    if isinstance(value, PackedSequence):
        raise PrivacyError(
            f"collate_fn returns a PackedSequence{_at(path)}: its rows hold the steps of several examples",
            remedy="return the padded tensor and the lengths (pad_sequence), and mask what is behind the end of each",
        )
    parts = _parts(value)
    if parts is None:
        yield path, value
        return
    for name, part in parts:
        yield from _leaves(part, f"{path}{name}")


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """What a container holds; None for a leaf. Texts in a row are one: that is what default_collate makes of them."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        if not any(map(_holds_rows, value)):
            return None
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)]
    if not isinstance(value, (Tensor, np.ndarray)) and hasattr(value, "__dict__") and not callable(value):
        return [(f".{name}", part) for name, part in vars(value).items()]
    return None


def _holds_rows(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray, Mapping, tuple, list)) or hasattr(value, "__dict__")


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same container with other leaves, in the order of :func:`_leaves`."""
    parts = _parts(value)
    if parts is None:
        return function(value)
    mapped = [_mapped(part, function) for _, part in parts]
    if isinstance(value, Mapping):
        if type(value) is dict:
            return dict(zip(value, mapped, strict=True))
        changed: Any = copy.copy(value)
        for key, part in zip(value, mapped, strict=True):
            changed[key] = part
        return changed
    if isinstance(value, tuple):
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    if isinstance(value, list):
        return type(value)(mapped)
    changed = copy.copy(value)
    for (name, _), part in zip(parts, mapped, strict=True):
        object.__setattr__(changed, name[1:], part)
    return changed


def _lengths(leaf: Any) -> tuple[int, ...]:
    """The sizes of a leaf that may grow with the examples."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        return tuple(leaf.shape)
    return (len(leaf),) if isinstance(leaf, (list, tuple)) else ()


def _grown(path: str, leaf: Any, other: Any, count: int) -> int:
    """The dimension of ``leaf`` that is larger by one in ``other``, of one example more; -1 if none is."""
    sizes, larger = _lengths(leaf), _lengths(other)
    changed = [d for d, (a, b) in enumerate(zip(sizes, larger, strict=False)) if a != b]
    if len(sizes) != len(larger) or len(changed) > 1:
        raise PrivacyError(
            f"collate_fn returns {list(sizes)}{_at(path)} for {count} examples and {list(larger)} for one more: it "
            "has no row for each example",
            remedy="return one row for each example, along one dimension",
        )
    if changed and (sizes[changed[0]], larger[changed[0]]) != (count, count + 1):
        raise PrivacyError(
            f"collate_fn returns {sizes[changed[0]]} rows{_at(path)} for {count} examples, and "
            f"{larger[changed[0]]} for one more: one example is one row, and epsilon is for one example",
            remedy="return one row for each example; what belongs to one example may be a dimension within the row",
        )
    return changed[0] if changed else -1


def _refuse_other_count(data: Any, dims: tuple[int, ...], count: int) -> None:
    for (path, leaf), dim in zip(_leaves(data), dims, strict=True):
        if dim >= 0 and _lengths(leaf)[dim] != count:
            raise PrivacyError(
                f"collate_fn returns {_lengths(leaf)[dim]} rows{_at(path)} for {count} examples: rows cannot be told "
                "from padding, and an example could count several times",
                remedy="return one row for each example",
            )


def _filled(leaf: Any, dim: int, real: int, size: int, filling: Any) -> Any:
    """``leaf`` with ``size`` rows, of which the first ``real`` are its own."""
    if dim < 0:
        return leaf
    if isinstance(leaf, (list, tuple)):
        more = filling[0] if filling is not None else type(leaf[0])()
        return type(leaf)([*leaf[:real], *[more] * (size - real)])
    if isinstance(leaf, np.ndarray):
        given = None if filling is None else torch.from_numpy(np.asarray(filling))
        return _filled(torch.from_numpy(leaf), dim, real, size, given).numpy()
    if real == size and leaf.shape[dim] == size:
        return leaf
    shape = list(leaf.shape)
    shape[dim] = size - real
    if filling is not None:
        rows = _fitted(filling, leaf, dim).expand(shape)
    elif leaf.ndim == 1 and not leaf.is_floating_point() and not leaf.is_complex() and leaf.dtype != torch.bool:
        rows = leaf.min().expand(shape)
    else:
        rows = leaf.new_zeros(()).expand(shape)
    return torch.cat([leaf.narrow(dim, 0, real), rows], dim)


def _fitted(filling: Tensor, leaf: Tensor, dim: int) -> Tensor:
    """The padding example's row, filled up with zeros where the drawn examples are longer."""
    row = leaf.new_zeros([1 if d == dim else n for d, n in enumerate(leaf.shape)])
    if filling.ndim != leaf.ndim or any(a > b for a, b in zip(filling.shape, row.shape, strict=True)):
        raise PrivacyError(
            f"the padding example is collated to {list(filling.shape)}, which does not fit into rows of "
            f"{list(row.shape)}",
            remedy="give a padding_example that is no longer than the shortest example",
        )
    row[tuple(slice(n) for n in filling.shape)] = filling
    return row


def _at(path: str) -> str:
    return f" at {path}" if path else ""
