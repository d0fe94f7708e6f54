"""Which values of a graph are the same on all ranks that share a batch, and which are each rank's own.

Those ranks are a mesh, with tensor parallelism along one dimension and context parallelism along the other, or with one
of them. Each dimension is looked at by itself: along it a value is the same on all, whatever their place along the
other, or each rank's own.

A parameter that every rank holds whole is updated on every rank with the gradient found there. So this gradient must be
the same on all, and then its norm counts once. A parameter of which every rank holds another part is updated part by
part, and the squared norms of the parts add up. No other kind of gradient is let through: in particular none that is a
rank's share of a sum still to be taken.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile._torch import OpOverload
from dpcompile._torch.aot import PlainAOTInput
from dpcompile._torch.tensors import real_tensors
from dpcompile.distributed.ranks import differ_along, gathered_over
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.joint import JointGraph, OverAxis, OverRanks
from dpcompile.graph.labels import Own, Shared
from dpcompile.graph.locate import where
from dpcompile.graph.operations import operation_name
from dpcompile.kernels.rates import adopt, rates_for
from dpcompile.proof.between_ranks import GROUP, TOGETHER, dimensions_of, is_collective, is_wait, told_to
from dpcompile.proof.prove import Proof
from dpcompile.proof.rules.registry import named_arguments

__all__ = ["agree_on_rates", "check_replication", "refuse_ranks_own"]


def refuse_ranks_own(graph: fx.Graph, ranks: OverRanks | None) -> None:
    """What no example goes into must be the same on all ranks: it reads nothing that is cut, and exchanges nothing.

    Raises:
        UnsupportedGraphError: naming the operation or input.
    """
    for node in graph.nodes:
        if is_collective(node):
            raise UnsupportedGraphError(
                f"`{operation_name(node.target)}` exchanges values between ranks, in a graph where no batch is shared "
                "out by tensor parallelism",
                where=where(node),
                remedy="remove it from the model; the batch is dealt out and gradients are added up outside of it",
            )
        if ranks is not None and node.op == "placeholder" and node.users and _is_cut(node, ranks):
            raise UnsupportedGraphError(
                f"input `{node.name}`, of which every rank holds a part, is used where no example is",
                remedy="use such parameters and buffers in the block that they belong to",
            )


def check_replication(joint: JointGraph, proof: Proof, ranks: OverRanks | None) -> dict[int, Own]:
    """Prove of every value whether it is the same on all ranks, and refuse what the norms cannot stand on.

    Every rank calls this on its own graph at the same time: the graphs are compared, and what stands otherwise in
    another rank's graph (a slice that begins elsewhere) is that rank's own.

    Returns:
        Positions of the outputs that may be others on each rank, along which dimensions, and why. So may their
        cotangents, then.

    **Guarantee.** If this returns, then the gradient of every trainable parameter that all ranks hold whole is the same
    on all, as long as they are given the same examples, and the same cotangents of outputs that are the same; so is
    the gradient of every input that is. Every collective is one over these ranks, or those along a dimension of their
    mesh, who see the same examples in the same order.

    ====================================================  ===========================================================
    edge case                                             outcome
    ====================================================  ===========================================================
    gradient of a whole parameter that is a rank's share  refused; added up over the ranks: right
    output that is another one on each rank               its cotangent is taken for another one on each
    gradient of an input that is another one on each      refused, if the input is the same on all
    collective over other ranks, or of another kind       refused
    any collective, without tensor parallelism            refused
    random numbers drawn in the graph                     each rank's own
    a buffer that is not the same on all ranks            each rank's own
    graphs that are not built alike                       refused
    sums over ranks behind the sum over the examples      right; anything else there is refused by the proof
                                                          of the example axis
    ====================================================  ===========================================================

    Raises:
        UnsupportedGraphError: see there.
    """
    if ranks is None:
        refuse_ranks_own(joint.graph, None)
        return {}
    over = {node: dimensions_of(node, ranks) for node in joint.graph.nodes if is_collective(node) and not is_wait(node)}
    differences, found = _differences(joint, ranks, over), dict[int, Own]()
    for axis, different in zip(ranks.axes, differences, strict=True):
        own = _ranks_own(joint, axis, different, over)
        _refuse_shares(joint, proof, axis, own)
        for i, node in enumerate(joint.outputs):
            if node in own:
                found[i] = (*found.get(i, ()), (axis.label, own[node]))
    return found


def _refuse_shares(joint: JointGraph, proof: Proof, axis: OverAxis, own: Mapping[fx.Node, str]) -> None:
    """Along a dimension of the mesh: what would be updated, or handed back, as one value and is another on each rank.

    Raises:
        UnsupportedGraphError: naming the parameter, the input or the buffer.
    """
    along = f", along {axis.label}" * bool(axis.label)
    for name, gradient in joint.gradients.items():
        if gradient is not None and gradient in own and _position(joint.parameters[name]) not in axis.cut:
            raise UnsupportedGraphError(
                f"every rank of tensor parallelism holds parameter '{name}' whole, and its gradient is another one on "
                f"each{along} ({own[gradient]})",
                where=where(gradient),
                remedy="let it see whole activations, or give its module the style that adds the ranks' shares up "
                "(SequenceParallel, for what is cut over tokens; `to_local(grad_placements=[Partial()])` on rows and "
                "weights that go to cut experts); no random numbers in forward on whole activations "
                "(dropout), no plain parameter on what ColwiseParallel returns (cut it too: distribute_tensor); or "
                "freeze it",
            )
    for node, gradient in joint.input_gradients.items():
        if gradient in own and node not in own and not isinstance(proof.of(gradient), Shared):
            raise UnsupportedGraphError(
                f"the gradient of input '{joint.input_name(node)}' is another one on each rank of tensor parallelism"
                f"{along} ({own[gradient]}): it was not added up",
                where=where(gradient),
                remedy="use the input layouts of ColwiseParallel (Replicate) and RowwiseParallel (Shard(-1))",
            )
    for destination, source in joint.mutations():
        if source in own:
            raise UnsupportedGraphError(
                f"'{joint.input_name(destination)}' is written with values that are others on each rank",
                where=where(source),
                remedy="write to no buffer in forward",
            )


def agree_on_rates(device: torch.device, ranks: OverRanks | None) -> None:
    """Let all ranks of tensor parallelism plan by what the first of them measured; they call this together.

    **Guarantee.** They choose the same rules and the same kernels, so that the sums of a parameter that every rank
    holds, and updates for itself, do not drift apart by rounding.
    """
    if ranks is not None:
        with real_tensors():
            everywhere = gathered_over(ranks.groups, rates_for(device))
        adopt(device, everywhere[0])


def _ranks_own(
    joint: JointGraph, axis: OverAxis, different: Mapping[fx.Node, str], over: Mapping[fx.Node, Collection[str]]
) -> dict[fx.Node, str]:
    """The values that may be others on other ranks along a dimension of the mesh, and why.

    Args:
        joint: the graph.
        axis: the dimension.
        different: nodes that are others in the graphs of those ranks.
        over: of collectives, the dimensions that they are over. What one over the other dimension returns is the same
            along this one if what it is given is.
    """
    own: dict[fx.Node, str] = {}
    for node in _outputs_before_cotangents(joint):
        if node.op == "output":
            continue
        name = operation_name(node.target) if node.op == "call_function" else ""
        if node.op == "placeholder":
            if _position(node) in axis.cut:
                own[node] = f"{joint.input_name(node)} is not the same on all"
            elif (output := joint.tangent_of.get(node)) in own:
                own[node] = own[output]
        elif axis.name in over.get(node, ()) and name.rpartition("::")[2] in TOGETHER:
            continue
        elif axis.name in over.get(node, ()):
            own[node] = f"`{name}` hands each rank another part"
        elif _draws(node):
            own[node] = f"`{name}` draws random numbers"
        if node in different:
            own[node] = different[node]
        elif node not in own:
            inherited = next((n for n in _read(node) if n in own), None)
            if inherited is not None:
                own[node] = own[inherited]
    return own


def _read(node: fx.Node) -> list[fx.Node]:
    """The operands whose values a node depends on: all, but for what is written over whole."""
    return [node.args[1]] if operation_name(node.target) == "copy" else node.all_input_nodes  # type: ignore[list-item]


def _draws(node: fx.Node) -> bool:
    """Whether an operation draws random numbers; attention without dropout only might have."""
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    return named_arguments(node).get("dropout_p") != 0


def _outputs_before_cotangents(joint: JointGraph) -> list[fx.Node]:
    """The nodes in an order in which each comes behind its operands, and a cotangent behind the output it is of."""
    late: dict[fx.Node, None] = {}
    for node in joint.graph.nodes:
        if node in joint.tangent_of or any(n in late for n in node.all_input_nodes):
            late[node] = None
    return [*(n for n in joint.graph.nodes if n not in late), *late]


def _is_cut(node: fx.Node, ranks: OverRanks) -> bool:
    return any(_position(node) in axis.cut for axis in ranks.axes)


def _position(node: fx.Node) -> int | None:
    descriptor = node.meta.get("desc")
    return descriptor.idx if isinstance(descriptor, PlainAOTInput) else None


def _differences(
    joint: JointGraph, ranks: OverRanks, over: Mapping[fx.Node, Collection[str]]
) -> list[dict[fx.Node, str]]:
    """The nodes that are others in the graph of another rank, along each dimension of the mesh."""
    nodes = list(joint.graph.nodes)
    labels = {node: [axis.label for axis in ranks.axes if axis.name in names] for node, names in over.items()}
    with real_tensors():
        everywhere = gathered_over(ranks.groups, _lines(joint, nodes, labels))
    shapes = [[kind for kind, _ in lines] for lines in everywhere]
    if any(s != shapes[0] for s in shapes):
        raise UnsupportedGraphError(
            "the ranks of tensor parallelism do not compile the same graph",
            remedy="run the same code on all of them, with sizes that divide by the number of ranks, and dynamic=False "
            "where a rank's number meets a size that varies; call torch.compiler.reset() on all or on none",
        )
    found: list[dict[fx.Node, str]] = [{} for _ in ranks.axes]
    for i, node in enumerate(nodes):
        for own, differ in zip(found, differ_along(ranks.groups, [lines[i] for lines in everywhere]), strict=True):
            if differ:
                own[node] = f"`{operation_name(node.target)}` is not given the same on all"
    return found


def _lines(joint: JointGraph, nodes: Sequence[fx.Node], over: Mapping[fx.Node, Sequence[str]]) -> list[tuple[str, str]]:
    """Of each node what must be equal for graphs that are built alike, and what else it is given.

    A collective's group has another name on other ranks; by ``over`` it is named as the dimensions of the mesh are.
    """
    numbers = {node: i for i, node in enumerate(nodes)}
    lines = []
    for node in nodes:
        value = node.meta.get("val")
        shape = tuple(map(str, value.shape)) if isinstance(value, Tensor) else type(value).__name__
        inputs = [numbers[n] for n in node.all_input_nodes]
        target = _target(node.target) if node.op == "call_function" else ""
        given: Collection[Any] = ()
        if node in over:
            target = f"{target} over {list(over[node])}"
            given = (_text([x for name, x in told_to(node).items() if name not in GROUP]),)
        elif node.op == "call_function":
            given = (_text(node.args), _text(node.kwargs))
        elif node.op == "get_attr":
            constant = operator.attrgetter(str(node.target))(joint.module)
            given = (_digest(constant) if isinstance(constant, Tensor) else getattr(constant, "code", ""),)
        lines.append((f"{node.op} {target} {inputs} {shape}", hashlib.sha256(repr(given).encode()).hexdigest()[:16]))
    return lines


def _target(target: Any) -> str:
    return str(target) if isinstance(target, OpOverload) else operation_name(target)


def _text(values: Any) -> str:
    return repr(fx.map_arg(values, lambda n: "%"))


def _digest(tensor: Tensor) -> str:
    """Equal for equal values."""
    value = tensor.detach().cpu().contiguous().reshape(-1)
    if not value.numel():
        return "empty"
    return hashlib.sha256(value.view(torch.uint8).numpy().tobytes()).hexdigest()
