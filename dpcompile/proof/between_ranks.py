"""The collectives of a graph: which they are, and over which dimensions of the mesh of ranks that share a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dpcompile._torch.parallel import ranks_of_group
from dpcompile._torch.tensors import free_unbacked_symbols
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.joint import OverRanks
from dpcompile.graph.locate import where
from dpcompile.graph.operations import operation_name

__all__ = ["GROUP", "TOGETHER", "dimensions_of", "is_collective", "is_wait", "refuse_moved_rows", "told_to"]

TOGETHER = {"all_reduce", "all_gather_into_tensor", "broadcast"}  # give every rank the same
GROUP = ("group_name", "group")
_APART = {"reduce_scatter_tensor", "all_to_all_single", "shard_dim_alltoall"}


def refuse_moved_rows(graph: fx.Graph) -> None:
    """No row goes to the rank that data says, where another example's rows would come in its place.

    What is exchanged in equal parts, or in parts that are known, is asked of the proof
    (:mod:`dpcompile.proof.rules.collectives`).

    Raises:
        UnsupportedGraphError: naming the operation.
    """
    for node in graph.nodes:
        if is_collective(node) and "all_to_all" in operation_name(node.target) and _lengths_of_data(node):
            raise UnsupportedGraphError(
                f"`{operation_name(node.target)}` hands rows of examples to other ranks, as expert parallelism does "
                "where each rank has examples of its own: an expert's gradient would be made of examples that are "
                "clipped elsewhere",
                where=where(node),
                remedy="let the ranks that hold other experts work on one batch: cut the experts over the mesh of "
                "parallelize_module, let each rank run its own on all rows, and all-reduce the results (Transformers: "
                "ep_size = tp_size, ep_implementation='all_reduce'); or send rows by "
                "dpcompile.experts.products_of_experts (docs/distributed.md, Expert parallelism)",
            )


def _lengths_of_data(node: fx.Node) -> bool:
    """Whether numbers that were read from tensors say how much goes to each rank."""
    lengths = [x for arg in node.args if isinstance(arg, (list, tuple)) for x in arg if isinstance(x, fx.Node)]
    return any(free_unbacked_symbols(x.meta["val"]) for x in lengths)


def is_collective(node: fx.Node) -> bool:
    """Whether it exchanges values between ranks, or waits for them."""
    return node.op == "call_function" and str(getattr(node.target, "namespace", "")) in (
        "_c10d_functional",
        "_c10d_functional_autograd",
        "c10d_functional",
        "c10d",
        "_dtensor",
        "symm_mem",
    )


def is_wait(node: fx.Node) -> bool:
    """Whether it waits for what was exchanged."""
    return node.target is torch.ops._c10d_functional.wait_tensor.default


def told_to(node: fx.Node) -> dict[str, Any]:
    """The arguments of a collective by name."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    return {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)} | dict(node.kwargs)


def dimensions_of(node: fx.Node, ranks: OverRanks) -> tuple[str, ...]:
    """The dimensions of the mesh, by the names of their groups, that a collective is over.

    Raises:
        UnsupportedGraphError: it is over other ranks, or of another kind.
    """
    kind = node.target._schema.name.rpartition("::")[2]  # type: ignore[union-attr]
    named = told_to(node)
    group = next((named[name] for name in GROUP if name in named), None)
    of_torch = node.target.namespace in ("_c10d_functional", "_dtensor")  # type: ignore[union-attr]
    if not of_torch or kind not in TOGETHER | _APART:
        raise UnsupportedGraphError(
            f"`{operation_name(node.target)}` exchanges values between ranks in a way that has no rule",
            where=where(node),
            remedy="use ColwiseParallel and RowwiseParallel with whole inputs and outputs",
        )
    members = ranks_of_group(group)
    for axis in ranks.axes:
        if group == axis.name or members == ranks_of_group(axis.group):  # a mesh like it has others
            return (axis.name,)
    if frozenset(members) == ranks.everyone:
        return tuple(axis.name for axis in ranks.axes)
    raise UnsupportedGraphError(
        f"`{operation_name(node.target)}` exchanges values with ranks that are not those of tensor parallelism, "
        "and whose examples are others",
        where=where(node),
        remedy="use one mesh for all parallelize_module, of whose dimensions each has parameters that lie along it "
        "(distribute_tensor(p, mesh['cp', 'tp'], [Replicate(), Shard(0)])), and keep other communication out of the "
        "model",
    )
