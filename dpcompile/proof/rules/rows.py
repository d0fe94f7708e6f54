"""Which shared values are the same for every example, which are drawn for each, and which go by the row number.

A value that depends on no example can still differ from row to row of the batch: ``torch.arange(B)``, a buffer with B
rows, ``tril``. Without one example the rows behind it move up and get other values, so that their gradients change too.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx

from dpcompile.graph.labels import Examples, Mixed, Shared
from dpcompile.graph.locate import where
from dpcompile.graph.operations import operation_name
from dpcompile.graph.sizes import Size, is_one, same, shape_of
from dpcompile.proof.rules.pointwise import pointwise
from dpcompile.proof.rules.registry import Call, Labels, find_rule, is_pointwise, named_arguments
from dpcompile.proof.rules.stripes import RowWise, Stripes, broadcast, find_row_wise

__all__ = ["Rows", "made_of"]


_SAME = {
    "full", "zeros", "ones", "scalar_tensor", "full_like", "zeros_like", "ones_like", "new_full", "new_zeros",
    "new_ones", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "fill",
}  # fmt: skip
_DIFFERENT = {"iota", "arange", "linspace", "logspace", "eye", "randperm", "tril_indices", "triu_indices"}
# Draws of one number for every element, independent of each other -> the operands that say how they are distributed.
_DRAWS: Mapping[str, tuple[str, ...]] = {
    "rand": (), "randn": (), "randint": (), "rand_like": (), "randn_like": (), "randint_like": (), "uniform": (),
    "normal_functional": (), "exponential": (), "geometric": (), "log_normal": (), "cauchy": (), "random": (),
    "normal": ("mean", "std"), "bernoulli": ("self", "p"), "poisson": ("self",), "native_dropout": ("input",),
    "rrelu_with_noise_functional": ("self",), "binomial": ("count", "prob"), "_standard_gamma": ("self",),
}  # fmt: skip
_CALLED = {"iota": "arange", "lift_fresh_copy": "tensor"}
_REMEDY = (
    "give the examples what does not depend on their place in the batch: index along their own dimensions ([1, T, ..] "
    "where they lie as [B, T, ..]), expand one value over the batch, pass what belongs to an example as an input "
    "(in_dims), or draw it with torch.rand or torch.randn"
)


def made_of(target: object) -> RowWise | None:
    """What is registered of an operation."""
    rule = find_rule(target) or (pointwise if is_pointwise(target) else None)
    return find_row_wise(operation_name(target)) or find_row_wise(rule)


class Rows:
    """Answers for one graph.

    Args:
        labels: of its values, as far as they are known.
        batch: B.
        names: placeholder -> what the user calls it.

    Attributes:
        drawn: draws of random numbers that met examples, and how these lay: each example has its own.
    """

    def __init__(self, labels: Mapping[fx.Node, Labels], batch: Size, names: Mapping[fx.Node, str]) -> None:
        self._labels, self._batch, self._names = labels, batch, names
        self.drawn: dict[fx.Node, Examples] = {}
        self._same: set[tuple[fx.Node, Stripes, int]] = set()

    def refusal(self, call: fx.Node, operand: fx.Node, axis: Examples) -> Mixed | None:
        """See :meth:`dpcompile.proof.rules.Call.by_row`."""
        draws: dict[fx.Node, Examples] = {}
        found = self._differing(operand, Stripes(axis, self._batch), draws)
        if found is None:
            self.drawn.update(draws)
            return None
        node, known = found
        what = self._called(node)
        if known:
            reason = f"what it does to an example depends on the example's row number in the batch, through {what}; "
            return Mixed(reason + "with one example less others would get other values", call, remedy=_REMEDY)
        reason = f"an operand is as long as the batch, and whether {what} is the same for every example is not known"
        return Mixed(reason, call, supported=False, remedy=_REMEDY)

    def alike(self, node: fx.Node) -> tuple[int, ...]:
        """The dimensions of a shared value along which all positions are the same."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return ()
        found = []
        for dim, length in enumerate(shape_of(value)):
            draws: dict[fx.Node, Examples] = {}
            if self._differing(node, Stripes(Examples(dim), length), draws) is None and not draws:
                found.append(dim)
        return tuple(found)

    def _differing(
        self, node: fx.Node, stripes: Stripes, draws: dict[fx.Node, Examples]
    ) -> tuple[fx.Node, bool] | None:
        """The operation or input that makes places differ, and whether that is known; None if nothing does."""
        asked, seen = [(node, stripes, 0)], set()
        while asked:
            question = asked.pop()
            if question in seen or question in self._same:
                continue
            seen.add(question)
            answer = self._behind(*question, draws)
            if isinstance(answer, bool):
                return question[0], answer
            asked += answer
        if not draws:
            self._same |= seen
        return None

    def _behind(
        self, node: fx.Node, stripes: Stripes, result: int, draws: dict[fx.Node, Examples]
    ) -> list[tuple[fx.Node, Stripes, int]] | bool:
        """Questions to be answered first, or, where the places differ, whether that is known."""
        label = self._labels.get(node)
        label = label[result] if isinstance(label, tuple) else label
        if not isinstance(label, Shared):
            return False
        if label.zero or is_one(stripes.count) or stripes.dim in label.alike:
            return []
        if node.op != "call_function":
            return True
        if node.target is operator.getitem:
            return [(node.args[0], stripes, node.args[1])]  # type: ignore[list-item]
        name = operation_name(node.target)
        call = Call(node, named_arguments(node), self._labels, self._batch, {}, self)
        if name in _SAME or name in _DIFFERENT:
            return [] if name in _SAME else True
        if name in _DRAWS:
            if not same(stripes.count, self._batch) or draws.setdefault(node, stripes.axis) != stripes.axis:
                return False
            said_by = ("p",) if name == "bernoulli" and call["p"] is not None else _DRAWS[name]
            operands = [n for k in said_by if isinstance(n := call[k], fx.Node)]
            return [(n, s, 0) for n, s in broadcast(call, operands, stripes)]
        known = made_of(node.target)
        behind = known(call, stripes, result) if known is not None else None
        return known is not None if behind is None else [(n, s, 0) for n, s in behind]

    def _called(self, node: fx.Node) -> str:
        if node.op != "call_function":
            return f"'{self._names.get(node, node.name)}'"
        name, place = operation_name(node.target), where(node)
        text = f"`{_CALLED.get(name, name).removeprefix('python::')}`"
        return text if place is None else f"{text} ({place.partition(', in ')[0]})"
