"""Values of examples that outlive a call: what the model keeps for itself, and reads again."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from dpcompile._torch import pytree
from dpcompile._torch.tensors import WeakMemory, memory_of, weak_memory
from dpcompile.capture.flow import Flow, Untrained, reaches
from dpcompile.distributed.shards import is_distributed
from dpcompile.errors import ExampleMixingError
from dpcompile.graph.labels import Label, Shared
from dpcompile.runtime.kept_numbers import KeptNumbers, Reads
from dpcompile.runtime.places import TRACE, Path, follow, places_in

__all__ = ["ExampleMemory", "Left", "Trace", "held_tensors"]

_TOKENS = re.compile(r"\[(?:'([^']*)'|(\d+))\]|\.(\w+)")
_ROOTS = ("L['module']", "L['losses']._modules['module']", "L['losses'].module", "L['self']")


@dataclass(frozen=True, slots=True)
class _Noted:
    """Memory that holds examples.

    Attributes:
        memory: that.
        trained: whether a forward with gradients put them there, or was given them.
        sized: whether their number depends on their values.
        array: what keeps memory of NumPy's, which was written to, alive.
    """

    memory: WeakMemory
    trained: bool
    sized: bool = False
    array: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """What a module holds of examples, to be told to whoever watches a copy of it.

    Attributes:
        tensors: parameters, buffers and attributes.
        numbers: attributes that are Python numbers, by path; also flags, texts, lengths.
        sized: those of the tensors whose sizes go by values.
    """

    tensors: list[Tensor]
    numbers: dict[Path, Any]
    sized: list[Tensor]


# Of a module that was compiled: memory that holds examples, by address, where it was ever of a size that goes by their
# values, and numbers. All who compile it share them.
_MEMORY: WeakKeyDictionary[nn.Module, tuple[dict[int, _Noted], set[int], dict[Path, Any]]] = WeakKeyDictionary()


class Trace:
    """What a module carries along of what it holds of examples: to copies of it, and to who compiles it again."""

    def __init__(self, left: Left | None = None) -> None:
        self._left = left
        self.kept: ExampleMemory | None = None  # of the engine that compiles it

    def now(self) -> Left:
        """What the module holds."""
        if self.kept is not None:
            return self.kept.left()
        return self._left or Left([], {}, [])

    def __deepcopy__(self, memo: dict[int, Any]) -> Trace:
        return Trace(copy.deepcopy(self.now(), memo))

    def __reduce__(self) -> Any:
        return Trace, (self.now(),)


class ExampleMemory:
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
    a copy of the model (deepcopy, pickle), also of   holds examples where the model did
    the plain module; a second ``dp_compile``
    passed in again as an argument                    an input like any other
    a copy made outside of the model's calls          not recognised (docs/sharp_edges.md)
    a NumPy array in a copy of the model              not recognised
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
        known = module in _MEMORY
        self._alive, self._sized, left = _MEMORY.setdefault(module, ({}, set(), {}))
        self.numbers = KeptNumbers(module, exact=not breaks, left=left)
        self._purge_at = 64
        for name, part in module.named_modules():
            trace = _trace_of(part)
            if trace is not None and not (known and part is module):
                self.take(trace.now(), tuple(name.split(".")) if name else ())

    def note(self, outputs: Sequence[Any], labels: Sequence[Label]) -> None:
        """A graph returned these outputs, with these labels."""
        self.note_arguments(x for x, label in zip(outputs, labels, strict=False) if not isinstance(label, Shared))

    def note_arguments(self, tensors: Iterable[Any], *, trained: bool = True, sized: bool = False) -> None:
        """These tensors hold examples; ``trained`` in a forward with gradients, ``sized`` if sizes go by values."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and (address := tensor.untyped_storage().data_ptr()):
                before = self._noted(tensor) or _Noted(weak_memory(tensor), trained=False)
                memory = weak_memory(tensor)
                self._alive[address] = _Noted(memory, trained or before.trained, sized or before.sized, before.array)
                if sized:
                    self._sized.add(address)
                if not trained:
                    self._leave_trace()
        if len(self._alive) > self._purge_at:
            for address in [a for a, n in self._alive.items() if n.memory.expired()]:
                del self._alive[address]
            self._sized &= self._alive.keys()
            self._purge_at = 64 + 2 * len(self._alive)

    def run(self, graph: Untrained, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run a graph that trains nothing, and note what of examples it returns, and writes to its inputs."""
        spread = self.numbers.spread
        held = frozenset(p for p, x in enumerate(inputs) if self.holds(x))
        versions = [_version(x) for x in inputs]
        outputs = graph.compiled(*inputs)
        own = {memory_of(x) for x in inputs if isinstance(x, Tensor)}
        for x in self._left(graph.flow, held, inputs, versions, spread):
            self.note_arguments([x], trained=False)
            if not x.untyped_storage().resizable():
                address = x.untyped_storage().data_ptr()
                self._alive[address] = replace(self._alive[address], array=x)
        returned = [(p, x) for p, x in enumerate(outputs) if isinstance(x, Tensor) and memory_of(x) not in own]
        for p, x in returned:
            if spread or reaches(graph.flow.outputs.get(p, held), held):
                sized = spread or reaches(graph.flow.sizes.get(p, frozenset()), held)
                self.note_arguments([x], trained=False, sized=sized)
        for p, (sources, place) in graph.flow.numbers.items():
            number = not (isinstance(outputs[p], Tensor) and outputs[p].ndim)
            if number and reaches(sources, held):
                self.numbers.note(outputs[p], place)
        return outputs

    def _left(
        self, flow: Flow, held: frozenset[int], inputs: Sequence[Any], versions: Sequence[int | None], spread: bool
    ) -> Iterator[Tensor]:
        """The inputs that a graph wrote examples to; one that it is not known to write to, if it did nevertheless."""
        for position, (value, version) in enumerate(zip(inputs, versions, strict=True)):
            sources = flow.written.get(position)
            wrote = sources is not None or _version(value) != version
            unknown = sources is None and bool(held)
            if wrote and (spread or unknown or reaches(sources or frozenset(), held)):
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
        held = [(x, n) for x in self._held() if (n := self._noted(x))]
        return Left([x for x, _ in held], dict(self.numbers.left), [x for x, n in held if n.sized])

    def _held(self) -> list[Tensor]:
        held = [*self._module.parameters(), *held_tensors(self._module).values()]
        return [x for x in held if not is_distributed(x)]

    def take(self, left: Left, path: Path = ()) -> None:
        """What stands there in the module held this before it was compiled here."""
        self.note_arguments(left.tensors, trained=False)
        self.note_arguments(left.sized, trained=False, sized=True)
        self.numbers.left.update(((*path, *p), x) for p, x in left.numbers.items())
        if left.numbers:
            self._leave_trace()

    def _leave_trace(self) -> None:
        trace = _trace_of(self._module)
        if trace is None or trace.kept is None:
            trace = self._module.__dict__[TRACE] = Trace()
            trace.kept = self

    def check_buffers(self, module: nn.Module) -> None:
        """Raise ExampleMixingError if a forward with gradients made a buffer such a tensor."""
        for buffer in _buffers_of(module):
            noted = self._noted(buffer)
            if noted is not None and noted.trained:
                name = next((name for name, own in module.named_buffers() if own is buffer), "of a module")
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
        name = f"'{_readable(name)}'"
        if isinstance(value, nn.Parameter):
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

    def check_constants(self, reads: Reads, root: nn.Module, *, whole: bool = True) -> None:
        """Raise ExampleMixingError if a graph with gradients, of this module, has numbers of examples as constants.

        Without ``whole``, Python of the model runs beside it.
        """
        self.numbers.check(reads, root, whole=whole)
        if self._sized:
            looked = [x for way, _ in reads.ways if isinstance(x := follow(root, way)[2], Tensor)]
            found = next((x for x in (looked if whole else self._held()) if (n := self._noted(x)) and n.sized), None)
            if found is not None:
                names = [n for n, x in self._module.named_buffers() if x is found]
                names += [str(p) for p in places_in(self._module, tensors=True) if p.value is found]
                self.check_input(next(iter(names), "a tensor"), found)
        for path, value in reads.tensors(self._module):
            self.check_input(path, value)


def _buffers_of(module: nn.Module) -> Iterator[Tensor]:
    """As ``module.buffers()``: without names, which take longest in a small step."""
    seen, waiting = {id(module)}, [module]
    while waiting:
        part = waiting.pop()
        yield from (x for x in part._buffers.values() if x is not None)
        new = [child for child in part._modules.values() if child is not None and id(child) not in seen]
        seen.update(map(id, new))
        waiting += new


def held_tensors(module: nn.Module) -> dict[int, Tensor]:
    """Buffers, and what else of tensors the modules' attributes hold: by identity."""
    found: dict[int, Tensor] = {}
    for part in module.modules():
        values = {k: v for k, v in vars(part).items() if k not in ("_modules", "_parameters")}
        found.update((id(x), x) for x in pytree.tree_leaves(values) if isinstance(x, Tensor))
    return found


def _trace_of(module: nn.Module) -> Trace | None:
    return vars(module).get(TRACE)


def _readable(name: str) -> str:
    """``sizes.k`` for ``L['module'].sizes['k']``, as Dynamo calls it."""
    name = name.removeprefix("___from_numpy(").removesuffix(")") if name.startswith("___from_numpy(") else name
    root = next((r for r in _ROOTS if name.startswith(r)), None)
    if root is None:
        return name
    tokens = map("".join, _TOKENS.findall(name.removeprefix(root)))
    return ".".join(t for t in tokens if t not in ("_modules", "_buffers", "_parameters", "__dict__")) or name


def _version(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.is_inference():
        return None
    return value._version
