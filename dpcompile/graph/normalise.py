"""Small passes around the transform: a form that is easy to prove, and one that Inductor compiles rightly."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

import dpcompile.graph.expert_products  # noqa: F401  # registers the operations
from dpcompile.graph.operations import IN_THE_SAME_MEMORY, WRITES_BY_INDEX, operation_name
from dpcompile.graph.sizes import is_one, shape_of

__all__ = [
    "copy_expanded_bases",
    "expand_last",
    "save_what_is_overwritten",
    "slices_for_splits",
    "split_convolution_bias",
    "sums_of_outer_products",
]

aten = torch.ops.aten
_MASKS = (torch.bool, torch.uint8)
_SCALES = (
    aten.div.Scalar, aten.mul.Scalar, aten.div.Tensor, aten.mul.Tensor, aten.neg.default,
    torch.ops.prims.convert_element_type.default,
)  # fmt: skip


def split_convolution_bias(graph: fx.Graph) -> None:
    """The gradient of a convolution's bias is the sum of the cotangent over all but the channels: write it as one.

    Contract: equal values; the third result of ``convolution_backward`` has no users left.
    """
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        cotangent = node.args[0]
        assert isinstance(cotangent, fx.Node)
        others = [d for d in range(cotangent.meta["val"].ndim) if d != 1]
        for result in list(node.users):
            if result.target is operator.getitem and result.args[1] == 2:
                with graph.inserting_before(result):
                    bias = graph.call_function(aten.sum.dim_IntList, (cotangent, others))
                bias.meta = dict(result.meta)
                result.replace_all_uses_with(bias)
                graph.erase_node(result)


def sums_of_outer_products(graph: fx.Graph) -> None:
    """Outer products that are added up by an index are not made one by one, where nothing else needs them.

    They are the gradient of matrices that every row looks up by its own index, which the look-up has found to be that
    of one, from the front or from the back. Contract: equal values, up to rounding.
    """
    for node in graph.find_nodes(op="call_function", target=aten.index_put.default):
        base, indices, values, *adds = node.args
        if adds != [True] or len(indices) != 1 or values.users != {node: None} or not _is_zero(base):
            continue
        (index,), (shape, written) = indices, (shape_of(n.meta["val"]) for n in (base, values))
        sides = _sides_of(values) if len(shape) == 3 and shape[1:] == written[1:] else None
        if sides is None or shape_of(index.meta["val"]) != written[:1] or index.meta["val"].dtype in _MASKS:
            continue
        count = base.meta["val"].shape[0]
        with graph.inserting_before(node):
            left, right = (graph.call_function(aten.squeeze.dim, side) for side in sides)
            for flat, (side, dim) in zip((left, right), sides, strict=True):
                flat.meta = {**values.meta, "val": side.meta["val"].squeeze(dim)}
            own = graph.call_function(aten.remainder.Scalar, (index, count))
            own.meta = {**values.meta, "val": index.meta["val"]}
            sums = graph.call_function(torch.ops.dpcompile.expert_sums.default, (left, right, own, count))
        sums.meta = dict(node.meta)
        node.replace_all_uses_with(sums)
        graph.erase_node(node)
        graph.erase_node(values)


def _sides_of(values: fx.Node) -> list[tuple[fx.Node, int]] | None:
    """The factors of ``[N, P, 1]`` times ``[N, 1, D]``, each with the dimension that it has not."""
    factors = [n for n in values.args if isinstance(n, fx.Node)]
    if values.target not in (aten.mul.Tensor, aten.bmm.default) or len(factors) != 2:
        return None
    if any(n.meta["val"].dtype != values.meta["val"].dtype for n in factors):
        return None
    for left, right in (factors, factors[::-1]) if values.target is aten.mul.Tensor else (factors,):
        first, second = (shape_of(n.meta["val"]) for n in (left, right))
        if len(first) == len(second) == 3 and first[0] == second[0] and is_one(first[2]) and is_one(second[1]):
            return [(left, 2), (right, 1)]
    return None


def _is_zero(base: fx.Node) -> bool:
    filled = base.target is aten.full.default and bool(base.args[1] == 0)
    return filled and isinstance(base.meta["val"].shape[0], int)


def expand_last(graph: fx.Graph) -> None:
    """Scale, negate and cast what is spread over positions before it is spread: the cotangents of a mean, for one.

    A kernel then reads a row where it would read one for each position. Not where a view is taken of the result, which
    may need it as it lies. Contract: equal values.
    """
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_function" and node.args else None
        if node.target not in _SCALES or not isinstance(source, fx.Node) or source.target is not aten.expand.default:
            continue
        inner, shape = source.all_input_nodes[0], node.meta["val"].shape
        others = any(isinstance(x, fx.Node) for x in (*node.args[1:], *node.kwargs.values()))
        viewed = any(operation_name(user.target) in IN_THE_SAME_MEMORY or user.op == "output" for user in node.users)
        if others or viewed or shape_of(source.meta["val"]) != shape_of(node.meta["val"]):
            continue
        with graph.inserting_before(node):
            narrow = graph.call_function(node.target, (inner, *node.args[1:]), node.kwargs)
            wide = graph.call_function(aten.expand.default, (narrow, source.args[1]), source.kwargs)
        value = node.meta["val"].new_empty(inner.meta["val"].shape)
        narrow.meta, wide.meta = {**node.meta, "val": value}, {**node.meta, "val": value.expand(shape)}
        node.replace_all_uses_with(wide)
        graph.erase_node(node)


def save_what_is_overwritten(graph: fx.Graph) -> None:
    """Read an input that the graph writes to from a copy, which is saved for the backward.

    Torch's partitioner (to 2.14 at least) may compute again in the backward what it finds cheap, and then reads such an
    input when it has its new value. Contract: equal values.
    """
    for write in graph.find_nodes(op="call_function", target=aten.copy_.default):
        written = write.args[0]
        readers = [n for n in written.users if n is not write]
        if not readers:
            continue
        last = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
        with graph.inserting_after(last):
            if written.meta["val"].is_complex():
                saved = graph.call_function(aten.clone.default, (written,))
            else:  # Inductor removes clones before it partitions
                saved = graph.call_function(aten.maximum.default, (written, written))
        saved.meta = {"val": written.meta["val"], "recompute": CheckpointPolicy.MUST_SAVE}
        for reader in readers:
            reader.replace_input_with(written, saved)


def copy_expanded_bases(graph: fx.Graph) -> None:
    """Give every write by index a base with memory of its own.

    Inductor of torch 2.13 writes all rows of an expanded base into one (seen on a CPU with ``index_put`` into
    ``full(..).expand(..)``; torch 2.15 does not). Contract: equal values.
    """
    for name in WRITES_BY_INDEX:
        packet = getattr(aten, name)
        for target in (getattr(packet, overload) for overload in packet.overloads()):
            for node in graph.find_nodes(op="call_function", target=target):
                base = node.args[0]
                assert isinstance(base, fx.Node)
                value = base.meta["val"]
                if all(stride for size, stride in zip(value.shape, value.stride(), strict=True) if size != 1):
                    continue
                with graph.inserting_before(node):
                    own = graph.call_function(aten.clone.default, (base,), {"memory_format": torch.contiguous_format})
                own.meta = {k: v for k, v in base.meta.items() if k == "partitioner_tag"}
                own.meta["val"] = value.new_empty(value.shape)
                node.replace_input_with(base, own)


def slices_for_splits(graph: fx.Graph) -> None:
    """Cut out each piece of a split by itself: what is behind a sum over the examples then has one result each."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.split.Tensor):
        source, size = node.args[:2]
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        takers = list(node.users)
        if not isinstance(size, int) or any(u.target is not operator.getitem for u in takers):
            continue
        length = source.meta["val"].shape[dim]
        for taker in takers:
            begin = taker.args[1] * size
            with graph.inserting_before(taker):
                piece = graph.call_function(
                    torch.ops.aten.slice.Tensor, (source, dim, begin, min(begin + size, length))
                )
            piece.meta = dict(taker.meta)
            taker.replace_all_uses_with(piece)
            graph.erase_node(taker)
        graph.erase_node(node)
