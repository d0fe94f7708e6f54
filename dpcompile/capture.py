"""From what Dynamo hands a backend to a joint graph with names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from dpcompile._torch import (
    ForwardTokenAOTOutput,
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
    add_inputs,
    detect_fake_mode,
    is_number,
)
from dpcompile.axis import Examples
from dpcompile.empty import NoExample
from dpcompile.errors import UnsupportedGraphError
from dpcompile.joint import JointGraph, OverRanks
from dpcompile.locate import where
from dpcompile.lowering import Lowering
from dpcompile.outputs import check_differentiable, separate_outputs
from dpcompile.sizes import Size, divide, is_one, product, same, shape_of, size

__all__ = ["Roles", "arguments_of", "assign_roles", "check_outputs", "extend", "name_joint", "written_inputs"]

_ARGUMENTS = re.compile(r"^(?:\w+\()?L\['(?:args|kwargs)'\]")  # ___from_numpy(L['args'][0]) too
_HIDDEN = re.compile(r"^L\['(args|kwargs)'\]")
_INSIDE_MODEL = re.compile(
    r"^L\['module'\](?:\.__dict__)?((?:(?:\.|\[')_modules(?:'\])?\['[^']*'\])*)\._buffers\['(.*)'\]$"
)
MASK, NORMS, SUM, WEIGHTS = "dpcompile_mask", "dpcompile_norms", "dpcompile_sum", "dpcompile_weights"


@dataclass(frozen=True, slots=True)
class Roles:
    """What the inputs of a captured graph are, by position.

    Attributes:
        parameters: position -> name, of the trainable ones.
        frozen: position -> name, of the others.
        examples: position -> the dimension that the examples lie along.
        names: position -> what the user calls it.
        batch: the number of examples.
        hints: a value for every symbol.
        narrow: positions of the trainable parameters of a dtype narrower than float32.
        inputs: how many inputs the captured graph has.
        arguments: positions of the tensors of the call.
        lowering: of a region; None for a model in one graph.
        layouts: position -> how the examples lie, where that is more than a dimension of their own.
        ranks: what the inputs are on the other ranks of tensor parallelism; None without it.
        shared: names of the trainable parameters that other regions use too.
        alike: position -> the dimensions along which all positions of a shared input are known to be the same.
    """

    parameters: Mapping[int, str]
    frozen: Mapping[int, str]
    examples: Mapping[int, int]
    names: Mapping[int, str]
    batch: Size
    hints: Mapping[sympy.Symbol, int]
    narrow: tuple[int, ...]
    inputs: int
    arguments: frozenset[int]
    lowering: Lowering | None = None
    layouts: Mapping[int, Examples] = field(default_factory=dict)
    ranks: OverRanks | None = None
    shared: frozenset[str] = frozenset()
    alike: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def others(self) -> dict[int, str]:
        """Inputs that are neither parameters nor arguments: buffers, attributes, globals."""
        known = {**self.parameters, **self.frozen}
        return {p: n for p, n in self.names.items() if p not in known and p not in self.arguments}

    @property
    def outside(self) -> dict[int, str]:
        """Inputs that are no arguments: the others, and parameters."""
        return {p: n for p, n in self.names.items() if p not in self.arguments}

    @property
    def batch_from(self) -> tuple[int, int]:
        """``(position, dimension)`` of an input that tells B at run time."""
        return next(iter(self.examples.items()))


def assign_roles(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    parameters: Mapping[int, str],
    leaves: Mapping[int, tuple[str, int | Examples | None]],
    *,
    trained: bool = True,
) -> Roles:
    """Recognise every input by identity: a live parameter, a tensor of the call, or neither.

    Args:
        gm: Dynamo's graph.
        inputs: its example inputs, the live tensors.
        parameters: ``id(parameter)`` -> name.
        leaves: ``id(tensor)`` -> name and example dimension, of the call's tensors; or how the examples lie in it.
        trained: whether the graph is to give gradients of parameters; otherwise it need not hold examples.

    Raises:
        UnsupportedGraphError: an input that needs a gradient and is no parameter; no input with an example axis; no
            output that needs a gradient.
    """
    if trained:
        check_differentiable(gm)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    trainable: dict[int, str] = {}
    frozen: dict[int, str] = {}
    examples: dict[int, int] = {}
    names: dict[int, str] = {}
    hints: dict[sympy.Symbol, int] = {}
    layouts: dict[int, Examples] = {}
    batch: Size | None = None
    plain: int | torch.SymInt | None = None  # the same as torch has it, where the examples are a dimension
    for position, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
        fake = node.meta.get("example_value")
        if not isinstance(value, Tensor) or not isinstance(fake, Tensor):
            continue
        for expression, number in zip(shape_of(fake), value.shape, strict=True):
            if isinstance(expression, sympy.Symbol) and isinstance(number, int):
                hints[expression] = number
        if id(value) in parameters:
            names[position] = parameters[id(value)]
            if value.is_complex() and value.requires_grad:
                raise UnsupportedGraphError(
                    f"parameter '{names[position]}' is complex, and norms and noise are those of real numbers",
                    remedy="keep it as a real parameter [..., 2], and use torch.view_as_complex(it) in forward",
                )
            (trainable if value.requires_grad else frozen)[position] = parameters[id(value)]
        elif id(value) in leaves:
            names[position], dim = leaves[id(value)]
            if dim is not None:
                layout = None if isinstance(dim, int) else dim
                dim = dim if isinstance(dim, int) else dim.dim
                examples[position] = dim % value.ndim
                here = shape_of(fake)[dim]
                if layout is not None and not (is_one(layout.outer) and is_one(layout.inner)):
                    layouts[position] = layout
                    here = divide(here, product([layout.outer, layout.inner]))
                    if not isinstance(here, int):
                        raise UnsupportedGraphError(
                            f"the examples of '{names[position]}' are flattened into a dimension of symbolic size",
                            remedy="compile with dynamic=False, or pass the tensor between blocks with a batch "
                            "dimension of its own",
                        )
                if value.shape[dim] == 0:
                    raise NoExample(
                        f"input '{names[position]}' holds no example",
                        remedy="pad an empty draw to a physical batch and mask it, as PoissonLoader does",
                    )
                if (
                    plain is not None and layout is None and plain == fake.shape[dim]
                ):  # for symbols that differ, a guard
                    here = batch = size(plain)
                if batch is not None and not same(batch, here):
                    raise UnsupportedGraphError(
                        f"the example axis of '{names[position]}' has the size {here}, others have {batch}",
                        remedy="pass inputs that hold the same number of examples; in_dims says where they are",
                    )
                batch = here
                plain = fake.shape[dim] if layout is None else plain
        else:
            names[position] = _source_name(node)
            if is_number(node):
                continue
            if _ARGUMENTS.match(names[position]):
                hidden = _HIDDEN.sub(r"\1", names[position])
                raise UnsupportedGraphError(
                    f"the model reads the tensor {hidden}, which is inside an object or an array of NumPy: it is not "
                    "known whether it has an example axis",
                    remedy="pass tensors themselves (torch.from_numpy), or in lists, tuples and dicts",
                )
            if value.requires_grad:
                raise UnsupportedGraphError(
                    f"the model uses '{names[position]}', which needs a gradient and is no parameter of the model",
                    remedy="register it as an nn.Parameter of the model, or detach it",
                )
    if batch is None and not trained:
        batch = 0
    elif batch is None:
        raise UnsupportedGraphError(
            "no input of the model has an example axis",
            remedy="pass the batch as a tensor argument of the call; in_dims says which dimension holds the examples",
        )
    narrow = tuple(p for p in trainable if inputs[p].element_size() < 4)
    arguments = frozenset(i for i, x in enumerate(inputs) if id(x) in leaves)
    return Roles(trainable, frozen, examples, names, batch, hints, narrow, len(inputs), arguments, layouts=layouts)


def arguments_of(gm: fx.GraphModule) -> list[int]:
    """Positions of the inputs that a captured graph reads out of the arguments of the call, in whatever object."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [p for p, node in enumerate(placeholders) if _ARGUMENTS.match(_source_name(node))]


