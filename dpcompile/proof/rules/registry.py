"""The table of rules: for each operation, what it does to the example axis.

A rule sees one call and answers with the label of its result (a tuple of labels where the operation returns several
values). It is asked only when a value of an example, or a sum over examples, is among the operands: a function of
shared values is shared. Operations without a rule are refused by name. What else is known of an operation is said with
its rule: how its result grows with its operands (:mod:`dpcompile.proof.rules.growth`), how its sums over the examples
are clipped (:mod:`dpcompile.proof.site_kinds`), what its slices are made of (:mod:`dpcompile.proof.rules.stripes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import fx

import dpcompile._torch.prims  # noqa: F401  # rules are for operations that are there
from dpcompile.graph.labels import Examples, Label, Mixed, Shared, Summed
from dpcompile.graph.operations import operation_name
from dpcompile.graph.sizes import Size, is_one, shape_of
from dpcompile.proof.rules.growth import Growth, add_growth, find_growth
from dpcompile.proof.site_kinds import SiteKind, own_site_kind

__all__ = ["AxisRule", "Call", "Labels", "axis_rule", "find_rule", "is_pointwise", "named_arguments"]

Labels: TypeAlias = "Label | tuple[Label, ...]"


class RowNumbers(Protocol):
    """Whether a shared operand is the same for every example: :class:`dpcompile.proof.rules.rows.Rows`."""

    def refusal(self, call: fx.Node, operand: fx.Node, axis: Examples) -> Mixed | None:
        """None if it is, or drawn for each of them."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """One operation of the joint graph, its operands by schema name, and what is known of them."""

    node: fx.Node
    arguments: Mapping[str, Any]
    labels: Mapping[fx.Node, Labels]
    batch: Size
    forward_sums: Mapping[int, tuple[Examples, tuple[Size, ...]]]
    rows: RowNumbers

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def label(self, operand: Any) -> Label:
        """The label of an operand; what is no tensor of the graph is shared."""
        if not isinstance(operand, fx.Node):
            return Shared(zero=isinstance(operand, (int, float)) and operand == 0)
        label = self.labels[operand]
        return label[0] if isinstance(label, tuple) else label

    def shape(self, operand: Any) -> tuple[Size, ...]:
        """The shape of an operand; a number has none."""
        if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
            return ()
        return shape_of(operand.meta["val"])

    @property
    def name(self) -> str:
        """Of the operation: :func:`dpcompile.graph.operations.operation_name`."""
        return operation_name(self.node.target)

    @property
    def growth(self) -> Growth | None:
        """How the result grows with the operands, where that is known."""
        return find_growth(self.name)

    @property
    def out_shape(self) -> tuple[Size, ...]:
        """The shape of the result (of the first one, if there are several)."""
        value = self.node.meta["val"]
        return shape_of(value[0] if isinstance(value, (tuple, list)) else value)

    @property
    def operands(self) -> list[fx.Node]:
        """All tensor operands, lists flattened, in order."""
        return [n for n in self.node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]

    def mixes(self, reason: str, remedy: str | None = None) -> Mixed:
        """Answer that this call mixes examples."""
        return Mixed(reason, self.node, remedy=remedy)

    def unsupported(self, reason: str, remedy: str | None = None) -> Mixed:
        """Answer that nothing is known about this form of the call."""
        return Mixed(reason, self.node, supported=False, remedy=remedy)

    def by_row(self, operand: Any, axis: Examples) -> Mixed | None:
        """The refusal where a shared operand differs from example to example along ``axis``; None where it may stand.

        **Guarantee.** After None the operand holds the same values for every example, or draws of random numbers that
        are independent and alike for all of them and reach no other example; then, without one example, the others
        get what they had, or what is distributed like it.

        Args:
            operand: of this call; one that is not shared, or is broadcast along ``axis``, passes.
            axis: how the examples lie in it, as they do in the operands that it meets.
        """
        if not isinstance(operand, fx.Node) or not isinstance(self.label(operand), Shared):
            return None
        shape = self.shape(operand)
        if not 0 <= axis.dim < len(shape) or is_one(shape[axis.dim]):
            return None
        return self.rows.refusal(self.node, operand, axis)

    def any_by_row(self, operands: Iterable[Any], axis: Examples, ndim: int) -> Mixed | None:
        """The same for operands that are broadcast together to ``ndim`` dimensions, of which ``axis`` is one."""
        for operand in operands:
            refusal = self.by_row(operand, axis.at(axis.dim - ndim + len(self.shape(operand))))
            if refusal is not None:
                return refusal
        return None

    def dim(self, value: int, ndim: int) -> int:
        """A dimension counted from the front."""
        return value % ndim if ndim else 0

    def summed(self) -> bool:
        """Whether a sum over examples is among the operands."""
        return any(isinstance(self.label(n), Summed) for n in self.operands)


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by the names of its schema, defaults too."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(node.kwargs)
    named: dict[str, Any] = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    named.update({a.name: v for a, v in zip(schema.arguments, node.args, strict=False)})
    named.update(node.kwargs)
    return named


AxisRule: TypeAlias = Callable[[Call], Labels]
_RULES: dict[Any, AxisRule] = {}


def axis_rule(
    *names: str, growth: Growth | None = None, site: SiteKind | None = None
) -> Callable[[AxisRule], AxisRule]:
    """Register a rule for operations named ``namespace.operation``, all overloads, and what else is known of them.

    Operations that this version of torch does not have are passed over.

    Args:
        names: of the operations.
        growth: how their results grow with their operands.
        site: how their sums over the examples are clipped.
    """

    def register(rule: AxisRule) -> AxisRule:
        for name in names:
            namespace, _, operation = name.partition(".")
            packet = getattr(getattr(torch.ops, namespace), operation, None)
            if packet is not None:
                assert packet not in _RULES, f"two rules for {name}"
                _RULES[packet] = rule
                if growth is not None:
                    add_growth(growth, operation_name(packet))
                if site is not None:
                    own_site_kind(operation_name(packet), site)
        return rule

    return register


def add_rule(operation: Any, rule: AxisRule) -> None:
    """Register a rule for one operation of another library."""
    _RULES[operation] = rule


def find_rule(target: Any) -> AxisRule | None:
    """The rule of an operation, or None."""
    packet = getattr(target, "overloadpacket", target)
    return _RULES.get(packet)


def is_pointwise(target: Any) -> bool:
    """Whether torch says of an operation of its own that it works element by element.

    Another library's tag is a hint to a compiler, not a promise.
    """
    return "::" not in operation_name(target) and torch.Tag.pointwise in getattr(target, "tags", ())


def rules() -> Mapping[Any, AxisRule]:
    """Every registered rule, for documentation and tests."""
    return dict(_RULES)
