"""Accounting, on dp-accounting: how much privacy the steps so far cost.

Each step is the Gaussian mechanism on a Poisson sample (Abadi et al. 2016). The default method is PLD, which is tight
to its discretisation and rounds up; with little noise its grid is coarser, or the bound is RDP's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dpcompile.accounting.arguments import Method, Relation, check_bound, check_delta, check_mechanism, check_steps
from dpcompile.accounting.composition import composed_epsilon
from dpcompile.accounting.events import sampled_gaussian_of
from dpcompile.errors import PrivacyError

if TYPE_CHECKING:  # it takes as long to import as the rest of the package
    from dp_accounting import DpEvent

__all__ = ["PrivacyAccountant"]


class PrivacyAccountant:
    """Counts logical steps and tells their epsilon.

    Args:
        noise_multiplier: sigma: standard deviation of the noise over the sensitivity C. 0: epsilon is infinite.
        sample_rate: q in (0, 1]: the chance of each example, independently, to be in a step.
        method: "pld" (tight; with so little noise that losses of hundreds are possible, RDP's bound) or "rdp" (looser,
            and instant).
        relation: which datasets are neighbours. "zero_out": one example counts or does not, in a dataset whose size is
            public; that is what a sample rate of ``expected_batch_size / len(dataset)`` allows. "add_remove": one
            example is there or is not; epsilon is the same, but sample rate, expected batch size and number of steps
            must then have been fixed without looking at the dataset's size. "replace_one": one example is another one;
            epsilon is larger. See Ponomareva et al. 2023, "How to DP-fy ML", section 2.1.

    Raises:
        PrivacyError: an argument out of its range, or "rdp" with "replace_one", for which no bound is known.

    **Guarantee.** ``epsilon(delta)`` is an upper bound for the composition of all counted steps, under Poisson
    sampling at ``sample_rate``, for the relation. It is not one for shuffled batches.

    ==========================================  ===================================================
    edge case                                   outcome
    ==========================================  ===================================================
    no step yet                                 0.0
    sigma 0 and at least one step               infinity
    a restored history with another sigma or q  composed with the steps that follow
    delta 0 or 1                                refused
    "pld" with little noise, sigma below 0.2    a coarser grid, which rounds up; RDP's bound where it is smaller
    "pld" with losses above 500                 RDP's bound: a grid of them would take gigabytes
    sigma below 1e-100                          infinity
    ==========================================  ===================================================
    """

    _relation: Relation = "zero_out"  # of accountants that were pickled before there were others

    def __init__(
        self,
        *,
        noise_multiplier: float,
        sample_rate: float,
        method: Method = "pld",
        relation: Relation = "zero_out",
    ) -> None:
        check_mechanism(noise_multiplier, sample_rate)
        check_bound(method, relation)
        self._mechanism = (float(noise_multiplier), float(sample_rate))
        self._method: Method = method
        self._relation = relation
        self._history: list[tuple[float, float, int]] = []
        self._epsilons: dict[tuple[tuple[tuple[float, float, int], ...], float], float] = {}

    @property
    def noise_multiplier(self) -> float:
        """Sigma of the steps to come."""
        return self._mechanism[0]

    @property
    def sample_rate(self) -> float:
        """Sample rate of the steps to come."""
        return self._mechanism[1]

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
    def history(self) -> list[tuple[float, float, int]]:
        """Runs of equal steps: ``(noise_multiplier, sample_rate, number of steps)``; a copy."""
        return list(self._history)

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
            check_mechanism(*mechanism)
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
        self._mechanism = (float(value), self.sample_rate)

    def epsilon(self, delta: float) -> float:
        """Epsilon at ``delta`` of all counted steps. Remembered per number of steps and delta.

        With PLD a new number of steps takes about a tenth of a second, with little noise or a sigma for every
        step some seconds. More than 32 kinds of steps are rounded to less noise.

        Raises:
            PrivacyError: delta outside (0, 1).
        """
        check_delta(delta)
        key = (tuple(self._history), delta)
        if key not in self._epsilons:
            self._epsilons[key] = composed_epsilon(key[0], delta, self._method, self._relation)
        return self._epsilons[key]

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes: the history as plain numbers, and the relation."""
        return {"history": [list(run) for run in self._history], "relation": self._relation}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace the history. Sigma, sample rate, method and relation stay: they are those of the steps to come.

        Raises:
            PrivacyError: no history, or an entry that is no possible run of steps; or steps of another relation for
                "add_remove", whose sample rates may have told the dataset's size. Nothing is changed then.
        """
        runs = state_dict.get("history") if isinstance(state_dict, Mapping) else None
        if not isinstance(runs, (list, tuple)):
            raise PrivacyError(
                "the accountant's state has no list 'history': which steps it counted is unknown",
                remedy="load what PrivacyAccountant.state_dict() returned",
            )
        history = []
        for run in runs:
            if not isinstance(run, (list, tuple)) or len(run) != 3:
                raise PrivacyError(
                    f"the accountant's history holds {run!r} in place of (noise_multiplier, sample_rate, steps)",
                    remedy="load what PrivacyAccountant.state_dict() returned",
                )
            noise_multiplier, sample_rate, n = run
            check_mechanism(noise_multiplier, sample_rate)
            check_steps(n)
            history.append((noise_multiplier, sample_rate, n))
        counted = state_dict.get("relation", "zero_out")
        if history and self._relation == "add_remove" != counted:
            raise PrivacyError(
                f"the saved steps were counted for relation {counted!r}: their sample rates may depend on the size of "
                "the dataset, which 'add_remove' protects",
                remedy="make the accountant with the relation of the saved run",
            )
        self._history = history

    def __repr__(self) -> str:
        sigma, q = self._mechanism
        return (
            f"PrivacyAccountant(noise_multiplier={sigma}, sample_rate={q}, method={self._method!r}, "
            f"relation={self._relation!r}, steps={self.steps})"
        )
