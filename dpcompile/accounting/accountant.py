"""Accounting, on dp-accounting: how much privacy the steps so far cost, and how much noise a target needs.

Each step is the Gaussian mechanism on a Poisson sample; neighbouring datasets differ by one example added or removed.
Sources: Abadi et al. 2016 (the subsampled Gaussian mechanism), Mironov 2017 and Mironov, Talwar, Zhang 2019 (RDP),
Koskela, Jälkö, Honkela 2020 and Doroshenko et al. 2022 (privacy loss distributions, PLD). The default is PLD, which is
tight to its discretisation and rounds up; with little noise its grid is coarser, or the bound is RDP's.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from dpcompile.accounting.events import sampled_gaussian, sampled_gaussian_of
from dpcompile.errors import PrivacyError

if TYPE_CHECKING:  # it takes as long to import as the rest of the package
    from dp_accounting import DpEvent

__all__ = ["Method", "PrivacyAccountant", "calibrate_noise"]

Method = Literal["pld", "rdp"]
_INTERVAL = 1e-4  # of the PLD's grid, in units of epsilon; dp-accounting's own default
_ONE_STEP, _COMPOSED = 4e5, 8e6  # so many points at most: some seconds, and below a gigabyte
_LARGEST_LOSS = 500.0  # its exponential is to stay below float64's largest number
_LEAST_NOISE, _MOST_NOISE = 1e-100, 1e100  # divergences are of its square
_TOLERANCE = 1e-4  # of a calibrated noise multiplier, relative


class PrivacyAccountant:
    """Counts logical steps and tells their epsilon.

    Args:
        noise_multiplier: sigma: standard deviation of the noise over the sensitivity C. 0: epsilon is infinite.
        sample_rate: q in (0, 1]: the chance of each example, independently, to be in a step.
        method: "pld" (tight; with so little noise that losses of hundreds are possible, RDP's bound) or "rdp" (looser,
            and instant).

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
    "pld" with little noise, sigma below 0.2    a coarser grid, which rounds up; RDP's bound where it is smaller
    "pld" with losses above 500                 RDP's bound: a grid of them would take gigabytes
    sigma below 1e-100                          infinity
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

    def step(self, n: int = 1, *, event: DpEvent | None = None) -> None:
        """Count steps.

        Args:
            n: how many, 0 or more.
            event: what each of them was; None: the mechanism that this accountant was made for.

        Raises:
            PrivacyError: a number that is none, or an event of which no bound is known; nothing is counted then.
        """
        _check_steps(n)
        mechanism = self._mechanism
        if event is not None:
            mechanism = sampled_gaussian_of(event)
            _check_mechanism(*mechanism)
        if not n:
            return
        if self._history and self._history[-1][:2] == mechanism:
            n += self._history.pop()[2]
        self._history.append((*mechanism, n))

    def epsilon(self, delta: float) -> float:
        """Epsilon at ``delta`` of all counted steps. Remembered per number of steps and delta.

        With PLD a new number of steps takes about a tenth of a second, with little noise some seconds.

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
            PrivacyError: no history, or an entry that is no possible run of steps; nothing is changed then.
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
    if not 0 < _number(target_epsilon) < math.inf:
        raise PrivacyError(f"target_epsilon is {target_epsilon!r}", remedy="give a finite number above 0")
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
    while high > low * (1 + _TOLERANCE):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(middle) > epsilon else (low, middle)
    return high


def _compose(history: Sequence[tuple[float, float, int]], delta: float, method: Method) -> float:
    history = [(min(sigma, _MOST_NOISE), q, n) for sigma, q, n in history if n]
    if not history:
        return 0.0
    if any(sigma == 0 for sigma, _, _ in history):
        return math.inf
    with _quiet():
        return _epsilon(history, delta, method)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orders that do not converge are left out of the bound, which stays a bound; dp-accounting logs each of them."""
    import absl.logging

    level = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(level)


