"""One forward of a model in several regions, and its backward: norms, weights, clipped sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpcompile._torch.autograd import after_backward, current_backward
from dpcompile._torch.dynamo import disable
from dpcompile.clipping.groups import Bounds, group_of
from dpcompile.clipping.weights import clip_group, own_norms
from dpcompile.distributed.tensor_parallel import NormsOverRanks
from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.lowering.pending import LoweredBackward, PendingSums
from dpcompile.options import AT_ONCE, TWO_PASS, Lowering, Options
from dpcompile.planning.shared_uses import HandedOut, Part, Redone, Use, joint_norm
from dpcompile.runtime.delivery import refuse_asked_for, warn_of_lost_examples
from dpcompile.runtime.loss_scale import Unscaling, refused_scale
from dpcompile.runtime.sums import Delivered, Sums

__all__ = ["RegionBackward", "RegionRun", "attach", "shared_in_two_passes"]


@dataclass(eq=False, slots=True)
class RegionRun:
    """A region with trainable parameters that ran forward.

    Attributes:
        names: its parameters, in the order of the rows of norms and weights.
        touched: those whose gradient is not zero for every example.
        whole: the forward that it is a part of.
        lowered: the region's compiled backward.
        given: ``[parameters, B]``, float64, what the graph takes for clip weights; clipped at once: the bounds.
        unit: the path of the unit that the region is a part of.
        memory: parameters' memory that is freed before the clipped sums are computed.
        uses: of parameters that other regions use too, what the region hands out.
        probe: a leaf behind the region in autograd's graph, where its backward may come twice.
        squared: its squared norms, ``[parameters, B]``, float64, once its backward came.
        rest: deferred: what its clipped sums are computed from.
    """

    names: tuple[str, ...]
    touched: frozenset[str]
    whole: RegionBackward
    lowered: LoweredBackward
    given: Tensor
    unit: str = ""
    memory: frozenset[int] = frozenset()
    uses: Mapping[str, Use] = field(default_factory=dict)
    probe: Tensor | None = None
    squared: Tensor | None = None
    rest: PendingSums | None = None

    @property
    def lowering(self) -> Lowering:
        """Of the region."""
        return self.lowered.lowering

    def named(self, sums: Sequence[Tensor | None]) -> list[tuple[str, Tensor]]:
        """Clipped sums with their parameters' names; without those that are zero."""
        return [(n, s) for n, s in zip(self.names, sums, strict=True) if s is not None]


