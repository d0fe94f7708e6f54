"""Plans for a machine that need not be there."""

from __future__ import annotations

import torch
from torch import fx

from dpcompile._torch.hollow import put_on
from dpcompile.planning.parts import behind
from dpcompile.planning.plan import Plan

__all__ = ["Planned", "moved", "plan_behind"]


class Planned(Exception):
    """Stops a compilation: the plan was all that was asked for."""

    def __init__(self, plan: Plan) -> None:
        super().__init__("the plan is made")
        self.plan = plan


def plan_behind(error: BaseException | None) -> Plan | None:
    """The plan of a :class:`Planned` behind this error, or None."""
    found = behind(error, Planned)
    return None if found is None else found.plan


def moved(graph: fx.Graph) -> None:
    """Let every value of a graph lie on a GPU.

    It was captured on another device: autograd refuses GPUs where torch has none.
    """
    for node in graph.nodes:
        put_on(node.meta.get("val"), torch.device("cuda"))
