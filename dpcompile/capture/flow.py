"""Where the values that leave a graph come from, if nothing is trained in it: then nothing has to be proved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile._torch import pytree
from dpcompile._torch.aot import InputMutationAOTOutput, PlainAOTInput, PlainAOTOutput, TangentAOTInput
from dpcompile._torch.tensors import free_unbacked_symbols
from dpcompile.capture.roles import arguments_of
from dpcompile.graph.compile import compile_joint
from dpcompile.graph.joint import mutations
from dpcompile.graph.locate import where
from dpcompile.graph.operations import takes_only_shapes

__all__ = ["Flow", "Untrained", "compile_untrained", "reaches"]

_UNKNOWN = -1
_ANYTHING = frozenset({_UNKNOWN})


@dataclass(frozen=True, slots=True)
class Flow:
    """Which inputs the values that leave a graph depend on, by position in the captured graph.

    Attributes:
        outputs: output -> inputs.
        written: input that the graph writes to -> inputs that the new value depends on.
        sizes: output -> inputs whose values its shape goes by.
        numbers: output -> inputs of which a Python number was read out on the way to it, and the user's line.
    """

    outputs: Mapping[int, frozenset[int]]
    written: Mapping[int, frozenset[int]]
    sizes: Mapping[int, frozenset[int]]
    numbers: Mapping[int, tuple[frozenset[int], str | None]]


def reaches(sources: frozenset[int], held: frozenset[int]) -> bool:
    """Whether one of the inputs ``held`` is among the sources, or it is not known which these are."""
    return bool(held) and (_UNKNOWN in sources or not held.isdisjoint(sources))


@dataclass(frozen=True, slots=True)
class Untrained:
    """A compiled graph that trains nothing.

    Attributes:
        compiled: the callable.
        flow: of values through it.
        arguments: positions of the inputs that it reads out of the arguments of the call.
    """

    compiled: Callable[..., Sequence[Any]]
    flow: Flow
    arguments: tuple[int, ...]


def compile_untrained(gm: fx.GraphModule, inputs: Sequence[Any], backend: str) -> Untrained:
    """Compile Dynamo's graph as it is."""
    found: list[Flow] = []

    def follow(graph: fx.GraphModule) -> None:
        found.append(_flow_of(graph))

    arguments = tuple(arguments_of(gm))
    compiled = compile_joint(gm, inputs, backend=backend, transform=follow, key="untrained")
    return Untrained(compiled, found[0], arguments)


def _flow_of(module: fx.GraphModule) -> Flow:
    """Follow values through a decomposed graph without in-place operations but those that write to inputs.

    **Guarantee.** A value that is not said to depend on an input does not change with the values of that input; it may
    with its shape. A size that depends on values (``x[x > 0].shape[0]``) depends on what they do.
    """
    comes_from: dict[fx.Node, frozenset[int]] = {}
    symbols: dict[Any, frozenset[int]] = {}  # of a size -> inputs whose values it goes by
    read: dict[fx.Node, frozenset[int]] = {}
    for node in module.graph.nodes:
        descriptor = node.meta.get("desc")
        if node.op == "placeholder" and isinstance(descriptor, PlainAOTInput):
            comes_from[node], read[node] = frozenset({descriptor.idx}), frozenset()
        elif node.op == "placeholder":
            plain = isinstance(descriptor, TangentAOTInput)
            comes_from[node], read[node] = frozenset() if plain else frozenset({_UNKNOWN}), frozenset()
        elif node.op != "output":
            value, operands = node.meta.get("val"), node.all_input_nodes
            sources = [n for n in operands if _is_number(n)] if takes_only_shapes(node.target) else operands
            own = frozenset().union(*(comes_from[n] for n in operands))
            sized = frozenset().union(*(symbols.setdefault(s, own) for s in _sizes_of_values(value)))
            comes_from[node] = frozenset().union(sized, *(comes_from[n] for n in sources))
            read[node] = frozenset().union(*(read[n] for n in sources))
            if _is_number(node):
                read[node] |= comes_from[node]
    written: dict[int, frozenset[int]] = {}
    for destination, source in mutations(module.graph):
        for position in comes_from[destination]:
            written[position] = written.get(position, frozenset()) | comes_from[source]
    output = module.graph.output_node()
    values: Sequence[Any] = output.args[0]  # type: ignore[assignment]
    outputs: dict[int, frozenset[int]] = {}
    sizes: dict[int, frozenset[int]] = {}
    numbers: dict[int, tuple[frozenset[int], str | None]] = {}
    for descriptor, value in zip(output.meta["desc"], values, strict=True):
        if not isinstance(value, fx.Node):
            continue
        if isinstance(descriptor, InputMutationAOTOutput) and isinstance(descriptor.mutated_input, PlainAOTInput):
            position = descriptor.mutated_input.idx
            written[position] = written.get(position, frozenset()) | comes_from[value]
        elif isinstance(descriptor, PlainAOTOutput):
            outputs[descriptor.idx] = comes_from[value]
            found = (symbols.get(s, _ANYTHING) for s in _sizes_of_values(value.meta.get("val")))
            sizes[descriptor.idx] = frozenset().union(*found)
            if read[value]:
                numbers[descriptor.idx] = read[value], where(value)
    return Flow(outputs, written, sizes, numbers)


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _sizes_of_values(value: Any) -> set[Any]:
    """The symbols in sizes that torch cannot tell from those of the inputs."""
    leaves = [x for x in pytree.tree_leaves(value) if isinstance(x, (Tensor, torch.SymInt, torch.SymFloat))]
    return set().union(*(free_unbacked_symbols(x) for x in leaves))