def _epsilon(history: Sequence[tuple[float, float, int]], delta: float, method: Method) -> float:
    interval = _interval(history, delta) if method == "pld" else None
    if interval is None:
        return _renyi_bound(history, delta)
    first, *rest = (_one_step(sigma, q, interval).self_compose(n) for sigma, q, n in history)
    total = functools.reduce(lambda a, b: a.compose(b), rest, first)
    bound = float(cast(Any, total).get_epsilon_for_delta(delta))
    return bound if interval == _INTERVAL and bound < math.inf else min(bound, _renyi_bound(history, delta))


def _renyi_bound(history: Sequence[tuple[float, float, int]], delta: float) -> float:
    if any(sigma < _LEAST_NOISE for sigma, _, _ in history):
        return math.inf
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant()
    for sigma, q, n in history:
        accountant.compose(sampled_gaussian(sigma, q), n)
    return float(accountant.get_epsilon(delta))


def _interval(history: Sequence[tuple[float, float, int]], delta: float) -> float | None:
    """The finest grid, down to the usual one, that is composed in seconds; None if there is none.

    How far losses reach is estimated: in one step, at ten standard deviations of the noise; composed, by epsilon, and
    by dp-accounting's bound on the tails that it keeps, which grows with the variance over the loss of one step.
    """
    one = tails = divergences = 0.0
    for sigma, q, n in history:
        if sigma < 1 / _LARGEST_LOSS or 0.5 / sigma**2 + 10 / sigma > _LARGEST_LOSS:
            return None
        loss = math.log1p(q * math.expm1(0.5 / sigma**2 + 10 / sigma))
        divergence = n * math.log1p(q**2 * math.expm1(min(sigma**-2, _LARGEST_LOSS)))  # Rényi's, of order 2
        loss = max(loss, 3 * _INTERVAL)
        rounded = max(divergence, n * loss * _INTERVAL / 10)  # the grid moves small losses apart
        one, tails, divergences = max(one, loss), tails + rounded / loss, divergences + divergence
    points = max(one / _ONE_STEP, max(tails, divergences) / _COMPOSED) / _INTERVAL
    if points > 1 and divergences > tails:  # often far too large
        epsilon = _renyi_bound(history, delta)
        if epsilon > _LARGEST_LOSS:
            return None
        points = max(one / _ONE_STEP, max(tails, epsilon) / _COMPOSED) / _INTERVAL
    interval = _INTERVAL * 2 ** math.ceil(math.log2(max(points, 1)))
    return interval if points <= 1 or interval < one / 10 else None


@functools.lru_cache(maxsize=8)
def _one_step(sigma: float, q: float, interval: float) -> Any:
    """The privacy loss distribution of one step: what takes time, and is the same for every number of steps."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=interval
    )


def _number(x: Any) -> float:
    """Not a number where it is none."""
    try:
        return float(x) if not isinstance(x, str) else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def _check_mechanism(noise_multiplier: float, sample_rate: float) -> None:
    if not 0 <= _number(noise_multiplier) < math.inf:
        raise PrivacyError(
            f"noise_multiplier is {noise_multiplier!r}",
            remedy="give a finite number, 0 or more (0: epsilon is infinite)",
        )
    if not 0 < _number(sample_rate) <= 1:
        raise PrivacyError(
            f"sample_rate is {sample_rate!r}, not in (0, 1]",
            remedy="give the expected batch size divided by the size of the dataset",
        )


def _check_delta(delta: float) -> None:
    if not 0 < _number(delta) < 1:
        raise PrivacyError(
            f"delta is {delta!r}, not in (0, 1)", remedy="give a number well below 1 / size of the dataset"
        )


def _check_steps(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**63:
        raise PrivacyError(f"the number of steps is {n!r}", remedy="give an integer, 0 or more and below 2**63")


def _check_method(method: str) -> None:
    if method not in ("pld", "rdp"):
        raise PrivacyError(f"accounting method {method!r} is not known", remedy="take 'pld' or 'rdp'")
