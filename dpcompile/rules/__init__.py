"""What every operation does to the example axis."""

from dpcompile.rules import (
    attention,
    batched,
    collectives,
    contractions,
    indexing,
    layers,
    pointwise,
    reductions,
    strided,
    views,
)
from dpcompile.rules.registry import AxisRule, Call, Labels, add_rule, axis_rule, find_rule, rules

__all__ = [
    "AxisRule",
    "Call",
    "Labels",
    "add_rule",
    "attention",
    "axis_rule",
    "batched",
    "collectives",
    "contractions",
    "find_rule",
    "indexing",
    "layers",
    "pointwise",
    "reductions",
    "rules",
    "strided",
    "views",
]
