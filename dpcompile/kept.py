"""Values of examples that outlive a call: what the model keeps for itself, and reads again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dpcompile.axis import Label, Shared
from dpcompile.errors import ExampleMixingError

__all__ = ["Kept"]


class Kept:
    """Remembers which tensors came out of private graphs with examples in them, as long as they live.

    **Guarantee.** A value of one batch does not reach the gradients of another through the model's own state: a buffer
    may not be replaced by such a value (it would also be published with the model), and a graph may not read one from
    an attribute. Values that the user passes in again as arguments are inputs like any other (docs/sharp_edges.md).
    """

    def __init__(self) -> None:
        self._alive: dict[int, weakref.ref[Tensor]] = {}

    def note(self, outputs: Sequence[Any], labels: Sequence[Label]) -> None:
        """A graph returned these outputs, with these labels."""
        for output, label in zip(outputs, labels, strict=False):
            if isinstance(output, Tensor) and not isinstance(label, Shared):
                key = id(output)
                self._alive[key] = weakref.ref(output, lambda _, key=key: self._alive.pop(key, None))

    def holds(self, value: Any) -> bool:
        """Whether this very tensor came out of a private graph, with examples in it."""
        found = self._alive.get(id(value))
        return found is not None and found() is value

    def check_buffers(self, module: nn.Module) -> None:
        """Raise ExampleMixingError if a buffer is now such a tensor."""
        for name, buffer in module.named_buffers():
            if self.holds(buffer):
                raise ExampleMixingError(
                    f"buffer '{name}' was replaced by a value that depends on the examples: it would be published with "
                    "the model, without noise",
                    remedy="do not assign buffers in forward, or compute the statistic outside the private model",
                )

    def check_input(self, name: str, value: Any) -> None:
        """Raise ExampleMixingError if an input that is no argument of the call is such a tensor."""
        if self.holds(value):
            raise ExampleMixingError(
                f"the model reads {name}, which an earlier call left there with examples in it: one batch would reach "
                "the gradients of the next",
                remedy="keep nothing of a batch in the model's attributes",
            )
