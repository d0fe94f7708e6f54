"""How much memory a step needs, by replaying its forward and backward graphs: for plans under a memory budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import sympy
import torch
from torch import fx

from dpcompile._torch.aot import GradAOTOutput, copy_graph, partition
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Examples, Whole
from dpcompile.graph.operations import CONSTANTS, IN_THE_SAME_MEMORY, operation_name
from dpcompile.graph.sizes import hinted
from dpcompile.proof.prove import Proof

__all__ = ["Holding", "Replay", "bytes_of", "is_fused", "replay", "storage_of"]


_REDUCTIONS = ("sum", "mean", "amax", "var_mean")
_LOOK_UPS = ("embedding", "gather", "index")
_ACCUMULATIONS = ("index_put", "_unsafe_index_put")


@dataclass(frozen=True, slots=True)
class Holding:
    """What one parameter's rule keeps until the clip.

    Attributes:
        operands: values of the joint graph, by name, that are needed again after the clip, and their bytes.
        since: names of the operations at which what the rule makes comes to exist; none: at the end of the backward.
        kept: bytes of it that stay until the clip.
        scratch: bytes of it that are freed at once.
        result: bytes of the clipped sum.
    """

    operands: Mapping[str, float]
    since: tuple[str, ...]
    kept: float
    scratch: float
    result: float


@dataclass(frozen=True, slots=True)
class _Life:
    """A value's memory, from the moment ``start`` up to and with ``end``."""

    start: int
    end: int
    size: float
    of_examples: bool


@dataclass(frozen=True, slots=True)
class Replay:
    """The plain step, moment by moment.

    Attributes:
        before: what exists during the forward.
        forward: the forward's length.
        saved: bytes of the examples that wait for the backward.
        derived: bytes that do so too and are made of parameters alone (standardised weights).
        lives: what exists during the backward, by name; moment 0 is its start.
        made: the moment at which every value of the backward is made.
        owners: the value of ``lives`` that holds the memory of a value of the joint graph.
        moments: the backward's length.
        gradients: bytes of all gradients.
        standing: bytes that are there all the time: parameters and inputs.
    """

    before: Sequence[_Life]
    forward: int
    saved: float
    derived: float
    lives: Mapping[str, _Life]
    made: Mapping[str, int]
    owners: Mapping[str, str]
    moments: int
    gradients: float
    standing: float

    def plain_peak(self, seen: int = 1) -> float:
        """Of the step without privacy, on a batch of ``seen`` times the examples that were replayed."""
        backward = max(_timeline(self.lives.values(), self.moments, 1 / seen), default=0.0)
        return self.standing + max(self._forward_peak(1 / seen), backward)

    def _forward_peak(self, share: float) -> float:
        """Of the forward, where there are ``share`` times fewer examples than were replayed."""
        return max(_timeline(self.before, self.forward, share), default=0.0)

    def peak(self, holdings: Iterable[Holding], parts: int = 1, seen: int = 1) -> float:
        """Of the private step that runs its batch in ``parts`` parts.

        All parts' forwards come first; in the backward each part's own values are gone when its turn is over.

        Args:
            holdings: what every parameter's rule keeps.
            parts: see above.
            seen: of how many parts the replayed batch is one.
        """
        share = parts / seen  # of the replayed batch by a part
        lives = dict(self.lives)
        for name in [n for n, x in lives.items() if n.startswith("gradient ")]:
            del lives[name]
        holdings = list(holdings)
        last = self.moments + sum(not h.since for h in holdings) + 1  # the clip
        moment = self.moments
        for i, holding in reversed(list(enumerate(holdings))):
            moment += not holding.since  # one after the other, the last first, when the backward is over
            until = last if holding.since else moment
            for name, size in holding.operands.items():
                operand = self.owners.get(name)
                if operand is not None and operand in lives:  # it has memory then, though it may be fused without
                    life = lives[operand]
                    lives[operand] = replace(life, end=max(life.end, until), size=max(life.size, size))
            begin = max((self.made[n] for n in holding.since if n in self.made), default=moment)
            lives[f"kept {i}"] = _Life(begin, last, holding.kept, True)
            lives[f"scratch {i}"] = _Life(begin, begin, holding.scratch, True)
        largest = max((h.result for h in holdings), default=0.0)
        waiting = (self.saved / share + self.derived) * (parts - 1)
        live = _timeline(lives.values(), last, share)
        # At the end sums take the place of what was held for them; those of earlier parts are there already.
        backward = max(*live, live[-1] + largest, self.gradients) + (self.gradients if parts > 1 else 0)
        return self.standing + waiting + max(self._forward_peak(share), backward)


