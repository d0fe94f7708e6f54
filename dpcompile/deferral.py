"""One forward of a model in several regions, and its one backward: norms first, then weights, then clipped sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from dpcompile.tensor_parallel import NormsOverRanks

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
    """

    names: tuple[str, ...]
    touched: frozenset[str]
    whole: Pass
    dtype: torch.dtype
    unit: str = ""
    memory: frozenset[int] = frozenset()
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
    an example that is not finite in one region     weight 0 in all regions
    a parameter in two regions                      refused: their gradients add before the norm
    a second backward, or one through another part  refused: an example would count twice
    a backward that fails                           nothing is delivered
    a parameter of which this rank holds a part     its norm is that of all ranks' parts
    ==============================================  =================================================

    Attributes:
        options: of the model.
        mask: ``[B]``, 1 for an example and 0 for padding.
        deliver: takes the outcome.
        refused: why this forward may have no backward, or None.
        ranks: of tensor parallelism, over which norms are added up; None without it.
    """

    options: Options
    mask: Tensor
    deliver: Callable[[Outcome], None]
    refused: PrivacyError | None = None
    ranks: NormsOverRanks | None = None
    names: set[str] = field(default_factory=set)
    touched: dict[str, None] = field(default_factory=dict)
    received: list[RegionRun] = field(default_factory=list)
    task: int | None = None
    done: bool = False

    def run(
        self, names: Sequence[str], touched: Sequence[str], dtype: torch.dtype, unit: str, memory: frozenset[int]
    ) -> RegionRun:
        """A region runs forward on these parameters.

        Raises:
            PrivacyError: one of them was in a region of this forward already.
        """
        again = [n for n in names if n in self.names]
        if again:
            raise PrivacyError(
                f"parameter '{again[0]}' is used in two regions of one forward: its gradients add before the norm is "
                "taken, and the regions know nothing of each other",
                remedy="compile the model without regions, or put both uses into one block (a block that is called "
                "twice, a weight shared by two blocks, a tied head outside the block of its embedding)",
            )
        self.names.update(names)
        self.touched.update(dict.fromkeys(n for n in names if n in set(touched)))
        return RegionRun(tuple(names), frozenset(touched), self, dtype, unit, memory)

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
        rows = {n: s for run in self.received for n, s in zip(run.names, run.squared, strict=True)}  # type: ignore[arg-type]
        weights, total = self._weights(rows)
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
        sums = {group: _sum(members, self.mask) for group, members in groups.items()}
        if self.ranks is not None:
            sums = self._over_ranks(self.ranks, rows, groups)
        for group, total in sums.items():
            totals.append(total)
            weights[group] = clip_weights(total, self.mask, clipping=options.clipping, bound=bound, scale=scale)
        everything = sum(totals[1:], start=totals[0])
        lost = ~torch.isfinite(everything)
        return {g: torch.where(lost, torch.zeros_like(w), w) for g, w in weights.items()}, everything

    def _over_ranks(self, ranks: NormsOverRanks, rows: dict[str, Tensor], groups: Iterable[str]) -> dict[str, Tensor]:
        """Squared norms of each group's parameters, of which this rank may hold parts."""
        names, cut = list(groups), ranks.parallel.cut

        def own(group: str, parts: bool) -> Tensor:
            chosen = (n for n in rows if group_of(self.options.clipping, n) == group and (n in cut) == parts)
            return _sum([rows[n] for n in chosen], self.mask)

        sums = ranks.add([own(g, True) for g in names], [own(g, False) for g in names])
        return dict(zip(names, sums, strict=True))


def _sum(members: Sequence[Tensor], like: Tensor) -> Tensor:
    return sum(members[1:], start=members[0]) if members else torch.zeros_like(like)


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
