"""A micro-batch of one stage of a pipeline: what it keeps until the norms of the other stages are there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dpcompile.errors import PrivacyError

__all__ = ["MicroBatch", "Waiting"]


class Waiting(Protocol):
    """The backward of one stage on one micro-batch, over or not.

    Attributes:
        mask: ``[B]``, as the stage's weights take it.
        refused: why it may have none.
    """

    mask: Tensor
    refused: PrivacyError | None

    def conclude(self, squared: Tensor) -> None:
        """Deliver what the backward came to, with these squared norms over all stages."""
        ...


@dataclass(eq=False, slots=True)
class MicroBatch:
    """One that ran forward, until its whole batch is over.

    Attributes:
        mask: see :class:`Waiting`.
        waiting: with all that is kept for clipped sums; None once they are delivered.
        done: its backward is over.
        refused: why it may have none, known when its sums were delivered.
    """

    mask: Tensor
    waiting: Waiting | None
    done: bool = False
    refused: PrivacyError | None = None

    @property
    def fault(self) -> PrivacyError | None:
        """Why its backward is refused."""
        return self.refused if self.waiting is None else self.waiting.refused

    def drop(self, why: PrivacyError) -> None:
        """A backward that still comes is refused."""
        if self.waiting is not None:
            self.waiting.refused = why

    def conclude(self, squared: Tensor) -> None:
        """Deliver, with these squared norms ``[B]`` over all stages; what was kept is freed."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            self.refused = waiting.refused
            waiting.conclude(squared)
