"""Sites as sums of outer products: gradient of example b = sum over t of rows[b, :, t, :]^T cols[b, :, t, :].

Shape letters, here and wherever tensors of examples are meant: B examples, K independent blocks (groups, heads), T
positions, P rows, D columns; of images N images, F frames (images) of an example, C channels, G groups, S spatial
positions of the filter. A one-hot side (an embedding's rows) is kept as its index.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile.graph.labels import Examples
from dpcompile.graph.sent_products import all_experts
from dpcompile.graph.sizes import Size, product, shape_of, size
from dpcompile.graph.slices import accumulation_dtype, in_front
from dpcompile.kernels.by_index import LEFT_OUT, has_sums_by_index
from dpcompile.norms.chains import chain_of
from dpcompile.norms.convolutions import (
    Window,
    each_gradient,
    each_norm,
    filled,
    ghost_of_patches,
    patch_columns,
    patch_columns_last,
    positions_in_rows,
)
from dpcompile.norms.experts import expert_blocks, expert_gradients, norms_of_experts, positions_of_an_expert
from dpcompile.norms.heads import HeadRows, head_each, head_sides, norms_of_head
from dpcompile.norms.tables import zeroed_positions
from dpcompile.proof.site_kinds import Form
from dpcompile.proof.sites import ParameterGradient, Site

__all__ = ["Factored", "alone", "bare", "factored", "oriented"]


@dataclass(frozen=True, slots=True)
class Factored:
    """How a site is written as a sum of outer products.

    Attributes:
        site: the site.
        operands: the nodes that :attr:`build` takes.
        build: from their values and B to ``(rows [B, K, T, P] or index [B, T], cols [B, K, T, D] or index [B, T])``.
        sizes: K, T, P, D.
        one_hot: which side is an index: ``"rows"``, ``"cols"`` or None.
        unfolded: elements per example of the copy that a ghost norm makes (the patches of a convolution, or the Gram
            matrix of its pixels).
        aligned: rows and columns are those of the parameter itself, not only of the site.
        each: from the operands' values, B, whether memory may stay mapped and whether the result is kept to every
            example's value of the site, ``[B, *shape]``, and its squared norm, where there is a better way than the
            product of the sides.
        norms: from the operands' values and B to the squared norms, where they come without the values.
        filled: how full the tiles of our filter kernel are, which makes both; 0 where it does not.
        last: as :attr:`build`, with the columns of filters in another order: the channels last.
        ghost: from the same to the squared norms by Gram matrices, where those of the columns are cheaper than building
            the columns.
        bare: of a table, the same without the zeros that are written into the cotangents at some positions: the index
            is :data:`dpcompile.kernels.by_index.LEFT_OUT` there.
        flipped: rows and columns were exchanged: the first operand is the columns'.
        chain: what the tail does to the site's value (rows and columns of a flipped site are exchanged already).
        layout: how rows and columns lie in the parameter; sites of equal layouts add up along T.
        on_ranks: the gradient of an example lies on several ranks: rule "ghost" is the only one.
    """

    site: Site
    operands: tuple[fx.Node, ...]
    build: Callable[..., tuple[Tensor, Tensor]]
    sizes: tuple[Size, Size, Size, Size]
    one_hot: str | None = None
    unfolded: Size = 0
    aligned: bool = False
    each: Callable[..., tuple[Tensor, Tensor]] | None = None
    norms: Callable[..., Tensor] | None = None
    filled: float = 0.0
    last: Callable[..., tuple[Tensor, Tensor]] | None = None
    ghost: Callable[..., Tensor] | None = None
    bare: Factored | None = None
    flipped: bool = False
    chain: tuple[Any, ...] = ("identity",)
    layout: Hashable = None
    on_ranks: bool = False

    def transposed(self) -> Factored:
        """The same with rows and columns exchanged."""
        k, t, p, d = self.sizes
        build = self.build
        swapped = {"rows": "cols", "cols": "rows", None: None}[self.one_hot]
        return replace(
            self,
            build=lambda *a: build(*a)[::-1],
            sizes=(k, t, d, p),
            one_hot=swapped,
            last=None,
            ghost=None,
            bare=None if self.bare is None else self.bare.transposed(),
            flipped=not self.flipped,
        )


def factored(site: Site, batch: Size) -> Factored | None:
    """The site as outer products of real numbers, or None where it is not of that form."""
    if any(o.meta["val"].is_complex() for o in site.operands.values()):
        return None
    return None if site.form is None else _MAKERS[site.form](site, batch)


def oriented(gradient: ParameterGradient, batch: Size, through: Collection[str] = ()) -> list[Factored] | None:
    """All sites of a parameter as outer products in one common orientation, or None.

    Each site must reach the gradient through a chain of its own of norm-preserving operations, joined by plain adds,
    and the chains must place rows and columns alike (a transposed chain exchanges them).

    Args:
        gradient: of the parameter.
        batch: B.
        through: names of operations that chains may have besides; the forms are without them.
    """
    forms = []
    reference: object = None
    for site in gradient.sites:
        form = factored(site, batch)
        chain = chain_of(site.value, gradient, through)
        if form is None or chain is None or site.value.meta["val"].dtype.is_complex:
            return None
        if chain == ("transposed",):
            form, chain = form.transposed(), ("identity",)
        layout = (chain, form.sizes[0], form.sizes[2], form.sizes[3], str(site.kind) if form.sizes[0] != 1 else "")
        if reference is not None and layout != reference:
            return None
        reference = layout
        forms.append(replace(form, aligned=chain == ("identity",), chain=chain, layout=layout))
    return forms


def bare(forms: Sequence[Factored]) -> list[Factored]:
    """The same, where all sites are look-ups each without the zeros in its cotangents (:attr:`Factored.bare`)."""
    if any(f.one_hot is None for f in forms):
        return list(forms)
    return [f if f.bare is None else replace(f.bare, aligned=f.aligned, chain=f.chain, layout=f.layout) for f in forms]


def alone(forms: Sequence[Factored]) -> Factored | None:
    """The only form, if its norms come without values; they are the gradient's, as its tail preserves norms."""
    return forms[0] if len(forms) == 1 and forms[0].norms is not None else None


