"""Accounting, on dp-accounting: how much privacy the steps so far cost, and how much noise a target needs.

Each step is the Gaussian mechanism on a Poisson sample; neighbouring datasets differ by one example added or removed.
Sources: Abadi et al. 2016 (the subsampled Gaussian mechanism), Mironov 2017 and Mironov, Talwar, Zhang 2019 (RDP),
Koskela, Jälkö, Honkela 2020 and Doroshenko et al. 2022 (privacy loss distributions, PLD). The default is PLD, which is
tight to its discretisation and rounds up.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import absl.logging
import dp_accounting
from dp_accounting import pld, rdp
from dp_accounting.pld import privacy_loss_distribution

from dpcompile.errors import PrivacyError

__all__ = ["Method", "PrivacyAccountant", "calibrate_noise"]

Method = Literal["pld", "rdp"]
_INTERVAL = 1e-4  # of the PLD's grid, in units of epsilon; dp-accounting's own default


class PrivacyAccountant:
    """Counts logical steps and tells their epsilon.

    Args:
        noise_multiplier: sigma: standard deviation of the noise over the sensitivity C. 0: epsilon is infinite.
        sample_rate: q in (0, 1]: the chance of each example, independently, to be in a step.
        method: "pld" (tight) or "rdp" (looser, and instant).

    Raises:
        PrivacyError: an argument out of its range.

    **Guarantee.** ``epsilon(delta)`` is an upper bound for the composition of all counted steps, under Poisson
    sampling at ``sample_rate`` and one example added or removed. It is not one for shuffled batches.

    ==========================================  ===================================================
    edge case                                   outcome
    ==========================================  ===================================================
    no step yet                                 0.0
    sigma 0 and at least one step               infinity
    a restored history with another sigma or q  composed with the steps that follow
    delta 0 or 1                                refused
    ==========================================  ===================================================
    """

    def __init__(self, *, noise_multiplier: float, sample_rate: float, method: Method = "pld") -> None:
        _check_mechanism(noise_multiplier, sample_rate)
        _check_method(method)
        self._mechanism = (float(noise_multiplier), float(sample_rate))
        self._method: Method = method
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
    def steps(self) -> int:
        """Logical steps counted so far."""
        return sum(n for _, _, n in self._history)

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """Runs of equal steps: ``(noise_multiplier, sample_rate, number of steps)``; a copy."""
        return list(self._history)

    def step(self, n: int = 1) -> None:
        """Count ``n`` steps (0 or more)."""
        _check_steps(n)
        if not n:
            return
        if self._history and self._history[-1][:2] == self._mechanism:
            n += self._history.pop()[2]
        self._history.append((*self._mechanism, n))

    def epsilon(self, delta: float) -> float:
        """Epsilon at ``delta`` of all counted steps. Remembered per number of steps and delta.

        With PLD a new number of steps takes about a tenth of a second.

        Raises:
            PrivacyError: delta outside (0, 1).
        """
        _check_delta(delta)
        key = (tuple(self._history), delta)
        if key not in self._epsilons:
            self._epsilons[key] = _compose(key[0], delta, self._method)
        return self._epsilons[key]

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes: the history as plain numbers."""
        return {"history": [list(run) for run in self._history]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace the history. Sigma, sample rate and method stay: they are those of the steps to come.

        Raises:
            PrivacyError: no history, or an entry that is no possible run of steps.
        """
        try:
            runs = [(float(sigma), float(rate), n) for sigma, rate, n in state_dict["history"]]
        except (KeyError, TypeError, ValueError) as error:
            raise PrivacyError(
                f"this is no state of an accountant ({type(error).__name__}: {error})",
                remedy="load what PrivacyAccountant.state_dict() returned",
            ) from None
        history = []
        for noise_multiplier, sample_rate, n in runs:
            _check_mechanism(noise_multiplier, sample_rate)
            _check_steps(n)
            history.append((noise_multiplier, sample_rate, n))
        self._history = history

    def __repr__(self) -> str:
        sigma, q = self._mechanism
        return (
            f"PrivacyAccountant(noise_multiplier={sigma}, sample_rate={q}, method={self._method!r}, steps={self.steps})"
        )


def calibrate_noise(
    *, target_epsilon: float, target_delta: float, sample_rate: float, steps: int, method: Method = "pld"
) -> float:
    """The smallest noise multiplier, to a relative 1e-4, whose epsilon after ``steps`` is at most the target.

    Args:
        target_epsilon: more than 0.
        target_delta: in (0, 1); well below 1 / size of the dataset.
        sample_rate: in (0, 1].
        steps: logical steps of the whole training, at least 1.
        method: of the accountant that will be used.

    Raises:
        PrivacyError: an argument out of its range, or a target that no noise multiplier up to 2**20 reaches.

    **Guarantee.** ``PrivacyAccountant(noise_multiplier=result, ...)`` with the same method says at most
    ``target_epsilon`` at ``target_delta`` after ``steps``.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise PrivacyError(f"target_epsilon is {target_epsilon}", remedy="give a finite number above 0")
    _check_delta(target_delta)
    _check_mechanism(1.0, sample_rate)
    _check_steps(steps)
    _check_method(method)
    if steps == 0:
        raise PrivacyError(
            "steps is 0: nothing to calibrate", remedy="give the number of logical steps of the training"
        )
    search = functools.partial(_calibrate, target_epsilon, target_delta, sample_rate, steps)
    # PLD is slow for little noise, so it starts from RDP's answer, which is fast and a few per cent above.
    sigma = search("rdp", 1.0, 2.0)
    return sigma if method == "rdp" else search("pld", sigma, 1.1)


def _calibrate(
    epsilon: float, delta: float, q: float, steps: int, method: Method, start: float, factor: float
) -> float:
    def spent(sigma: float) -> float:
        return _compose(((sigma, q, steps),), delta, method)

    low = high = start
    while spent(high) > epsilon:
        low, high = high, high * factor
        if high > 2**20:
            raise PrivacyError(
                f"no noise multiplier up to 2**20 gives epsilon {epsilon} at delta {delta} in {steps} steps",
                remedy="raise target_epsilon or target_delta, or train fewer steps",
            )
    while low == high or spent(low) <= epsilon:
        high, low = low, low / factor
        if low < 2**-10:
            return high  # the target is so loose that next to no noise meets it
    with _quiet():
        sigma = float(
            dp_accounting.calibrate_dp_mechanism(
                _ACCOUNTANTS[method],
                lambda sigma: dp_accounting.SelfComposedDpEvent(_event(sigma, q), steps),
                epsilon,
                delta,
                dp_accounting.ExplicitBracketInterval(low, high),
                tol=1e-4 * low,
            )
        )
    while spent(sigma) > epsilon:  # composed in another order, the last digits may differ
        sigma *= 1 + 1e-5
    return sigma


def _event(sigma: float, q: float) -> dp_accounting.DpEvent:
    return dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))