def replay(joint: JointGraph, proof: Proof, hints: Mapping[sympy.Symbol, int]) -> Replay:
    """Partition a copy of the plain joint graph as the compiler will, and note when every value lives.

    A pointwise value that only operations read whose loops may compute it is taken to be fused away.
    """
    of_examples = {n.name for n in joint.graph.nodes if _of_examples(proof.labels.get(n))}
    plain = fx.GraphModule(joint.module, copy_graph(joint.graph))
    described = joint.graph.output_node().meta["desc"]
    outputs = sum(d is not None and not isinstance(d, GradAOTOutput) for d in described)
    forward, backward = partition(plain, outputs)
    lives, moments = _lives(backward.graph, hints, of_examples)
    parameters = sum(bytes_of(p, hints) for p in joint.parameters.values())
    returned = forward.graph.output_node().args[0]
    assert isinstance(returned, (list, tuple))
    kept = {storage_of(n) for n in returned if isinstance(n, fx.Node)}
    waiting = [n for n in kept if n.op != "placeholder"]
    saved = sum(bytes_of(n, hints) for n in waiting if n.name in of_examples)
    derived = sum(bytes_of(n, hints) for n in waiting) - saved
    before, length = _lives(forward.graph, hints, of_examples)
    inputs = sum(bytes_of(n, hints) for n in joint.graph.nodes if n.op == "placeholder" and n not in joint.tangent_of)
    memory = {n: storage_of(n) for n in joint.graph.nodes}
    names = {n.name for n, own in memory.items() if own.op == "placeholder" and own not in joint.tangent_of}
    lives = {n: x for n, x in lives.items() if n not in names}
    made = {n: x.start for n, x in lives.items()}
    for i, gradient in enumerate(storage_of(g) for g in joint.gradients.values() if g is not None):
        if gradient.name in lives:
            lives[f"gradient {i}"] = lives.pop(gradient.name)
    first: dict[str, str] = {}  # of several saved views of one memory
    same = {n.name: first.setdefault(storage_of(n).name, n.name) for n in returned if isinstance(n, fx.Node)}
    for name, owner in same.items():
        if name != owner and name in lives and owner in lives:
            lives[owner] = replace(lives[owner], end=max(lives[owner].end, lives.pop(name).end))
    owners = {n.name: storage_of(n).name for n in backward.graph.nodes}
    owners = {name: same.get(owner, owner) for name, owner in owners.items()}
    for memory, name in first.items():  # saved as a view of a value that the backward does not know
        owners.setdefault(memory, name)
    for node in joint.graph.nodes:  # a view that the backward makes of something else
        source = node
        while source.name not in owners and storage_of(source) is not source:
            source = source.all_input_nodes[0]
        if source.name in owners:
            owners.setdefault(node.name, owners[source.name])
    during = [x for x in before.values() if x.start > 0]
    return Replay(during, length, saved, derived, lives, made, owners, moments, parameters, inputs)


def _timeline(lives: Iterable[_Life], moments: int, parts: float) -> list[float]:
    """Bytes at every moment, where the examples' values are ``parts`` times smaller."""
    change = [0.0] * (moments + 2)
    for life in lives:
        size = life.size / parts if life.of_examples else life.size
        change[life.start] += size
        change[life.end + 1] -= size
    return list(itertools.accumulate(change[: moments + 1]))


def _of_examples(label: object) -> bool:
    """Whether a value, or one of several, grows with the number of examples."""
    return any(map(_of_examples, label)) if isinstance(label, (tuple, list)) else isinstance(label, (Examples, Whole))


def _lives(graph: fx.Graph, hints: Mapping[sympy.Symbol, int], of_examples: set[str]) -> tuple[dict[str, _Life], int]:
    nodes = [n for n in graph.nodes if n.op != "output"]
    moment: dict[fx.Node, int] = {}
    number = 0
    for node in nodes:
        number += node.op != "placeholder"
        moment[node] = 0 if node.op == "placeholder" else number
    last: dict[fx.Node, int] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            owner = storage_of(operand)
            last[owner] = max(last.get(owner, 0), moment[node])
    for value in graph.output_node().all_input_nodes:
        last[storage_of(value)] = number
    lives: dict[str, _Life] = {}
    for node in nodes:
        size = bytes_of(node, hints) if storage_of(node) is node and not is_fused(node) and not _several(node) else 0.0
        lives[node.name] = _Life(moment[node], last.get(node, moment[node]), size, node.name in of_examples)
    return lives, number


def is_fused(node: fx.Node) -> bool:
    """Whether no memory is needed, since every reader is computed in the same loop."""
    return node.op == "call_function" and _pointwise(node) and all(_pointwise(u) or _absorbs(u) for u in node.users)


def _pointwise(node: fx.Node) -> bool:
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return True
    name = operation_name(node.target) if node.op == "call_function" else ""
    if name == "scatter":  # into a constant: a comparison of positions
        base = node.args[0]
        return isinstance(base, fx.Node) and base.op == "call_function" and operation_name(base.target) in CONSTANTS
    return name in CONSTANTS or (name in _LOOK_UPS and _by_numbers(node))


def _absorbs(node: fx.Node) -> bool:
    """Whether the operation's loop may compute its operands, though it is not pointwise."""
    name = operation_name(node.target) if node.op == "call_function" else ""
    return name in _REDUCTIONS or (name in _ACCUMULATIONS and _by_numbers(node))


def _by_numbers(node: fx.Node) -> bool:
    """Whether positions are given as numbers: by masks, the compiler makes no loop of its own."""
    values = (n.meta.get("val") for n in node.all_input_nodes)
    return not any(isinstance(v, torch.Tensor) and v.dtype in (torch.bool, torch.uint8) for v in values)


def storage_of(node: fx.Node) -> fx.Node:
    """The value whose memory this one is a view of; itself if it is none."""
    while node.op == "call_function" and node.all_input_nodes:
        name = operation_name(node.target)
        if name not in IN_THE_SAME_MEMORY or _several(node.all_input_nodes[0]):
            break
        node = node.all_input_nodes[0]
    return node


def _several(node: fx.Node) -> bool:
    """Whether the node has several results, each with memory of its own."""
    return isinstance(node.meta.get("val"), (tuple, list))


def bytes_of(node: fx.Node, hints: Mapping[sympy.Symbol, int]) -> float:
    """The size of a node's value, of all of them if there are several."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    total = 0.0
    for v in values:
        if isinstance(v, torch.Tensor):
            total += prod(hinted(n, hints) for n in v.shape) * v.element_size()
    return total
