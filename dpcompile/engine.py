"""What the optimizer and the loader need of a compiled model, and nothing more of it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from dpcompile.ledger import GradientLedger

__all__ = ["Engine"]


class Engine(Protocol):
    """The side of a dpcompile model that the optimizer and the loader see."""

    @property
    def ledger(self) -> GradientLedger:
        """The clipped sums between backward and step."""
        ...

    @property
    def max_grad_norm(self) -> float:
        """C: the bound on one example's gradient, all parameters together."""
        ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name, tied ones once. The position in it is the parameter's index in the noise."""
        ...

    def trainable(self) -> list[str]:
        """Names of the parameters that require grad now."""
        ...

    def set_mask(self, mask: Tensor | None) -> None:
        """Bool ``[physical batch]`` for the next forward that records gradients; False: padding, weight 0."""
        ...
