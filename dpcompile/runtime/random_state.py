"""The state of torch's random number generators and of buffers, to run something again as if for the first time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["RandomState", "Snapshot"]


@dataclass(frozen=True, slots=True)
class RandomState:
    """Of the CPU's generator and of those of some CUDA devices.

    Attributes:
        cpu: its state.
        devices: index of a device -> its state.
    """

    cpu: Tensor
    devices: dict[int, Tensor]

    @classmethod
    def now(cls, tensors: Iterable[object]) -> RandomState:
        """The generators of the CPU and of the devices on which these tensors lie."""
        used = {x.device.index or 0 for x in tensors if isinstance(x, Tensor) and x.device.type == "cuda"}
        return cls(torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in sorted(used)})

    def restore(self) -> None:
        """Go on from here."""
        torch.set_rng_state(self.cpu)
        for index, state in self.devices.items():
            torch.cuda.set_rng_state(state, index)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw from here; afterwards the generators stand where they stood before."""
        with torch.random.fork_rng(devices=list(self.devices)):
            self.restore()
            yield


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a forward of a model changes: generators, and buffers that it writes to."""

    random: RandomState
    buffers: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, module: nn.Module) -> Snapshot:
        """The state now."""
        buffers = tuple((b, b.detach().clone()) for b in module.buffers())
        return cls(RandomState.now([*module.parameters(), *module.buffers()]), buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """Go on from here."""
        self.random.restore()
        for buffer, before in self.buffers:
            buffer.copy_(before)
