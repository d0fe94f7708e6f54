"""Values of examples that outlive a call: what the model keeps for itself, and reads again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from dpcompile._torch import WeakMemory, weak_memory
from dpcompile.axis import Label, Shared
from dpcompile.errors import ExampleMixingError

__all__ = ["Kept"]


class Kept:
    """Remembers which memory holds examples: that of arguments and outputs of private graphs, as long as it lives.

    **Guarantee.** A value of one batch does not reach the gradients of another through the model's own state: a buffer
    may not be replaced by such a value (it would also be published with the model), and a graph may not read one, or
    anything that shares its memory (a view, a NumPy array), from an attribute. Values that the user passes in again as
    arguments are inputs like any other, and copies made outside are not recognised (docs/sharp_edges.md).
    """

    def __init__(self) -> None:
        self._alive: dict[int, WeakMemory] = {}  # by address
        self._purge_at = 64

    def note(self, outputs: Sequence[Any], labels: Sequence[Label]) -> None:
        """A graph returned these outputs, with these labels."""
        self.note_arguments(x for x, label in zip(outputs, labels, strict=False) if not isinstance(label, Shared))

    def note_arguments(self, tensors: Iterable[Any]) -> None:
        """These tensors hold examples."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and (address := tensor.untyped_storage().data_ptr()):
                self._alive[address] = weak_memory(tensor)
        if len(self._alive) > self._purge_at:
            self._alive = {a: m for a, m in self._alive.items() if not m.expired()}
            self._purge_at = 64 + 2 * len(self._alive)

    def holds(self, value: Any) -> bool:
        """Whether the memory of this tensor holds examples, whatever object it was reached through."""
        if not isinstance(value, Tensor):
            return False
        memory = self._alive.get(value.untyped_storage().data_ptr())
        return memory is not None and not memory.expired()

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
                f"the model reads {name}, which an earlier call left there with examples in it (or shares the memory "
                "of an argument): one batch would reach the gradients of the next",
                remedy="keep nothing of a batch in the model's attributes; pass what it needs as arguments",
            )
