"""Labels of a graph into which no example goes."""

from __future__ import annotations

from torch import fx

from dpcompile._torch.aot import PlainAOTInput, PlainAOTOutput
from dpcompile.capture.joint import returned
from dpcompile.capture.roles import Roles
from dpcompile.graph.labels import Label, Shared
from dpcompile.proof.rules import Rows

__all__ = ["labels_of_no_example"]


def labels_of_no_example(module: fx.GraphModule, roles: Roles) -> tuple[Label, ...]:
    """Of the outputs of a graph, where all is shared: along which dimensions they are the same."""
    labels: dict[fx.Node, Label] = {}
    for node in module.graph.nodes:
        descriptor = node.meta.get("desc")
        known = roles.alike.get(descriptor.idx, ()) if isinstance(descriptor, PlainAOTInput) else ()
        labels[node] = Shared(alike=known)
    rows = Rows(labels, roles.batch, {})
    return tuple(
        Shared(alike=rows.alike(v) if isinstance(v, fx.Node) else ())
        for d, v in returned(module)
        if isinstance(d, PlainAOTOutput)
    )
