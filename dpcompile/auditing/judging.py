"""One half of the canaries chooses the attack, the other half judges it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from dpcompile.auditing.statistics import ErrorRates, rate_at_most

__all__ = ["Guesses", "error_rates", "guesses"]

_SHARES = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02)  # of the canaries, guessed to be in, or out
_SPECIAL = 0.01  # of the significance: an attack on a part must be better at this, to be taken before that on all
_THRESHOLDS = np.linspace(0.02, 0.98, 49)  # quantiles


@dataclass(frozen=True, slots=True)
class Guesses:
    """Guesses about half of the canaries.

    Attributes:
        attack: which score they went by.
        canaries: of that half.
        made: on how many of them there was a guess.
        right: how many of the guesses were right.
    """

    attack: str
    canaries: int
    made: int
    right: int


def guesses(scores: Mapping[str, np.ndarray], inside: np.ndarray, significance: float) -> Guesses:
    """Guess that the canaries of the highest scores are in and those of the lowest are out, and count.

    Args:
        scores: by attack, ``[m]`` each, higher for canaries that are in. The first is taken unless another one is much
            better.
        inside: bool ``[m]``, which were.
        significance: of the bound that is to come of it.

    **Guarantee.** Which attack, and how many guesses of each kind, is decided with the first half of the canaries. The
    guesses about the second half depend on ``inside`` by nothing else, as
    :func:`dpcompile.auditing.statistics.one_run_p_value` asks for: given the first half's coins, the run is private in
    the second half's canaries as before.
    """
    half = len(inside) // 2
    best = (-1.0, "", 0.0, 0.0)
    for attack, values in scores.items():
        order, level = np.argsort(values[:half], kind="stable"), _level(attack, scores, significance)
        for high, low in _shares():
            made, right = _counted(inside[:half][order], high, low)
            sure = 1 - rate_at_most(made - right, made, level)
            best = max(best, (sure, attack, high, low))
    _, attack, high, low = best
    order = np.argsort(scores[attack][half:], kind="stable")
    made, right = _counted(inside[half:][order], high, low)
    return Guesses(attack, len(inside) - half, made, right)


def _level(attack: str, scores: Mapping[str, np.ndarray], significance: float) -> float:
    return significance if attack == next(iter(scores)) else significance * _SPECIAL


def _shares() -> Iterator[tuple[float, float]]:
    for share in _SHARES:
        yield from ((share, share), (share, 0.0), (0.0, share))


def _counted(inside: np.ndarray, high: float, low: float) -> tuple[int, int]:
    """Guesses and right ones; ``inside`` is in ascending order of the scores."""
    above, below = int(high * len(inside)), int(low * len(inside))
    right = int(inside[len(inside) - above :].sum()) + int((~inside[:below]).sum())
    return above + below, right


def error_rates(scores: Mapping[str, np.ndarray], inside: np.ndarray, significance: float) -> tuple[str, ErrorRates]:
    """Bounds on the errors of the rule that a canary whose score is above a threshold is in.

    Args:
        scores: see :func:`guesses`.
        inside: see :func:`guesses`.
        significance: of both bounds together.

    Returns:
        The attack, and the bounds.

    **Guarantee.** Attack and threshold are decided with the first half of the canaries, and the errors of the second
    half counted. Where the scores of the second half are independent given which are in, the bounds hold with a
    probability of at least ``1 - significance``.
    """
    from scipy import special

    half = len(inside) // 2
    best = (-math.inf, "", 0.0)
    for attack, values in scores.items():
        level = _level(attack, scores, significance)
        for threshold in np.unique(np.quantile(values[:half], _THRESHOLDS)):
            rates = _rates(values[:half] > threshold, inside[:half], level)
            power = -float(special.ndtri(rates.false_positive) + special.ndtri(rates.false_negative))
            best = max(best, (power, attack, float(threshold)))
    _, attack, threshold = best
    taken = scores[attack][half:] > threshold
    return attack, _rates(taken, inside[half:], significance)


def _rates(taken: np.ndarray, inside: np.ndarray, significance: float) -> ErrorRates:
    false_in, false_out = int((taken & ~inside).sum()), int((~taken & inside).sum())
    n = int(inside.sum())
    return ErrorRates.counted(false_in, len(inside) - n, false_out, n, significance)
