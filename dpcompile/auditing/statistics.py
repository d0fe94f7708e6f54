"""From guesses about canaries to lower bounds on epsilon.

Sources: Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run" (NeurIPS 2023, arXiv:2305.08846), for
guesses within one run; Jagielski, Ullman, Oprea, "Auditing Differentially Private Machine Learning" (NeurIPS 2020,
arXiv:2006.07709), for error rates of independent guesses, with the intervals of Clopper and Pearson 1934.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["ErrorRates", "first_crossing", "one_run_epsilon", "one_run_p_value", "rate_at_most"]

_LARGEST, _STEP, _PRECISION = 700.0, 0.25, 1e-6  # epsilons; exp of the first is a float64


def one_run_p_value(canaries: int, guesses: int, right: int, *, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are, at most, of a run that is (epsilon, delta)-private.

    With W binomial of ``guesses`` trials and chance ``e**epsilon / (1 + e**epsilon)``, it is ``P(W >= right)`` and
    ``2 * canaries * delta * max_i P(right > W >= right - i) / i`` more, i from 1 to ``right``.

    Args:
        canaries: m: each was in or out of the run by a fair coin of its own.
        guesses: on how many of them there was a guess; the rest abstained.
        right: how many of the guesses were right.
        epsilon: of the claim, 0 or more.
        delta: of the claim, in [0, 1].

    **Guarantee.** If the run is (epsilon, delta)-private when one canary is added or taken out, and guesses were made
    without knowing the coins, the result is at most p with a probability of at most p: whatever the mechanism is, and
    however the guesses depend on each other. Source: Steinke et al. 2023, the main theorem for approximate privacy.
    """
    from scipy import special, stats

    chance, binom = special.expit(epsilon), stats.binom
    alone = float(binom.sf(right - 1, guesses, chance))
    if delta == 0 or right == 0:
        return alone
    i = np.arange(1, right + 1)
    added = (binom.sf(right - i - 1, guesses, chance) - alone) / i
    return float(min(1.0, alone + 2 * canaries * delta * added.max()))


def one_run_epsilon(canaries: int, guesses: int, right: int, *, delta: float, significance: float) -> float:
    """The smallest epsilon that so many right guesses do not contradict; see :func:`one_run_p_value`.

    **Guarantee.** At most ``epsilon`` of the run, with a probability of at least ``1 - significance``.

    ==========================================  =======
    edge case                                   outcome
    ==========================================  =======
    no guess, or half of them right             0
    all right                                   finite: about ``log(guesses / log(1 / significance))``
    ``2 * canaries * delta`` of 1 or more       close to 0: such a run may give all of one canary away
    ==========================================  =======
    """
    return first_crossing(
        lambda epsilon: one_run_p_value(canaries, guesses, right, epsilon=epsilon, delta=delta) > significance
    )


def first_crossing(holds: Callable[[float], bool]) -> float:
    """The smallest epsilon for which something holds, from below and to 1e-6; at most 700.

    It is looked for upwards in steps of 0.25: what is not monotone is taken where it holds first.
    """
    low, high = 0.0, _STEP
    if holds(low):
        return low
    while not holds(high):
        low, high = high, high + _STEP
        if high > _LARGEST:
            return low
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low


def rate_at_most(events: int, trials: int, significance: float) -> float:
    """Clopper and Pearson's upper bound on a probability, from independent trials.

    **Guarantee.** At least the probability, with a probability of at least ``1 - significance``.
    """
    from scipy import special

    return 1.0 if events >= trials else float(special.betaincinv(events + 1, trials - events, 1 - significance))


@dataclass(frozen=True, slots=True)
class ErrorRates:
    """Bounds on the two errors of a rule that says which canaries are in.

    Attributes:
        false_positive: at least the chance that a canary that is out is taken for one that is in.
        false_negative: at least the chance of the opposite error.
    """

    false_positive: float
    false_negative: float

    @classmethod
    def counted(cls, false_in: int, out: int, false_out: int, inside: int, significance: float) -> ErrorRates:
        """Both bounds, from independent guesses, together true with a probability of ``1 - significance``."""
        half = significance / 2
        return cls(rate_at_most(false_in, out, half), rate_at_most(false_out, inside, half))

    def epsilon(self, delta: float) -> float:
        """The smallest epsilon at ``delta`` of any mechanism with these errors.

        Source: Kairouz, Oh, Viswanath 2015 (arXiv:1311.0776), section 2.
        """
        return max(0.0, self._one_way(delta, self.false_positive, self.false_negative),
                   self._one_way(delta, self.false_negative, self.false_positive))  # fmt: skip

    @staticmethod
    def _one_way(delta: float, first: float, second: float) -> float:
        power = 1 - delta - second
        return -math.inf if power <= 0 else math.log(power) - math.log(first) if first > 0 else math.inf

    def contradict(self, epsilons: np.ndarray, deltas: np.ndarray) -> bool:
        """Whether no mechanism with these errors has this privacy profile: ``deltas`` at ``epsilons``, both ``[n]``."""
        factor = np.exp(epsilons)
        first = 1 - self.false_negative > factor * self.false_positive + deltas
        second = 1 - self.false_positive > factor * self.false_negative + deltas
        return bool((first | second).any())
