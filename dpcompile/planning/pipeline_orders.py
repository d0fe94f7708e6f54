"""In which order the ranks of a pipeline compute, and what each of them may know of the first stage at which point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Action", "Orders", "gpipe", "known_over", "one_forward_one_backward", "source_of"]


@dataclass(frozen=True, slots=True)
class Action:
    """What a rank computes of one micro-batch.

    Attributes:
        kind: "F" forward, "B" backward, "I" backward without weight gradients, "W" these.
        stage: number of the stage.
        chunk: number of the micro-batch.
    """

    kind: str
    stage: int
    chunk: int

    @property
    def back(self) -> bool:
        """Whether gradients of inputs come of it."""
        return self.kind in ("B", "I")


Orders = Sequence[Sequence[Action]]


def gpipe(stages: int, chunks: int) -> list[list[Action]]:
    """All forwards, then all backwards (Huang et al., 2019, section 2.2); rank i holds stage i."""
    return [[Action(kind, s, m) for kind in "FB" for m in range(chunks)] for s in range(stages)]


def one_forward_one_backward(stages: int, chunks: int) -> list[list[Action]]:
    """1F1B (Narayanan et al., 2019, section 3.2): ``stages - i`` forwards on rank i, then backward, forward, and so on.

    torch runs it so; rank i holds stage i.
    """
    orders = []
    for s in range(stages):
        ahead = min(chunks, stages - s)
        order = [Action("F", s, m) for m in range(ahead)]
        for m in range(chunks):
            order.append(Action("B", s, m))
            if ahead + m < chunks:
                order.append(Action("F", s, ahead + m))
        orders.append(order)
    return orders


def source_of(action: Action, stages: int) -> tuple[bool, int, int] | None:
    """Whose result an action waits for: ``(back, stage, micro-batch)``; None: nobody's, or its own rank's."""
    if action.kind == "F" and action.stage > 0:
        return False, action.stage - 1, action.chunk
    if action.back:
        last = action.stage == stages - 1
        return (False, action.stage, action.chunk) if last else (True, action.stage + 1, action.chunk)
    return None


def known_over(orders: Orders, stages: int) -> Mapping[Action, int]:
    """For every action how many micro-batches are over when it begins, as its rank can know.

    A backward of the first stage counts itself.
    The first stage's backward of a micro-batch is the last of all. A rank knows of it through what it was sent since:
    so at an action with number n the backwards of micro-batches 0 .. n - 1 are over in every stage on every rank, in
    every run of the schedule, however long anything takes. Waiting there for what those backwards sent cannot
    block.

    Args:
        orders: of every rank.
        stages: how many the pipeline has.

    Raises:
        ValueError: no run of these orders comes to an end.
    """
    found: dict[Action, int] = {}
    sent: dict[tuple[bool, int, int], int] = {}  # with a result, what its rank knew
    places, knows, over = [0] * len(orders), [0] * len(orders), set[int]()
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                action = order[places[rank]]
                source = source_of(action, stages)
                if source is not None and source not in sent:
                    break
                knows[rank] = max(knows[rank], 0 if source is None else sent[source])
                if action.back and action.stage == 0:
                    over.add(action.chunk)
                    knows[rank] = next(n for n in range(len(over) + 1) if n not in over)
                found[action] = knows[rank]
                if action.kind != "W":
                    sent[action.back, action.stage, action.chunk] = knows[rank]
                places[rank] += 1
                moved = True
    if any(place < len(order) for place, order in zip(places, orders, strict=True)):
        raise ValueError("the ranks of this schedule wait for each other")
    return found
