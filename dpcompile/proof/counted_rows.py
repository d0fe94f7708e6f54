"""Where each number's rows end, however a model computes it: found by trying it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from dpcompile._torch.tensors import real_tensors
from dpcompile.graph.operations import CONSTANTS, COPIES, RESHAPES, operation_name
from dpcompile.graph.sizes import hinted, shape_of

__all__ = ["behind", "counts_up", "root_of"]

_COUNTS = CONSTANTS | COPIES | RESHAPES | frozenset(
    {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "sym_size", "squeeze", "unsqueeze",
     "permute", "expand", "slice", "eq", "le", "lt", "ge", "gt", "where", "sum", "cumsum", "histc", "bincount",
     "scatter", "scatter_add", "index_add", "index_put", "searchsorted", "bucketize", "sort", "add", "getitem"}
)  # fmt: skip
_LIMITS = frozenset({"clamp", "clamp_min", "clamp_max"})  # of numbers; of counts they are not understood
_LARGE = 2**26  # a table of that many numbers takes a tenth of a second to add up


def root_of(numbers: fx.Node) -> fx.Node:
    """The integers of which a vector is another shape."""
    while operation_name(numbers.target) in RESHAPES | {"clone", "alias"}:
        first: Any = numbers.args[0]
        numbers = first
    return numbers


def behind(ends: fx.Node, root: fx.Node) -> list[fx.Node] | None:
    """What lies between ``root`` and ``ends``, in the order of the graph; None if anything but counting does."""
    found: dict[fx.Node, None] = {}
    waiting = [ends]
    while waiting:
        node = waiting.pop()
        if node in found or node is root or isinstance(node.meta.get("val"), (int, torch.SymInt)):
            continue
        name = operation_name(node.target) if node.op == "call_function" else ""
        if name not in _COUNTS and not (name in _LIMITS and _are_numbers(node.args[0], root)):
            return None
        found[node] = None
        waiting += node.all_input_nodes
    order = {n: i for i, n in enumerate(ends.graph.nodes)}
    return sorted(found, key=order.__getitem__)


def _are_numbers(node: Any, root: fx.Node) -> bool:
    """Whether a value is the integers in another order and shape."""
    while node is not root and isinstance(node, fx.Node):
        if operation_name(node.target) not in COPIES | RESHAPES | {"unsqueeze", "squeeze", "sort", "getitem"}:
            return False
        node = node.args[0]
    return node is root


def counts_up(ends: fx.Node, root: fx.Node, count: int, hints: Mapping[sympy.Symbol, int]) -> list[fx.Node] | None:
    """What computes, of integers from 0 to E-1, how many are no larger than each: that, if ``ends`` does so.

    It may be made of comparisons, sums, and writes by index alone, and must give what counting does for numbers that
    are all the same, that are spread evenly, and random ones, of two kinds and of all: a limit, a shift, or an expert
    that is left out shows there. Numbers of E, of no expert, must be left out, or raise. The proof does not stand on
    it (:mod:`dpcompile.proof.unsort`).

    Args:
        ends: an integer vector ``[E]``.
        root: integers, of any shape.
        count: E.
        hints: of symbols in sizes.
    """
    path = behind(ends, root)
    value = root.meta["val"]
    if path is None or value.dtype not in (torch.int64, torch.int32) or len(shape_of(ends.meta["val"])) != 1:
        return None
    larger = {symbol: 8 * hint for symbol, hint in hints.items()}
    with real_tensors():
        for sizes, numbers in _trials(value.shape, count, hints, larger):
            wanted = torch.bincount(numbers.flatten(), minlength=count)[:count].cumsum(0)
            try:
                found = _run(path, {root: numbers.to(value.dtype)}, sizes)[ends]
            except (RuntimeError, IndexError, ValueError):
                if (numbers == count).any():  # it may refuse a number that is none of E
                    continue
                return None
            if not isinstance(found, Tensor) or found.shape != wanted.shape or not torch.equal(found.long(), wanted):
                return None
    return path


def _trials(
    shape: Sequence[Any], count: int, hints: Mapping[sympy.Symbol, int], larger: Mapping[sympy.Symbol, int]
) -> Iterator[tuple[Mapping[sympy.Symbol, int], Tensor]]:
    """Sizes, and numbers of these."""
    generator = torch.Generator().manual_seed(0)
    own = [hinted(s, hints) for s in shape]
    rows = torch.Size(own).numel()
    few = rows * count > _LARGE
    even = torch.arange(rows).reshape(own) % count
    yield hints, even
    yield hints, count - 1 - even
    for number in sorted({count - 1} if few else {0, 1 % count, count // 2, count - 1}):
        yield hints, torch.full(own, number)
    for _ in range(1 if few else 4):
        two = torch.randint(0, count, (2,), generator=generator)
        yield hints, two[torch.randint(0, 2, own, generator=generator)]
        yield hints, torch.randint(0, count, own, generator=generator)
    yield hints, torch.randint(0, count + 1, own, generator=generator)
    yield hints, torch.full(own, count)
    if not all(isinstance(s, int) for s in shape):
        yield larger, torch.full([hinted(s, larger) for s in shape], count - 1)


def _run(path: list[fx.Node], values: dict[fx.Node, Any], hints: Mapping[sympy.Symbol, int]) -> dict[fx.Node, Any]:
    def given(node: fx.Node) -> Any:
        return values[node] if node in values else hinted(node.meta["val"], hints)

    for node in path:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), given)
        own = {k: "cpu" if k == "device" else v for k, v in kwargs.items()}
        values[node] = node.target(*args, **own)  # type: ignore[operator]
    return values
