"""Norms that are certain: in float64 where a quicker way cannot tell.

Shape letters as in :mod:`dpcompile.norms.factors`. What is here runs inside of operations, on real tensors: how many
examples are done again depends on their values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpcompile.kernels.rounding import CLOSE, WIDE, gamma, linear_slack, unit_of, with_floor
from dpcompile.kernels.squares import kept_norms, settled_norms, squared_sizes, squares_of

__all__ = [
    "exact_norms",
    "kept_norms_of",
    "kinds_of",
    "norms_of",
    "rounded_again",
    "rounded_again_at_once",
    "settled",
    "settled_at_once",
    "sizes_of",
]

_AT_ONCE = 2**22  # elements of a gradient that exist at once, in float64


def norms_of(each: Tensor) -> Tensor:
    """Squared norms of every example's value: ``[B, ...]`` to ``[B]``, float64."""
    rows = each.flatten(2) if each.ndim > 2 else each.reshape(len(each), 1, -1)
    return squares_of(rows).sum(1)


def sizes_of(rows: Tensor, cols: Tensor) -> Tensor:
    """Squared sizes ``S**2`` (:mod:`dpcompile.kernels.rounding`), summed over blocks: ``[B]``, float64.

    Args:
        rows: ``[B, K, T, P]``.
        cols: ``[B, K, T, D]``.
    """
    found = squared_sizes(rows, cols)
    if found is not None:
        return found
    lengths = squares_of(rows).sqrt() * squares_of(cols).sqrt()
    return lengths.sum(2).square().sum(1)


def settled(squared: Tensor, slack: Tensor, sizes: Tensor, redo: Callable[[Tensor], Tensor]) -> Tensor:
    """Squared norms that are right or too large: the bound added where it is small, and done again where it is not.

    **Guarantee.** No result is below the true squared norm, and none is above it by more than twice
    :data:`dpcompile.kernels.rounding.CLOSE` of it and the floor (:func:`dpcompile.kernels.rounding.with_floor`), but
    for what ``redo`` gives.

    ===========================================  ==========================================
    edge case                                    outcome
    ===========================================  ==========================================
    a gradient of zeros                          0
    terms that cancel but for a little           ``redo``
    not finite, from operands that are finite    ``redo``
    operands that are not finite                 not finite
    ===========================================  ==========================================

    Args:
        squared: ``[B]``, float64.
        slack: ``[B]``, how far each may be off at most.
        sizes: ``[B]``, the squared sizes of the gradients.
        redo: from the numbers of some examples to their squared norms, float64.
    """
    result, again = settled_norms(squared, slack, sizes, sizes)
    if again:
        which = torch.tensor(again, device=sizes.device)
        result[which] = with_floor(redo(which), sizes[which])
    return result


def settled_at_once(
    squared: Tensor, slack: Tensor, sizes: Tensor, positions: int, exact: Callable[[Tensor], Tensor]
) -> Tensor:
    """:func:`settled`, with its guarantee, for GPUs: nothing waits to know how many examples are done again.

    Args:
        squared: see there.
        slack: see there.
        sizes: see there.
        positions: that an element of a gradient is a sum over.
        exact: from a mask ``[B]`` to the squared norms of the examples in it, added up in float64; of others anything.
    """
    known = sizes.isfinite()
    certain = (slack <= CLOSE * squared) & squared.isfinite()
    again = (exact(known & ~certain).sqrt() + gamma(positions + 2, WIDE) * sizes.sqrt()).square()
    return with_floor(torch.where(known, torch.where(certain, squared + slack, again), sizes), sizes)


def rounded_again(
    each: Tensor, squared: Tensor, sizes: Tensor, positions: int, redo: Callable[[int], Tensor]
) -> Tensor:
    """Squared norms of kept gradients ``[B, ...]``, ``[B]``, after those that cancel have been made again, in place.

    **Guarantee.** None is below that of the kept gradient, which the clipped sum is made of. None of float32 gradients
    is above it by more than :data:`dpcompile.kernels.rounding.CLOSE` of it and the floor: what rounding is likely to
    have taken from the true one is added, and where that is more, the gradient is made again. Of float64 gradients
    whatever it is is added.

    Args:
        each: the gradients.
        squared: their squared norms, float64, as they are.
        sizes: their squared sizes.
        positions: how many terms each of their elements is a sum of.
        redo: an example's gradient, in float64.
    """
    result, again = settled_norms(squared, positions**0.5 * unit_of(each.dtype), sizes, squared)
    return _made_again(each, result, again if each.dtype == torch.float32 else [], lambda i: sizes[i], redo)


