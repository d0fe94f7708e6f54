"""Where the clipped sums of a backward go: as they arise, over the ranks, and into the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from dpcompile.distributed.shards import Pending, computing_device, gathered_shape, reduce_sums, zeros_for
from dpcompile.runtime.ledger import GradientLedger
from dpcompile.runtime.replicas import Replicas

__all__ = ["Delivered", "LocalSums", "ShardedSums", "Sums", "lying_like", "to_ledger"]

Named = Sequence[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Delivered:
    """What the backward of a forward, or of a part of one, came to.

    Attributes:
        norms: ``[B]``, before clipping; None if the backward reached no parameter.
        mask: ``[B]``, of the same rows.
        graph_task: the identity of the backward.
        sums: ``(parameter name, clipped sum)``; of sharded parameters the local parts of the sums over all ranks.
        by_group: clip group -> ``[B]``, its norms; of one group, and of groups without a gradient, it need not be told.
    """

    norms: Tensor | None
    mask: Tensor
    graph_task: int
    sums: Named
    by_group: Mapping[str, Tensor] = field(default_factory=dict)


class Sums(Protocol):
    """Takes clipped sums of regions as they arise; ``unit`` is the path of the unit that a region is a part of."""

    def expect(self, unit: str) -> None:
        """A region of this unit ran forward."""
        ...

    def add(self, unit: str, sums: Named) -> None:
        """The clipped sums of a region of this unit; once per region. Those of one parameter add up."""
        ...

    def finish(self) -> Named:
        """All of them, when the backward is over."""
        ...


class LocalSums:
    """Of parameters that lie on this rank whole, also where other ranks hold replicas: those add up in the end."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def expect(self, unit: str) -> None:
        """Nothing waits for it."""

    def add(self, unit: str, sums: Named) -> None:
        """The clipped sums of a region; those of one parameter add up."""
        _add_up(self._found, sums)

    def finish(self) -> Named:
        """All of them; none is kept."""
        found, self._found = self._found, {}
        return list(found.items())


class ShardedSums:
    """Of parameters that FSDP2 shards: added up over the ranks, unit by unit.

    A unit's reduction starts when all its regions have their sums, and runs while those of the next are computed; two
    at most are under way. Every rank reduces every trainable parameter, also one that no backward of its own reached,
    in the same order.

    Args:
        units: path of a unit -> the trainable parameters that it holds; in one order on all ranks.
        parameters: of the model.
    """

    def __init__(self, units: Mapping[str, Sequence[str]], parameters: Mapping[str, nn.Parameter]) -> None:
        self._own, self._parameters = dict(units), parameters
        self._left: Counter[str] = Counter()
        self._gathered: dict[str, dict[str, Tensor]] = {}
        self._pending: list[tuple[list[str], Pending]] = []
        self._done: list[tuple[str, Tensor]] = []

    def expect(self, unit: str) -> None:
        """A region of this unit ran forward."""
        self._left[unit] += 1

    def add(self, unit: str, sums: Named) -> None:
        """The clipped sums of a region of this unit, of the examples of this rank; those of one parameter add up."""
        assert all(name in self._own.get(unit, ()) for name, _ in sums), (unit, [name for name, _ in sums])
        _add_up(self._gathered.setdefault(unit, {}), sums)
        self._left[unit] -= 1
        if not self._left[unit]:
            self._reduce(unit)

    def finish(self) -> Named:
        """``(parameter name, local part of the sum over all ranks)``."""
        for unit in list(self._own):
            self._reduce(unit)
        self._wait()
        done, self._done = self._done, []
        return done

    def _reduce(self, unit: str) -> None:
        started = _start(self._own.pop(unit), self._parameters, self._gathered.pop(unit, {}))
        self._wait()
        self._pending = started

    def _wait(self) -> None:
        for names, reduction in self._pending:
            self._done += zip(names, reduction.wait(), strict=True)
        self._pending = []


def _start(
    names: Sequence[str], parameters: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor]
) -> list[tuple[list[str], Pending]]:
    groups: dict[torch.dtype, list[str]] = {}
    for name in names:
        groups.setdefault(torch.promote_types(parameters[name].dtype, torch.float32), []).append(name)
    started = []
    for dtype, members in groups.items():
        own = [parameters[n] for n in members]
        whole = [
            sums[n] if n in sums else torch.zeros(gathered_shape(p), dtype=dtype, device=computing_device(p))
            for n, p in zip(members, own, strict=True)
        ]
        started.append((members, reduce_sums(own, whole)))
    return started


def _add_up(totals: dict[str, Tensor], sums: Iterable[tuple[str, Tensor]]) -> None:
    for name, value in sums:
        totals[name] = totals[name] + value if name in totals else value


def lying_like(parameters: Mapping[str, nn.Parameter], sums: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Sums that are contiguous where their parameters are: those of one graph may have their channels last."""
    return [(n, s.contiguous() if parameters[n].is_contiguous() else s) for n, s in sums]


def to_ledger(
    ledger: GradientLedger,
    replicas: Replicas,
    trained: Mapping[str, nn.Parameter],
    sums: Named,
    *,
    graph_task: int,
    call: object,
    reduces: bool,
) -> None:
    """Hand what a backward came to on into ``p.grad``; the only way there.

    **Guarantee.** Every trainable parameter has a gradient afterwards: zeros if no backward reached it. Of a model
    inside DistributedDataParallel the sums are held back until the backward is over, added up over its replicas then,
    and zeros of a rank that did not reach a parameter among them; of a stage of a pipeline, until a step.

    Args:
        ledger: of the model.
        replicas: of the model.
        trained: the trainable parameters.
        sums: ``(parameter name, clipped sum)``, float32 or wider.
        graph_task: the identity of the backward.
        call: identifies the call of the model, whose parts deliver one by one.
        reduces: whether the forward ran outside ``no_sync()``.
    """
    if replicas.known:
        replicas.hold(sums, graph_task=graph_task, call=call, reduces=reduces)
        return
    if ledger.holds:
        ledger.deliver([], graph_task=graph_task, call=call)
        ledger.hold(sums)
        return
    reached = {name for name, _ in sums}
    zeros = [(n, zeros_for(p)) for n, p in trained.items() if n not in reached and p.grad is None]
    ledger.deliver([*sums, *zeros], graph_task=graph_task, call=call)
