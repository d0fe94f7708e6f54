"""What every value of the joint graph has to do with the examples.

Four answers, and one for a batch of a single example:

=============  ========================================================================================
label          meaning
=============  ========================================================================================
``Shared``     no example's data went into it (parameters, constants, buffers, random draws)
``Examples``   slices along one dimension belong to single examples: slice i depends on example i alone
``Summed``     a sum over the examples of a linear function of values that belong to single examples
``Whole``      the batch holds one example, and all of the value belongs to it
``Mixed``      anything else: no example has a part of its own in it
=============  ========================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import fx

from dpcompile.graph.sizes import Size, divide, is_one, product, same

__all__ = ["Examples", "Label", "Mixed", "Own", "Shared", "Summed", "Whole", "as_ranks_own", "reshape_axis"]


@dataclass(frozen=True, slots=True)
class Shared:
    """Independent of every example's data.

    Attributes:
        zero: every element is known to be 0 (the neutral start of an accumulation).
        counts: along this dimension the value is its own position (an ``arange`` from 0), constant along the others.
        cotangent: made from the cotangent of a sum over examples (a loss reduced inside the model), so that
            broadcasting it over the example axis hands every example its own cotangent.
        alike: of a value that passes from one graph to another: along these dimensions all its positions are the same.
        own: of such a value, along which dimensions of the mesh of ranks that share a batch it may be another one on
            each rank, and why.
    """

    zero: bool = False
    counts: int | None = None
    cotangent: bool = False
    alike: tuple[int, ...] = ()
    own: Own = ()

    def __str__(self) -> str:
        text = f"shared, the same along dim {', '.join(map(str, self.alike))}" if self.alike else "shared"
        return text + _told(self.own)


@dataclass(frozen=True, slots=True)
class Examples:
    """Slices along ``dim`` belong to single examples.

    The dimension has size ``outer * B * inner`` and position ``(o * B + b) * inner + i`` belongs to example ``b``:
    ``[B, T]`` flattened has ``inner == T``, ``[T, B]`` flattened has ``outer == T``. ``own``: as in :class:`Shared`.
    """

    dim: int
    outer: Size = 1
    inner: Size = 1
    own: Own = ()

    def same_layout(self, other: Examples) -> bool:
        """Whether both dimensions enumerate the examples in the same order."""
        return same(self.outer, other.outer) and same(self.inner, other.inner)

    def at(self, dim: int) -> Examples:
        """The same layout on another dimension."""
        return replace(self, dim=dim)

    def __str__(self) -> str:
        layout = "B" if is_one(self.outer) else f"{self.outer}·B"
        lies = layout if is_one(self.inner) else f"{layout}·{self.inner}"
        return f"examples on dim {self.dim} ({lies})" + _told(self.own)


@dataclass(frozen=True, slots=True)
class Summed:
    """A sum over the examples, and linear in it ever since."""

    def __str__(self) -> str:
        return "summed over the examples"


@dataclass(frozen=True, slots=True)
class Whole:
    """The batch is one example: every element belongs to it. ``own``: as in :class:`Shared`."""

    own: Own = ()

    def __str__(self) -> str:
        return "the only example" + _told(self.own)


@dataclass(frozen=True, slots=True)
class Mixed:
    """Examples influence each other.

    Attributes:
        reason: what the operation did, in words.
        origin: the first operation that mixed them.
        supported: False where the operation has no rule, rather than a rule that says no.
        remedy: what to do about it, where more is known than what helps in general.
    """

    reason: str
    origin: fx.Node
    supported: bool = True
    remedy: str | None = None

    def __str__(self) -> str:
        return f"mixed by {self.origin}: {self.reason}"


Own: TypeAlias = "tuple[tuple[str, str], ...]"  # dimension of the mesh, and why
Label: TypeAlias = "Shared | Examples | Summed | Whole | Mixed"


def _told(own: Own) -> str:
    """Values that differ along other dimensions of the mesh read otherwise, and are compiled for apart."""
    axes = " and ".join(axis for axis, _ in own if axis)
    return (", another on each rank" + f" of {axes}" * bool(axes)) * bool(own)


def as_ranks_own(label: Label, own: Own) -> Label:
    """The label of a value that leaves a graph and may be another one on each rank; ``()``: is the same on all."""
    assert not own or isinstance(label, (Shared, Examples, Whole)), label
    return replace(label, own=own) if isinstance(label, (Shared, Examples, Whole)) else label


def reshape_axis(axis: Examples, old: Sequence[Size], new: Sequence[Size], batch: Size) -> Examples | None:
    """Follow the example axis through a reshape (row-major order is kept).

    The example of flat position ``f`` is ``(f // I) % B`` with ``I`` the product of ``inner`` and all later sizes. The
    new dimension that carries the axis is the one where both ``I`` and its size divide exactly; for B >= 2 there is at
    most one. The same can be read from the front, which decides where sizes are symbols that do not cancel. None if the
    examples would be spread over several dimensions.
    """
    behind, before = product([axis.inner, *old[axis.dim + 1 :]]), product([axis.outer, *old[: axis.dim]])
    for dim in reversed(range(len(new))):
        inner = divide(behind, product(new[dim + 1 :]))
        outer = None if inner is None else divide(new[dim], product([batch, inner]))
        if inner is not None and outer is not None:
            return Examples(dim, outer, inner)
    for dim in range(len(new)):
        outer = divide(before, product(new[:dim]))
        inner = None if outer is None else divide(new[dim], product([batch, outer]))
        if inner is not None and outer is not None:
            return Examples(dim, outer, inner)
    return None
