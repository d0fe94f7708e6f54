"""The table of rules: for each operation, what it does to the example axis.

A rule sees one call and answers with the label of its result (a tuple of labels where the operation returns several
values). It is asked only when a value of an example, or a sum over examples, is among the operands: a function of
shared values is shared. Operations without a rule are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from dpcompile.axis import Examples, Label, Mixed, Shared, Summed
from dpcompile.operations import operation_name
from dpcompile.sizes import Size, shape_of

__all__ = ["AxisRule", "Call", "Labels", "axis_rule", "find_rule"]

Labels: TypeAlias = "Label | tuple[Label, ...]"


@dataclass(frozen=True, slots=True)
class Call:
    """One operation of the joint graph, its operands by schema name, and what is known of them."""

    node: fx.Node
    arguments: Mapping[str, Any]
    labels: Mapping[fx.Node, Labels]
    batch: Size
    forward_sums: Mapping[int, tuple[Examples, tuple[Size, ...]]]

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
        if not isinstance(operand, fx.Node) or not isinstance(operand.meta["val"], torch.Tensor):
            return ()
        return shape_of(operand.meta["val"])

    @property
    def name(self) -> str:
        """Of the operation: :func:`dpcompile.operations.operation_name`."""
        return operation_name(self.node.target)

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

    def dim(self, value: int, ndim: int) -> int:
        """A dimension counted from the front."""
        return value % ndim if ndim else 0

    def summed(self) -> bool:
        """Whether a sum over examples is among the operands."""
        return any(isinstance(self.label(n), Summed) for n in self.operands)


AxisRule: TypeAlias = Callable[[Call], Labels]
_RULES: dict[Any, AxisRule] = {}


def axis_rule(*names: str) -> Callable[[AxisRule], AxisRule]:
    """Register a rule for operations named ``namespace.operation``, all overloads.

    Operations that this version of torch does not have are passed over.
    """

    def register(rule: AxisRule) -> AxisRule:
        for name in names:
            namespace, _, operation = name.partition(".")
            packet = getattr(getattr(torch.ops, namespace), operation, None)
            if packet is not None:
                assert packet not in _RULES, f"two rules for {name}"
                _RULES[packet] = rule
        return rule

    return register


def add_rule(operation: Any, rule: AxisRule) -> None:
    """Register a rule for one operation of another library."""
    _RULES[operation] = rule


def find_rule(target: Any) -> AxisRule | None:
    """The rule of an operation, or None."""
    packet = getattr(target, "overloadpacket", target)
    return _RULES.get(packet)


def rules() -> Mapping[Any, AxisRule]:
    """Every registered rule, for documentation and tests."""
    return dict(_RULES)
