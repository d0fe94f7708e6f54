"""Values of examples that outlive a call: what the model keeps for itself, and reads again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dpcompile._torch import WeakMemory, memory_of, pytree, weak_memory
from dpcompile.axis import Label, Shared
from dpcompile.errors import ExampleMixingError
from dpcompile.flow import Flow, Untrained, reaches
from dpcompile.kept_numbers import KeptNumbers, Reads, path_of
from dpcompile.shards import is_distributed

__all__ = ["Kept", "Left", "held_tensors"]


@dataclass(frozen=True, slots=True)
class _Noted:
    """Memory that holds examples; ``trained`` if a forward with gradients put them there, or was given them."""

    memory: WeakMemory
    trained: bool


@dataclass(frozen=True, slots=True)
class Left:
    """What a module holds of examples, to be told to whoever watches a copy of it.

    Attributes:
        tensors: parameters, buffers and attributes.
        numbers: attributes that are Python numbers, by path.
    """

    tensors: list[Tensor]
    numbers: dict[str, Any]


class Kept:
    """Remembers which memory holds examples: that of arguments and outputs of the model's graphs, as long as it lives.

    **Guarantee.** A value of one batch does not reach the gradients of another through the model's own state: a graph
    with gradients may not read one, or anything that shares its memory (a view, a NumPy array), from an attribute,
    buffer or parameter, whether a forward with gradients left it there or one without. In a forward with gradients a
    buffer may not be replaced by such a value either: it would be published with the model.

    ================================================  ====================================================
    edge case                                         outcome
    ================================================  ====================================================
    left there without gradients, never read again    allowed (caches of generation, statistics for later)
    read again without gradients                      allowed; what comes of it holds examples too
    written with what depends on no example           allowed (counters, schedules, averages of weights)
    memory written in part, or written over later     holds examples as long as it lives
    a copy of the model (deepcopy, pickle)            holds examples where the model did
    passed in again as an argument                    an input like any other
    a copy made outside of the model's calls          not recognised (docs/sharp_edges.md)
    written by the undecorated model                  not recognised (docs/sharp_edges.md)
    ================================================  ====================================================

    Args:
        module: the model.
        breaks: whether Python of the model runs between graphs.

    Attributes:
        numbers: Python numbers that it keeps.
    """

    def __init__(self, module: nn.Module, *, breaks: bool = False) -> None:
        self._module = module
        self.numbers = KeptNumbers(module, exact=not breaks)
        self._alive: dict[int, _Noted] = {}  # by address
        self._purge_at = 64

    def note(self, outputs: Sequence[Any], labels: Sequence[Label]) -> None:
        """A graph returned these outputs, with these labels."""
        self.note_arguments(x for x, label in zip(outputs, labels, strict=False) if not isinstance(label, Shared))

    def note_arguments(self, tensors: Iterable[Any], *, trained: bool = True) -> None:
        """These tensors hold examples; ``trained`` in a forward with gradients."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and (address := tensor.untyped_storage().data_ptr()):
                before = self._alive.get(address)
                known = before is not None and before.trained and not before.memory.expired()
                self._alive[address] = _Noted(weak_memory(tensor), trained or known)
        if len(self._alive) > self._purge_at:
            self._alive = {a: n for a, n in self._alive.items() if not n.memory.expired()}
            self._purge_at = 64 + 2 * len(self._alive)

    def run(self, graph: Untrained, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run a graph that trains nothing, and note what of examples it returns, and writes to its inputs."""
        held = frozenset(p for p, x in enumerate(inputs) if self.holds(x))
        versions = [_version(x) for x in inputs]
        outputs = graph.compiled(*inputs)
        own = {memory_of(x) for x in inputs if isinstance(x, Tensor)}
        self.note_arguments(self._left(graph.flow, held, inputs, versions), trained=False)
        returned = ((p, x) for p, x in enumerate(outputs) if isinstance(x, Tensor) and memory_of(x) not in own)
        examples = (x for p, x in returned if reaches(graph.flow.outputs.get(p, held), held))
        self.note_arguments(examples, trained=False)
        for p, (sources, place) in graph.flow.numbers.items():
            if reaches(sources, held):
                self.numbers.note(outputs[p], place)
        return outputs

    def _left(
        self, flow: Flow, held: frozenset[int], inputs: Sequence[Any], versions: Sequence[int | None]
    ) -> Iterator[Tensor]:
        """The inputs that a graph wrote examples to; one that it is not known to write to, if it did nevertheless."""
        for position, (value, version) in enumerate(zip(inputs, versions, strict=True)):
            sources = flow.written.get(position)
            if sources is None and held and _version(value) != version or sources and reaches(sources, held):
                yield value

    def holds(self, value: Any) -> bool:
        """Whether the memory of this tensor holds examples, whatever object it was reached through."""
        return self._noted(value) is not None

    def _noted(self, value: Any) -> _Noted | None:
        if not isinstance(value, Tensor):
            return None
        noted = self._alive.get(value.untyped_storage().data_ptr())
        return None if noted is None or noted.memory.expired() else noted

    def left(self) -> Left:
        """What the module holds of examples now."""
        held = [*self._module.parameters(), *held_tensors(self._module).values()]
        return Left([x for x in held if not is_distributed(x) and self.holds(x)], dict(self.numbers.left))

    def take(self, left: Left) -> None:
        """The module is a copy of one that held this; so does it."""
        self.note_arguments(left.tensors, trained=False)
        self.numbers.left.update(left.numbers)

    def check_buffers(self, module: nn.Module) -> None:
        """Raise ExampleMixingError if a forward with gradients made a buffer such a tensor."""
        for name, buffer in module.named_buffers():
            noted = self._noted(buffer)
            if noted is not None and noted.trained:
                raise ExampleMixingError(
                    f"buffer '{name}' was replaced by a value that depends on the examples: it would be published with "
                    "the model, without noise",
                    remedy="do not assign buffers in forward, or compute the statistic outside the private model",
                )

    def check_input(self, name: str, value: Any) -> None:
        """Raise ExampleMixingError if an input that is no argument of the call is such a tensor."""
        noted = self._noted(value)
        if noted is None:
            return
        name = f"'{path_of(name) or name}'"
        if isinstance(value, nn.Parameter):
            if noted.trained:  # an argument of the call too
                return
            raise ExampleMixingError(
                f"parameter {name} was written with values of examples by an earlier call of the model: they would "
                "be published with it, without noise",
                remedy="initialise parameters from public data, or from none, before dp_compile",
            )
        if noted.trained:
            raise ExampleMixingError(
                f"the model reads {name}, which an earlier call left there with examples in it (or shares the memory "
                "of an argument): one batch would reach the gradients of the next",
                remedy="keep nothing of a batch in the model's attributes; pass what it needs as arguments",
            )
        raise ExampleMixingError(
            f"the model reads {name}, and an earlier call without gradients left there values that depend on its "
            "examples: they would reach the gradients of this batch, unclipped",
            remedy=f"before training goes on, give the model a new tensor that depends on no example in the place of "
            f"{name} (writing over the old one is not enough); or make such calls on a copy, copy.deepcopy(model)",
        )

    def check_constants(self, reads: Reads) -> None:
        """Raise ExampleMixingError if a graph with gradients has numbers of examples as constants."""
        self.numbers.check(reads)
        for path, value in reads.tensors(self._module):
            self.check_input(path, value)


def held_tensors(module: nn.Module) -> dict[int, Tensor]:
    """Buffers, and what else of tensors the modules' attributes hold: by identity."""
    found: dict[int, Tensor] = {}
    for part in module.modules():
        values = {k: v for k, v in vars(part).items() if k not in ("_modules", "_parameters")}
        found.update((id(x), x) for x in pytree.tree_leaves(values) if isinstance(x, Tensor))
    return found


def _version(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.is_inference():
        return None
    return value._version
