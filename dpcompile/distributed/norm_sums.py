"""Squared norms of micro-batches, added up over the ranks of a pipeline while its schedule runs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpcompile.distributed.borders import Borders
from dpcompile.distributed.messages import Messages
from dpcompile.distributed.ranks import world_size

__all__ = ["NormSums"]

_TAGS = 2  # numbers with each message: of the batch, and of the micro-batch


class NormSums:
    """To the rank of the first stage, which is the last to know, and back from there, in messages.

    Sends and receives, and no all-reduce in a batch: one of gloo that is under way when its rank fails keeps the
    process from ending, and so the others.

    Args:
        group: of the pipeline; all its ranks make this together.
        device: of the norms.

    **Guarantee.** :meth:`take` returns the same numbers on every rank: the sum of what all ranks gave for that
    micro-batch of that batch, or NaN, and then :attr:`wrong` on all of them.

    =====================================================  =======================================================
    edge case                                              outcome
    =====================================================  =======================================================
    a rank dropped a batch half-way, others did not        NaN from then on, :attr:`wrong`
    a number that is not finite on one rank                not finite on all
    a batch of which the first stage has not all           :meth:`give_up`: NaN for the others
    one rank                                               nothing is sent
    =====================================================  =======================================================

    Attributes:
        borders: what stages tell each other besides; None where no rank shares a stage with another.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._batch, self._first = 0, 0
        self._sent: list[tuple[Any, Tensor]] = []
        self._coming: dict[tuple[int, int], tuple[Any, Tensor]] = {}
        self._there: dict[tuple[int, int], Tensor] = {}
        self._wrong: list[Tensor] = []
        if self._size > 1:
            self._to_first, self._from_first = Messages(group, device), Messages(group, device)
        self.borders = Borders(Messages(group, device)) if self._size < world_size() else None

    @staticmethod
    def of(group: Any, device: torch.device) -> NormSums:
        """The one of this group; all its ranks call this equally often, or once more when it is new."""
        found = _OF_GROUPS.get(group)
        if found is None:
            found = _OF_GROUPS[group] = NormSums(group, device)
        return found

    @property
    def wrong(self) -> bool:
        """Whether ranks were not at one micro-batch, once in the life of the group."""
        return any(bool(w) for w in self._wrong)

    def begin(self, first: int) -> int:
        """A batch begins; returns its number.

        Args:
            first: which rank of the group holds the first stage.
        """
        self._batch, self._first = self._batch + 1, first
        return self._batch

    def give(self, batch: int, chunk: int, squared: Tensor) -> None:
        """What this rank's stages have of a micro-batch; every rank gives them in one order.

        The rank of the first stage waits for what the others sent: by then they all have.

        Args:
            batch: its number.
            chunk: number of the micro-batch.
            squared: float64 ``[B]``.
        """
        own = torch.cat([squared, squared.new_tensor(self._tags(batch, chunk))])
        if self._size == 1:
            self._there[batch, chunk] = own
        elif self._rank != self._first:
            self._send(own, self._first, self._to_first)
            room = torch.empty_like(own)
            work = self._from_first.receive(room, self._first)
            self._coming[batch, chunk] = work, room
        else:
            total, tags, room = squared.clone(), own[-_TAGS:].clone(), torch.empty_like(own)
            for rank in self._others():
                self._to_first.receive(room, rank).wait()
                total += self._checked(room, batch, chunk)
                tags = torch.where(room[-_TAGS:] == tags, tags, -1.0)  # then it is wrong for the others too
            self._return(batch, chunk, torch.cat([total, tags]))

    def give_up(self, batch: int, chunk: int, like: Tensor) -> None:
        """The rank of the first stage will not have this micro-batch: whoever waits for it gets NaN.

        Args:
            batch: its number.
            chunk: number of the micro-batch.
            like: float64 ``[B]``.
        """
        if self._size > 1 and self._rank == self._first:
            none = torch.full_like(like, torch.nan)
            self._return(batch, chunk, torch.cat([none, none.new_tensor(self._tags(batch, chunk))]))

    def take(self, batch: int, chunk: int) -> Tensor:
        """The sum over all ranks, float64 ``[B]``; waits for it. Once for each that was given."""
        if (batch, chunk) in self._there:
            return self._there.pop((batch, chunk))[:-_TAGS]
        work, room = self._coming.pop((batch, chunk))
        work.wait()
        return self._checked(room, batch, chunk)

    def settle(self) -> None:
        """All ranks have taken all: what was sent has arrived."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []

    def _return(self, batch: int, chunk: int, message: Tensor) -> None:
        for rank in self._others():
            self._send(message, rank, self._from_first)
        self._there[batch, chunk] = message

    def _send(self, message: Tensor, rank: int, messages: Messages) -> None:
        self._sent.append((messages.send(message, rank), message))

    def _others(self) -> list[int]:
        return [rank for rank in range(self._size) if rank != self._first]

    @staticmethod
    def _tags(batch: int, chunk: int) -> list[float]:
        return [float(batch), float(chunk)]

    def _checked(self, message: Tensor, batch: int, chunk: int) -> Tensor:
        wrong = (message[-_TAGS:] != message.new_tensor(self._tags(batch, chunk))).any()
        self._wrong = [wrong if not self._wrong else self._wrong[0] | wrong]
        return message[:-_TAGS].masked_fill(wrong, torch.nan)


_OF_GROUPS: weakref.WeakKeyDictionary[Any, NormSums] = weakref.WeakKeyDictionary()