def extend(gm: fx.GraphModule, roles: Roles) -> tuple[fx.GraphModule, list[Tensor]]:
    """Append inputs: the padding mask ``[B]``, and some whose only use is to receive a gradient.

    The norms leave the compiled backward as the gradient of the second one, ``[B]``. One more float32 input for every
    parameter of a narrower dtype receives its clipped sum: autograd would round the parameter's own gradient. Outputs
    that overlap in memory are copied. In a region norms are squared and ``[parameters, B]``, float64, and so is one
    input more: the clip weights, or, clipped at once, the bound C of every parameter's group.
    """
    position, dim = roles.batch_from
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    like = placeholders[position].meta["example_value"]
    fake_mode = detect_fake_mode([like])
    assert fake_mode is not None
    axis = roles.layouts.get(position)
    batch: Any = like.shape[dim] if axis is None else roles.batch
    with fake_mode:
        mask = torch.empty(batch, device=like.device, dtype=torch.float32)
        if roles.lowering is not None:
            norms = mask.new_empty((len(roles.parameters), batch), dtype=torch.float64, requires_grad=True)
            weights = {WEIGHTS: torch.empty_like(norms, requires_grad=False)}
        else:
            norms, weights = torch.empty_like(mask, requires_grad=True), {}
        wide = [
            torch.zeros((), device=fake.device, dtype=torch.float32).expand(fake.shape).requires_grad_()
            for fake in (placeholders[p].meta["example_value"] for p in roles.narrow)
        ]
    named = {MASK: mask, NORMS: norms} | weights | {f"{SUM}_{i}": w for i, w in enumerate(wide)}
    extended = add_inputs(gm, named)
    separate_outputs(extended)
    extended.recompile()
    return extended, list(named.values())


