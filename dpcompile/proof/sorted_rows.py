"""What is known of values whose rows one sort has put in another order."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from dpcompile._torch import pytree
from dpcompile.graph.labels import Examples, Shared
from dpcompile.graph.operations import COPIES, FILLED, ZEROS, operation_name
from dpcompile.graph.sizes import is_one, same, shape_of
from dpcompile.proof.counted_rows import counts_up, root_of
from dpcompile.proof.rules.registry import Call, is_pointwise, named_arguments
from dpcompile.proof.rules.rows import made_of
from dpcompile.proof.rules.stripes import Stripes

__all__ = ["SortedRows"]

aten = torch.ops.aten


class SortedRows:
    """Of one sort of a vector ``[N]``.

    Attributes:
        source: what is sorted.
        count: N.
        own: value with sorted rows -> the value with the rows in their own order, and the dimension of the rows.
        several: the same for operations with several results.
        places: integers ``[N]`` -> q: the own place of the row that lies here, divided by q and rounded down.
        ends: integers ``[E]`` -> E: how many rows have a number up to this one, if the source is numbers from 0 to E-1.
        seen: everything that was recognised, and everything written.
    """

    def __init__(self, graph: fx.Graph, sort: fx.Node, hints: Mapping[sympy.Symbol, int]) -> None:
        arguments = named_arguments(sort)
        self._graph, self._sort, self.source, self._hints = graph, sort, arguments["self"], hints
        self._ascending = not arguments["descending"]
        (self.count,) = shape_of(self.source.meta["val"])
        self.own: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.several: dict[fx.Node, fx.Node] = {}
        self.places: dict[fx.Node, int] = {}
        self.ends: dict[fx.Node, int] = {}
        self.seen: list[fx.Node] = [sort]
        self._back: set[fx.Node] = set()  # where each row lies now, by its own place
        self._resorted: set[fx.Node] = set()  # sorts of places
        self._counts: dict[fx.Node, int] = {}
        self._numbers = {self.source}  # as they are or in another dtype, in any order

    def note(self, node: fx.Node) -> bool:
        """Recognise what says where rows lie; whether it was that."""
        name = operation_name(node.target)
        first: Any = node.args[0] if node.args else None
        if node.target is operator.getitem and first is self._sort:
            self._note_sorted(node)
        elif name in COPIES and first in self._numbers:
            self._numbers.add(node)
            return first is self.source and node not in self.own  # of sorted ones the copy is needed too
        elif name in COPIES and not node.meta["val"].dtype.is_floating_point and self._is_noted(first):
            for known in (self.places, self.ends, self._counts):
                if first in known:
                    known[node] = known[first]
            if first in self._back:
                self._back.add(node)
        elif first in self.places and (divisor := _rounded_down(node)) is not None:
            self.places[node] = self.places[first] * divisor
        elif self._is_inverse(node):
            self._back.add(node)
        elif name == "sort" and self.places.get(first) == 1 and not named_arguments(node)["descending"]:
            self._resorted.add(node)
        elif name == "histc" and first in self._numbers and self._ascending:
            a = named_arguments(node)
            if a["min"] != 0 or a["max"] != a["bins"] - 1 or self.source.meta["val"].dtype.is_floating_point:
                return False
            self._counts[node] = a["bins"]
        elif name == "cumsum" and first in self._counts:
            self.ends[node] = self._counts[first]
        else:
            return False
        self.seen.append(node)
        return True

    def ends_in(self, offsets: Any) -> int | None:
        """E, if these are where each number's rows end."""
        if offsets not in self.ends and self._ascending:
            count = shape_of(offsets.meta["val"])[0]
            path = counts_up(offsets, root_of(self.source), count, self._hints) if isinstance(count, int) else None
            if path is not None and isinstance(count, int):
                self.ends[offsets] = count
                self.seen += path
        return self.ends.get(offsets)

    def goes_back(self, index: Any) -> bool:
        """Whether an index says where each row lies now, by its own place."""
        return index in self._back

    def copy(self, node: fx.Node) -> bool:
        """Write an operation that handles row by row on the rows in their own order; whether it is one."""
        if node.target is operator.getitem:
            return self._copy_result(node)
        if isinstance(node.meta.get("val"), (tuple, list)):
            return any(n in self.own for n in node.all_input_nodes) and self._written(node) is not None
        dim = self._dim_of_rows(node, node.meta["val"], 0)
        written = None if dim is None else self._written(node)
        if dim is not None and written is not None:
            self.own[node] = written, dim
        return written is not None

    def write(self, before: fx.Node, target: Any, *args: Any) -> fx.Node | None:
        """A new operation in front of ``before``, which it stands for; None where it cannot be run."""
        try:
            value = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        except (RuntimeError, ValueError):
            return None
        with self._graph.inserting_before(before):
            node = self._graph.call_function(target, args)
        node.meta = {k: v for k, v in before.meta.items() if k != "seq_nr"} | {"val": value}
        self.seen.append(node)
        return node

    def _written(self, node: fx.Node) -> fx.Node | None:
        """The operation on the rows in their own order."""
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: self.own[n][0] if n in self.own else n)
        try:
            value = node.target(*fx.map_arg(args, _value), **fx.map_arg(kwargs, _value))  # type: ignore[operator]
        except (RuntimeError, ValueError):
            return None
        with self._graph.inserting_before(node):
            written = self._graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        written.meta = {**node.meta, "val": value}
        self.seen += [node, written]
        if isinstance(value, (tuple, list)):
            self.several[node] = written
        return written

    def _copy_result(self, node: fx.Node) -> bool:
        container, number = node.args
        if container not in self.several:
            return False
        dim = self._dim_of_rows(container, node.meta["val"], number)
        written = None if dim is None else self.write(node, operator.getitem, self.several[container], number)
        if dim is not None and written is not None:
            self.own[node] = written, dim
            self.seen.append(node)
        return written is not None

    def _dim_of_rows(self, node: Any, value: torch.Tensor, result: Any) -> int | None:
        """The dimension along which a result is made of its operands' rows, row by row and all alike."""
        made = made_of(node.target)
        given = [n for n in pytree.tree_leaves((node.args, dict(node.kwargs))) if n in self.own]
        if made is None or not given or (len(set(given)) < len(given) and not is_pointwise(node.target)):
            return None
        call = Call(node, named_arguments(node), defaultdict(Shared), self.count, {}, _NO_ROWS)
        call_shape = shape_of(value)
        for dim in (d for d, n in enumerate(call_shape) if same(n, self.count)):
            behind = made(call, Stripes(Examples(dim), self.count), result)
            if behind is not None and all(self._lies(n, s) for n, s in behind) and {n for n, _ in behind} >= set(given):
                return dim
        return None

    def _lies(self, operand: fx.Node, stripes: Stripes) -> bool:
        """Whether an operand has its rows where they are asked for, or is the same for all of them."""
        if operand not in self.own:
            return operation_name(operand.target) in FILLED or operation_name(operand.target) in ZEROS
        whole = is_one(stripes.axis.outer) and is_one(stripes.axis.inner) and same(stripes.count, self.count)
        return whole and self.own[operand][1] == stripes.dim

    def _note_sorted(self, node: fx.Node) -> None:
        if node.args[1] == 0:
            self._numbers.add(node)
            self.own[node] = self.source, 0
        else:
            self.places[node] = 1

    def _is_noted(self, node: Any) -> bool:
        return node in self.places or node in self._back or node in self.ends or node in self._counts

    def _is_inverse(self, node: fx.Node) -> bool:
        """``back[place] = arange``, or the places sorted."""
        name, a = operation_name(node.target), named_arguments(node)
        index: Any
        if node.target is operator.getitem:
            return bool(node.args[0] in self._resorted and node.args[1] == 1)
        if name == "index_put":
            index, values = (a["indices"][0] if len(a["indices"]) == 1 else None), a["values"]
        elif name in ("index_copy", "scatter"):
            index, values = a["index"], a["source"] if name == "index_copy" else a.get("src")
        else:
            return False
        whole = len(shape_of(node.meta["val"])) == 1 and same(shape_of(node.meta["val"])[0], self.count)
        adds = bool(a.get("accumulate")) or a.get("reduce") is not None
        return whole and not adds and self.places.get(index) == 1 and self._counts_from_zero(values)

    def _counts_from_zero(self, node: Any) -> bool:
        while isinstance(node, fx.Node) and operation_name(node.target) in COPIES:
            node = node.args[0]
        if not isinstance(node, fx.Node) or operation_name(node.target) not in ("iota", "arange"):
            return False
        a = named_arguments(node)
        length = shape_of(node.meta["val"])
        return a.get("start") in (None, 0) and a.get("step") in (None, 1) and same(length[0], self.count)


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _rounded_down(node: fx.Node) -> int | None:
    """The divisor, if places are divided by a number and rounded down."""
    name, a = operation_name(node.target), named_arguments(node)
    if name not in ("div", "floor_divide") or (name == "div" and a.get("rounding_mode") not in ("floor", "trunc")):
        return None
    divisor = a["other"]
    return divisor if isinstance(divisor, int) and divisor > 0 else None


class _NoRows:
    """Nobody asks: what rows are made of is asked without labels."""

    def refusal(self, call: fx.Node, operand: fx.Node, axis: Examples) -> None:
        return None


_NO_ROWS = _NoRows()
