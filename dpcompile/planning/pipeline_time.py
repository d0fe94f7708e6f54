"""How long a batch of a pipeline takes, how long each rank stands idle, and what it holds: by its schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dpcompile.planning.pipeline_orders import Action, Orders, known_over, source_of

__all__ = ["PredictedRun", "StageCosts", "predicted_run"]


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Of one micro-batch in one stage, in seconds (or any unit).

    Attributes:
        forward: of the forward.
        backward: of the gradients of inputs, and of the norms.
        weights: of the weight gradients, or clipped sums.
    """

    forward: float
    backward: float
    weights: float


@dataclass(frozen=True, slots=True)
class PredictedRun:
    """One batch.

    Attributes:
        seconds: from the first forward to the last rank's last product.
        idle: of each rank, the share of that time in which it computes nothing: the bubble.
        held: of each rank, the most micro-batches at a time, stage by stage, that keep activations or cotangents.
        waiting: the same, of those whose backward is over, and that wait for the norms of other stages.
    """

    seconds: float
    idle: tuple[float, ...]
    held: tuple[int, ...]
    waiting: tuple[int, ...]


@dataclass(slots=True)
class _Rank:
    order: Sequence[Action]
    stages: frozenset[int]
    place: int = 0
    free: float = 0.0
    busy: float = 0.0
    most: int = 0
    most_waiting: int = 0
    given: int = 0  # micro-batches whose backward is over in all stages of the rank
    taken: int = 0  # those whose clipped sums are computed
    held: set[tuple[int, int]] = field(default_factory=set)
    waiting: set[tuple[int, int]] = field(default_factory=set)
    backwards: dict[int, int] = field(default_factory=dict)

    def works(self, seconds: float, since: float = 0.0) -> None:
        self.free = max(self.free, since) + seconds
        self.busy += seconds

    def is_back(self, chunk: int) -> None:
        self.backwards[chunk] = self.backwards.get(chunk, 0) + 1
        while self.backwards.get(self.given) == len(self.stages):
            self.given += 1


def predicted_run(
    orders: Orders, stages: int, costs: Sequence[StageCosts], *, private: bool = True, send: float = 0.0
) -> PredictedRun:
    """What becomes of a schedule, private (weights of a micro-batch wait for all stages' norms) or not.

    Args:
        orders: what each rank does: :mod:`dpcompile.planning.pipeline_orders`.
        stages: how many there are.
        costs: of each stage.
        private: see :mod:`dpcompile.runtime.stages_of_rank`, whose rules these are.
        send: seconds from rank to rank.

    Raises:
        ValueError: the orders never come to an end.
    """
    known = known_over(orders, stages)
    ranks = [_Rank(order, frozenset(a.stage for a in order)) for order in orders]
    ends: dict[tuple[bool, int, int], float] = {}
    left = sum(map(len, orders))
    while left:
        for rank in ranks:
            while rank.place < len(rank.order):
                action = rank.order[rank.place]
                source = source_of(action, stages)
                if source is not None and source not in ends:
                    break
                away = source is not None and source[1] not in rank.stages
                since = 0.0 if source is None else ends[source] + away * send
                end = _perform(rank, action, since, known, costs, private=private)
                if action.kind != "W":
                    ends[action.back, action.stage, action.chunk] = end
                rank.place += 1
                left -= 1
    if private:
        over = [end for (back, stage, _), end in sorted(ends.items()) if back and stage == 0]
        for rank in ranks:
            while rank.taken < rank.given:
                there = max(over[: rank.taken + 1]) + (0 not in rank.stages) * send
                _take(rank, rank.taken + 1, costs, since=there)
    seconds = max(rank.free for rank in ranks)
    idle = tuple(1 - rank.busy / seconds for rank in ranks)
    return PredictedRun(seconds, idle, tuple(r.most for r in ranks), tuple(r.most_waiting for r in ranks))


def _perform(
    rank: _Rank,
    action: Action,
    since: float,
    known: Mapping[Action, int],
    costs: Sequence[StageCosts],
    *,
    private: bool,
) -> float:
    """Returns when the action itself ends: what it came to is sent then."""
    cost, own = costs[action.stage], (action.stage, action.chunk)
    if private and action.kind in ("F", "W"):
        _take(rank, min(known[action], rank.given), costs, since)
    if action.kind == "F":
        rank.held.add(own)
        rank.most = max(rank.most, len(rank.held))
        rank.works(cost.forward, since)
    elif action.back:
        rank.works(cost.backward + (cost.weights if action.kind == "B" and not private else 0.0), since)
    elif not private:
        rank.works(cost.weights)
    if not private and action.kind in ("B", "W"):
        rank.held.discard(own)
    end = rank.free
    if action.back:
        rank.is_back(action.chunk)
        rank.waiting |= {own} if private else set()
        rank.most_waiting = max(rank.most_waiting, len(rank.waiting))
        if private and action.stage == 0:
            _take(rank, rank.given, costs)
    return end


def _take(rank: _Rank, end: int, costs: Sequence[StageCosts], since: float = 0.0) -> None:
    while rank.taken < end:
        rank.works(sum(costs[s].weights for s in rank.stages), since)
        done = {(s, rank.taken) for s in rank.stages}
        rank.held, rank.waiting = rank.held - done, rank.waiting - done
        rank.taken += 1
