"""One compiled piece of a model: what it may be given, and what is known of what it returns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from dpcompile.capture.flow import Untrained, compile_untrained
from dpcompile.capture.inputs import extend
from dpcompile.capture.joint import written_inputs
from dpcompile.capture.outputs import separate_outputs
from dpcompile.capture.roles import Roles, assign_roles
from dpcompile.errors import ExampleMixingError, UnsupportedGraphError
from dpcompile.graph.compile import compile_joint
from dpcompile.graph.labels import Examples, Label, Mixed, Shared, Summed, Whole
from dpcompile.graph.sizes import shape_of
from dpcompile.lowering.backward import lower_backward
from dpcompile.lowering.cache_key import cache_key
from dpcompile.lowering.pending import LoweredBackward
from dpcompile.options import Lowering, Options
from dpcompile.pipeline import Transformed, label_outputs, privatize
from dpcompile.runtime.verify import Verifier

__all__ = ["CompiledRegion", "Scope", "compile_region", "concrete"]


@dataclass(slots=True)
class Scope:
    """What is known of the tensors that a piece may read.

    Attributes:
        parameters: ``id(parameter)`` -> name, of the whole model.
        shared: names of the parameters that several regions use.
        tensors: ``id(tensor)`` -> the tensor, what to call it, its label; arguments, and what earlier pieces returned.
    """

    parameters: dict[int, str]
    shared: Collection[str] = ()
    tensors: dict[int, tuple[Tensor, str, Label]] = field(default_factory=dict)

    def note(self, tensor: Tensor, name: str, label: Label) -> None:
        """Remember a tensor as long as this scope lives."""
        self.tensors[id(tensor)] = (tensor, name, label)

    def knows(self, tensor: Tensor) -> bool:
        """Whether it is a parameter, or was noted."""
        return id(tensor) in self.parameters or id(tensor) in self.tensors

    def kind(self, value: Any) -> tuple[Any, ...] | None:
        """What a graph that reads this is compiled for, besides its shape; None for what is no tensor."""
        if not isinstance(value, Tensor):
            return None
        name = self.parameters.get(id(value))
        if name is not None:
            return "parameter", value.requires_grad, name in self.shared
        return "tensor", value.requires_grad, str(self.label(value))

    def label(self, tensor: Tensor) -> Label | None:
        """Of a tensor that was noted; None for any other."""
        known = self.tensors.get(id(tensor))
        return None if known is None else known[2]

    def is_ranks_own(self, value: Any, axis: str) -> bool:
        """Whether a tensor that was noted may be another one on each rank along this dimension of their mesh."""
        label = self.label(value) if isinstance(value, Tensor) else None
        return isinstance(label, (Shared, Examples, Whole)) and any(axis == own for own, _ in label.own)


@dataclass(slots=True)
class CompiledRegion:
    """What a graph was compiled to. It belongs to no parameter in particular: equal pieces share it.

    Attributes:
        compiled: the callable.
        roles: of the graph's inputs; None for a graph that runs without gradients.
        labels: of the outputs.
        transformed: of a graph with trainable parameters.
        unowned: positions of outputs that depend on no example.
        written: positions of the inputs that it writes to.
        lowered: its backward, of a graph with trainable parameters.
        untrained: of a graph that runs without gradients.
    """

    compiled: Callable[..., Any]
    roles: Roles | None = None
    labels: tuple[Label, ...] = ()
    transformed: Transformed | None = None
    unowned: Mapping[int, str | None] = field(default_factory=dict)
    symbols: Mapping[sympy.Symbol, tuple[int, int]] = field(default_factory=dict)
    written: frozenset[int] = frozenset()
    lowered: LoweredBackward | None = None
    untrained: Untrained | None = None

    @property
    def lowering(self) -> Lowering:
        """Of its backward."""
        return Lowering() if self.lowered is None else self.lowered.lowering

    @property
    def trained(self) -> list[int]:
        """Positions of the trainable parameters, if their gradients are wanted."""
        return list(self.roles.parameters) if self.transformed is not None and self.roles is not None else []


def compile_region(
    gm: fx.GraphModule,
    live: Sequence[Any],
    examples: Sequence[Any],
    scope: Scope,
    options: Options,
    lowering: Lowering,
    on_ranks: Callable[[Roles], Roles],
    proving: bool,
    place: str = "",
) -> CompiledRegion:
    """Prove a graph, rewrite it, and compile it.

    Args:
        gm: of Dynamo, or a part of such a graph.
        live: the tensors it is to run on.
        examples: what to trace with: the same, or fake ones.
        scope: what is known of ``live``.
        options: of the model.
        lowering: of the region.
        on_ranks: adds to these roles what the inputs are on other ranks.
        proving: a backward of the model will follow.
        place: what to call the region.

    Raises:
        ExampleMixingError: examples mix, or an input is a sum over them.
        UnsupportedGraphError: what cannot be proved.
    """
    if not proving:
        untrained = compile_untrained(gm, examples, options.backend)
        return CompiledRegion(untrained.compiled, untrained=untrained)
    leaves = _leaves(live, scope)
    trained = torch.is_grad_enabled() and _needs_gradient(gm) and any(_is_trainable(x, scope) for x in live)
    roles = assign_roles(gm, live, scope.parameters, leaves, trained=trained, region=place)
    roles = replace(on_ranks(roles), alike=_alike(live, scope))
    symbols = _symbols(gm)
    if not trained:
        return _label_only(gm, examples, roles, options, symbols, place)
    shared = frozenset(n for n in roles.parameters.values() if n in scope.shared)
    roles = replace(roles, narrow=(), lowering=lowering, shared=shared)
    extended, extra = extend(gm, roles)
    found: list[Transformed] = []
    lowered = LoweredBackward(lowering)
    verifier = _verifier(options, roles, place, lowered)

    def backward(graph: fx.GraphModule, compile_graph: Any) -> Any:
        assert found[0].cut is not None
        return lower_backward(found[0].cut, graph, compile_graph, lowered)

    written: set[int] = set()

    def transform(joint: fx.GraphModule) -> None:
        written.update(written_inputs(joint))
        found.append(privatize(joint, roles, options, 1))
        if verifier is not None:
            verifier.describe(found[0])

    compiled = compile_joint(
        extended,
        [*examples, *extra],
        backend=options.backend,
        transform=transform,
        key=cache_key(options, roles),
        backward=backward,
        watcher=verifier,
    )
    (transformed,) = found
    return CompiledRegion(
        compiled,
        roles,
        transformed.output_labels,
        transformed,
        transformed.unowned,
        symbols,
        frozenset(written),
        lowered,
    )


def _verifier(options: Options, roles: Roles, place: str, lowered: LoweredBackward | None) -> Verifier | None:
    """None where nothing is to be compared: ranks could part ways in a graph's collectives."""
    alone = roles.ranks is None and roles.experts is None
    return Verifier(place, lowered) if options.verify and alone else None


