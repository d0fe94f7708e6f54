"""A batch in parts, one after the other, within one call: how a memory budget is met.

Every part is a call of its own to the compiled model, and has a backward of its own; the user sees one call. An
example's clipped gradient depends on no other example, so the clipped sums of the parts add up to those of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpcompile._torch import pytree
from dpcompile.clipping.groups import Bounds
from dpcompile.errors import PrivacyError, UnsupportedGraphError, running_line
from dpcompile.graph.labels import Examples, Label

__all__ = ["OfSeveralForwards", "PartOfBatch", "WholeBatch", "joined", "split_call"]


@dataclass(eq=False, slots=True)
class WholeBatch:
    """The batch of one call, of which parts may run one after the other; all parts hold this one.

    Attributes:
        parts: how many there are.
        mask: ``[B]`` weights of the whole batch, once a part asked for them.
        rows: bool, of all rows, if some are left out of the losses of users whose other rows count; else None.
        bound: C that it is clipped to, and that of its clip groups, known with the mask.
        refused: why the call may have no backward, known with the mask; or None.
        norms: ``[B]`` of the whole batch, as far as parts had their backward; None before the first.
        filters: parameters by name, as the compiled parts take them; they share one copy.
        delivered: of how many the backward has come.
    """

    parts: int = 1
    mask: Tensor | None = None
    rows: Tensor | None = None
    bound: Bounds = field(default_factory=lambda: Bounds(math.inf))
    refused: PrivacyError | None = None
    norms: Tensor | None = None
    filters: dict[str, Tensor] = field(default_factory=dict)
    delivered: int = 0

    def with_norms(self, norms: Tensor, rows: slice) -> Tensor:
        """The batch's norms once these rows' are known; zero where no backward came yet."""
        if self.parts == 1:
            return norms
        if self.norms is None:
            self.norms = norms.new_zeros(len(norms) * self.parts)
        self.norms[rows] = norms
        return self.norms


@dataclass(frozen=True, slots=True)
class PartOfBatch:
    """Which part of a call's batch a forward runs on.

    Attributes:
        whole: the batch.
        index: of the part.
    """

    whole: WholeBatch = field(default_factory=WholeBatch)
    index: int = 0

    @property
    def left_out(self) -> Tensor | None:
        """:attr:`WholeBatch.rows` of this part."""
        rows = self.whole.rows
        return None if rows is None else rows.chunk(self.whole.parts)[self.index]

    def rows(self, size: int) -> slice:
        """Of a part of this many rows, in the batch."""
        return slice(self.index * size, (self.index + 1) * size)


class OfSeveralForwards:
    """Stands where a batch ran in several forwards and each returned an object, such as a cache of keys and values.

    Most loops never look at it; one that does is told.
    """

    def __init__(self, kind: type, forwards: int) -> None:
        self._kind, self._forwards = kind, forwards

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedGraphError(
            f"the batch ran in {self._forwards} forwards, and each returned a {self._kind.__name__} of its own, which "
            "cannot be put together",
            where=running_line(),
            remedy="read it where one forward runs: without gradients, or with a physical_batch_size as large as the "
            "largest draw and without memory_budget",
        )


def split_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], dims: Sequence[tuple[str, Tensor, int | None]], parts: int
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The call with every tensor that has examples cut along them into ``parts`` equal pieces."""
    along = {id(t): dim for _, t, dim in dims if dim is not None}
    leaves, structure = pytree.tree_flatten((args, kwargs))
    for part in range(parts):

        def piece(leaf: Any, part: int = part) -> Any:
            dim = along.get(id(leaf))
            if dim is None:
                return leaf
            length = leaf.shape[dim] // parts
            return leaf.narrow(dim, part * length, length)

        yield pytree.tree_unflatten([piece(x) for x in leaves], structure)


def joined(results: Sequence[Any], labels: Sequence[Mapping[int, Label]]) -> Any:
    """The parts' results as the batch's.

    Args:
        results: what the model returned for every part.
        labels: for every part ``id(tensor)`` -> how the examples lie in it.

    Raises:
        UnsupportedGraphError: a tensor that is not one of the examples, or a number.
    """
    columns = [pytree.tree_leaves(r) for r in results]
    structure = pytree.tree_flatten(results[0])[1]
    leaves = []
    for values in zip(*columns, strict=True):
        found = [own.get(id(v)) for v, own in zip(values, labels, strict=True)]
        if all(isinstance(x, Examples) for x in found):
            leaves.append(torch.cat(values, dim=found[0].dim))  # type: ignore[union-attr]
        elif all(v is None for v in values):
            leaves.append(None)
        elif not isinstance(values[0], (Tensor, bool, int, float, complex, str)):
            leaves.append(OfSeveralForwards(type(values[0]), len(values)))
        else:
            raise UnsupportedGraphError(
                f"memory_budget needs the batch in parts, and the model returns {type(values[0]).__name__} "
                f"{'of no examples ' if isinstance(values[0], Tensor) else ''}that cannot be put together again",
                remedy="return nothing but tensors with an example axis from forward, or set memory_budget=None and "
                "use smaller batches",
            )
    return pytree.tree_unflatten(leaves, structure)
