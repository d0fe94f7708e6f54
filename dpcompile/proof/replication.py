"""Which values of a graph are the same on all ranks of tensor parallelism, and which are each rank's own.

A parameter that every rank holds whole is updated on every rank with the gradient found there. So this gradient must be
the same on all, and then its norm counts once. A parameter of which every rank holds another part is updated part by
part, and the squared norms of the parts add up. No other kind of gradient is let through: in particular none that is a
rank's share of a sum still to be taken.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from dpcompile._torch import OpOverload
from dpcompile._torch.aot import PlainAOTInput
from dpcompile._torch.parallel import ranks_of_group
from dpcompile._torch.tensors import free_unbacked_symbols, real_tensors
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.joint import JointGraph, OverRanks
from dpcompile.graph.labels import Shared
from dpcompile.graph.locate import where
from dpcompile.graph.operations import operation_name
from dpcompile.kernels.rates import adopt, rates_for
from dpcompile.proof.prove import Proof
from dpcompile.proof.rules.registry import named_arguments

__all__ = ["agree_on_rates", "check_replication", "refuse_moved_rows", "refuse_ranks_own"]

_TOGETHER = {"all_reduce", "all_gather_into_tensor", "broadcast"}  # give every rank the same
_APART = {"reduce_scatter_tensor", "all_to_all_single", "shard_dim_alltoall"}


def refuse_moved_rows(graph: fx.Graph) -> None:
    """No row goes to the rank that data says, where another example's rows would come in its place.

    What is exchanged in equal parts, or in parts that are known, is asked of the proof
    (:mod:`dpcompile.proof.rules.collectives`).

    Raises:
        UnsupportedGraphError: naming the operation.
    """
    for node in graph.nodes:
        if _is_collective(node) and "all_to_all" in operation_name(node.target) and _lengths_of_data(node):
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


def refuse_ranks_own(graph: fx.Graph, ranks: OverRanks | None) -> None:
    """What no example goes into must be the same on all ranks: it reads nothing that is cut, and exchanges nothing.

    Raises:
        UnsupportedGraphError: naming the operation or input.
    """
    for node in graph.nodes:
        if _is_collective(node):
            raise UnsupportedGraphError(
                f"`{operation_name(node.target)}` exchanges values between ranks, in a graph where no batch is shared "
                "out by tensor parallelism",
                where=where(node),
                remedy="remove it from the model; the batch is dealt out and gradients are added up outside of it",
            )
        if ranks is not None and node.op == "placeholder" and node.users and _position(node) in ranks.cut:
            raise UnsupportedGraphError(
                f"input `{node.name}`, of which every rank holds a part, is used where no example is",
                remedy="use such parameters and buffers in the block that they belong to",
            )


def check_replication(joint: JointGraph, proof: Proof, ranks: OverRanks | None) -> dict[int, str]:
    """Prove of every value whether it is the same on all ranks, and refuse what the norms cannot stand on.

    Every rank calls this on its own graph at the same time: the graphs are compared, and what stands otherwise in
    another rank's graph (a slice that begins elsewhere) is that rank's own.

    Returns:
        Positions of the outputs that may be others on each rank, and why. So may their cotangents, then.

    **Guarantee.** If this returns, then the gradient of every trainable parameter that all ranks hold whole is the same
    on all, as long as they are given the same examples, and the same cotangents of outputs that are the same; so is
    the gradient of every input that is. Every collective is one over these ranks, who see the same examples in the same
    order.

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
    for node in joint.graph.nodes:
        if _is_collective(node):
            _check_collective(node, ranks)
    own = _ranks_own(joint, ranks)
    positions = {joint.parameters[n]: n for n in joint.gradients}
    cut = {_position(node) for node in positions} & ranks.cut
    for name, gradient in joint.gradients.items():
        if gradient in own and _position(joint.parameters[name]) not in cut:
            raise UnsupportedGraphError(
                f"every rank of tensor parallelism holds parameter '{name}' whole, and its gradient is another one on "
                f"each ({own[gradient]})",
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
                f"the gradient of input '{joint.input_name(node)}' is another one on each rank of tensor parallelism "
                f"({own[gradient]}): it was not added up",
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
    return {i: own[node] for i, node in enumerate(joint.outputs) if node in own}


def agree_on_rates(device: torch.device, ranks: OverRanks | None) -> None:
    """Let all ranks of tensor parallelism plan by what the first of them measured; they call this together.

    **Guarantee.** They choose the same rules and the same kernels, so that the sums of a parameter that every rank
    holds, and updates for itself, do not drift apart by rounding.
    """
    if ranks is not None:
        everywhere: list[Any] = [None] * dist.get_world_size(ranks.group)
        with real_tensors():
            dist.all_gather_object(everywhere, rates_for(device), group=ranks.group)
        adopt(device, everywhere[0])


def _ranks_own(joint: JointGraph, ranks: OverRanks) -> dict[fx.Node, str]:
    """The values that may be others on other ranks, and why."""
    own: dict[fx.Node, str] = {}
    different = _differences(joint, ranks)
    for node in _outputs_before_cotangents(joint):
        if node.op == "output":
            continue
        name = operation_name(node.target) if node.op == "call_function" else ""
        if node.op == "placeholder":
            if _position(node) in ranks.cut:
                own[node] = f"{joint.input_name(node)} is not the same on all"
            elif (output := joint.tangent_of.get(node)) in own:
                own[node] = own[output]
        elif _is_collective(node) and name.rpartition("::")[2] in _TOGETHER:
            continue
        elif _is_collective(node) and not _is_wait(node):
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


def _is_collective(node: fx.Node) -> bool:
    return node.op == "call_function" and str(getattr(node.target, "namespace", "")) in (
        "_c10d_functional",
        "_c10d_functional_autograd",
        "c10d_functional",
        "c10d",
        "_dtensor",
        "symm_mem",
    )


def _is_wait(node: fx.Node) -> bool:
    return node.target is torch.ops._c10d_functional.wait_tensor.default


def _check_collective(node: fx.Node, ranks: OverRanks) -> None:
    kind = node.target._schema.name.rpartition("::")[2]  # type: ignore[union-attr]
    if _is_wait(node):
        return
    schema: Any = node.target._schema  # type: ignore[union-attr]
    named = {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    group = named.get("group_name", named.get("group"))
    of_torch = node.target.namespace in ("_c10d_functional", "_dtensor")  # type: ignore[union-attr]
    if not of_torch or kind not in _TOGETHER | _APART:
        raise UnsupportedGraphError(
            f"`{operation_name(node.target)}` exchanges values between ranks in a way that has no rule",
            where=where(node),
            remedy="use ColwiseParallel and RowwiseParallel with whole inputs and outputs",
        )
    if group != ranks.name and ranks_of_group(group) != ranks_of_group(ranks.group):  # a mesh like it has others
        raise UnsupportedGraphError(
            f"`{operation_name(node.target)}` exchanges values with ranks that are not those of tensor parallelism, "
            "and whose examples are others",
            where=where(node),
            remedy="use one mesh for all parallelize_module, and keep other communication out of the model",
        )


def _position(node: fx.Node) -> int | None:
    descriptor = node.meta.get("desc")
    return descriptor.idx if isinstance(descriptor, PlainAOTInput) else None


def _differences(joint: JointGraph, ranks: OverRanks) -> dict[fx.Node, str]:
    """The nodes that are others in another rank's graph."""
    nodes = list(joint.graph.nodes)
    with real_tensors():
        own = _lines(joint, nodes)
        everywhere: list[Any] = [None] * dist.get_world_size(ranks.group)
        dist.all_gather_object(everywhere, own, group=ranks.group)
    first = everywhere[0]
    shapes = [[kind for kind, _ in lines] for lines in everywhere]
    if any(s != shapes[0] for s in shapes):
        raise UnsupportedGraphError(
            "the ranks of tensor parallelism do not compile the same graph",
            remedy="run the same code on all of them, with sizes that divide by the number of ranks, and dynamic=False "
            "where a rank's number meets a size that varies; call torch.compiler.reset() on all or on none",
        )
    return {
        node: f"`{operation_name(node.target)}` is not given the same on all"
        for i, node in enumerate(nodes)
        if any(lines[i] != first[i] for lines in everywhere)
    }


def _lines(joint: JointGraph, nodes: Sequence[fx.Node]) -> list[tuple[str, str]]:
    """Of each node what must be equal for graphs that are built alike, and what else it is given."""
    numbers = {node: i for i, node in enumerate(nodes)}
    lines = []
    for node in nodes:
        value = node.meta.get("val")
        shape = tuple(map(str, value.shape)) if isinstance(value, Tensor) else type(value).__name__
        inputs = [numbers[n] for n in node.all_input_nodes]
        target = _target(node.target) if node.op == "call_function" else ""
        given: Collection[Any] = ()
        if node.op == "call_function":
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