@dataclass(eq=False, slots=True)
class RegionBackward:
    """Every region of one forward; their backward is one backward.

    **Guarantee.** ``deliver`` is called once, when the whole backward is over, with clipped sums for the weights of
    every example from its norm over all parameters of its group, in whichever region they are.

    ==============================================  =================================================
    edge case                                       outcome
    ==============================================  =================================================
    a region whose backward does not come           its gradient is zero for every example
    an example that is not finite in one region     weight 0 in its whole group, in all regions
    a parameter in two regions, or in one twice     the norm is that of the sum, cross terms included
    the same, in two passes or clipped at once      refused
    a second backward, or one through another part  refused: an example would count twice
    a backward that fails                           nothing is delivered
    a parameter of which this rank holds a part     its norm is that of all ranks' parts
    ==============================================  =================================================

    Attributes:
        options: of the model.
        mask: ``[B]``, 0 for padding, and for an example 1, or 1 over the scale of the loss.
        sums: where clipped sums go as they arise.
        deliver: takes what the backward came to.
        bounds: of the compiled graphs, with this forward's parts of the clip groups.
        refused: why this forward may have no backward, or None.
        repeat: in two passes, runs the backward again; it ends in :meth:`receive_sums` of every region in ``received``.
        weights: clip group -> ``[B]``, once they are known.
        ranks: of tensor parallelism, over which norms are added up; None without it.
        over: of a pipeline's stage: takes its own squared norms, float64 ``[B]``; :meth:`conclude` delivers.
        repeated: parameters that turned out to be used in more regions than were told to hand out what norms need.
    """

    options: Options
    mask: Tensor
    sums: Sums
    deliver: Callable[[Delivered], None]
    bounds: Bounds
    refused: PrivacyError | None = None
    ranks: NormsOverRanks | None = None
    over: Callable[[Tensor], None] | None = None
    repeat: Callable[[], None] | None = None
    runs: list[RegionRun] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)
    touched: dict[str, None] = field(default_factory=dict)
    received: list[RegionRun] = field(default_factory=list)
    weights: dict[str, Tensor] | None = None
    task: int | None = None
    done: bool = False
    unscaling: Unscaling = field(init=False)

    def __post_init__(self) -> None:
        self.unscaling = Unscaling(self.mask)

    def run(
        self,
        names: Sequence[str],
        touched: Sequence[str],
        lowered: LoweredBackward,
        unit: str,
        memory: frozenset[int],
        uses: Mapping[str, Use],
    ) -> RegionRun:
        """A region runs forward on these parameters.

        Raises:
            UnsupportedGraphError: one of them was in a region of this forward already, and one of the two regions was
                compiled to be clipped at once, or in two passes.
        """
        again = [n for n in names if n in self.names]
        self.repeated.update(again)
        for name in again:
            kinds = {run.lowering.kind for run in self.runs if name in run.names} | {lowered.lowering.kind}
            if TWO_PASS in kinds:
                raise shared_in_two_passes(name)
            if AT_ONCE in kinds:
                raise UnsupportedGraphError(
                    f"parameter '{name}' turned out to be used in two regions of one forward, and one of them was "
                    "compiled to clip it by itself: its gradients add before the norm is taken",
                    remedy="call the model again: it is compiled anew, with one norm over both uses; or "
                    "clipping='flat'",
                )
        self.names.update(names)
        self.touched.update(dict.fromkeys(n for n in names if n in set(touched)))
        given = self.mask.new_zeros((len(names), len(self.mask)), dtype=torch.float64)
        run = RegionRun(tuple(names), frozenset(touched), self, lowered, given, unit, memory, uses)
        self.runs.append(run)
        self.sums.expect(unit)
        return run

    def seal(self) -> None:
        """The forward is over: regions that are clipped at once get the bound of their groups."""
        bounds = self._bounds()
        for run in self.runs:
            if run.lowering.kind == AT_ONCE:
                rows = [[bounds.get(group_of(self.options.clipping, n), 0.0)] for n in run.names]
                given = run.given.data  # autograd has saved it: its version stays
                given.copy_(given.new_tensor(rows).expand_as(given))
        self.runs = []

    def check(self, run: RegionRun | None) -> None:
        """Raise PrivacyError if no backward may come, through this region or any."""
        if self.refused is not None:
            raise self.refused
        again = run is not None and run.squared is not None
        if self.done or again or (self.task is not None and current_backward() != self.task):
            raise PrivacyError(
                "a second backward through the same forward: every example would count twice",
                remedy="run the forward again, or add the losses before one backward",
            )

    @disable
    def receive(self, run: RegionRun, squared: Tensor | None) -> None:
        """The backward of a region is over: ``squared`` holds its norms ``[parameters, B]``."""
        self.check(run)
        if self.task is None:
            self.task = current_backward()
            after_backward(self._finish)
        if squared is None:
            return
        run.squared = squared
        self.received.append(run)
        if run.lowering.kind == AT_ONCE:
            self.sums.add(run.unit, run.named(run.lowered.take(squared)(None)))
        elif run.lowering.kind != TWO_PASS:
            run.rest = run.lowered.take(squared)
            run.rest.protect(run.memory)

    def receive_sums(self, run: RegionRun, marker: Tensor | None) -> None:
        """The second backward of a region is over."""
        if marker is not None:
            self.sums.add(run.unit, run.named(run.lowered.take_sums(marker) or [None] * len(run.names)))

    def weights_of(self, run: RegionRun) -> Tensor:
        """``[parameters, B]``, in the second part."""
        assert self.weights is not None
        return torch.stack([self.weights[group_of(self.options.clipping, n)] for n in run.names]).to(run.given.dtype)

    def _finish(self) -> None:
        self.done = True
        if self.over is not None:
            self.refused = self.refused or refused_scale(current_backward())
            self.over(self._own_squared())
        elif self.repeat is None:
            self._deliver()
        else:
            after_backward(self._deliver)  # FSDP's own end of the first backward comes before the second one

    @torch.no_grad()
    def _own_squared(self) -> Tensor:
        groups = self._over_ranks(self._grouped(self._squared_norms())).values()
        return _sum([row for group in groups for row in group], self.mask.double())

    def conclude(self, squared: Tensor) -> None:
        """Of a stage: deliver, now that squared norms ``[B]`` over all stages are known."""
        self._deliver({group_of(self.options.clipping, n): [squared] for n in self.names})

    @torch.no_grad()
    def _deliver(self, squared: Mapping[str, list[Tensor]] | None = None) -> None:
        assert self.task is not None
        own = self._over_ranks(self._grouped(self._squared_norms())) if squared is None else squared
        self.weights, totals = self._weights(own)
        norms = own_norms(list(totals.values()), self.mask, self._mean_of())
        if self.repeat is not None:
            self.repeat()
        for run in self.received:
            if run.rest is not None:
                rest, run.rest = run.rest, None
                self.sums.add(run.unit, run.named(rest(self.weights_of(run))))
        self.received, self.weights, self.repeat = [], None, None
        by_group = {group: own_norms([total], self.mask, self._mean_of()) for group, total in totals.items()}
        self.deliver(Delivered(norms, self.mask, self.task, self.sums.finish(), by_group))
        warn_of_lost_examples(norms, self.mask)

    def _squared_norms(self) -> dict[str, Tensor]:
        """Of every parameter that the backward reached, over all its uses: name -> ``[B]``."""
        found: dict[str, list[tuple[RegionRun, int]]] = {}
        for run in self.received:
            for row, name in enumerate(run.names):
                if name in run.touched:
                    found.setdefault(name, []).append((run, row))
        rows = {}
        for name, places in found.items():
            run, row = places[0]
            if len(places) == 1 and name not in run.uses:
                assert run.squared is not None
                rows[name] = run.squared[row]
            else:
                rows[name] = joint_norm([_part(*place) for place in places], len(self.mask), self.options.norm)
        return rows

    def _grouped(self, squared: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """By clip group; also those of which no backward came."""
        names = [*self.touched, *(n for run in self.received for n in run.names)]
        groups: dict[str, dict[str, Tensor]] = {group_of(self.options.clipping, n): {} for n in names}
        for name, row in squared.items():
            groups[group_of(self.options.clipping, name)][name] = row
        return groups

    def _weights(self, squared: Mapping[str, list[Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of each group's examples the weights (nobody asks for those of groups clipped at once) and squared norms."""
        clipping, mask, bounds = self.options.clipping, self.mask, self._bounds()
        found = {
            group: clip_group(rows, mask, clipping=clipping, bound=bounds.get(group, 0.0), mean_of=self._mean_of())
            for group, rows in squared.items()
        }
        return {g: w for g, (_, w) in found.items()}, {g: total for g, (total, _) in found.items()}

    def _bounds(self) -> dict[str, float]:
        """Of the groups in which there are gradients; what the others have does not matter."""
        return self.bounds.of({group_of(self.options.clipping, n): None for n in self.touched})

    def _mean_of(self) -> int | None:
        return self.options.examples_per_user if self.options.loss_reduction == "mean" else None

    def _over_ranks(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
        """Squared norms of each group's parameters, of all ranks' parts where they lie on several."""
        if self.ranks is None:
            return {group: list(rows.values()) for group, rows in groups.items()}
        sums = self.ranks.add(list(groups.values()), self.mask)
        return {group: [total] for group, total in zip(groups, sums, strict=True)}


def _sum(members: Sequence[Tensor], like: Tensor) -> Tensor:
    return sum(members[1:], start=members[0]) if members else torch.zeros_like(like)


def _part(run: RegionRun, row: int) -> Part:
    """What a use of a parameter gives to its norm over all uses."""
    rest, name = run.rest, run.names[row]
    assert rest is not None
    if name in run.uses:
        return HandedOut(run.uses[name], rest.handed[row])

    def weighted(weights: Tensor) -> Tensor:
        alone = weights.new_zeros(len(run.names), len(weights))
        alone[row] = weights
        total = rest.preview(alone)[row]
        assert total is not None
        return total

    return Redone(weighted, run.whole.mask.to(run.given.dtype))


def shared_in_two_passes(name: str) -> UnsupportedGraphError:
    """A parameter of several regions, in two passes."""
    return UnsupportedGraphError(
        f"parameter '{name}' is used in two regions of one forward, and the backward has two passes: the first keeps "
        "nothing that the norm over both uses could be taken of",
        remedy="use one backward (norm='auto'), compile the model without regions, or put both uses into one block",
    )


def attach(run: RegionRun, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Stand-ins for the norms, ``[parameters, B]``, and for the parameters, that a region's graph takes.

    What the graph's backward returns for the norms goes to the run's :class:`RegionBackward`; nothing goes to autograd.
    """
    norms, *aliases = _Receive.apply(run, *parameters)  # type: ignore[misc]
    return norms, aliases


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: RegionRun, *parameters: Tensor) -> Any:  # noqa: D102
        ctx.run = run
        ctx.set_materialize_grads(False)
        return (torch.zeros_like(run.given), *(p.detach() for p in parameters))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, squared: Tensor | None, *sums: Tensor | None) -> Any:  # noqa: D102
        assert all(s is None for s in sums), "a gradient of a parameter was handed to autograd"
        refuse_asked_for(ctx.next_functions if ctx.run.whole.over is None else ())  # schedules ask stages for some
        ctx.run.whole.receive(ctx.run, squared)
        return (None, *(None for _ in sums))