_ACCOUNTANTS: dict[Method, Callable[[], Any]] = {
    "pld": functools.partial(pld.PLDAccountant, value_discretization_interval=_INTERVAL),
    "rdp": rdp.RdpAccountant,
}


def _compose(history: Sequence[tuple[float, float, int]], delta: float, method: Method) -> float:
    history = [run for run in history if run[2]]
    if not history:
        return 0.0
    if any(sigma == 0 for sigma, _, _ in history):
        return math.inf
    with _quiet():
        return _epsilon(history, delta, method)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orders that do not converge are left out of the bound, which stays a bound; dp-accounting logs each of them."""
    level = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(level)


def _epsilon(history: Sequence[tuple[float, float, int]], delta: float, method: Method) -> float:
    if method == "rdp":
        accountant = rdp.RdpAccountant()
        for sigma, q, n in history:
            accountant.compose(_event(sigma, q), n)
        return float(accountant.get_epsilon(delta))
    first, *rest = (_one_step(sigma, q).self_compose(n) for sigma, q, n in history)
    total = functools.reduce(lambda a, b: a.compose(b), rest, first)
    return float(cast(Any, total).get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=8)
def _one_step(sigma: float, q: float) -> Any:
    """The privacy loss distribution of one step: what takes time, and is the same for every number of steps."""
    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=_INTERVAL
    )


def _check_mechanism(noise_multiplier: float, sample_rate: float) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise PrivacyError(
            f"noise_multiplier is {noise_multiplier}", remedy="give a finite number, 0 or more (0: epsilon is infinite)"
        )
    if not 0 < sample_rate <= 1:
        raise PrivacyError(
            f"sample_rate is {sample_rate}, not in (0, 1]",
            remedy="give the expected batch size divided by the size of the dataset",
        )


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise PrivacyError(
            f"delta is {delta}, not in (0, 1)", remedy="give a number well below 1 / size of the dataset"
        )


def _check_steps(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise PrivacyError(f"the number of steps is {n!r}", remedy="give an integer, 0 or more")


def _check_method(method: str) -> None:
    if method not in ("pld", "rdp"):
        raise PrivacyError(f"accounting method {method!r} is not known", remedy="take 'pld' or 'rdp'")
