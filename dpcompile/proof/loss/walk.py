"""From the model's outputs to the loss, operation by operation, as autograd recorded them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpcompile._torch.loss_graph import inputs_of, noted, shape_of_output
from dpcompile.errors import ExampleMixingError, running_line
from dpcompile.graph.labels import Shared
from dpcompile.proof.loss import rules, views  # noqa: F401  (they register themselves)
from dpcompile.proof.loss.labels import Mixes, Outer, Unknown, Value
from dpcompile.proof.loss.registry import label_of_result, spoken
from dpcompile.proof.loss.targets import MeanOfTargets, means_of_targets

__all__ = ["refuse_mixing"]

_CONSTANT = Value(Shared(), ())
_LONGEST = 4000  # operations of a loss; nothing is said of a longer one


def refuse_mixing(root: tuple[Any, int]) -> list[MeanOfTargets]:
    """Refuse a loss that mixes examples.

    Args:
        root: node and output of the loss, whose backward runs; outputs of private models on its way carry their labels.

    Returns:
        The means over targets in it, of which :func:`dpcompile.proof.loss.targets.refuse_uneven` can tell more.

    Raises:
        ExampleMixingError: an operation of which it is certain.
    """
    values: dict[tuple[Any, int], Value] = {}
    waiting, means = [root], []
    while waiting:
        node, output = edge = waiting[-1]
        label = noted(node, output)
        inputs = () if label is not None else inputs_of(node)
        missing = [e for e in inputs if e[0] is not None and e not in values]
        if missing and edge not in values:
            waiting += missing
            if len(values) + len(waiting) > _LONGEST:
                return []
            continue
        waiting.pop()
        if edge not in values:
            found = [_CONSTANT if e[0] is None else values[e] for e in inputs]
            values[edge] = _value(node, output, label, found)
            means += means_of_targets(node, found) if found else []
    return means


def _value(node: Any, output: int, label: Outer | None, inputs: Sequence[Value]) -> Value:
    try:
        shape = shape_of_output(node, output)
        return Value(label_of_result(node, inputs, shape, output) if label is None else label, shape)
    except Mixes as found:
        raise ExampleMixingError(
            f"the loss mixes examples: `{spoken(node)}`, called on outputs of the private model: {found.how}",
            where=running_line(),
            remedy=found.remedy or "make a loss of each example's own outputs, [B], and call backward on their mean",
        ) from None
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):  # not as the rule knows it
        return Value(Unknown(), ())
