"""What a stage of a pipeline tells the next one of the values that it hands on: which are another one on each rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dpcompile.distributed.messages import Messages
from dpcompile.errors import PrivacyError

__all__ = ["Border", "Borders"]

Border: TypeAlias = "tuple[tuple[str, ...], ...]"

_SIZE = 4096  # of a message, bytes


class Borders:
    """Messages from the rank of a stage to that of the next, one in each batch.

    Where a stage's tensors are cut over tokens (sequence or context parallelism), its ranks may hand on what each has
    of them, to ranks that lie alike. What those compute with it is another value on each as well, and their proof has
    to know.

    Args:
        messages: of the pipeline's ranks, for these alone.

    **Guarantee.** :meth:`told` returns what the stage before said in this batch, or raises.

    =========================================  ===================================================================
    edge case                                  outcome
    =========================================  ===================================================================
    both stages lie on one rank                nothing is sent
    two pairs of stages on one pair of ranks   a message waits until its stage asks
    a batch that was dropped half-way          its messages are passed over
    a batch of which the sender knows nothing  PrivacyError: the ranks are at other batches
    =========================================  ===================================================================
    """

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        self._there: dict[int, tuple[int, Border]] = {}
        self._sent: list[tuple[Any, Tensor]] = []

    def tell(self, batch: int, stage: int, to: int, border: Border, device: torch.device) -> None:
        """Say of what a stage hands on along which dimensions of the ranks' mesh it may be another value on each rank.

        Args:
            batch: its number.
            stage: the one that is handed it.
            to: the rank of that stage, in the group.
            border: for each tensor, in order, the dimensions, each as the ranks along it, seen from this one.
            device: where sends and receives work.
        """
        if to == self._messages.rank:
            self._there[stage] = batch, border
            return
        self._sent = [(work, sent) for work, sent in self._sent if not work.is_completed()]
        message = _packed([batch, stage, border], device)
        self._sent.append((self._messages.send(message, to), message))

    def told(self, batch: int, stage: int, by: int, device: torch.device) -> Border:
        """What was said of the tensors that this stage is handed; waits for it.

        Args:
            batch: its number.
            stage: this one.
            by: the rank of the stage before, in the group.
            device: where sends and receives work.

        Raises:
            PrivacyError: the ranks are at other batches.
        """
        while (found := self._there.pop(stage, (-1, ())))[0] < batch:
            room = torch.empty(_SIZE, dtype=torch.uint8, device=device)
            self._messages.receive(room, by).wait()
            number, other, border = json.loads(bytes(room.tolist()).rstrip())
            self._there[other] = number, tuple(map(tuple, border))
        if found[0] > batch:
            raise PrivacyError(
                f"a stage of the pipeline is handed values of batch {found[0]}, and is at batch {batch}",
                remedy="run every batch on all ranks of the pipeline; after an error on one start the processes again, "
                "from the last checkpoint",
            )
        return found[1]


def _packed(values: Sequence[Any], device: torch.device) -> Tensor:
    text = json.dumps(values).encode()
    assert len(text) <= _SIZE, "a stage hands on hundreds of tensors"
    return torch.tensor(list(text.ljust(_SIZE)), dtype=torch.uint8, device=device)
