"""How much noise the errors of guesses leave room for, among runs like the one that was audited."""

from __future__ import annotations

import math

import numpy as np

from dpcompile.accounting.composition import Composed
from dpcompile.accounting.runs import History
from dpcompile.auditing.statistics import ErrorRates

__all__ = ["most_noise", "scaled"]

_LEAST, _MOST, _PRECISION = -5.0, 5.0, 0.02  # binary logarithms of a factor
_COARSER = 32  # the grid of losses, than that of the accountant
_EPSILONS = np.concatenate([np.linspace(0, 4, 81), np.geomspace(4.1, 60, 60)])


def scaled(history: History, factor: float) -> History:
    """The same steps with so many times the noise."""
    return [(sigma * factor, rate, steps) for sigma, rate, steps in history]


def most_noise(history: History, rates: ErrorRates) -> float:
    """The factor on the noise of all steps from which on the run would leave fewer chances to tell canaries apart.

    Source: Nasr et al., "Tight Auditing of Differentially Private Machine Learning" (USENIX Security 2023,
    arXiv:2302.07956): the claim under test is the whole trade-off of the mechanism, not one (epsilon,
    delta). Here that of dp-accounting's privacy loss distributions, so that Poisson samples and any number of steps are
    covered.

    Args:
        history: of the run: noise multiplier, sample rate, number of steps.
        rates: bounds on the errors of a rule for one canary.

    **Guarantee.** If ``rates`` are bounds on the errors, and the run was the one of ``history`` with f times its noise,
    then f is at most the result. Below 1, the noise of ``history`` was not there.

    ==============================  ========================================
    edge case                       outcome
    ==============================  ========================================
    guesses no better than chance   infinity
    no noise at all                 1/32 or less is not told apart: 1/32
    a step counted without noise    infinity: nothing contradicts it
    ==============================  ========================================
    """
    if all(rate == 1 for _, rate, _ in history):
        return _most_of_gaussian(history, rates)
    low = high = 0.0
    if contradicts(history, rates, 1.0):
        while low > _LEAST and contradicts(history, rates, 2.0 ** (low - 1)):
            low -= 1
        low, high = low - 1, low
    else:
        while not contradicts(history, rates, 2.0 ** (high + 1)):
            high += 1
            if high == _MOST:
                return math.inf
        low, high = high, high + 1
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if contradicts(history, rates, 2.0**middle) else (middle, high)
    return 2.0**high


def _most_of_gaussian(history: History, rates: ErrorRates) -> float:
    """The same in closed form where every example is in every step: the trade-off is that of one Gaussian.

    Its mean is 1 over the noise; those of several steps add up as squares. Source: Dong, Roth, Su 2022
    (arXiv:1905.02383), definition 2.6 and corollary 3.3.
    """
    from scipy import special

    seen = -float(special.ndtri(rates.false_positive) + special.ndtri(rates.false_negative))
    if not seen > 0 or any(sigma == 0 for sigma, _, _ in history):
        return math.inf
    return max(math.sqrt(sum(steps / sigma**2 for sigma, _, steps in history)) / seen, 2.0**_LEAST)


def contradicts(history: History, rates: ErrorRates, factor: float) -> bool:
    """Whether the run with so many times the noise has a privacy profile that does not allow the errors."""
    run = Composed(scaled(history, factor), "pld", "zero_out", coarser=_COARSER)
    return rates.contradict(_EPSILONS, np.array([run.delta(float(epsilon)) for epsilon in _EPSILONS]))
