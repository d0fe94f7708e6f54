"""A model of throughput on many ranks, from counted bytes, seconds of compute, and the speed of links.

A logical step takes ``L`` examples in ``L / (n b)`` micro-batches of ``b`` examples on each of ``n`` ranks, and one
optimizer step. Of a micro-batch, with ``c`` the seconds of one non-private pass over its examples (forward, gradients
of inputs, gradients of parameters: a third each), ``g`` those of one all-gather of all units, ``r`` those of one
reduction, and ``u`` units::

    not private    max(c / 3, g) + max(2 c / 3, g + r) + (g + r) / u
    deferred       max(c / 3, g) + max(p - 2 c / 3, g) + max(c / 3, r) + (g + r) / u      with p = c / ratio
    two backwards  max(c / 3, g) + 2 max(2 c / 3, g + r) + (g + r) / u

Communication runs beside computation where FSDP2 lets it: gathers beside the forward and the first part of the
backward, reductions beside the backward, or beside the clipped sums where these come last. The first gather and the
last reduction have nothing to run beside: the last term. What privacy adds, ``p - c``, is in the first part of the
backward (norms). Two backwards are given no time for norms.

A collective of ``S`` bytes takes ``S (n - 1) / (n B) + calls * latency * log2 n`` seconds, ``B`` the bytes/s of a
rank's link: the one within a node up to that many ranks, else the one between nodes. The optimizer step takes
``bytes per element * N / n / traffic`` seconds, the noise ``N / n / noise`` more, with
``N`` trained elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["RANKS", "Cluster", "Load", "amdahl", "curve", "load_of", "step_seconds"]

RANKS = tuple(2**i for i in range(11))


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a rank has; the defaults are round figures for eight H100 in a node, 400 Gbit/s each to the next.

    Attributes:
        flops: FLOP/s that training reaches.
        inside: bytes/s of a rank's link within a node.
        outside: bytes/s of a rank's link between nodes.
        node: ranks in a node.
        latency: seconds for one hop of a collective.
        traffic: bytes/s of the optimizer's kernels.
        noise: normal values drawn per second.
    """

    flops: float = 2e14
    inside: float = 3e11
    outside: float = 4e10
    node: int = 8
    latency: float = 1e-5
    traffic: float = 2e12
    noise: float = 2e10


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be done.

    Attributes:
        seconds: of one non-private pass over one example, on one rank.
        ratio: seconds of the non-private pass over the private one's.
        batch: examples of a micro-batch.
        logical: examples of a step.
        trained: elements that are updated.
        units: of FSDP.
        gathered: bytes of one all-gather of all units, whole.
        reduced: bytes of one reduction of all units, whole.
    """

    seconds: float
    ratio: float
    batch: int
    logical: int
    trained: int
    units: int
    gathered: float
    reduced: float


def step_seconds(load: Load, cluster: Cluster, ranks: int, way: str) -> float:
    """Seconds of a logical step; ``way`` is "plain", "ours" or "twice"."""
    c = load.seconds * load.batch
    g, r = (_collective(size, load.units, cluster, ranks) for size in (load.gathered, load.reduced))
    first, tail = max(c / 3, g), (g + r) / load.units
    if way == "plain":
        micro = first + max(2 * c / 3, g + r)
    elif way == "ours":
        micro = first + max(c / load.ratio - 2 * c / 3, g) + max(c / 3, r)
    else:
        micro = first + 2 * max(2 * c / 3, g + r)
    update = 7 * 4 * load.trained / ranks / cluster.traffic  # reads four tensors and writes three
    noise = 0.0 if way == "plain" else load.trained / ranks / cluster.noise
    return load.logical / (ranks * load.batch) * (micro + tail) + update + noise


def curve(load: Load, cluster: Cluster, way: str) -> dict[int, float]:
    """Ranks -> examples per second."""
    return {n: load.logical / step_seconds(load, cluster, n, way) for n in RANKS}


def amdahl(rates: dict[int, float]) -> float:
    """The part of one rank's step that would have to be serial to explain the speedup on the most ranks.

    From Amdahl 1967: ``1 / S = s + (1 - s) / n``.
    """
    most = max(rates)
    speedup = rates[most] / rates[1]
    return (1 / speedup - 1 / most) / (1 - 1 / most)


def load_of(cell: dict[str, Any], *, context: int, seconds: float | None, ratio: float, flops: float) -> Load:
    """The load of a model from its sizes as counted for the non-private step on FSDP2.

    Without ``seconds`` an example takes ``6 * parameters * tokens / flops``, or ``4`` with frozen parameters, whose
    gradients are not computed.
    """
    whole = cell["trainable"] == cell["parameters"]
    gathers, reductions = cell["bytes"]["allgather_base"], cell["bytes"]["reduce_scatter_base"]
    times = cell["calls"]["allgather_base"] / cell["calls"]["reduce_scatter_base"] if whole else 2.0
    per_example = seconds or (6 if whole else 4) * cell["parameters"] * context / flops
    logical = max(RANKS) * cell["batch"]
    return Load(
        per_example, ratio, cell["batch"], logical, cell["trainable"], cell["depth"] + 1, gathers / times, reductions
    )


def _collective(size: float, units: int, cluster: Cluster, ranks: int) -> float:
    if ranks == 1:
        return 0.0
    link = cluster.inside if ranks <= cluster.node else cluster.outside
    return size * (ranks - 1) / ranks / link + units * cluster.latency * math.log2(ranks)
