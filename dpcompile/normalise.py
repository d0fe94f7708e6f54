"""Small passes around the transform: a form that is easy to prove, and one that Inductor compiles rightly."""

from __future__ import annotations

import operator

import torch
from torch import fx

from dpcompile.sizes import is_one, shape_of, size

__all__ = ["copy_expanded_bases", "separate_outputs", "split_convolution_bias"]

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


def separate_outputs(graph: fx.Graph) -> None:
    """Give every output whose positions overlap in memory a memory of its own, in a captured graph.

    AOTAutograd lays a cotangent out as it lays out the output, and of positions that share memory only one survives
    (seen with ``Tensor.unfold``, torch 2.11 to 2.15). Contract: equal values.
    """
    output = graph.output_node()

    def separate(node: fx.Node) -> fx.Node:
        value = node.meta.get("example_value")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not _may_overlap(value):
            return node
        with graph.inserting_before(output):
            own = graph.call_method("clone", (node,), {"memory_format": torch.contiguous_format})
        own.meta = {**node.meta, "example_value": value.clone(memory_format=torch.contiguous_format)}
        return own

    output.args = fx.map_arg(output.args, separate)


def _may_overlap(value: torch.Tensor) -> bool:
    """Whether two positions may share memory, other than by ``expand`` (stride 0), which AOTAutograd sees itself."""
    dims = [(size(s), n) for s, n in zip(value.stride(), shape_of(value), strict=True) if not is_one(n)]
    dims = [(step, n) for step, n in dims if step != 0]
    if not all(isinstance(step, int) and isinstance(n, int) for step, n in dims):
        return not value.is_contiguous()
    extent = 1
    for step, n in sorted(dims):  # type: ignore[type-var]
        if step < extent:  # type: ignore[operator]
            return True
        extent += (n - 1) * step  # type: ignore[operator]
    return False


_WRITES = ("index_put", "_unsafe_index_put", "index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce")


def copy_expanded_bases(graph: fx.Graph) -> None:
    """Give every write by index a base with memory of its own.

    Inductor of torch 2.13 writes all rows of an expanded base into one (seen on a CPU with ``index_put`` into
    ``full(..).expand(..)``; torch 2.15 does not). Contract: equal values.
    """
    for name in _WRITES:
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
