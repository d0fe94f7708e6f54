"""By which power of the cotangents each value of a graph grows.

Multiplied by s > 0, the cotangents multiply a value by ``s ** degree``. What is known of an operation is said beside
its rule (:mod:`dpcompile.proof.rules.growth`).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Shared
from dpcompile.graph.operations import takes_only_shapes
from dpcompile.proof.prove import Proof
from dpcompile.proof.rules import named_arguments
from dpcompile.proof.rules.growth import Degrees

__all__ = ["degrees_of", "is_zero"]


def degrees_of(joint: JointGraph, proof: Proof) -> dict[fx.Node, Any]:
    """The degree of every node; a node instead of a number: the operation that has none, on which the value depends.

    Several results of an operation have a tuple of degrees.
    """
    degrees: dict[fx.Node, Any] = {}
    for node in joint.graph.nodes:
        degrees[node] = 1.0 if node in joint.tangent_of else 0.0
        if node.op == "call_function":
            degrees[node] = _degree(node, degrees, proof)
    return degrees


def _degree(node: fx.Node, degrees: Mapping[fx.Node, Any], proof: Proof) -> Any:
    if node.target is operator.getitem:
        found = degrees[node.args[0]]  # type: ignore[index]
        return found[node.args[1]] if isinstance(found, tuple) else found  # type: ignore[index]
    known = [degrees[n] for n in node.all_input_nodes]
    unknown = next((d for d in known if isinstance(d, fx.Node)), None)
    if unknown is not None:
        return unknown
    tensors = isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
    if not any(known) or takes_only_shapes(node.target) or not tensors:
        return 0.0
    degree = Degrees(node, named_arguments(node), degrees, lambda n: is_zero(proof, n)).of_result()
    return node if degree is None else degree


def is_zero(proof: Proof, node: fx.Node) -> bool:
    """Whether a value is known to be zeros, which have any degree."""
    label = proof.of(node)
    return isinstance(label, Shared) and label.zero
