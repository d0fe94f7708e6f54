"""The proof, printed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from dpcompile.graph.joint import JointGraph
from dpcompile.graph.operations import operation_name
from dpcompile.proof.prove import Proof
from dpcompile.proof.sites import ParameterGradient

__all__ = ["Certificate", "certify"]


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was proved, for people to read.

    Attributes:
        examples: input -> where its examples lie.
        gradients: parameter -> the operations in which its gradient is summed over the examples.
        zero: trainable parameters whose gradient is identically zero.
        operations: how often each operation occurs on values of examples, or on sums over them.
        values: every value of the graph -> its label, as text.
    """

    examples: dict[str, str]
    gradients: dict[str, tuple[str, ...]]
    zero: tuple[str, ...]
    operations: dict[str, int]
    values: dict[str, str]

    def __str__(self) -> str:
        lines = ["examples never mix:"]
        lines += [f"  input {name}: {text}" for name, text in self.examples.items()]
        lines.append(f"  {sum(self.operations.values())} operations on values of examples, all with a rule:")
        lines.append("    " + ", ".join(f"{name} {n}" for name, n in sorted(self.operations.items())))
        lines.append("every gradient is summed over the examples, once on every path:")
        lines += [f"  {name}: {', '.join(kinds)}" for name, kinds in self.gradients.items()]
        lines += [f"  {name}: zero for every example" for name in self.zero]
        return "\n".join(lines)


def certify(joint: JointGraph, proof: Proof, gradients: list[ParameterGradient]) -> Certificate:
    """Write down what :func:`dpcompile.proof.prove.prove` and :func:`dpcompile.proof.sites.find_gradients` established.

    Call it before the graph is rewritten.
    """
    operations: Counter[str] = Counter()
    values = {}
    for node in joint.graph.nodes:
        label = proof.labels.get(node)
        if label is None:
            continue
        text = ", ".join(map(str, label)) if isinstance(label, tuple) else str(label)
        values[node.name] = text
        if node.op == "call_function" and text != "shared" and hasattr(node.target, "overloadpacket"):
            operations[operation_name(node.target)] += 1
    found = {g.name: tuple(s.kind for s in g.sites) for g in gradients}
    return Certificate(
        examples={joint.input_name(n): str(a) for n, a in joint.example_axes.items() if n is not joint.mask},
        gradients=found,
        zero=tuple(n for n in joint.gradients if n not in found),
        operations=dict(operations),
        values=values,
    )
