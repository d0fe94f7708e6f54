"""What a step on a mesh of four dimensions sends, holds and takes, from what one rank was counted to hold and send.

A step is ``m = examples / (dp b)`` micro-batches of ``b`` examples through ``pp`` stages. Stage 0 is counted: it has
the embedding and as many blocks as any. Of one micro-batch, ``A`` bytes are held after its forward and ``H`` when its
clip weights are made::

    not private, first stage    peak + (pp - 1) A          1F1B has pp micro-batches under way
    private                     peak + (pp - 1) max(A, H)  each is held until its norms are in from all stages
    private, all at the step    peak + (m - 1) H           where norms are exchanged in optimizer.step()

A ring of ``n`` ranks sends ``(n - 1) / n`` of a tensor for a gather or a reduction, and twice that for both. A
micro-batch sends, of each rank, with ``T`` tokens, ``d`` features and 2 bytes for an activation::

    tp    4 sums of [b, T / cp, d] a block (two forward, two backward); norms: [2, b] and 8 float64 numbers, with cp 10
    cp    keys and values of T tokens gathered, their gradients reduced; private: for each weight [p, q] the smaller of
          every example's gradient summed, 4 b p q, and rows and columns gathered, 4 b T (p + q); norms: [2, b] and 8
          float64 numbers, with tp [4, b]
    pp    [b, T / cp, d] to the next stage and its gradient back; private: [b] float64 numbers summed
    dp    FSDP2's gathers and reductions, as counted

and a step, without privacy, the gradients summed over ``cp`` once. A micro-batch takes a stage ``max(c + t + k, f)``
seconds: ``c`` are ``6 b T / cp`` FLOPs for each element of a stage on a rank and ``6 b T^2 / cp`` for each feature of
its queries in each block, divided by the FLOP/s, and by ``ratio`` if private; ``t`` and ``k`` what ``tp`` and ``cp``
send, which nothing runs beside; ``f`` what FSDP2 sends, which runs beside. The step takes ``m + pp - 1`` of these, so
``(pp - 1) / (m + pp - 1)`` of it is bubble; then the update, the noise, and the sums over ``cp`` without privacy. A
group lies within a node, on its faster links, if it and those before it in the order tp, cp, pp, dp fit.
"""

from __future__ import annotations

import math
from typing import Any

from benchmarks.scale.meshes import HEAD, Mesh, Sizes
from benchmarks.scale.throughput import Cluster

__all__ = ["Answer", "links", "predict"]

Answer = dict[str, Any]


def links(sizes: Sizes, mesh: Mesh, cell: Answer, *, private: bool, batch: int = 1) -> dict[str, float]:
    """Bytes that a rank sends for one micro-batch, by dimension of the mesh."""
    blocks, tokens = -(-sizes.depth // mesh.pp), sizes.context // mesh.cp
    hidden = 2.0 * batch * tokens * sizes.width
    keys = 2 * batch * sizes.context * 2 * sizes.groups * HEAD // mesh.tp
    found = {
        "tp": 4 * blocks * _both(hidden, mesh.tp),
        "cp": blocks * _both(keys, mesh.cp),
        "pp": 2 * hidden if mesh.pp > 1 else 0.0,
        "dp": (cell["gathered"] + cell["reduced"]) * (mesh.dp - 1) / mesh.dp,
    }
    if private:
        found["tp"] += _both(8 * (2 * batch + 8 + 2 * (mesh.cp > 1)), mesh.tp)
        found["cp"] += _both(8 * ((4 if mesh.tp > 1 else 2) * batch + 8), mesh.cp)
        found["pp"] += _both(8 * batch, mesh.pp)
        found["cp"] += blocks * sum(
            _for_norms(p, q, sizes.context, mesh.cp, batch) for p, q in _weights(sizes, mesh.tp)
        )
    return found


def predict(sizes: Sizes, mesh: Mesh, cell: Answer, cluster: Cluster, ratio: float, *, private: bool) -> Answer:
    """Bytes of memory, seconds and tokens per second of a step of as many examples as fill the pipeline eight times."""
    micro = 8 * mesh.pp
    sent = links(sizes, mesh, cell, private=private)
    kept = max(cell["forward"], cell["held"]) if private else cell["forward"]
    flops = 6.0 * sizes.context / mesh.cp * cell["parameters"]
    blocks = -(-sizes.depth // mesh.pp)
    flops += 6.0 * sizes.context**2 / mesh.cp * blocks * sizes.heads * HEAD / mesh.tp
    compute = flops / cluster.flops / (ratio if private else 1.0)
    inside = {"tp": mesh.tp, "cp": mesh.tp * mesh.cp, "pp": mesh.tp * mesh.cp * mesh.pp, "dp": mesh.ranks}
    speed = {k: cluster.inside if n <= cluster.node else cluster.outside for k, n in inside.items()}
    waits = sent["tp"] / speed["tp"] + (sent["cp"] / speed["cp"] if mesh.cp > 1 else 0.0)
    waits += (math.log2(mesh.tp) + math.log2(mesh.pp)) * cluster.latency * private
    each = max(compute + waits, sent["dp"] / speed["dp"])
    trained = cell["parameters"] / mesh.dp
    update = 28 * trained / cluster.traffic + private * trained / cluster.noise
    once = 0.0 if private else _both(4 * cell["parameters"], mesh.cp) / speed["cp"]
    seconds = (micro + mesh.pp - 1) * each + update + once
    return {
        "memory": cell["peak"] + (mesh.pp - 1) * kept,
        "at_the_step": cell["peak"] + (micro - 1) * cell["held"],
        "sent": sent,
        "bubble": (mesh.pp - 1) / (micro + mesh.pp - 1),
        "seconds": seconds,
        "tokens": micro * mesh.dp * sizes.context / seconds,
        "examples": micro * mesh.dp,
        "bound": "FSDP2's links" if sent["dp"] / speed["dp"] > compute + waits else "compute",
    }


def _weights(sizes: Sizes, tp: int) -> list[tuple[int, int]]:
    """Of a block, on one of ``tp`` ranks; the vectors of the norms as matrices of one row."""
    queries, keys, inside = (n // tp for n in (sizes.heads * HEAD, sizes.groups * HEAD, sizes.inside))
    return [(sizes.width, n) for n in (queries, queries, keys, keys, inside, inside, inside, 1, 1)]


def _for_norms(p: int, q: int, tokens: int, ranks: int, batch: int) -> float:
    added, gathered = _both(4.0 * batch * p * q, ranks), 4.0 * batch * tokens * (p + q) * (ranks - 1) / ranks
    return min(added, gathered)


def _both(size: float, ranks: int) -> float:
    """A gather and a reduction of a tensor, or an all-reduce of it."""
    return 2.0 * size * (ranks - 1) / ranks