def _label_only(
    gm: fx.GraphModule,
    examples: Sequence[Any],
    roles: Roles,
    options: Options,
    symbols: Mapping[Any, Any],
    place: str,
) -> CompiledRegion:
    found: list[Any] = []
    written: set[int] = set()
    separate_outputs(gm)
    gm.recompile()

    def transform(graph: fx.GraphModule) -> None:
        written.update(written_inputs(graph))
        found.append(label_outputs(graph, roles, options))

    compiled = compile_joint(
        gm,
        examples,
        backend=options.backend,
        transform=transform,
        key=cache_key(options, roles) + "passing",
        watcher=_verifier(options, roles, place, None),
    )
    ((labels, unowned),) = found
    return CompiledRegion(compiled, roles, labels, None, unowned, symbols=symbols, written=frozenset(written))


def concrete(label: Label, symbols: Mapping[sympy.Symbol, tuple[int, int]], inputs: Sequence[Any]) -> Label:
    """The label with numbers in place of the symbols of this run's sizes."""
    if isinstance(label, Shared):
        return Shared(alike=label.alike, own=label.own)
    if not isinstance(label, Examples):
        return label

    def number(size: Any) -> int:
        value = sympy.sympify(size)
        return int(value.xreplace({s: inputs[symbols[s][0]].shape[symbols[s][1]] for s in value.free_symbols}))

    return Examples(label.dim, number(label.outer), number(label.inner), label.own)


def _leaves(live: Sequence[Any], scope: Scope) -> dict[int, tuple[str, Examples | None]]:
    """What :func:`assign_roles` is to know of the inputs that are no parameters."""
    leaves: dict[int, tuple[str, Examples | None]] = {}
    for value in live:
        known = scope.tensors.get(id(value)) if isinstance(value, Tensor) else None
        if known is None or id(value) in scope.parameters:
            continue
        _, name, label = known
        if isinstance(label, (Summed, Mixed)):
            raise ExampleMixingError(
                f"'{name}' is {label}, and another block of the model computes with it",
                remedy="compute it for every example by itself",
            )
        if isinstance(label, Shared):
            if value.requires_grad:
                raise UnsupportedGraphError(
                    f"'{name}' comes from parameters alone, and another block of the model computes with it: its "
                    "gradient would belong to no example there",
                    remedy="use the parameters in one block only, or compile the model without regions",
                )
            leaves[id(value)] = (name, None)
        else:
            leaves[id(value)] = (name, _of_one(value) if isinstance(label, Whole) else replace(label, own=()))
    return leaves


def _alike(live: Sequence[Any], scope: Scope) -> dict[int, tuple[int, ...]]:
    """Along which dimensions shared inputs are known to be the same."""
    labels = {p: scope.label(x) for p, x in enumerate(live) if isinstance(x, Tensor)}
    return {p: label.alike for p, label in labels.items() if isinstance(label, Shared) and label.alike}


def _of_one(value: Tensor) -> Examples:
    """An axis for a batch of one example, which may lie anywhere."""
    ones = [d for d, n in enumerate(value.shape) if n == 1]
    if ones:
        return Examples(ones[0])
    if not value.ndim:
        raise UnsupportedGraphError(
            "a number that belongs to the only example of a batch passes from one block of the model to another",
            remedy="give it a batch dimension, or pass batches of two and more examples",
        )
    return Examples(0, 1, value.shape[0])


def _is_trainable(value: Any, scope: Scope) -> bool:
    return isinstance(value, Tensor) and id(value) in scope.parameters and value.requires_grad


def _needs_gradient(gm: fx.GraphModule) -> bool:
    outputs: Iterable[Any] = gm.graph.output_node().args[0]  # type: ignore[assignment]
    values = (n.meta.get("example_value") for n in outputs if isinstance(n, fx.Node))
    return any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _symbols(gm: fx.GraphModule) -> dict[sympy.Symbol, tuple[int, int]]:
    """Where the sizes of a run can be read off: symbol -> input and dimension."""
    found: dict[sympy.Symbol, tuple[int, int]] = {}
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        fake = node.meta.get("example_value")
        if isinstance(fake, Tensor):
            for dim, n in enumerate(shape_of(fake)):
                if isinstance(n, sympy.Symbol):
                    found.setdefault(n, (position, dim))
    return found