def kept_norms_of(
    each: Tensor, rows: Tensor, cols: Tensor, squared: Tensor | None, redo: Callable[[int], Tensor]
) -> Tensor:
    """:func:`rounded_again`, with its guarantee, of kept gradients ``[B, K, P, D]`` that are products of two sides.

    Args:
        each: the gradients, contiguous.
        rows: ``[B, K, T, P]``.
        cols: ``[B, K, T, D]``.
        squared: their squared norms, if they are known.
        redo: see there.
    """
    positions = rows.shape[2]
    found = kept_norms(each, rows, cols, positions**0.5 * unit_of(each.dtype)) if squared is None else None
    if found is None:
        squared = norms_of(each) if squared is None else squared
        return rounded_again(each, squared, sizes_of(rows, cols), positions, redo)
    return _made_again(each, *found, lambda i: sizes_of(rows[i : i + 1], cols[i : i + 1])[0], redo)


def _made_again(
    each: Tensor, norms: Tensor, again: Sequence[int], size: Callable[[int], Tensor], redo: Callable[[int], Tensor]
) -> Tensor:
    for i in again:
        each[i] = redo(i)
        norms[i] = with_floor(norms_of(each[i : i + 1])[0], size(i))
    return norms


def rounded_again_at_once(
    squared: Tensor, sizes: Tensor, positions: int, dtype: torch.dtype, redo: Callable[[Tensor], Tensor]
) -> Tensor:
    """:func:`rounded_again`, with its guarantee, for float32 gradients on GPUs; nothing waits.

    Args:
        squared: see there.
        sizes: see there.
        positions: see there.
        dtype: of the gradients.
        redo: makes the gradients of a mask ``[B]`` again, and gives the squared norms of these; of others anything.
    """
    known = sizes.isfinite()
    slack = linear_slack(squared, positions**0.5 * unit_of(dtype), sizes)
    which = known & ~((slack <= CLOSE * squared) & squared.isfinite())
    again = redo(which)
    return with_floor(torch.where(which, again, torch.where(known, squared + slack, squared)), sizes)


def kinds_of(one_hot: Sequence[str | None]) -> str:
    """Which sides are an index, of all sites, as :func:`exact_norms` takes it."""
    return ",".join(kind or "" for kind in one_hot)


def exact_norms(rows: Sequence[Tensor], cols: Sequence[Tensor], kinds: str) -> Tensor:
    """Squared norms ``[B]`` of sums of outer products, by the products themselves, in float64.

    **Guarantee.** Not below the true one: what rounding may move is added.

    Args:
        rows: of every site, ``[B, K, T, P]``, or an index ``[B, T]``.
        cols: the same, ``[B, K, T, D]``.
        kinds: see :func:`kinds_of`; a side that no site has is an index of in all of them.
    """
    one_hot = kinds.split(",")
    dense = [i for i, kind in enumerate(one_hot) if kind != "rows"], [i for i, k in enumerate(one_hot) if k != "cols"]
    p, d = rows[dense[0][0]].shape[-1], cols[dense[1][0]].shape[-1]
    batch, blocks = cols[dense[1][0]].shape[:2]
    step = max(1, _AT_ONCE // max(p, 1))
    squared = torch.zeros(batch, dtype=torch.float64, device=cols[0].device)
    for b in range(batch):
        for k in range(blocks):
            own = [
                (r[b] if kind == "rows" else r[b, k], c[b] if kind == "cols" else c[b, k], kind)
                for r, c, kind in zip(rows, cols, one_hot, strict=True)
            ]
            for start in range(0, d, step):
                squared[b] += _part(own, p, start, min(d, start + step)).square().sum()
    sizes, positions = _sizes(rows, cols, one_hot), sum(r.shape[1 if r.ndim == 2 else 2] for r in rows)
    return (squared.sqrt() + gamma(positions + 2, WIDE) * sizes.sqrt()).square()


def _part(sites: Sequence[tuple[Tensor, Tensor, str]], p: int, start: int, end: int) -> Tensor:
    """Columns ``[start, end)`` of the sum of ``rows^T cols`` of one example and block."""
    total = torch.zeros(p, end - start, dtype=torch.float64, device=sites[0][1].device)
    for rows, cols, kind in sites:
        if kind == "cols":
            right = (cols[:, None] == torch.arange(start, end, device=cols.device)).double()
        else:
            right = cols[:, start:end].double()
        if kind == "rows":
            total.index_add_(0, rows.long(), right)
        else:
            total.addmm_(rows.double().T, right)
    return total


def _sizes(rows: Sequence[Tensor], cols: Sequence[Tensor], one_hot: Sequence[str]) -> Tensor:
    """Squared sizes ``[B]`` of all sites together."""
    total: Tensor | float = 0.0
    for r, c, kind in zip(rows, cols, one_hot, strict=True):
        lengths = 1.0 if kind == "rows" else squares_of(r).sqrt()
        lengths = lengths if kind == "cols" else lengths * squares_of(c).sqrt()
        assert isinstance(lengths, Tensor)
        total = total + lengths.sum(-1)  # [B, K]
    assert isinstance(total, Tensor)
    return total.square().sum(1)
