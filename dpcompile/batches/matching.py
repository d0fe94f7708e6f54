"""Which handed-out batch a call's tensors are, and the order in which its rows arrive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from dpcompile.batches.row_keys import row_bytes, row_keys
from dpcompile.errors import PrivacyError
from dpcompile.kernels.content import Content, different, fingerprints

__all__ = ["DrawnBatch", "Match", "recognised", "refuse_moved_rows"]

Located: TypeAlias = "tuple[Tensor, int]"  # a tensor, and the dimension of the examples


@dataclass(eq=False, slots=True)
class DrawnBatch:
    """A batch that the loader handed out.

    Attributes:
        rows: its tensors that have a row for each example, and the dimension of the rows.
        mask: bool ``[B]``, False for padding.
        turns: in how many forwards it runs, one after the other.
        step: the loader's logical step.
        part: which of the step's batches it is.
        parts: how many these are.
        of_pass: the pass over the loader that it is from.
        of_users: whose each row is goes by its place.
        keys: of the rows of each tensor, as they were handed out: ``[B]``.
        contents: of users, the fingerprint of each tensor then: keys are those of some of a row's elements.
    """

    rows: list[Located]
    mask: Tensor
    turns: int = 1
    step: int = 0
    part: int = 0
    parts: int = 1
    of_pass: object = None
    of_users: bool = False
    keys: list[list[int]] = field(init=False)
    contents: list[Content] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = [row_keys(*row).tolist() for row in self.rows]
        self.contents = fingerprints([tensor for tensor, _ in self.rows]) if self.of_users else []

    @property
    def identities(self) -> list[int]:
        """What the rows are told apart by: the keys of the tensor with the largest rows."""
        sizes = [t.numel() * t.element_size() for t, _ in self.rows]
        return self.keys[sizes.index(max(sizes))] if sizes else [0] * len(self.mask)


@dataclass(frozen=True, slots=True)
class Match:
    """Tensors of a call that are a batch's.

    Attributes:
        batch: the batch.
        order: which row of the batch each arriving row is, int64 ``[B]``; None: as drawn.
        rest: tensors of the call that are not recognised, or were changed in place, where the recognised ones do not
            tell padding from examples.
        untouched: all tensors are as they were drawn.
    """

    batch: DrawnBatch
    order: Tensor | None
    rest: list[Located]
    untouched: bool


@dataclass(frozen=True, slots=True)
class _Pair:
    """A tensor of the call that has the rows of one of the batch, which may have moved; None: they have not."""

    arriving: Sequence[object] | None = None
    drawn: Sequence[object] | None = None


def recognised(batches: Sequence[DrawnBatch], tensors: Sequence[Located]) -> Match | None:
    """The batch that these tensors are; None if they are none.

    Raises:
        PrivacyError: they are of several batches, or have their rows in different orders, or it cannot be told where
            the padding went.
    """
    known: list[tuple[Located, dict[DrawnBatch, _Pair | None]]] = []
    rest: list[Located] = []
    for tensor, dim in tensors:
        found = {b: pair for b in batches if (pair := _by_memory(tensor, dim, b)) is not _OTHER}
        if not found:
            found = {b: pair for b in batches if (pair := _by_content(tensor, dim, b)) is not _OTHER}
        if found:
            known.append(((tensor, dim), found))  # type: ignore[arg-type]
        else:
            rest.append((tensor, dim))
    if not known:
        return None
    batch = _only([b for b in batches if all(b in found for _, found in known)])
    pairs = [found[batch] for _, found in known]
    rest += [located for (located, _), pair in zip(known, pairs, strict=True) if pair is None]
    recognised_ones = [(located, pair) for (located, _), pair in zip(known, pairs, strict=True) if pair is not None]
    order = _order(batch, [pair for _, pair in recognised_ones], ambiguous=not rest)
    tells = order is not None or any(_tells(batch, *located) for located, _ in recognised_ones)
    return Match(batch, order, [] if tells else rest, untouched=order is None and not rest)


def refuse_moved_rows(mask: Tensor, tensors: Sequence[Located]) -> None:
    """Padding rows are alike, and so is what is computed from each: alike rows elsewhere show that rows moved."""
    padding = int((~mask).sum())
    if padding < 2 or padding == len(mask):
        return
    for tensor, dim in tensors:
        rows = row_bytes(tensor, dim % tensor.ndim)
        if len({row for row, real in zip(rows, mask.tolist(), strict=True) if not real}) == 1:
            continue
        if max(rows.count(row) for row in set(rows)) >= padding:
            raise PrivacyError(
                "the rows of the batch have moved since the loader gave it: padding rows are not where they were",
                remedy="leave the order of the rows as it is, or reorder them in collate_fn (padding comes after it)",
            )


_OTHER = _Pair()  # not this batch
_AS_DRAWN = _Pair()


def _by_memory(tensor: Tensor, dim: int, batch: DrawnBatch) -> _Pair | None:
    """None: it is this memory, and holds other rows than were drawn."""
    for i, ((drawn, along), keys) in enumerate(zip(batch.rows, batch.keys, strict=True)):
        if not _shares_memory(tensor, dim, drawn, along):
            continue
        now = row_keys(drawn, along).tolist()
        if now == keys:
            changed = batch.of_users and different(batch.contents[i : i + 1], fingerprints([drawn]))
            return None if changed else _AS_DRAWN
        return _Pair(now, keys) if sorted(now) == sorted(keys) else None
    return _OTHER


def _by_content(tensor: Tensor, dim: int, batch: DrawnBatch) -> _Pair:
    for drawn, along in batch.rows:
        if tensor.shape != drawn.shape or tensor.dtype != drawn.dtype or dim % tensor.ndim != along:
            continue
        if _bits_equal(tensor, drawn):
            return _AS_DRAWN
        here, there = row_bytes(tensor, along), row_bytes(drawn, along)
        if sorted(here) == sorted(there):
            return _Pair(here, there)
    return _OTHER


def _only(candidates: Sequence[DrawnBatch]) -> DrawnBatch:
    if not candidates:
        raise PrivacyError(
            "the tensors of this call are those of several batches of the loader",
            remedy="pass tensors of one batch",
        )
    if any(not _equal(candidates[0], other) for other in candidates[1:]):
        raise PrivacyError(
            "the tensors of this call are the same in several batches of the loader: it cannot be told which rows are "
            "padding",
            remedy="where batches are taken ahead, pass at least one tensor by which they can be told apart",
        )
    return candidates[0]


def _order(batch: DrawnBatch, pairs: Sequence[_Pair], *, ambiguous: bool) -> Tensor | None:
    """By all tensors together: one alone, as labels, may have many rows alike.

    Args:
        batch: whose mask the order is for.
        pairs: of the tensors that were recognised.
        ambiguous: whether a padding row may be like an example: where all tensors are known, either may take the
            other's place.
    """
    moved = [pair for pair in pairs if pair.arriving is not None and pair.drawn is not None]
    if not moved:
        return None
    still = any(pair.arriving is None for pair in pairs)
    arriving = list(zip(*(pair.arriving for pair in moved if pair.arriving is not None), strict=True))
    drawn = list(zip(*(pair.drawn for pair in moved if pair.drawn is not None), strict=True))
    if (still and arriving != drawn) or Counter(arriving) != Counter(drawn):
        raise PrivacyError(
            "the tensors of this call have the rows of a batch in different orders",
            remedy="reorder all tensors of a batch alike",
        )
    places: dict[object, list[int]] = {}
    for i in reversed(range(len(drawn))):
        places.setdefault(drawn[i], []).append(i)
    mask = batch.mask.tolist()
    if not ambiguous and any(len({mask[i] for i in alike}) > 1 for alike in places.values()):
        raise PrivacyError(
            "rows of the batch have moved, other tensors of this call were computed anew, and what is left as drawn "
            "does not tell padding from examples",
            remedy="leave the order of the rows as it is, or reorder them in collate_fn (padding comes after it)",
        )
    return torch.tensor([places[row].pop() for row in arriving])


def _tells(batch: DrawnBatch, tensor: Tensor, dim: int) -> bool:
    """Whether a tensor as it was drawn shows that no padding row took the place of an example."""
    keys, mask = row_keys(tensor, dim % tensor.ndim).tolist(), batch.mask.tolist()
    real, padding = ({k for k, m in zip(keys, mask, strict=True) if m is which} for which in (True, False))
    return not real & padding


def _shares_memory(tensor: Tensor, dim: int, drawn: Tensor, along: int) -> bool:
    """Whether ``tensor`` is ``drawn``, or a view of it with the same rows in the same order."""
    if tensor is drawn:
        return True
    same = tensor.untyped_storage().data_ptr() == drawn.untyped_storage().data_ptr() != 0
    if not same or tensor.dtype != drawn.dtype or tensor.shape[dim] != drawn.shape[along]:
        return False
    step, offset = drawn.stride(along), tensor.storage_offset() - drawn.storage_offset()
    return tensor.stride(dim) == step and 0 <= offset < max(step, 1)


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach().to(a.device)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _equal(a: DrawnBatch, b: DrawnBatch) -> bool:
    """Whether two batches are the same rows with the same mask (those of two empty draws are)."""
    same = len(a.rows) == len(b.rows) and len(a.mask) == len(b.mask) and torch.equal(a.mask, b.mask)
    return same and all(x.shape == y.shape and _bits_equal(x, y) for (x, _), (y, _) in zip(a.rows, b.rows, strict=True))
