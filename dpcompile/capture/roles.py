"""What the inputs of a captured graph are: a live parameter, a tensor of the call, or neither."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from dpcompile._torch.aot import source_name
from dpcompile._torch.dynamo import is_number
from dpcompile.capture.outputs import check_differentiable
from dpcompile.clipping.groups import SEVERAL, Clipping, clip_groups
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.joint import OfExperts, OverRanks
from dpcompile.graph.labels import Examples
from dpcompile.graph.sizes import Size, divide, is_one, product, same, shape_of, size
from dpcompile.options import Lowering

__all__ = ["NoExample", "Roles", "arguments_of", "assign_roles", "no_example_axis"]
_ARGUMENTS = re.compile(r"^(?:\w+\()?L\['(?:args|kwargs)'\]")  # ___from_numpy(L['args'][0]) too
_PARAMETER = re.compile(r"\._parameters\['([^']+)'\]$")
_HIDDEN = re.compile(r"^L\['(args|kwargs)'\]")
_INSIDE_MODEL = re.compile(
    r"^L\['module'\](?:\.__dict__)?((?:(?:\.|\[')_modules(?:'\])?\['[^']*'\])*)\._buffers\['(.*)'\]$"
)


class NoExample(UnsupportedGraphError):
    """The batch of a call has size 0."""


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
        experts: which parameters are experts of ranks with examples of their own; None: none are.
        shared: names of the trainable parameters that other regions use too.
        alike: position -> the dimensions along which all positions of a shared input are known to be the same.
        groups: of a model in one graph the clip groups whose bounds are an input; empty: one group, whose bound is a
            constant.
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
    experts: OfExperts | None = None
    shared: frozenset[str] = frozenset()
    alike: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    groups: tuple[str, ...] = ()

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
    clipping: Clipping = "flat",
    region: str = "",
) -> Roles:
    """Recognise every input by identity: a live parameter, a tensor of the call, or neither.

    Args:
        gm: Dynamo's graph.
        inputs: its example inputs, the live tensors.
        parameters: ``id(parameter)`` -> name.
        leaves: ``id(tensor)`` -> name and example dimension, of the call's tensors; or how the examples lie in it.
        trained: whether the graph is to give gradients of parameters; otherwise it need not hold examples.
        clipping: of a model in one graph.
        region: what to call the graph, if it is one of several.

    Raises:
        UnsupportedGraphError: an input that needs a gradient and is no parameter; no input with an example axis; no
            output that needs a gradient.
    """
    if trained:
        check_differentiable(gm)
    found = _Found()
    for position, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)):
        fake = node.meta.get("example_value")
        if not isinstance(value, Tensor) or not isinstance(fake, Tensor):
            continue
        found.hint(value, fake)
        if id(value) in parameters:
            found.parameter(position, parameters[id(value)], value)
        elif id(value) in leaves:
            found.argument(position, *leaves[id(value)], value, fake)
        else:
            found.other(position, node, value)
    if found.batch is None and trained:
        raise _no_example_in(region, found.trainable.values()) if region else no_example_axis()
    return Roles(
        found.trainable,
        found.frozen,
        found.examples,
        found.names,
        0 if found.batch is None else found.batch,
        found.hints,
        narrow=tuple(p for p in found.trainable if inputs[p].element_size() < 4),
        inputs=len(inputs),
        arguments=frozenset(i for i, x in enumerate(inputs) if id(x) in leaves),
        layouts=found.layouts,
        groups=tuple(clip_groups(found.trainable.values(), clipping)) if clipping in SEVERAL else (),
    )


@dataclass(slots=True)
class _Found:
    """What the inputs seen so far are; see :class:`Roles`.

    Attributes:
        plain: ``batch`` as torch has it, where the examples are a dimension of their own.
    """

    trainable: dict[int, str] = field(default_factory=dict)
    frozen: dict[int, str] = field(default_factory=dict)
    examples: dict[int, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    hints: dict[sympy.Symbol, int] = field(default_factory=dict)
    layouts: dict[int, Examples] = field(default_factory=dict)
    batch: Size | None = None
    plain: int | torch.SymInt | None = None

    def hint(self, value: Tensor, fake: Tensor) -> None:
        """Learn the values of symbols."""
        for expression, number in zip(shape_of(fake), value.shape, strict=True):
            if isinstance(expression, sympy.Symbol) and isinstance(number, int):
                self.hints[expression] = number

    def parameter(self, position: int, name: str, value: Tensor) -> None:
        """A live parameter."""
        self.names[position] = name
        if value.is_complex() and value.requires_grad:
            raise UnsupportedGraphError(
                f"parameter '{name}' is complex, and norms and noise are those of real numbers",
                remedy="keep it as a real parameter [..., 2], and use torch.view_as_complex(it) in forward",
            )
        (self.trainable if value.requires_grad else self.frozen)[position] = name

    def argument(self, position: int, name: str, lies: int | Examples | None, value: Tensor, fake: Tensor) -> None:
        """A tensor of the call, in which examples lie like this."""
        self.names[position] = name
        if lies is None:
            return
        layout, dim = (None, lies) if isinstance(lies, int) else (lies, lies.dim)
        self.examples[position] = dim % value.ndim
        here = shape_of(fake)[dim]
        if layout is not None and not (is_one(layout.outer) and is_one(layout.inner)):
            self.layouts[position] = layout
            here = divide(here, product([layout.outer, layout.inner]))
            if not isinstance(here, int):
                raise UnsupportedGraphError(
                    f"the examples of '{name}' are flattened into a dimension of symbolic size",
                    remedy="compile with dynamic=False, or pass the tensor between blocks with a batch dimension of "
                    "its own",
                )
        if value.shape[dim] == 0:
            raise NoExample(
                f"input '{name}' holds no example",
                remedy="pad an empty draw to a physical batch and mask it, as PoissonLoader does",
            )
        if (
            self.plain is not None and layout is None and self.plain == fake.shape[dim]
        ):  # of symbols that differ: a guard
            here = self.batch = size(self.plain)
        if self.batch is not None and not same(self.batch, here):
            raise UnsupportedGraphError(
                f"the example axis of '{name}' has the size {here}, others have {self.batch}",
                remedy="pass inputs that hold the same number of examples; in_dims says where they are",
            )
        self.batch = here
        self.plain = fake.shape[dim] if layout is None else self.plain

    def other(self, position: int, node: fx.Node, value: Tensor) -> None:
        """A buffer, an attribute, a global, or a number."""
        name = self.names[position] = _source_name(node)
        if is_number(node):
            return
        if _ARGUMENTS.match(name):
            hidden = _HIDDEN.sub(r"\1", name)
            raise UnsupportedGraphError(
                f"the model reads the tensor {hidden}, which is inside an object or an array of NumPy: it is not "
                "known whether it has an example axis",
                remedy="pass tensors themselves (torch.from_numpy), or in lists, tuples and dicts",
            )
        if value.requires_grad and _PARAMETER.search(name):
            called = re.sub(r"^L\['\w+'\]\.", "", _PARAMETER.sub(r".\1", name))
            raise UnsupportedGraphError(
                f"the model uses parameter '{called}', which is none of those that dp_compile "
                "found: it was put there later, or its module is in a list or dict of Python's",
                remedy="call dp_compile again after changing the model, and make the optimizer from the result; hold "
                "modules in nn.ModuleList or nn.ModuleDict",
            )
        if value.requires_grad:
            raise UnsupportedGraphError(
                f"the model uses '{name}', which needs a gradient and is no parameter of the model",
                remedy="register it as an nn.Parameter of the model, or detach it",
            )


def no_example_axis() -> UnsupportedGraphError:
    """A call of which no tensor holds examples."""
    return UnsupportedGraphError(
        "no input of the model has an example axis",
        remedy="pass the batch as a tensor argument of the call; in_dims says which dimension holds the examples",
    )


def _no_example_in(region: str, parameters: Iterable[str]) -> UnsupportedGraphError:
    names = sorted(parameters)
    return UnsupportedGraphError(
        f"{region} is given no example, and makes values of parameter '{names[0]}'"
        + f" and {len(names) - 1} more" * (len(names) > 1)
        + ": what each example has for a gradient is known where they are used",
        remedy="compute these values where they meet the examples, in the block that uses them; or leave regions out, "
        "where the model is not under FSDP2",
    )


def arguments_of(gm: fx.GraphModule) -> list[int]:
    """Positions of the inputs that a captured graph reads out of the arguments of the call, in whatever object."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [p for p, node in enumerate(placeholders) if _ARGUMENTS.match(_source_name(node))]


def _source_name(node: fx.Node) -> str:
    text = source_name(node)
    if text is None:
        return str(node.target)
    found = _INSIDE_MODEL.match(text)
    if found is None:
        return text
    return ".".join([*re.findall(r"\['((?!_modules'\])[^']*)'\]", found[1]), found[2]])
