"""Rows that are sorted, handled row by row and brought back to their places: the same without the sorting.

The experts of a mixture sort the rows of all examples by expert. Where a row comes to lie depends on all examples; what
becomes of it does not. This pass follows the sorted rows and writes every operation on them a second time, on the rows
in their own order; where they come back to their places, or are added up, it takes that. What it does not know stays
sorted, and is refused.

Nothing here is trusted by the proof, which sees the graph as it is afterwards. A mistake would make another model, not
one in which examples mix.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from dpcompile.graph.operations import FILLED, ZEROS, operation_name
from dpcompile.graph.sizes import divide, same, shape_of
from dpcompile.proof.rules.registry import named_arguments
from dpcompile.proof.sorted_rows import SortedRows

__all__ = ["unsort"]

aten = torch.ops.aten
_SORTS = (aten.sort.default, aten.sort.stable)


def unsort(graph: fx.Graph, hints: Mapping[sympy.Symbol, int]) -> None:
    """Write what is done to sorted rows on the rows in their own order, where that makes no difference.

    Contract: equal values, up to rounding, of all that is not sorted. Numbers of experts below 0 raise an error when
    the graph runs, and rows of numbers beyond the last are zeros behind a product, where torch's own leaves them as
    they were in memory.

    Args:
        graph: a joint graph, or one that is proved by itself; changed in place.
        hints: of symbols in sizes.
    """
    for target in _SORTS:
        for sort in graph.find_nodes(op="call_function", target=target):
            if sort.users and sort.args[0].meta["val"].ndim == 1:
                _follow(graph, SortedRows(graph, sort, hints), sort)


def _follow(graph: fx.Graph, rows: SortedRows, sort: fx.Node) -> None:
    behind = [n for n in list(graph.nodes) if n.op == "call_function"]
    for node in behind[behind.index(sort) + 1 :]:
        if rows.note(node) or node.meta.get("val") is None:
            continue
        if not _handle(rows, node):
            rows.copy(node)
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in sorted(dict.fromkeys(rows.seen), key=order.__getitem__, reverse=True):
        if not node.users:
            graph.erase_node(node)


def _handle(rows: SortedRows, node: fx.Node) -> bool:
    """What brings rows to the sorted order, back from it, or adds them up; whether it was that."""
    name = operation_name(node.target)
    if node.target is operator.getitem:
        return _result_of_grouped(rows, node)
    handler = _HANDLERS.get(name)
    return handler is not None and handler(rows, node, named_arguments(node))


def _instead(rows: SortedRows, node: fx.Node, value: fx.Node | None) -> bool:
    """Let ``value`` take the place of a value whose rows are not sorted."""
    if value is not None and not value.meta["val"].is_contiguous():
        value = rows.write(node, aten.clone.default, value)
    if value is None:
        return False
    node.replace_all_uses_with(value)
    rows.seen.append(node)
    return True


def _sorted(rows: SortedRows, node: fx.Node, value: fx.Node | None) -> bool:
    """Note the rows of a sorted value in their own order."""
    if value is not None and not value.meta["val"].is_contiguous():
        value = rows.write(node, aten.clone.default, value)
    if value is None:
        return False
    rows.own[node] = value, 0
    rows.seen.append(node)
    return True


def _look_up(rows: SortedRows, node: fx.Node, a: dict[str, Any]) -> bool:
    """``x[place]`` sorts rows, ``x[back]`` brings them back."""
    if "indices" in a:
        index = a["indices"][0] if len(a["indices"]) == 1 else None
    else:
        index = a["index"] if a["dim"] in (0, -a["self"].meta["val"].ndim) else None
    source = a["self"]
    if rows.goes_back(index) and rows.own.get(source, (None, 1))[1] == 0:
        return _instead(rows, node, rows.own[source][0])
    if index not in rows.places or source in rows.own:
        return False
    each = rows.places[index]
    if divide(rows.count, each) is None or not same(shape_of(source.meta["val"])[0] * each, rows.count):
        return False
    if each == 1:
        return _sorted(rows, node, source)
    wide = rows.write(node, aten.unsqueeze.default, source, 1)
    sizes = [-1, each, *([-1] * (source.meta["val"].ndim - 1))]
    wide = wide and rows.write(node, aten.expand.default, wide, sizes)
    wide = wide and rows.write(node, aten.clone.default, wide)
    return _sorted(rows, node, wide and rows.write(node, aten.view.default, wide, _sizes(rows, node, source, -1)))


def _sizes(rows: SortedRows, node: fx.Node, source: fx.Node, *first: int) -> list[Any]:
    """``first``, and the sizes of all dimensions of ``source`` but its first."""
    rest = source.meta["val"].shape[1:]
    return [
        *first,
        *(n if isinstance(n, int) else rows.write(node, aten.sym_size.int, source, d + 1) for d, n in enumerate(rest)),
    ]


def _write(rows: SortedRows, node: fx.Node, a: dict[str, Any]) -> bool:
    """Writes and accumulations at the places of rows, or at numbers that every row has of its own."""
    base, values = a["self"], a["values"] if "values" in a else a["source"]
    index: Any
    if "indices" in a:
        index, adds = (a["indices"][0] if len(a["indices"]) == 1 else None), a["accumulate"]
    else:
        at_rows = a["dim"] in (0, -base.meta["val"].ndim) and a.get("alpha", 1) == 1
        index, adds = (a["index"] if at_rows else None), operation_name(node.target) == "index_add"
    empty = not adds or _is_zero(base)
    if rows.goes_back(index) and values not in rows.own and base not in rows.own:
        whole = all(same(shape_of(x.meta["val"])[0], rows.count) for x in (base, values))
        return whole and empty and _sorted(rows, node, values)
    if rows.own.get(values, (None, 1))[1] != 0 or base in rows.own:
        return False
    value = rows.own[values][0]
    if index in rows.own and rows.own[index][0].meta["val"].ndim == 1 and adds:
        return _instead(rows, node, _written_anew(rows, node, value, rows.own[index][0]))
    each = rows.places.get(index)
    if each is None or not same(shape_of(base.meta["val"])[0] * each, rows.count) or not (adds or each == 1):
        return False
    if each != 1:
        apart = rows.write(node, aten.view.default, value, _sizes(rows, node, value, -1, each))
        value = apart and rows.write(node, aten.sum.dim_IntList, apart, [1])
    return _instead(rows, node, value if empty or value is None else rows.write(node, aten.add.Tensor, base, value))


def _written_anew(rows: SortedRows, node: fx.Node, value: fx.Node, index: fx.Node) -> fx.Node | None:
    """The same accumulation of rows in their own order."""
    if operation_name(node.target) == "index_add":
        return rows.write(node, node.target, node.args[0], 0, index, value)
    return rows.write(node, node.target, node.args[0], [index], value, True)


def _is_zero(node: Any) -> bool:
    name = operation_name(node.target)
    return name in ZEROS or (name in FILLED and named_arguments(node)[FILLED[name]] == 0)


def _sum(rows: SortedRows, node: fx.Node, a: dict[str, Any]) -> bool:
    """A sum over the rows, in whatever order."""
    source = node.all_input_nodes[0]
    if node.kwargs or source not in rows.own or rows.own[source][1] not in _reduced_dims(node, a):
        return False
    return _instead(rows, node, rows.write(node, node.target, rows.own[source][0], *node.args[1:]))


def _reduced_dims(node: fx.Node, a: dict[str, Any]) -> set[int]:
    """The dimensions that a reduction takes away."""
    ndim = node.all_input_nodes[0].meta["val"].ndim
    dims = a.get("dim")
    if dims is None or dims == []:
        return set(range(ndim))
    return {d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


def _product(rows: SortedRows, node: fx.Node, a: dict[str, Any]) -> bool:
    """A matrix product that adds up over the rows."""
    x, y = a["self"], a["mat2"]
    if rows.own.get(x, (None, -1))[1] != 1 or rows.own.get(y, (None, -1))[1] != 0:
        return False
    return _instead(rows, node, rows.write(node, node.target, rows.own[x][0], rows.own[y][0]))


def _grouped(rows: SortedRows, node: fx.Node, a: dict[str, Any]) -> bool:
    """Each stretch of rows with the matrix of its expert, or multiplied with another stretch."""
    x, y = (a["self"], a["mat2"]) if "mat2" in a else (a["input"], a["weight"])
    count = rows.ends_in(a["offs"])
    if count is None or a.get("bias") is not None or a.get("out_dtype") not in (None, x.meta["val"].dtype):
        return False
    if y.meta["val"].ndim == 3:
        if rows.own.get(x, (None, -1))[1] != 0 or y in rows.own or not same(shape_of(y.meta["val"])[0], count):
            return False
        products = torch.ops.dpcompile.expert_products.default
        return _sorted(rows, node, rows.write(node, products, rows.own[x][0], y, rows.source))
    if x.meta["val"].ndim != 2 or rows.own.get(x, (None, -1))[1] != 1 or rows.own.get(y, (None, -1))[1] != 0:
        return False
    left = rows.write(node, aten.permute.default, rows.own[x][0], [1, 0])
    return left is not None and _instead(rows, node, _sums(rows, node, left, rows.own[y][0], count))


def _result_of_grouped(rows: SortedRows, node: fx.Node) -> bool:
    """Of the backward in one operation: of the rows, and of the matrices."""
    container: Any = node.args[0]
    if operation_name(container.target) != "transformers::grouped_mm_fallback_backward":
        return False
    x, weight, ends, cotangent = container.args
    count = rows.ends_in(ends)
    if count is None or any(rows.own.get(n, (None, -1))[1] != 0 for n in (x, cotangent)) or weight in rows.own:
        return False
    rows.seen.append(container)
    left, right = rows.own[x][0], rows.own[cotangent][0]
    if node.args[1] == 1:
        return _instead(rows, node, _sums(rows, node, left, right, count))
    turned = rows.write(node, aten.permute.default, weight, [0, 2, 1])
    products = torch.ops.dpcompile.expert_products.default
    return _sorted(rows, node, turned and rows.write(node, products, right, turned, rows.source))


def _sums(rows: SortedRows, node: fx.Node, left: fx.Node, right: fx.Node, count: int) -> fx.Node | None:
    return rows.write(node, torch.ops.dpcompile.expert_sums.default, left, right, rows.source, count)


_HANDLERS: dict[str, Callable[[SortedRows, fx.Node, dict[str, Any]], bool]] = {
    "index": _look_up,
    "index_select": _look_up,
    "index_put": _write,
    "_unsafe_index_put": _write,
    "index_add": _write,
    "index_copy": _write,
    "sum": _sum,
    "mm": _product,
    "_grouped_mm": _grouped,
    "transformers::grouped_mm_fallback": _grouped,
}
