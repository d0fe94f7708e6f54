"""Delta of a privacy loss distribution at many epsilons, read off in no time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

__all__ = ["delta_reader"]

_PROBES = 7  # epsilons at which what is read here is compared with what dp-accounting says
_APART = 1e-11


def delta_reader(distribution: Any, said: Callable[[float], float]) -> Callable[[float], float]:
    """A function of epsilon that is ``said`` but for rounding, from sums over the distribution that are taken once.

    Args:
        distribution: dp-accounting's; it lies behind names that are private to it. If they hold something else than
            expected, the function is ``said`` itself, which goes over the whole distribution each time.
        said: delta of epsilon, by dp-accounting.
    """
    try:
        parts = [distribution._pmf_remove] + ([] if distribution._symmetric else [distribution._pmf_add])
        curves = [_curve(part.to_dense_pmf()) for part in parts]
    except (AttributeError, TypeError, ValueError):
        return said

    def read(epsilon: float) -> float:
        return max(curve(epsilon) for curve in curves)

    top = 1.0
    while top < 1e3 and said(top) > 1e-12:
        top *= 2
    probes = [top * i / (_PROBES - 1) for i in range(_PROBES)]
    return read if all(abs(read(e) - said(e)) <= _APART + 1e-6 * said(e) for e in probes) else said


def _curve(pmf: Any) -> Callable[[float], float]:
    """Delta of epsilon: the sum over larger losses of their probability times 1 - e^(epsilon - loss).

    From one loss of the grid to the next smaller one, delta grows by (1 - e^-interval) times the sum of e^(next - loss)
    times probabilities: sums of positive numbers alone. In between it is linear in e^epsilon.
    """
    import numpy as np
    from scipy import signal

    interval, first, tail = float(pmf._discretization), int(pmf._lower_loss), float(pmf._infinity_mass)
    start = max(-first, 0)  # of the losses from 0 on
    probabilities = np.asarray(pmf._probs, dtype=np.float64)[start:]
    if not probabilities.size:
        return lambda epsilon: tail
    weighted: Any = signal.lfilter([1.0], [1.0, -math.exp(-interval)], probabilities[::-1])
    deltas = np.append(np.cumsum(weighted * -math.expm1(-interval))[::-1][1:], 0.0)  # at each loss, without the tail
    lowest, total, below = (first + start) * interval, float(probabilities.sum()), float(weighted[-1])

    def delta(epsilon: float) -> float:
        place = math.floor((epsilon - lowest) / interval) if epsilon < math.inf else deltas.size
        if place < 0:
            return tail + total - math.exp(epsilon - lowest) * below
        if place >= deltas.size - 1:
            return tail
        share = min(math.expm1(max(epsilon - lowest - place * interval, 0.0)) / math.expm1(interval), 1.0)
        return tail + float(deltas[place] + share * (deltas[place + 1] - deltas[place]))

    return delta