def _side(value: Tensor, axis: Examples | None, dim: int, batch: int) -> Tensor:
    """Bring the contracted dimension of a matrix, or of a batch of matrices, to ``[B, K, T, features]``."""
    axis = axis or Examples(dim)
    front = in_front(value, axis, batch)  # [B, (K,) .., T at dim, ..]
    front = front.movedim(dim + 1, -2)
    return front if front.ndim == 4 else front.unsqueeze(1)


def _product(site: Site, batch: Size) -> Factored:
    """Of matrices, or of batches of them: ``x`` lies along the examples with its last dimension, ``y`` with the one
    before.
    """
    axes, (x, y) = site.axes, (site.operands["self"], site.operands["mat2"])
    layout = next(iter(axes.values()))
    *blocks, p, _ = shape_of(x.meta["val"])
    dim = len(blocks)

    def build(x: Tensor, y: Tensor, b: int) -> tuple[Tensor, Tensor]:
        return _side(x, layout.at(dim + 1), dim + 1, b), _side(y, layout.at(dim), dim, b)

    d = shape_of(y.meta["val"])[-1]
    return Factored(site, (x, y), build, (blocks[0] if blocks else 1, product([layout.outer, layout.inner]), p, d))


def _index_put(site: Site, batch: Size) -> Factored | None:
    indices: Any = site.operation.args[1]
    values = site.operands["values"]
    table = shape_of(site.value.meta["val"])
    shape = shape_of(values.meta["val"])
    if len(indices) != 1 or indices[0] is None or len(table) != 2 or "values" not in site.axes:
        return None
    index: fx.Node = indices[0]
    if shape_of(index.meta["val"]) != shape[:-1]:
        return None
    axis, rows = site.axes["values"], table[0]
    if not isinstance(rows, int):
        return None  # negative indices could not be told from those that they are equal to

    def build(index: Tensor, values: Tensor, b: int) -> tuple[Tensor, Tensor]:
        wrapped = torch.where(index < 0, index + rows, index)
        return in_front(wrapped, axis, b).flatten(1), in_front(values, axis, b).flatten(1, -2).unsqueeze(1)

    positions = product([axis.outer, axis.inner, *(n for i, n in enumerate(shape[:-1]) if i != axis.dim)])
    form = Factored(site, (index, values), build, (1, positions, rows, table[1]), one_hot="rows")
    found = zeroed_positions(values)
    if found is None or not has_sums_by_index(values.meta["val"].device, accumulation_dtype(values.meta["val"].dtype)):
        return form

    def bare(index: Tensor, left_out: Tensor, source: Tensor, b: int) -> tuple[Tensor, Tensor]:
        index, cols = build(index, source, b)
        return torch.where(in_front(left_out, axis, b).flatten(1), LEFT_OUT, index), cols

    return replace(form, bare=replace(form, operands=(index, *found), build=bare))


def _experts(site: Site, batch: Size) -> Factored:
    """Blocks are the experts, those of all ranks; T is what comes to one of them."""
    left, right, expert = (site.operands[name] for name in ("left", "right", "expert"))
    axis, (count, p, d) = next(iter(site.axes.values())), site.value.meta["val"].shape
    on_ranks = site.form == "experts of ranks"  # what is summed here, of other ranks' examples too, is no example's
    if on_ranks:
        count = all_experts(int(count), str(site.operation.args[4]))

    def each(left: Tensor, right: Tensor, expert: Tensor, b: int, reuse: bool, kept: bool) -> tuple[Tensor, Tensor]:
        return expert_gradients(left, right, expert, count, axis, b)

    def build(left: Tensor, right: Tensor, expert: Tensor, b: int) -> tuple[Tensor, Tensor]:
        return expert_blocks(left, right, expert, count, axis, b)

    def norms(left: Tensor, right: Tensor, expert: Tensor, b: int) -> Tensor:
        return norms_of_experts(left, right, expert, count, axis, b)

    sizes = (count, positions_of_an_expert(product([axis.outer, axis.inner]), count), size(p), size(d))
    ways = {} if on_ranks else {"each": each, "norms": norms}
    return Factored(site, (left, right, expert), build, sizes, ghost=norms, on_ranks=on_ranks, **ways)


