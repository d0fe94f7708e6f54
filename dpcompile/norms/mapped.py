"""Norms of sites behind a tail that works row by row, without any example's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from dpcompile.graph.sizes import Size, is_one, product, shape_of
from dpcompile.kernels.mapped_norms import mapped_norms
from dpcompile.norms.convolutions import channels_last
from dpcompile.norms.factors import Factored, factored
from dpcompile.norms.ghost import Sides, merge
from dpcompile.norms.row_maps import row_map
from dpcompile.proof.sites import ParameterGradient

__all__ = ["Mapped", "mapped", "norms_of_mapped"]

_FORMS = ("product", "filters")


@dataclass(frozen=True, slots=True)
class Mapped:
    """A gradient behind a tail that works row by row.

    Attributes:
        forms: its sites as outer products, rows and columns as those of the parameter.
        values: of parameters, that the tail is made of.
        bases: how many of them are multiplied with every column.
    """

    forms: tuple[Factored, ...]
    values: tuple[fx.Node, ...]
    bases: int

    @property
    def operands(self) -> list[fx.Node]:
        """What :func:`norms_of_mapped` takes: the forms' operands, the values, each once for each use."""
        return [*(n for f in self.forms for n in f.operands), *self.values]


def mapped(gradient: ParameterGradient, batch: Size) -> Mapped | None:
    """The gradient as such a tail behind outer products, or None where it is of another kind; on CPUs."""
    like = gradient.gradient.meta["val"]
    found = [factored(s, batch) if s.form in _FORMS else None for s in gradient.sites]
    forms = [f for f in found if f is not None and is_one(f.sizes[0])]
    if len(forms) < len(found) or like.device.type != "cpu" or like.ndim == 0:
        return None
    asked: dict[fx.Node, None] = {}

    def value_of(node: fx.Node) -> Tensor:
        asked[node] = None
        return node.meta["val"]

    tail = row_map(gradient, value_of, like)
    if tail is None:
        return None
    asked |= dict.fromkeys(tail.bases)
    forms = [f.transposed() if tail.flipped else f for f in forms]
    elements = product(shape_of(gradient.sites[0].value.meta["val"]))
    shape = (like.shape[0], elements // like.shape[0])
    if any(f.sizes[2:] != shape for f in forms):
        return None
    return Mapped(tuple(forms), tuple(asked), len(tail.bases))


def norms_of_mapped(gradient: ParameterGradient, found: Mapped, batch: int, values: Sequence[Tensor]) -> Tensor:
    """Squared norms, ``[B]``, float64: right or too large.

    Args:
        gradient: of the parameter.
        found: of it.
        batch: B.
        values: of :attr:`Mapped.operands`; those of the forms in the dtype of sums.
    """
    remaining, sides = list(values), []
    whole = shape_of(gradient.gradient.meta["val"])
    last = all(f.last is not None and shape_of(f.site.value.meta["val"]) == whole for f in found.forms)
    for form in found.forms:
        own = [remaining.pop(0) for _ in form.operands]
        build = form.last if last and form.last is not None else form.build
        sides.append(Sides(*build(*own, batch)))
    (merged,) = merge(sides)
    known = dict(zip(found.values, remaining, strict=True))
    tail = row_map(gradient, known.__getitem__, merged.rows)
    assert tail is not None, "the tail is read twice, by its graph"
    bases = [known[n] for n in tail.bases]
    if last:
        bases = [channels_last(w.reshape(gradient.gradient.meta["val"].shape)) for w in bases]
    return mapped_norms(merged.rows, merged.cols, tail.scale, bases, tail.mixed)
