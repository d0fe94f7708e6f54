"""Rényi's bound on what steps and releases cost together, by dp-accounting (Mironov 2017)."""

from __future__ import annotations

import math
from typing import Any

from dpcompile.accounting.arguments import Relation
from dpcompile.accounting.events import sampled_gaussian
from dpcompile.accounting.known import neighbours
from dpcompile.accounting.runs import History, Releases, rounded_down
from dpcompile.accounting.truncation import TruncatedRate, plain_rate

__all__ = ["Renyi"]

_DISTINCT = 8  # kinds of steps that are told apart
_ROUNDING, _RELATIVE = 2e-15, 1e-14  # of a step's divergence: more than was found against 60 digits, to order 1024
_LARGEST = 1e100  # epsilon, of which multiples are taken


class Renyi:
    """Rényi's bound, at the orders of dp-accounting.

    Of replaced examples as though all of them were in every step, since none is known of samples: with the same
    examples drawn of both datasets, the sums differ by at most two sensitivities, and the divergence of mixtures is at
    most that of their parts (joint quasi-convexity; van Erven and Harremoës 2014, theorem 13). So of truncated samples,
    for every relation: one example more takes at most the place of another. Divergences are taken a little larger than
    computed: rounding may have made them smaller, even negative, where they are next to nothing.
    """

    def __init__(self, history: History, releases: Releases, relation: Relation) -> None:
        import numpy as np
        from dp_accounting import GaussianDpEvent, rdp

        steps, others = (rdp.RdpAccountant(neighboring_relation=neighbours(relation)) for _ in range(2))
        for sigma, q, n in rounded_down(history, _DISTINCT):
            whole = relation == "replace_one" or isinstance(q, TruncatedRate)
            event = GaussianDpEvent(sigma / 2) if whole else sampled_gaussian(sigma, q)
            steps.compose(event, n)
        self._bounded = all(others.supports(event) for event, _ in releases)
        for event, n in releases if self._bounded else ():
            others.compose(event, n)
        cushion = sum(n for _, q, n in history if plain_rate(q) < 1) * (0 if relation == "replace_one" else _ROUNDING)
        self._orders: Any = steps.orders
        self._divergences: Any = np.maximum(steps.rdp, 0) * (1 + _RELATIVE) + cushion + np.maximum(others.rdp, 0)

    def epsilon(self, delta: float) -> float:
        """Epsilon at ``delta``."""
        from dp_accounting import rdp

        return float(rdp.compute_epsilon(self._orders, self._divergences, delta)[0]) if self._bounded else math.inf

    def delta(self, epsilon: float) -> float:
        """Delta at ``epsilon``."""
        from dp_accounting.rdp import rdp_privacy_accountant

        if not self._bounded or self._divergences.min() == math.inf:
            return 1.0
        divergences = self._divergences.clip(_ROUNDING)  # a difference of 1 and their exponential is taken
        return float(rdp_privacy_accountant.compute_delta(self._orders, divergences, min(epsilon, _LARGEST))[0])
