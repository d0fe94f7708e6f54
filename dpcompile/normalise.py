"""The joint graph in a form where every gradient is summed over the examples by one operation that says so."""

from __future__ import annotations

import operator

import torch
from torch import fx

__all__ = ["split_convolution_bias"]

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
