"""Accounting, on dp-accounting: how much privacy the steps so far cost.

Each step is the Gaussian mechanism on a Poisson sample (Abadi et al. 2016). The default method is PLD, which is tight
to its discretisation and rounds up; with little noise its grid is coarser, or the bound is RDP's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dpcompile.accounting.arguments import (
    Method,
    Relation,
    check_delta,
    check_epsilon,
    check_mechanism,
    check_rate,
    check_slack,
    check_steps,
)
from dpcompile.accounting.composition import Composed, composed
from dpcompile.accounting.events import sampled_gaussian_of
from dpcompile.accounting.known import refuse_unbounded
from dpcompile.accounting.releases import event_of, text_of, whole_event
from dpcompile.accounting.saved import saved_releases, saved_runs
from dpcompile.accounting.tradeoff import GaussianBound, gaussian_bound, true_positive_rate
from dpcompile.accounting.truncation import (
    Rate,
    TruncatedRate,
    Truncation,
    check_truncated,
    plain_rate,
    sampled_at,
)
from dpcompile.errors import PrivacyError

if TYPE_CHECKING:  # it takes as long to import as the rest of the package
    from dp_accounting import DpEvent

__all__ = ["PrivacyAccountant"]


class PrivacyAccountant:
    """Counts logical steps, and other releases of the same data, and tells their epsilon and delta.

    Args:
        noise_multiplier: sigma: standard deviation of the noise over the sensitivity C. 0: epsilon is infinite.
        sample_rate: q in (0, 1]: the chance of each example, independently, to be in a step.
        method: "pld" (tight; with so little noise that one step may lose hundreds, RDP's bound) or "rdp" (looser, and
            instant).
        relation: which datasets are neighbours. "zero_out": one example counts or does not, in a dataset whose size is
            public; that is what a sample rate of ``expected_batch_size / len(dataset)`` allows. "add_remove": one
            example is there or is not; epsilon is the same, but sample rate, expected batch size and number of steps
            must then have been fixed without looking at the dataset's size. "replace_one": one example is another one;
            epsilon is larger. See Ponomareva et al. 2023, "How to DP-fy ML".
        truncation: ``(dataset_size, max_batch_size)`` of a loader that keeps at most so many examples of a draw,
            ``loader.truncation``; None: of one that keeps all of them.

    Raises:
        PrivacyError: an argument out of its range, or "rdp" with "replace_one" or ``truncation``, or "add_remove" with
            ``truncation``, for which no bound is known.

    **Guarantee.** ``epsilon(delta)`` and ``delta(epsilon)`` are upper bounds for the composition of all counted steps,
    under Poisson sampling at ``sample_rate``, truncated (:func:`dpcompile.accounting.events.truncated`) or not, and of
    all composed releases, for the relation. They are none for shuffled batches. What was counted stays counted.

    ==========================================  ===================================================
    edge case                                   outcome
    ==========================================  ===================================================
    no step yet                                 0.0
    sigma 0 and at least one step               infinity
    a restored history with another sigma or q  composed with the steps that follow
    ... with another cap, or none               composed too: each step is counted with its own
    ... with a cap, where none can be bounded   refused
    delta 0 or 1                                refused
    "pld" with little noise, sigma below 0.2    a coarser grid, which rounds up; RDP's bound where it is smaller
    "pld" with losses above 500 in one step     RDP's bound: a grid of them would take gigabytes
    "pld" with epsilon above 500                a coarser grid, to about a thousandth
    sigma below 1e-100                          infinity
    where epsilon is infinite, delta            1.0, at any epsilon
    delta at infinite epsilon, sigma above 0    0.0
    a release with no bound for method/relation refused
    a state without a release composed before   refused: it would be forgotten
    ==========================================  ===================================================
    """

    # Of accountants that were pickled before there were others.
    _relation: Relation = "zero_out"
    _releases: tuple[tuple[str, int], ...] = ()  # each as text, and how often

    def __init__(
        self,
        *,
        noise_multiplier: float,
        sample_rate: float,
        method: Method = "pld",
        relation: Relation = "zero_out",
        truncation: Truncation | None = None,
    ) -> None:
        check_mechanism(noise_multiplier, sample_rate)
        check_truncated(truncation, method, relation)
        self._mechanism: tuple[float, Rate] = (float(noise_multiplier), sampled_at(sample_rate, truncation))
        self._method: Method = method
        self._relation = relation
        self._history: list[tuple[float, Rate, int]] = []
        self._releases = ()
        self._epsilons: dict[tuple[Any, ...], float] = {}

    @property
    def noise_multiplier(self) -> float:
        """Sigma of the steps to come."""
        return self._mechanism[0]

    @property
    def sample_rate(self) -> float:
        """Sample rate of the steps to come."""
        return plain_rate(self._mechanism[1])

    @property
    def truncation(self) -> Truncation | None:
        """Size of the dataset and cap of the steps to come; None: they are whole Poisson samples."""
        rate = self._mechanism[1]
        return (rate.dataset_size, rate.max_batch_size) if isinstance(rate, TruncatedRate) else None

    @property
    def method(self) -> Method:
        """Which bound: "pld" or "rdp"."""
        return self._method

    @property
    def relation(self) -> Relation:
        """Which datasets are neighbours: "zero_out", "add_remove" or "replace_one"."""
        return self._relation

    @property
    def steps(self) -> int:
        """Logical steps counted so far; with correlated noise :func:`dpcompile.accounting.events.rounds` of them."""
        return sum(n for _, _, n in self._history)

    @property
    def history(self) -> list[tuple[float, Rate, int]]:
        """Runs of equal steps: ``(noise_multiplier, sample_rate, number of steps)``; a copy.

        With a cap a :class:`dpcompile.accounting.truncation.TruncatedRate` is in the place of the sample rate.
        """
        return list(self._history)

    @property
    def releases(self) -> list[tuple[DpEvent, int]]:
        """What was released beside the steps, and how often; a copy."""
        return [(event_of(json.loads(text)), count) for text, count in self._releases]

    @property
    def event(self) -> DpEvent:
        """All steps and releases so far, as one event of dp-accounting's: to repeat it, or to compose it elsewhere."""
        return whole_event(self._history, self.releases)

    def compose(self, event: DpEvent, count: int = 1) -> None:
        """Count what was released of the same data beside the steps: statistics, an earlier run, a tuning run.

        Noise multipliers of ``event`` are over the bound of one example's term, as those of steps are, and the relation
        is the same. A tuning run that keeps the best of a random number of runs is, with method "rdp", ``compose(
        RepeatAndSelectDpEvent(run.event, mean, shape))`` (Papernot and Steinke 2022).

        Args:
            event: Gaussian, Laplace, DiscreteLaplace, RandomizedResponse, ZCDp, RepeatAndSelect, on a Poisson sample or
                composed of such, of ``dp_accounting`` and ``dp_accounting.dp_event``.
            count: how often, 0 or more.

        Raises:
            PrivacyError: an event for which no bound is known with this method and relation; nothing is counted then.
        """
        check_steps(count)
        text = text_of(event)
        refuse_unbounded(event, self._method, self._relation)
        if count:
            counts = dict(self._releases)
            self._releases = tuple((counts | {text: counts.get(text, 0) + count}).items())

    def step(self, n: int = 1, *, event: DpEvent | None = None) -> None:
        """Count steps.

        Args:
            n: how many, 0 or more.
            event: what each of them was; None: the mechanism that this accountant was made for.

        Raises:
            PrivacyError: a number that is none, or an event of which no bound is known; nothing is counted then.
        """
        check_steps(n)
        mechanism = self._mechanism
        if event is not None:
            mechanism = sampled_gaussian_of(event)
            check_mechanism(mechanism[0], plain_rate(mechanism[1]))
            self._check_rate(mechanism[1])
        if not n:
            return
        if self._history and self._history[-1][:2] == mechanism:
            n += self._history.pop()[2]
        self._history.append((*mechanism, n))

    def move_noise_multiplier(self, value: float) -> None:
        """Expect steps of another sigma from now on.

        Raises:
            PrivacyError: it is none.
        """
        check_mechanism(value, self.sample_rate)
        self._mechanism = (float(value), self._mechanism[1])

    def epsilon(self, delta: float) -> float:
        """Epsilon at ``delta`` of all counted steps. Remembered per number of steps and delta.

        With PLD a new number of steps takes about a tenth of a second, with little noise, a cap or a sigma for every
        step some seconds. More than 32 kinds of steps are rounded to less noise.

        Raises:
            PrivacyError: delta outside (0, 1).
        """
        check_delta(delta)
        key = (tuple(self._history), self._releases, delta)
        if key not in self._epsilons:
            self._epsilons[key] = self._composed().epsilon(delta)
        return self._epsilons[key]

    def delta(self, epsilon: float) -> float:
        """Delta at ``epsilon`` of all counted steps: how much may leak with more than epsilon. It never rises.

        At 0 it is the total variation, which no attack's advantage exceeds. No steps: 0. Without noise: 1. With PLD no
        less than about 1e-15 is told apart, unless RDP's bound is smaller.

        Raises:
            PrivacyError: epsilon is below 0 or none.
        """
        check_epsilon(epsilon)
        return self._composed().delta(epsilon)

    def curve(self, epsilons: Iterable[float]) -> list[tuple[float, float]]:
        """``(epsilon, delta)`` for each of them: all of these hold at once, of the same steps.

        Raises:
            PrivacyError: one is below 0 or none.
        """
        return [(epsilon, self.delta(epsilon)) for epsilon in epsilons]

    def gaussian_bound(self, slack: float = 1e-8) -> GaussianBound:
        """Mu of Gaussian DP, one number for the whole curve, and the regret: how much it gives away.

        Gomez et al. 2025 report mu where the regret is below 0.01, and the curve where it is not.

        Args:
            slack: how far delta may be above that of mu, in (0, 1): far below any delta that is of interest.

        Returns:
            ``(mu, regret)``; mu is infinity where a step had no noise.

        Raises:
            PrivacyError: slack outside its range.

        **Guarantee.** At every epsilon, the delta of all that was counted is at most that of mu-Gaussian DP plus
        ``slack``. (With "rdp" :meth:`delta` may be larger: mu follows from all of the curve, which is not convex.)
        """
        check_slack(slack)
        return gaussian_bound(self._composed().delta, float(slack))

    def attack_advantage(self) -> float:
        """At most so much can the true-positive rate of an attack be above its false-positive rate: delta at 0."""
        return self.delta(0.0)

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """At most so often does an attack with this false-positive rate find out what tells neighbours apart.

        Args:
            false_positive_rate: in [0, 1].

        Raises:
            PrivacyError: it is outside.
        """
        check_rate(false_positive_rate)
        return true_positive_rate(self._composed().delta, float(false_positive_rate))

    def _composed(self) -> Composed:
        return composed(tuple(self._history), self._releases, self._method, self._relation)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes: history and releases as plain numbers and text, and the relation."""
        return {
            "history": [
                [sigma, list(rate) if isinstance(rate, TruncatedRate) else rate, n] for sigma, rate, n in self._history
            ],
            "releases": [[json.loads(text), count] for text, count in self._releases],
            "relation": self._relation,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace history and releases. Sigma, sample rate, method and relation stay: those of the steps to come.

        Releases that were composed before are taken for those of the saved run, and must be among them.

        Raises:
            PrivacyError: no history, or an entry that is no possible run of steps or release; steps of another relation
                for "add_remove", whose sample rates may have told the dataset's size; steps with a cap, or a release,
                for which no bound is known here, or no release that was composed here already. Nothing is changed then.
        """
        history, releases = saved_runs(state_dict), saved_releases(state_dict)
        counted = state_dict.get("relation", "zero_out")
        if (history or releases) and self._relation == "add_remove" != counted:
            raise PrivacyError(
                f"the saved steps were counted for relation {counted!r}: their sample rates may depend on the size of "
                "the dataset, which 'add_remove' protects",
                remedy="make the accountant with the relation of the saved run",
            )
        for _, rate, _ in history:
            self._check_rate(rate)
        for text in releases:
            refuse_unbounded(event_of(json.loads(text)), self._method, self._relation)
        for text, count in self._releases:
            if releases.get(text, 0) < count:
                raise PrivacyError(
                    f"the accountant counts {count} times {event_of(json.loads(text))!r}, and the state to be loaded "
                    f"{releases.get(text, 0)} times: epsilon would leave some out",
                    remedy="load the state first, and compose what it does not hold afterwards",
                )
        self._history, self._releases = history, tuple(releases.items())

    def _check_rate(self, rate: Rate) -> None:
        if isinstance(rate, TruncatedRate):
            check_truncated((rate.dataset_size, rate.max_batch_size), self._method, self._relation)

    def __repr__(self) -> str:
        sigma, q = self.noise_multiplier, self.sample_rate
        cap = "" if self.truncation is None else f"truncation={self.truncation}, "
        return (
            f"PrivacyAccountant(noise_multiplier={sigma}, sample_rate={q}, method={self._method!r}, "
            f"relation={self._relation!r}, {cap}steps={self.steps}"
            + (f", releases={sum(count for _, count in self._releases)})" if self._releases else ")")
        )
