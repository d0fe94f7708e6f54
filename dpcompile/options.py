"""What was asked for, and how a region's backward comes to clipped sums: plain data that all stages read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from dpcompile.clipping.groups import Clipping

__all__ = ["AT_ONCE", "DEFERRED", "TWO_PASS", "CompileOptions", "Lowering", "Options", "PassedOptions"]


class PassedOptions(TypedDict, total=False):
    """Keywords of :func:`dpcompile.dp_compile` that :func:`dpcompile.make_private` hands on."""

    clipping: Clipping
    norm: str
    in_dims: Any
    loss_reduction: str
    backend: str
    dynamic: bool | None
    memory_budget: float | int | None
    check: bool
    regions: str | None
    verify: bool
    pipeline: Any
    untied: bool


class CompileOptions(PassedOptions, total=False):
    """All keywords of :func:`dpcompile.dp_compile`."""

    max_grad_norm: float
    examples_per_user: int


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked of :func:`dpcompile.dp_compile`; its docstring explains each.

    Attributes:
        machine: plans are for this one (:mod:`dpcompile.kernels.data_sheets`), and nothing is compiled; None: for the
            one at hand.
    """

    max_grad_norm: float
    clipping: Clipping
    norm: str
    in_dims: Any
    loss_reduction: str
    backend: str
    dynamic: bool | None
    memory_budget: float | int | None
    check: bool
    regions: str | None = None
    verify: bool = True
    examples_per_user: int = 1
    machine: str | None = None
    pipeline: Any = None
    untied: bool = False


DEFERRED, AT_ONCE, TWO_PASS = "deferred", "at once", "two passes"


@dataclass(frozen=True, slots=True)
class Lowering:
    """What becomes of the backward of one region.

    Attributes:
        kind: "deferred": norms first, then, once the whole backward is over, clipped sums from what was kept. "at
            once": every clip group of the region lies within it, so that weights and sums are computed right there.
            "two passes": norms first, nothing is kept, and a second backward has the clipped sums.
        groups: at once: for every parameter, in order, the number of its clip group.
    """

    kind: str = DEFERRED
    groups: tuple[int, ...] = ()
