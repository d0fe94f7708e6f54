"""Tensors that single ranks of a pipeline send each other, apart from those of the schedule."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Messages"]


class Messages:
    """Sends and receives in a group of its own: in their own order, whatever else the ranks send each other.

    All ranks of the group make this together, and meet in it once. NCCL would otherwise make a communicator at the
    first message of each pair, where the sender waits for the receiver, who may be waiting for what the sender does
    next; the communicator of the whole group is there from then on, and batched messages go through it.

    Args:
        group: of the ranks.
        device: where messages will lie; one without content (``meta``) is let be.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        ranks, backend = dist.get_process_group_ranks(group), str(dist.get_backend_config(group))
        self._group: Any = dist.new_group(ranks, backend=backend, use_local_synchronization=True)
        if device.type != "meta":
            dist.all_reduce(torch.zeros(1, device=device), group=self._group)

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return dist.get_rank(self._group)

    def send(self, message: Tensor, to: int) -> Any:
        """Returns the work; the tensor must live until it is done."""
        return self._begin(dist.isend, message, to)

    def receive(self, room: Tensor, by: int) -> Any:
        """Returns the work, after whose ``wait()`` the message is there."""
        return self._begin(dist.irecv, room, by)

    def _begin(self, kind: Any, tensor: Tensor, other: int) -> Any:
        (work,) = dist.batch_isend_irecv([dist.P2POp(kind, tensor, group=self._group, group_peer=other)])
        return work
