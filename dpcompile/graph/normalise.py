"""Small passes around the transform: a form that is easy to prove, and one that Inductor compiles rightly."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from dpcompile.graph.operations import WRITES_BY_INDEX

__all__ = ["copy_expanded_bases", "save_what_is_overwritten", "slices_for_splits", "split_convolution_bias"]

aten = torch.ops.aten


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
