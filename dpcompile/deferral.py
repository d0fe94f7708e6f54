"""One forward of a model in several regions, and its one backward: norms first, then weights, then clipped sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpcompile._torch import after_backward, current_backward, disable, fake_like
from dpcompile.axis import Examples, Shared, Whole
from dpcompile.clipping import as_joint, check_function, clip_weights, group_of
from dpcompile.delivery import warn_of_lost_examples
from dpcompile.errors import PrivacyError
from dpcompile.lower import Rest, take_rest
from dpcompile.pipeline import Options
from dpcompile.proof import prove
from dpcompile.shared_uses import HandedOut, Part, Redone, Use, joint_norm

__all__ = ["Outcome", "Pass", "RegionRun", "attach", "prove_clipping"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a whole backward came to.

    Attributes:
        norms: float32 ``[B]``, before clipping.
        mask: ``[B]``.
        graph_task: the identity of the backward.
        sums: for every region that it reached, in the order in which it reached them, the path of the unit that the
            region is a part of, and a function that computes ``(parameter name, clipped sum)``, to be called once.
    """

    norms: Tensor
    mask: Tensor
    graph_task: int
    sums: Sequence[tuple[str, Callable[[], list[tuple[str, Tensor]]]]]


@dataclass(eq=False, slots=True)
class RegionRun:
    """A region with trainable parameters that ran forward.

    Attributes:
        names: its parameters, in the order of the rows of norms and weights.
        touched: those whose gradient is not zero for every example.
        shape: of norms and weights.
        dtype: of norms and weights.
        unit: the path of the unit that the region is a part of.
        memory: parameters' memory that is freed before the clipped sums are computed.
        uses: of parameters that other regions use too, what the region hands out.
    """

    names: tuple[str, ...]
    touched: frozenset[str]
    whole: Pass
    dtype: torch.dtype
    unit: str = ""
    memory: frozenset[int] = frozenset()
    uses: Mapping[str, Use] = field(default_factory=dict)
    squared: Tensor | None = None
    rest: Rest | None = None


