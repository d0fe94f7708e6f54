"""The adjoint of a matrix exponential as one operation, linear in the cotangent.

torch takes it from the exponential of a matrix of four blocks, the cotangent one of them (Al-Mohy and Higham 2009,
doi:10.1137/080716426, theorem 2.1). That exponential is not linear in its operand, only its upper right block is, in
the cotangent: so the proof needs to see the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dpcompile.graph.sizes import same, shape_of

__all__ = ["fold_matrix_exp", "matrix_exp_adjoint"]

aten = torch.ops.aten


@torch.library.custom_op("dpcompile::matrix_exp_adjoint", mutates_args=())
def matrix_exp_adjoint(a: Tensor, g: Tensor) -> Tensor:
    """The upper right block of ``exp([[a, g], [0, a]])``: linear in ``g``.

    Args:
        a: ``[.., n, n]``.
        g: ``[.., n, n]``.
    """
    a, g = torch.broadcast_tensors(a, g)
    n = a.shape[-1]
    blocks = torch.cat([torch.cat([a, g], -1), torch.cat([torch.zeros_like(a), a], -1)], -2)
    return torch.linalg.matrix_exp(blocks)[..., :n, n:].clone(memory_format=torch.contiguous_format)


@matrix_exp_adjoint.register_fake
def _(a: Tensor, g: Tensor) -> Tensor:
    return g.new_empty(torch.broadcast_shapes(a.shape, g.shape))


@matrix_exp_adjoint.register_vmap
def _(info: Any, in_dims: Any, a: Tensor, g: Tensor) -> tuple[Tensor, int]:
    a, g = (x if d is None else x.movedim(d, 0) for x, d in zip((a, g), in_dims, strict=True))
    return torch.ops.dpcompile.matrix_exp_adjoint(a, g), 0


def fold_matrix_exp(graph: fx.Graph) -> None:
    """Write the adjoint of a matrix exponential as :func:`matrix_exp_adjoint`, where the blocks are seen to be its.

    Contract: equal values.
    """
    for node in graph.find_nodes(op="call_function", target=aten.linalg_matrix_exp.default):
        blocks = _blocks(node.args[0])
        if blocks is None:
            continue
        a, g = blocks
        n = shape_of(a.meta["val"])[-1]
        for upper in [u for u in node.users if _is_part(u, -2, 0, n)]:
            for corner in [u for u in upper.users if _is_part(u, -1, n, 2 * n)]:
                with graph.inserting_before(corner):
                    folded = graph.call_function(torch.ops.dpcompile.matrix_exp_adjoint.default, (a, g))
                folded.meta = {**corner.meta, "val": g.meta["val"].new_empty(g.meta["val"].shape)}
                corner.replace_all_uses_with(folded)


def _blocks(value: Any) -> tuple[fx.Node, fx.Node] | None:
    """``(a, g)`` of ``[[a, g], [0, a]]``, or None."""
    rows = _joined(value, -2)
    upper, lower = (_joined(r, -1) for r in rows) if rows else (None, None)
    if not upper or not lower or upper[0] is not lower[1] or not _is_zero(lower[0]):
        return None
    shapes = [shape_of(x.meta["val"]) for x in upper]
    square = same(shapes[0][-1], shapes[0][-2]) and len(shapes[0]) == len(shapes[1])
    return (upper[0], upper[1]) if square and all(map(same, *shapes)) else None


def _joined(node: Any, dim: int) -> list[fx.Node] | None:
    """The two values that ``node`` joins along ``dim``."""
    if not isinstance(node, fx.Node) or node.target is not aten.cat.default or len(node.args) < 2:
        return None
    parts: Any = node.args[0]
    along: Any = node.args[1]
    return list(parts) if len(parts) == 2 and along in (dim, dim + node.meta["val"].ndim) else None


def _is_zero(node: fx.Node) -> bool:
    while node.target in (aten.permute.default, aten.clone.default, aten.expand.default, aten.view.default):
        node = node.args[0]  # type: ignore[assignment]
    return node.target is aten.full.default and bool(node.args[1] == 0)


def _is_part(node: fx.Node, dim: int, start: Any, end: Any) -> bool:
    """Whether ``node`` is a slice from ``start`` to ``end`` (numbers) along ``dim``."""
    if node.target is not aten.slice.Tensor or len(node.args) != 4:
        return False
    ndim = node.meta["val"].ndim
    along, first, last = node.args[1:]
    return bool(along in (dim, dim + ndim) and first == start and last == end)
