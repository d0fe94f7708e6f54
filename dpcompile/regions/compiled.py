"""What the regions of a model are compiled to: equal graphs once, and which lowering each gets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dpcompile.capture.roles import Roles
from dpcompile.clipping.groups import clip_groups, group_of
from dpcompile.distributed.ranks import any_rank
from dpcompile.options import AT_ONCE, DEFERRED, TWO_PASS, Lowering, Options
from dpcompile.pipeline import Transformed
from dpcompile.planning.plan import Plan
from dpcompile.planning.region_memory import RegionMemory, describe, peaks_of
from dpcompile.regions.backward import shared_in_two_passes
from dpcompile.regions.graph_key import graph_key
from dpcompile.regions.owners import Owners
from dpcompile.regions.region import CompiledRegion, Scope, compile_region
from dpcompile.regions.units import Unit

__all__ = ["CompiledRegions", "RegionPlans"]


@dataclass(frozen=True, slots=True)
class RegionPlans:
    """The plans of a model's regions, equal regions once; printed one after the other.

    Attributes:
        plans: of the regions.
        lowering: which lowering was chosen for the model, and why; empty without a choice.
    """

    plans: tuple[Plan, ...]
    lowering: str = ""

    def rules(self) -> dict[str, str]:
        """Parameter name -> rule, of the first of equal regions."""
        return {name: rule for plan in self.plans for name, rule in plan.rules().items()}

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.plans), *([self.lowering] if self.lowering else [])])


class CompiledRegions:
    """Compiles the graphs of a model in regions; equal ones share what was compiled.

    Args:
        options: of the model.
        owners: which units hold a parameter.
        deferred: whether norms are added up over ranks before any weight is known: tensor parallelism, pipelines.
        two_pass: whether regions run their backward twice, whatever memory it takes.

    Attributes:
        compilations: how many graphs were compiled.
        newest: of the graph with trainable parameters that was compiled last.
        two_pass: whether regions run their backward twice.
        shared: parameters that several regions use, as far as is known; it only grows.
        breaks: whether graph breaks are allowed.
    """

    def __init__(self, options: Options, owners: Owners, *, deferred: bool, two_pass: bool) -> None:
        self._options, self._owners, self._deferred = options, owners, deferred
        self.compilations = 0
        self.newest: Transformed | None = None
        self.two_pass = two_pass
        self.shared: set[str] = set()
        self.breaks = options.regions == "breaks"
        self._regions: dict[Any, CompiledRegion] = {}
        self._plans: list[Plan] = []
        self._trained: tuple[str, ...] = ()
        self._groups: Mapping[str, frozenset[str]] = {}
        self._of_units: dict[Any, tuple[Lowering, tuple[str, ...]]] = {}

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Of every graph with trainable parameters, equal ones once."""
        return tuple(self._plans)

    def train(self, names: Sequence[str]) -> None:
        """These parameters are trainable now."""
        if tuple(names) != self._trained:
            self._trained, self._of_units = tuple(names), {}
            self._groups = clip_groups(self._trained, self._options.clipping)

    def is_trained(self, name: str) -> bool:
        """Whether a parameter is one of them."""
        return any(name in members for members in self._groups.values())

    def share(self, names: Collection[str]) -> None:
        """Several regions use these parameters: what is compiled from now on knows of it."""
        self.shared |= set(names)

    def region(
        self,
        gm: fx.GraphModule,
        live: Sequence[Any],
        examples: Callable[[], Sequence[Any]],
        scope: Scope,
        on_ranks: Callable[[Roles], Roles],
        *,
        proving: bool,
        place: str,
    ) -> CompiledRegion:
        """What a graph is compiled to; an equal one is taken from those that were compiled before.

        Args:
            gm: what was captured, or a piece of it.
            live: its inputs.
            examples: makes what to trace with.
            scope: what is known of the inputs.
            on_ranks: see :func:`dpcompile.regions.region.compile_region`.
            proving: a backward of the model may follow.
            place: what to call the region.
        """
        lowering = self._lowering(live, scope)
        key = graph_key(gm, live, scope, proving)
        if key is not None:
            key = (key, lowering)
        if key is None or key not in self._regions:
            self.compilations += 1
            with torch.set_grad_enabled(torch.is_grad_enabled() and proving):
                region = compile_region(gm, live, examples(), scope, self._options, lowering, on_ranks, proving, place)
            if region.transformed is not None:
                self.newest = region.transformed
                self._plans.append(region.transformed.plan)
            if key is None:
                return region
            self._regions[key] = region
        return self._regions[key]

    # --- lowerings ---------------------------------------------------------------------------------------------------

    def choose(
        self,
        memory: Sequence[tuple[RegionMemory, bool, bool]],
        budget: float | int,
        standing: float,
        *,
        sharded: bool,
    ) -> str:
        """Choose between one backward and two, after a first forward; with two, everything is compiled again.

        Args:
            memory: of the forward's regions: see :func:`dpcompile.planning.region_memory.peaks_of`.
            budget: a float is a multiple of the non-private step's peak, an int is bytes.
            standing: bytes of parameters and inputs.
            sharded: on every rank there are two if there are on one; every rank must call this.

        Returns:
            What was chosen, and why.
        """
        peaks = peaks_of(memory, standing)
        allowed = budget * peaks.plain if isinstance(budget, float) else float(budget)
        obstacle = self._obstacle()
        over = peaks.deferred > allowed and not obstacle
        self.two_pass = any_rank(over) if sharded else over
        if self.two_pass:
            self._regions, self._plans = {}, []
        return describe(peaks, allowed, two_pass=self.two_pass, obstacle=obstacle)

    def _obstacle(self) -> str:
        """Why there cannot be two passes; empty if there can."""
        if self._deferred:
            return "tensor parallelism"
        if self.breaks:
            return "graph breaks"
        shared = [n for n in self._trained if n in self.shared]
        return f"'{min(shared)}' is used in several regions" if shared else ""

    def of_unit(self, unit: Unit) -> tuple[Lowering, tuple[str, ...]]:
        """The lowering of a unit, and its parameters that several regions use."""
        key = (unit.path, self.two_pass, len(self.shared))
        if key not in self._of_units:
            inside = list(self._owners.inside(unit))
            shared = tuple(n for n in inside if n in self.shared)
            own = set(inside)
            self._of_units[key] = self.lowering_of([n for n in self._trained if n in own]), shared
        return self._of_units[key]

    def _lowering(self, live: Sequence[Any], scope: Scope) -> Lowering:
        trained = (id(x) for x in live if isinstance(x, torch.Tensor) and x.requires_grad)
        return self.lowering_of([scope.parameters[i] for i in trained if i in scope.parameters])

    def lowering_of(self, names: Sequence[str]) -> Lowering:
        """Of a region with these trainable parameters.

        **Guarantee.** A region is clipped at once only if no parameter outside it is in a clip group of its own; never
        one with a parameter that is known to be used in another region too: its clip group is not whole there. Nor is
        any where graph breaks are allowed, and uses are only found as they run.

        Raises:
            UnsupportedGraphError: two passes, and another region uses one of the parameters too.
        """
        shared = next((n for n in names if n in self.shared), None)
        if self.two_pass and shared is not None:
            raise shared_in_two_passes(shared)
        if self._deferred:
            return Lowering()
        if self.two_pass:
            return Lowering(TWO_PASS)
        clipping = self._options.clipping
        if self.breaks or shared is not None or callable(clipping):
            return Lowering()
        numbers: dict[str, int] = {}
        own = frozenset(names)
        each = tuple(numbers.setdefault(group_of(clipping, n), len(numbers)) for n in names)
        whole = all(self._groups[group] <= own for group in numbers)
        return Lowering(AT_ONCE, each) if whole else Lowering(DEFERRED)