def name_joint(module: fx.GraphModule, roles: Roles) -> JointGraph:
    """Read AOTAutograd's descriptors off a joint graph.

    Args:
        module: the joint graph, decomposed.
        roles: of the inputs before :func:`extend`.

    Raises:
        UnsupportedGraphError: parameters or inputs that AOTAutograd replaced (views of one another, written to).
    """
    inputs = roles.inputs
    by_position: dict[int, fx.Node] = {}
    tangents: dict[Any, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        descriptor = node.meta.get("desc")
        if isinstance(descriptor, PlainAOTInput):
            by_position[descriptor.idx] = node
        elif isinstance(descriptor, TangentAOTInput):
            tangents[descriptor.output] = node
    missing = [p for p in (*roles.parameters, *roles.examples, inputs, inputs + 1) if p not in by_position]
    if missing:
        called = ", ".join(f"'{roles.names.get(p, p)}'" for p in missing)
        raise UnsupportedGraphError(
            f"inputs {called} share memory with others that the model writes to",
            remedy="clone the input before the in-place operation",
        )
    output = module.graph.output_node()
    values: Sequence[Any] = output.args[0]  # type: ignore[assignment]
    descriptors: Sequence[Any] = output.meta["desc"]
    slots = {d.grad_of.idx: i for i, d in enumerate(descriptors) if _is_gradient(d)}
    forward = {d: values[i] for i, d in enumerate(descriptors) if not _is_gradient(d) and d is not None}
    outputs = [values[i] for i, d in enumerate(descriptors) if isinstance(d, PlainAOTOutput)]
    return JointGraph(
        module=module,
        parameters={name: by_position[p] for p, name in roles.parameters.items()},
        gradients={name: values[slots[p]] for p, name in roles.parameters.items()},
        example_axes={by_position[p]: roles.layouts.get(p, Examples(dim)) for p, dim in roles.examples.items()}
        | {by_position[inputs]: Examples(0)},
        tangent_of={t: forward[d] for d, t in tangents.items() if isinstance(forward.get(d), fx.Node)},
        outputs=tuple(v if isinstance(v, fx.Node) else None for v in outputs),
        mask=by_position[inputs],
        names={by_position[p]: name for p, name in roles.names.items() if p in by_position},
        norm_slot=slots[inputs + 1],
        gradient_slots={name: slots[p] for p, name in roles.parameters.items()},
        sum_slots={
            name: slots[inputs + 2 + roles.narrow.index(p) if p in roles.narrow else p]
            for p, name in roles.parameters.items()
        },
        batch=size(by_position[inputs].meta["val"].shape[0]),
        plain_tangents={
            t: d.idx
            for d, t in tangents.items()
            if isinstance(d, PlainAOTOutput) and isinstance(forward.get(d), fx.Node)
        },
        input_gradients={
            by_position[p]: gradient
            for p, slot in slots.items()
            if roles.lowering is not None and p in by_position and p < inputs and p not in roles.parameters
            if isinstance(gradient := values[slot], fx.Node)
        },
        weights=by_position[inputs + 2] if roles.lowering is not None else None,
        alike={by_position[p]: dims for p, dims in roles.alike.items() if p in by_position},
    )


def written_inputs(module: fx.GraphModule) -> set[int]:
    """Positions of the captured graph's inputs that its joint graph writes to."""
    found = set()
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            descriptors = [n.meta.get("desc") for n in node.all_input_nodes]
            found |= {d.idx for d in descriptors if isinstance(d, PlainAOTInput)}
    return found


def check_outputs(module: fx.GraphModule, roles: Roles) -> None:
    """Raise UnsupportedGraphError unless the user gets every output of a joint graph as the graph returns it.

    Of other outputs AOTAutograd makes what the user sees outside the graph, where nothing is proved: views of a base,
    subclasses of tensors, new values of inputs that need a gradient.
    """
    output = module.graph.output_node()
    returned = zip(output.meta["desc"], output.args[0], strict=True)  # type: ignore[arg-type]
    cotangents = (n.meta.get("desc") for n in module.graph.find_nodes(op="placeholder"))
    candidates = [*returned, *((d.output, None) for d in cotangents if isinstance(d, TangentAOTInput))]
    for descriptor, node in candidates:
        if descriptor is None or _is_gradient(descriptor) or isinstance(descriptor, _AS_IN_GRAPH):
            continue
        place = where(node) if isinstance(node, fx.Node) else None
        if isinstance(descriptor, InputMutationAOTOutput) and isinstance(descriptor.mutated_input, PlainAOTInput):
            raise UnsupportedGraphError(
                f"the model writes to '{roles.names.get(descriptor.mutated_input.idx)}', which needs a gradient, in "
                "place",
                where=place,
                remedy="clone it before the in-place operation; write to parameters only between two steps (an "
                "embedding with max_norm does so in every forward)",
            )
        raise UnsupportedGraphError(
            f"the model returns what is no plain tensor of the captured graph ({descriptor.expr()})",
            where=place,
            remedy="return plain tensors: no tensor subclasses, no views of inputs that are written to",
        )


_AS_IN_GRAPH = (PlainAOTOutput, ForwardTokenAOTOutput)


def _is_gradient(descriptor: Any) -> bool:
    return isinstance(descriptor, GradAOTOutput) and isinstance(descriptor.grad_of, PlainAOTInput)


def _source_name(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return str(node.target)
    name = source.name
    text = str(name() if callable(name) else name)
    found = _INSIDE_MODEL.match(text)
    if found is None:
        return text
    return ".".join([*re.findall(r"\['((?!_modules'\])[^']*)'\]", found[1]), found[2]])