def _head(site: Site, batch: Size) -> Factored:
    """Rows are the logits' gradients: they are all of them only where sides are asked for."""
    names = ("cotangent", "hidden", "weight", "bias", "labels", "totals")
    operands = tuple(site.operands[n] for n in names if n in site.operands)
    axis, of_bias = next(iter(site.axes.values())), bool(site.operation.args[6])

    def build(*values: Any) -> tuple[Tensor, Tensor]:
        return head_sides(HeadRows(values[:-1], axis, values[-1]), of_bias)

    def norms(*values: Any) -> Tensor:
        return norms_of_head([HeadRows(values[:-1], axis, values[-1])], of_bias)

    def each(*values: Any) -> tuple[Tensor, Tensor]:
        *given, b, _, _ = values
        return head_each(HeadRows(given, axis, b), of_bias)

    shape = shape_of(site.value.meta["val"])
    sizes = (1, product([axis.outer, axis.inner]), shape[0], 1 if of_bias else shape[1])
    return Factored(site, operands, build, sizes, each=each, norms=norms, ghost=norms)


_BLOCK = 16  # channels, in the layouts of oneDNN
_NARROW = 64  # columns: patches of so few numbers (those of colours) are unfolded sooner than convolved in groups


def _convolution(site: Site, batch: Size) -> Factored | None:
    if site.value is site.operation or site.value.args[1] != 1:
        return None  # the bias of a convolution is a plain sum
    arguments: Any = site.operation.args
    transposed, groups = arguments[7], arguments[9]
    cotangent, source = site.operands["grad_output"], site.operands["input"]
    layout = next(iter(site.axes.values()))
    shape = tuple(int(size(n)) for n in site.value.meta["val"].shape)
    # One number may stand for all dimensions.
    stride, padding, dilation = (list(a) * (len(shape) - 2 if len(a) == 1 else 1) for a in arguments[4:7])
    window = Window(shape[2:], stride, padding, dilation, groups)
    options = (stride, padding, dilation, transposed, arguments[8], groups)
    small, large = (source, cotangent) if transposed else (cotangent, source)

    def build(small: Tensor, large: Tensor, b: int) -> tuple[Tensor, Tensor]:
        rows = small.flatten(2).unflatten(1, (groups, -1))  # [N, G, P, S]
        return positions_in_rows(rows, layout, b), patch_columns(large, window, layout, b, small.shape[2:])

    def last(small: Tensor, large: Tensor, b: int) -> tuple[Tensor, Tensor]:
        rows = positions_in_rows(small.flatten(2).unsqueeze(1), layout, b)
        return rows, patch_columns_last(large, window, layout, b, small.shape[2:])

    full = filled(source.meta["val"], shape, window)

    def each(small: Tensor, large: Tensor, b: int, reuse: bool, kept: bool) -> tuple[Tensor, Tensor]:
        source, cotangent = (small, large) if transposed else (large, small)
        return each_gradient(cotangent, source, layout, b, shape, options, full > 0, reuse, kept)

    def norms(small: Tensor, large: Tensor, b: int) -> Tensor:
        source, cotangent = (small, large) if transposed else (large, small)
        return each_norm(cotangent, source, layout, b, shape, options)

    def ghost(small: Tensor, large: Tensor, b: int) -> Tensor:
        source, cotangent = (small, large) if transposed else (large, small)
        return ghost_of_patches(cotangent, source, window, layout, b, shape, options)

    frames, seen = product([layout.outer, layout.inner]), shape_of(small.meta["val"])[2:]
    positions, columns = product([frames, *seen]), product(shape[1:])
    pixels = product([frames, *(n + 2 * p for n, p in zip(shape_of(large.meta["val"])[2:], padding, strict=True))])
    whole = all(isinstance(n, int) for n in (positions, pixels))
    cheaper = whole and pixels**2 <= positions**2 * prod(window.kernel)  # type: ignore[operator]
    sizes = (groups, positions, shape[0] // groups, columns)
    unfolded = product([groups, pixels, pixels] if cheaper else [groups, positions, columns])
    few = groups == 1 and shape[1] < _BLOCK
    # A grouped convolution pads the channels of every example to a block, those of its filters too: patches may take
    # less.
    patched = few and whole and positions * columns <= pixels * _BLOCK  # type: ignore[operator]
    slim = shape[0] < _BLOCK and whole and positions <= _BLOCK  # type: ignore[operator]
    narrow = groups == 1 and (columns <= _NARROW or patched or slim)
    return Factored(
        site, (small, large), build, sizes, unfolded=unfolded, ghost=ghost if cheaper else None, filled=full,
        each=each if full or not narrow else None, norms=norms if full else None, last=last if groups == 1 else None,
    )  # fmt: skip


_MAKERS: dict[Form, Callable[[Site, Size], Factored | None]] = {
    "product": _product,
    "table": _index_put,
    "filters": _convolution,
    "experts": _experts,
    "experts of ranks": _experts,
    "head": _head,
}
