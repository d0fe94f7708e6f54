"""What every operation does to the example axis."""

from dpcompile.proof.rules import (
    attention,
    batched,
    collectives,
    contractions,
    experts,
    indexing,
    layers,
    pointwise,
    reductions,
    scatters,
    slices,
    strided,
    views,
)
from dpcompile.proof.rules.registry import (
    AxisRule,
    Call,
    Labels,
    add_rule,
    axis_rule,
    find_rule,
    named_arguments,
    rules,
)
from dpcompile.proof.rules.rows import Rows

__all__ = [
    "AxisRule",
    "Call",
    "Labels",
    "Rows",
    "add_rule",
    "attention",
    "axis_rule",
    "batched",
    "collectives",
    "contractions",
    "experts",
    "find_rule",
    "indexing",
    "layers",
    "named_arguments",
    "pointwise",
    "reductions",
    "rules",
    "scatters",
    "slices",
    "strided",
    "views",
]