@dataclass(eq=False, slots=True)
class Pass:
    """Every region of one forward; their backward is one backward.

    **Guarantee.** ``deliver`` is called once, when the whole backward is over, with the weights of every example from
    its norm over all parameters of its group, in whichever region they are.

    ==============================================  =================================================
    edge case                                       outcome
    ==============================================  =================================================
    a region whose backward does not come           its gradient is zero for every example
    an example that is not finite in one region     weight 0 in its whole group, in all regions
    a parameter in two regions, or in one twice     the norm is that of the sum, cross terms included
    a second backward, or one through another part  refused: an example would count twice
    a backward that fails                           nothing is delivered
    ==============================================  =================================================

    Attributes:
        options: of the model.
        mask: ``[B]``, 1 for an example and 0 for padding.
        deliver: takes the outcome.
        refused: why this forward may have no backward, or None.
        repeated: parameters that turned out to be used in more regions than were told to hand out what norms need.
    """

    options: Options
    mask: Tensor
    deliver: Callable[[Outcome], None]
    refused: PrivacyError | None = None
    names: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)
    touched: dict[str, None] = field(default_factory=dict)
    received: list[RegionRun] = field(default_factory=list)
    task: int | None = None
    done: bool = False

    def run(
        self,
        names: Sequence[str],
        touched: Sequence[str],
        dtype: torch.dtype,
        unit: str,
        memory: frozenset[int],
        uses: Mapping[str, Use],
    ) -> RegionRun:
        """A region runs forward on these parameters."""
        self.repeated.update(n for n in names if n in self.names)
        self.names.update(names)
        self.touched.update(dict.fromkeys(n for n in names if n in set(touched)))
        return RegionRun(tuple(names), frozenset(touched), self, dtype, unit, memory, uses)

    @disable
    def receive(self, run: RegionRun, squared: Tensor | None) -> None:
        """The backward of a region is over: ``squared`` holds its norms ``[parameters, B]``."""
        if self.refused is not None:
            raise self.refused
        task = current_backward()
        if self.done or run.squared is not None or (self.task is not None and task != self.task):
            raise PrivacyError(
                "a second backward through the same forward: every example would count twice",
                remedy="run the forward again, or add the losses before one backward",
            )
        if self.task is None:
            self.task = task
            after_backward(self._finish)
        if squared is None:
            return
        run.squared, run.rest = squared, take_rest(squared)
        run.rest.protect(run.memory)
        self.received.append(run)

    @torch.no_grad()
    def _finish(self) -> None:
        assert self.task is not None
        self.done = True
        weights, total = self._weights(self._squared_norms())
        scale = len(self.mask) if self.options.loss_reduction == "mean" else 1
        norms = (total.sqrt() * scale).to(torch.float32)

        def sums(run: RegionRun) -> Callable[[], list[tuple[str, Tensor]]]:
            def compute() -> list[tuple[str, Tensor]]:
                rest, run.rest = run.rest, None
                assert rest is not None
                given = torch.stack([weights[group_of(self.options.clipping, n)] for n in run.names]).to(run.dtype)
                found = rest(given)
                return [(n, s) for n, s in zip(run.names, found, strict=True) if s is not None]

            return compute

        computed = [(run.unit, sums(run)) for run in self.received]
        self.received = []
        self.deliver(Outcome(norms, self.mask, self.task, computed))
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

    def _weights(self, rows: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The weights of each group's examples, and the squared norm over all groups."""
        options = self.options
        groups: dict[str, list[Tensor]] = {group_of(options.clipping, n): [] for n in (*self.touched, *rows)}
        present = {group_of(options.clipping, n) for n in self.touched}
        for name, squared in rows.items():
            groups[group_of(options.clipping, name)].append(squared)
        bound = float(options.max_grad_norm) / max(len(present), 1) ** 0.5
        scale = len(self.mask) if options.loss_reduction == "mean" else 1
        weights, totals = {}, [torch.zeros_like(self.mask)]
        for group, members in groups.items():
            total = sum(members[1:], start=members[0]) if members else torch.zeros_like(self.mask)
            totals.append(total)
            weights[group] = clip_weights(total, self.mask, clipping=options.clipping, bound=bound, scale=scale)
        return weights, sum(totals[1:], start=totals[0])


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

    return Redone(weighted, run.whole.mask.to(run.dtype))


def attach(run: RegionRun, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Stand-ins for the norms, ``[parameters, B]``, and for the parameters, that a region's graph takes.

    What the graph's backward returns for the norms goes to the pass; nothing goes to autograd.
    """
    norms, *aliases = _Receive.apply(run, *parameters)  # type: ignore[misc]
    return norms, aliases


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: RegionRun, *parameters: Tensor) -> Any:  # noqa: D102
        ctx.run = run
        ctx.set_materialize_grads(False)
        mask = run.whole.mask
        norms = mask.new_zeros((len(parameters), len(mask)), dtype=run.dtype)
        return (norms, *(p.detach() for p in parameters))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, squared: Tensor | None, *sums: Tensor | None) -> Any:  # noqa: D102
        assert all(s is None for s in sums), "a gradient of a parameter was handed to autograd"
        ctx.run.whole.receive(ctx.run, squared)
        return (None, *(None for _ in sums))


def prove_clipping(options: Options, batch: int) -> None:
    """A user's clipping function must give every example a weight from its own norm alone.

    Raises:
        PrivacyError: it does not.
    """
    if not callable(options.clipping):
        return
    traced, result = check_function(options.clipping, fake_like((batch,)), options.max_grad_norm)
    label = prove(as_joint(traced, result, batch)).of(result)
    if not isinstance(label, (Shared, Whole)) and label != Examples(0):
        raise PrivacyError(
            f"the clipping function does not give every example its own weight: its result is {label}",
            remedy="let weight i depend on norm i alone",
        )
