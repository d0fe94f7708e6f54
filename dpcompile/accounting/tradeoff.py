"""What an attack can do, from delta as a function of epsilon: rates of its errors, and mu of Gaussian DP.

Sources: Wasserman and Zhou 2010, theorem 2.4, and Kairouz, Oh, Viswanath 2015, theorem 2.1 (error rates under one
epsilon and delta), Dong, Roth, Su 2022 (Gaussian DP), Gomez, Kulynych, Kaissis, Hayes, Balle, Honkela 2025,
"(epsilon, delta) considered harmful" (mu and its regret). Every pair (epsilon, delta(epsilon)) is a guarantee, so any
set of them gives bounds that hold; more of them give tighter ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

__all__ = ["GaussianBound", "gaussian_bound", "true_positive_rate"]

Delta: TypeAlias = "Callable[[float], float]"
_POINTS = 1000  # of the curve


class GaussianBound(NamedTuple):
    """A mechanism summarised by Gaussian DP."""

    mu: float
    """No attack does better than one that tells N(0, 1) from N(mu, 1), up to the slack."""
    regret: float
    """How far the curve of error rates is from that of mu, at most, along the diagonal: 0 where mu tells all."""


def true_positive_rate(delta: Delta, false_positive_rate: float) -> float:
    """An upper bound on the true-positive rate of any attack with this false-positive rate.

    Args:
        delta: an upper bound on delta at any epsilon, 0 or more.
        false_positive_rate: in [0, 1].
    """
    fpr = false_positive_rate
    if fpr in (0, 1):
        return float(fpr) if fpr else delta(math.inf)
    direct = _least(lambda e: math.exp(e) * fpr + delta(e), min(-math.log(fpr), 700.0))
    dual = _least(lambda e: 1 - math.exp(-e) * (1 - delta(e) - fpr), 700.0)
    return max(fpr, min(direct, dual, 1.0))


def _least(of: Callable[[float], float], end: float) -> float:
    """About the least value between 0 and ``end`` of what first falls, then rises; never a smaller one."""
    grid = [end * (i / 64) ** 3 for i in range(65)]
    values = [of(e) for e in grid]
    place = min(range(len(grid)), key=values.__getitem__)
    low, high, best = grid[max(place - 1, 0)], grid[min(place + 1, 64)], values[place]
    for _ in range(40):  # by the golden section
        left, right = high - 0.618 * (high - low), low + 0.618 * (high - low)
        at_left, at_right = of(left), of(right)
        low, high = (low, right) if at_left <= at_right else (left, high)
        best = min(best, at_left, at_right)
    return best


def gaussian_bound(delta: Delta, slack: float) -> GaussianBound:
    """About the smallest mu of which it follows from ``delta`` that it holds up to ``slack``; never a smaller one.

    Args:
        delta: an upper bound on delta at any epsilon, 0 or more.
        slack: above 0; without any no mu would do for the far tails of most mechanisms.

    **Guarantee.** The mechanism's delta at every epsilon, 0 or more, is at most that of mu, ``Phi(mu / 2 - epsilon /
    mu) - e^epsilon Phi(-mu / 2 - epsilon / mu)``, plus ``slack``. Between two points of the curve delta is at most
    their chord over e^epsilon, as it is convex there; in error rates, a chord is a vertex, and what holds at the
    vertices of a polygon holds above it for the convex curve of Gaussian DP.
    """
    from scipy import special

    if delta(0.0) <= 0:
        return GaussianBound(0.0, 0.0)
    end = _end(delta, slack)
    if end == math.inf:
        return GaussianBound(math.inf, 0.0)
    vertices = _vertices([(e, delta(e)) for e in _points(delta, slack, end)])
    mu = 0.0
    for log_alpha, power in vertices:
        if power > slack:
            mu = max(mu, float(special.ndtri(power - slack) - special.ndtri_exp(log_alpha)))
    return GaussianBound(mu, _regret(vertices, mu) if mu < math.inf else 0.0)


def _end(delta: Delta, slack: float) -> float:
    """An epsilon where delta is within the slack, no more than a tenth too large; infinity if there is none."""
    end = 1.0
    while delta(end) > slack:
        end *= 2
        if end > 2.0**60:
            return math.inf
    while end > 2.0**-40 and delta(end / 2) <= slack:
        end /= 2
    return _last(lambda e: delta(e) > slack, end / 2, end)[1]


def _last(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    for _ in range(5):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high


def _points(delta: Delta, slack: float, end: float) -> Iterable[float]:
    """Where the curve is read: densely from where delta begins to fall."""
    start = 0.0
    if delta(0.0) > 1 - slack:
        start, falls = 0.0, end
        while falls - start > (end - start) / 16:
            middle = (start + falls) / 2
            start, falls = (middle, falls) if delta(middle) > 1 - slack else (start, middle)
    points = [start + (end - start) * i / _POINTS for i in range(_POINTS + 1)]
    return points if start == 0 else [0.0, *points]


def _vertices(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where neighbouring lines of the curve meet: logarithm of the false-positive rate, and the true-positive rate.

    Of the lines of (epsilon, delta), power = delta + e^epsilon alpha, only those on the lower hull of the curve over
    e^epsilon bound the power anywhere. Beyond where power is 1 - alpha the bound is that of the two rates exchanged.
    """
    hull: list[tuple[float, float, float]] = []  # epsilon, delta, log alpha where the line meets the one before
    for epsilon, delta in curve:
        meets = 0.0
        while hull:
            before, delta_before, at = hull[-1]
            fall = delta_before - delta
            meets = math.log(fall) - before - _log_expm1(epsilon - before) if fall > 0 else -math.inf
            if len(hull) == 1 or meets < at:
                break
            hull.pop()
        hull.append((epsilon, delta, meets))
    found = [(at, min(delta + math.exp(at + epsilon), 1.0)) for epsilon, delta, at in hull[1:] if at > -math.inf]
    middle = max(math.log1p(-delta) - e - math.log1p(math.exp(-e)) if delta < 1 else -math.inf for e, delta in curve)
    found = [(at, power) for at, power in found if at < middle]
    return [(middle, 1 - math.exp(middle)), *found, (-math.inf, hull[-1][1])]


def _log_expm1(x: float) -> float:
    return x + math.log(-math.expm1(-x))


def _regret(vertices: list[tuple[float, float]], mu: float) -> float:
    """The largest distance, along the diagonal, of the polygon from the curve of mu above it."""
    import numpy as np
    from scipy import special

    corners: Any = sorted({(math.exp(log_alpha), 1 - power) for log_alpha, power in vertices})
    corners += [(beta, alpha) for alpha, beta in corners]
    alphas, betas = np.array(sorted(corners, key=lambda c: (c[0], -c[1]))).T
    x = np.concatenate([np.linspace(0, 1, 2001), np.geomspace(1e-12, 1e-2, 500)])
    gaussian = special.ndtr(-special.ndtri(x) - mu)
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        polygon = np.interp(np.minimum(x + middle, 1), alphas, betas, right=0.0)
        low, high = (low, middle) if np.all(polygon - middle <= gaussian) else (middle, high)
    return high
