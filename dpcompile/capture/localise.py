"""Captured graphs with ``DTensor`` inputs, made graphs of what lies on this rank.

AOTAutograd would unwrap such inputs itself, and hand gradients over as ``DTensor`` again. Wrapped inside the graph
instead, by an operation of it, all its inputs and gradients are plain tensors, and everything that tensor parallelism
does between them (slices, collectives) is in the graph, where the proof sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from dpcompile._torch.aot import add_inputs
from dpcompile._torch.parallel import inner_tensor
from dpcompile._torch.tensors import fix_sizes
from dpcompile.distributed.expert_parallel import ExpertParallel
from dpcompile.distributed.shards import is_distributed
from dpcompile.distributed.tensor_parallel import TensorParallel
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.locate import where

__all__ = ["Localised", "StandIns", "localise"]

Wrapper: TypeAlias = "tuple[Callable[[Tensor], Tensor], tuple[str, ...]]"


@dataclass(slots=True)
class StandIns:
    """The plain tensors that take the place of ``DTensor`` inputs while a model runs.

    Attributes:
        originals: ``id(stand-in)`` -> the stand-in and the ``DTensor``.
    """

    originals: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def make(self, value: Tensor) -> Tensor:
        """A leaf on the memory of what lies on this rank, which needs a gradient if the ``DTensor`` does."""
        with torch.no_grad():
            local = inner_tensor(value).detach()
        stand_in = nn.Parameter(local, requires_grad=value.requires_grad)
        fix_sizes(stand_in)
        self.originals[id(stand_in)] = (stand_in, value)
        return stand_in

    def original(self, value: Any) -> Any:
        """What a tensor stands in for; itself if for nothing."""
        known = self.originals.get(id(value))
        return value if known is None else known[1]

    def is_cut(self, value: Any, group: str) -> bool:
        """Whether it stands in for a tensor of which the ranks of the group of this name hold other parts."""
        original: Any = self.original(value)
        if original is value:
            return False
        mesh, placements = original.device_mesh, original.placements
        cut = (i for i, p in enumerate(placements) if type(p).__name__ != "Replicate")
        return any(mesh.get_group(i).group_name == group for i in cut)


@dataclass(frozen=True, slots=True)
class Localised:
    """A graph whose inputs are plain tensors.

    Attributes:
        graph: the graph.
        kept: positions of its inputs among those of the captured graph; meshes are left out.
        wrapped: position of an output that the captured graph has as a ``DTensor`` -> makes it of what lies here; and
            the dimensions of the ranks' mesh that it lies along.
    """

    graph: fx.GraphModule
    kept: tuple[int, ...]
    wrapped: Mapping[int, Wrapper] = field(default_factory=dict)

    def inputs(self, live: Sequence[Any], stand_ins: StandIns) -> list[Any]:
        """Its inputs, from those of the captured graph."""
        return [stand_ins.make(x) if is_distributed(x) else x for x in (live[p] for p in self.kept)]


def localise(gm: fx.GraphModule, live: Sequence[Any], parallel: TensorParallel | ExpertParallel | None) -> Localised:
    """Wrap ``DTensor`` inputs inside the graph; a graph without any is left as it is.

    Args:
        gm: Dynamo's graph.
        live: its inputs.
        parallel: the ranks that tensor or expert parallelism is over; None if the model has none.

    Raises:
        UnsupportedGraphError: a ``DTensor`` that lies on other ranks, or that was computed outside.
    """
    if not any(is_distributed(x) or _is_mesh(x) for x in live):
        return Localised(gm, tuple(range(len(live))))
    copied = add_inputs(gm, {})
    placeholders = copied.graph.find_nodes(op="placeholder")
    kept = []
    for position, (node, value) in enumerate(zip(placeholders, live, strict=True)):
        if _is_mesh(value):
            _bind(copied.graph, node, value)
            copied.graph.erase_node(node)
            continue
        kept.append(position)
        if is_distributed(value):
            _check(node, value, parallel)
            _wrap(copied.graph, node, value)
    wrapped = _unwrap_outputs(copied.graph, live, parallel)
    copied.recompile()
    return Localised(copied, tuple(kept), wrapped)


def _is_mesh(value: Any) -> bool:
    return type(value).__name__ == "DeviceMesh"


def _check(node: fx.Node, value: Any, parallel: TensorParallel | ExpertParallel | None) -> None:
    mesh = value.device_mesh
    if not value.is_leaf:
        raise UnsupportedGraphError(
            "a DTensor that was computed goes into a compiled graph",
            remedy="pass plain tensors to the model and between its blocks (use_local_output=True)",
        )
    if parallel is None or parallel.along(mesh) is None:
        raise UnsupportedGraphError(
            f"the model reads a DTensor with the placements {tuple(value.placements)} on other ranks than those that "
            "its parameters are cut over by parallelize_module",
            remedy="use one mesh for parallelize_module and for all that the model reads; where it has two dimensions, "
            "some parameter lies along each (distribute_tensor(p, mesh['cp', 'tp'], [Replicate(), Shard(0)])); let "
            "fully_shard hold what cut_experts cut (mesh=mesh['edp']), without ignored_params",
        )


def _wrap(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    """Right before each use: what stands between two calls of units is a graph of its own."""
    fake = node.meta["example_value"]
    local = inner_tensor(fake).detach().requires_grad_(value.requires_grad)
    spec = _wrapper(value.device_mesh, tuple(value.placements), tuple(value.shape), tuple(value.stride()))
    for user in list(node.users):
        with graph.inserting_before(user):
            wrapped = graph.call_function(spec, (node,))
        wrapped.meta = {**node.meta, "example_value": fake}
        user.replace_input_with(node, wrapped)
    node.meta = {**node.meta, "example_value": local}


def _unwrap_outputs(
    graph: fx.Graph, live: Sequence[Any], parallel: TensorParallel | ExpertParallel | None
) -> dict[int, Wrapper]:
    """Outputs that are ``DTensor`` leave as what lies on this rank; by position, see :class:`Localised`."""
    output, found = graph.output_node(), {}
    values: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    for position, node in enumerate(values):
        fake: Any = node.meta.get("example_value") if isinstance(node, fx.Node) else None
        if not is_distributed(fake):
            continue
        placements = tuple(fake.placements)
        mesh = _mesh_like(fake.device_mesh, live, parallel)  # the one of a fake tensor may be fake
        axes = () if mesh is None or parallel is None else parallel.along(mesh)
        if mesh is None or {type(p).__name__ for p in placements} - {"Shard", "Replicate"}:
            raise UnsupportedGraphError(
                f"the model returns a DTensor with the placements {placements}"
                + (" on other ranks than those of its parameters" if mesh is None else ""),
                where=where(node),
                remedy="return it whole or cut, on the mesh of parallelize_module (Replicate(), Shard(dim)), or as a "
                "plain tensor",
            )
        found[position] = _wrapper(mesh, placements, tuple(fake.shape), tuple(fake.stride())), axes or ()
        with graph.inserting_before(output):
            local = graph.call_function(_to_local, (node,))
        value = inner_tensor(fake).detach().requires_grad_(fake.requires_grad)
        local.meta = {**node.meta, "example_value": value}
        values[position] = local
    output.args = (tuple(values),)
    return found


def _mesh_like(mesh: Any, live: Sequence[Any], parallel: TensorParallel | ExpertParallel | None) -> Any:
    """The mesh that ``mesh`` is, or stands for, if its dimensions are those of the ranks that share a batch."""
    known = [x if _is_mesh(x) else x.device_mesh for x in live if _is_mesh(x) or is_distributed(x)]
    wanted = None if parallel is None else parallel.along(mesh)
    if wanted is None:
        return None
    return next((m for m in known if parallel is not None and parallel.along(m) == wanted), None)


def _to_local(value: Any) -> Tensor:
    return value.to_local()


def _bind(graph: fx.Graph, mesh_node: fx.Node, mesh: Any) -> None:
    """Calls that take a mesh from an input take it as a constant."""
    for user in list(mesh_node.users):
        if user.op != "call_function":
            raise UnsupportedGraphError(
                f"the model hands a DeviceMesh to `{user.target}`",
                remedy="take the dimensions of a mesh before forward (self.tp = mesh['tp']), or leave redistribution "
                "to the styles of parallelize_module",
            )
        places = tuple(i for i, a in enumerate(user.args) if a is mesh_node)
        names = tuple(k for k, a in user.kwargs.items() if a is mesh_node)
        user.args = tuple(a for a in user.args if a is not mesh_node)
        user.kwargs = {k: a for k, a in user.kwargs.items() if a is not mesh_node}
        assert mesh_node not in user.all_input_nodes
        user.target = _bound(user.target, places, names, mesh)


@lru_cache(maxsize=4096)
def _bound(target: Any, places: tuple[int, ...], names: tuple[str, ...], mesh: Any) -> Callable[..., Any]:
    """``target`` with the mesh at these places; equal ones are one object, so that equal graphs are found equal."""

    def with_mesh(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        for place in places:
            given.insert(place, mesh)
        return target(*given, **{name: mesh for name in names}, **kwargs)

    return with_mesh


@lru_cache(maxsize=4096)
def _wrapper(mesh: Any, placements: Any, shape: tuple[int, ...], stride: tuple[int, ...]) -> Callable[[Tensor], Any]:
    """From what lies here to the ``DTensor``, differentiable; equal ones are one object."""

    def as_dtensor(local: Tensor) -> Any:
        from torch.distributed.tensor import DTensor  # a heavy import, and here it was imported already

        return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    return as_dtensor
