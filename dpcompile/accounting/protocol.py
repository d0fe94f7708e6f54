"""What an accountant must have to count the steps of a DPOptimizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, get_args

from dpcompile.accounting.arguments import Relation, check_mechanism
from dpcompile.accounting.events import sampled_gaussian_of, truncated
from dpcompile.accounting.saved import saved_runs
from dpcompile.accounting.truncation import Rate, check_truncated, saved_rate
from dpcompile.errors import PrivacyError

if TYPE_CHECKING:  # it takes as long to import as the rest of the package
    from dp_accounting import DpEvent

__all__ = ["Accountant", "check_accountant", "count_steps", "counted"]


class Accountant(Protocol):
    """Any object with these can be given as ``accountant=``; :class:`dpcompile.PrivacyAccountant` is one.

    ``copy.deepcopy`` makes an independent copy of it (a state is loaded into one before it is loaded in earnest).
    What it says that the steps cost is its own: dpcompile sees to it that it is told of every step, with the noise and
    the sample rate that the step had, and that none is forgotten. An accountant that counts other releases too may have
    ``releases``, pairs of an event and a count, which may not be forgotten either. One that counts truncated samples
    has ``truncation``, the size of the dataset and the cap; without, or None, it counts whole Poisson samples.
    """

    @property
    def noise_multiplier(self) -> float:
        """Sigma of the steps to come: what the optimizer must add."""
        ...

    @property
    def sample_rate(self) -> float:
        """Of the steps to come: what the loader must draw by.

        Where that is a function of the step, of any of them: each is told its own, by its event.
        """
        ...

    @property
    def relation(self) -> Relation:
        """For which neighbours its epsilon holds."""
        ...

    @property
    def steps(self) -> int:
        """Logical steps counted so far."""
        ...

    @property
    def history(self) -> Sequence[tuple[float, Rate, int]]:
        """Runs of equal steps: noise multiplier, sample rate (with the cap, if there is one), how many."""
        ...

    def step(self, n: int = 1, *, event: DpEvent | None = None) -> None:
        """Count ``n`` steps, of the mechanism that ``event`` describes; it is called before the noise is drawn."""
        ...

    def move_noise_multiplier(self, value: float) -> None:
        """Expect steps of another sigma from now on."""
        ...

    def epsilon(self, delta: float) -> float:
        """An upper bound on epsilon of all that was counted."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What JSON can hold; "history" in it is a list of runs."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace what was counted by what was saved, or raise and change nothing."""
        ...


_NAMES = tuple(name for name in vars(Accountant) if not name.startswith("_"))


def check_accountant(accountant: Any) -> None:
    """Raise PrivacyError unless this is an accountant by :class:`Accountant`, as far as can be seen without a step."""
    remedy = "give it what dpcompile.accounting.protocol.Accountant names, or take a PrivacyAccountant"
    if isinstance(accountant, (type, str)):
        raise PrivacyError(
            f"the accountant is {accountant!r}, not an object that counts",
            remedy="make one, PrivacyAccountant(noise_multiplier=..., sample_rate=...), and give it",
        )
    missing = [name for name in _NAMES if not hasattr(accountant, name)]
    if missing:
        raise PrivacyError(f"the accountant, a {type(accountant).__name__}, lacks {', '.join(missing)}", remedy=remedy)
    idle = [name for name in ("step", "move_noise_multiplier", "epsilon", "state_dict", "load_state_dict")
            if not callable(getattr(accountant, name))]  # fmt: skip
    if idle:
        raise PrivacyError(f"{', '.join(idle)} of the accountant cannot be called", remedy=remedy)
    check_mechanism(accountant.noise_multiplier, accountant.sample_rate)
    if accountant.relation not in get_args(Relation):
        raise PrivacyError(
            f"the accountant's relation is {accountant.relation!r}",
            remedy=f"let it be one of {', '.join(map(repr, get_args(Relation)))}",
        )
    check_truncated(getattr(accountant, "truncation", None), "pld", accountant.relation)
    state = accountant.state_dict()
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise PrivacyError(f"the accountant's state is not what JSON can hold: {error}", remedy=remedy) from error
    runs = saved_runs(state)
    if sum(n for _, _, n in runs) != accountant.steps or accountant.steps != sum(n for _, _, n in accountant.history):
        raise PrivacyError(
            f"the accountant counts {accountant.steps} steps, its history {sum(n for _, _, n in accountant.history)} "
            f"and its state {sum(n for _, _, n in runs)}",
            remedy="let all three tell the same steps: what is saved is what is counted after the run goes on",
        )


def counted(accountant: Accountant | None) -> Counter[Any]:
    """How many steps of each sigma and rate, and how many of each other release."""
    found: Counter[Any] = Counter()
    if accountant is not None:
        for sigma, rate, n in accountant.history:
            found[sigma, saved_rate(rate) if isinstance(rate, list) else rate] += n
        for event, n in getattr(accountant, "releases", ()):
            found[repr(event)] += n
    return found


def count_steps(
    accountant: Accountant, event: DpEvent, n: int = 1, *, before_them: Counter[Any] | None = None
) -> Counter[Any]:
    """Tell an accountant of ``n`` steps, 0 or more; what it counts then.

    Args:
        accountant: that is told.
        event: of each step.
        n: how many.
        before_them: what it counted before, where noise or rate go by the step: the history must show theirs then.

    Raises:
        PrivacyError: it counts another number of steps more, or steps of other noise or another rate.
    """
    before = accountant.steps
    if n:
        event = truncated(event, getattr(accountant, "truncation", None))
        accountant.step(n, event=event)
    if accountant.steps != before + n:
        raise PrivacyError(
            f"the accountant, a {type(accountant).__name__}, counted {before} steps, was told of {n} more and counts "
            f"{accountant.steps}: epsilon would not be that of the run",
            remedy="let its step() count every call; the sums of this step were not released",
        )
    now = counted(accountant)
    if before_them is not None and n:
        kind = sampled_gaussian_of(event)
        if now[kind] != before_them[kind] + n:
            raise PrivacyError(
                f"the accountant, a {type(accountant).__name__}, was told of {n} steps of noise multiplier {kind[0]} "
                f"and sample rate {kind[1]}, and counts {now[kind] - before_them[kind]} of these more: it does not go "
                "by the event of a step, and here every step has one of its own",
                remedy="let its step() count, and its history show, what event= says, or take a PrivacyAccountant; the "
                "sums of this step were not released",
            )
    return now
