"""Which rows came with which batches before: what the loop trains on must be rows of the batch that was drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dpcompile.batches.matching import DrawnBatch, Located
from dpcompile.batches.row_keys import row_keys
from dpcompile.errors import PrivacyError, running_line

__all__ = ["SeenRows"]

_KEPT = 1 << 17  # rows
_BYTES = 16  # smaller rows, as labels, tell too little
_ALIKE = 1  # what padding arrives as; with more a tensor tells too little


@dataclass(slots=True)
class SeenRows:
    """Rows that were handed out, and for rows that the loop computes from them, from which.

    **Guarantee.** A call whose tensors are no drawn batch's is refused if rows of one of them, at least two and three
    quarters as many as the batch has examples, came before with rows that the batch does not have. Rows that the loop
    makes anew every time (augmentation), and rows that never came before, are not known again; a tensor in which
    different rows of a batch become alike tells nothing.
    """

    _handed_out: dict[int, None] = field(default_factory=dict)
    _made_of: list[dict[int, int]] = field(default_factory=list)  # per tensor of the call: arrived -> handed out
    _alike: list[set[int]] = field(default_factory=list)  # per tensor: what several rows of one batch arrived as

    def hand_out(self, batch: DrawnBatch) -> None:
        """The loader gives this batch to the loop."""
        for row, real in zip(batch.identities, batch.mask.tolist(), strict=True):
            if real:
                self._handed_out[row] = None
        _shorten(self._handed_out)

    def take(self, batch: DrawnBatch, tensors: Sequence[Located]) -> None:
        """A call trains on these tensors, which it takes for computed from this batch.

        Raises:
            PrivacyError: they are evidently not its rows.
        """
        self._grow(len(tensors))
        places = [
            (row_keys(tensor, dim % tensor.ndim).tolist(), made_of, alike)
            for (tensor, dim), made_of, alike in zip(tensors, self._made_of, self._alike, strict=False)
            if len(alike) <= _ALIKE and _tells(tensor, dim)
        ]
        drawn, mask = batch.identities, batch.mask.tolist()
        own, enough = set(drawn), max(2.0, 0.75 * sum(mask))
        for keys, made_of, alike in places:
            if len({k for k in keys if k not in alike and self._is_another(k, made_of, own)}) >= enough:
                raise PrivacyError(
                    "a backward on rows that came with other batches of the loader: they are not those of the batch "
                    "that was drawn last, and the accountant counts its draws, each once",
                    where=running_line(),
                    remedy="iterate over the loader that make_private returned, and call the model with gradients once "
                    "per batch, on this batch (other calls under torch.no_grad())",
                )
        for keys, made_of, alike in places:
            rows = {(key, row) for key, row, real in zip(keys, drawn, mask, strict=True) if real}
            often = Counter(key for key, _ in rows)
            alike |= {key for key, count in often.items() if count > 1}
            for key, row in rows:
                made_of.setdefault(key, row)
            _shorten(made_of)

    def _is_another(self, key: int, made_of: dict[int, int], own: set[int]) -> bool:
        """Whether a row came before, with a row that is none of these."""
        return (key in self._handed_out and key not in own) or (key in made_of and made_of[key] not in own)

    def _grow(self, tensors: int) -> None:
        while len(self._made_of) < tensors:
            self._made_of.append({})
            self._alike.append(set())


def _shorten(rows: dict[int, Any]) -> None:
    while len(rows) > _KEPT:
        del rows[next(iter(rows))]


def _tells(tensor: Tensor, dim: int) -> bool:
    return tensor.numel() * tensor.element_size() >= _BYTES * max(tensor.shape[dim], 1)
