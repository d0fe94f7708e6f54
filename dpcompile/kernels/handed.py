"""Numbers of the host on a device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["handed"]


def handed(numbers: Tensor, device: torch.device) -> Tensor:
    """``numbers.to(device)``; where the host's go to a device, nobody waits for what that has still to do.

    **Guarantee.** The values are those of this moment, whatever is written to ``numbers`` later: memory that is not
    pinned is read before the call returns, and pinned memory, which is not, is copied as ever. So is what comes from a
    device: to the host it would arrive later than it is read.
    """
    early = numbers.device.type == "cpu" and not (device.type != "cpu" and numbers.is_pinned())
    return numbers.to(device, non_blocking=early)
