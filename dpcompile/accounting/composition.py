"""Epsilon of a history of steps, by dp-accounting.

Sources: Mironov 2017 and Mironov, Talwar, Zhang 2019 (RDP), Koskela, Jälkö, Honkela 2020 and Doroshenko et al. 2022
(privacy loss distributions, PLD).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias, cast

from dpcompile.accounting.arguments import Method, Relation
from dpcompile.accounting.events import sampled_gaussian

__all__ = ["History", "composed_deltas", "composed_epsilon", "merged", "rounded_down"]

History: TypeAlias = "Sequence[tuple[float, float, int]]"  # runs of equal steps: sigma, q, how many
_INTERVAL = 1e-4  # of the PLD's grid, in units of epsilon; dp-accounting's own default
_ONE_STEP, _COMPOSED = 4e5, 8e6  # so many points at most: some seconds, and below a gigabyte
_LARGEST_LOSS = 500.0  # its exponential is to stay below float64's largest number
# Kinds of steps that are told apart, and of which the grid is as fine as of one.
_DISTINCT, _FINE, _DISTINCT_RENYI = 32, 4, 8
_LEAST_NOISE, _MOST_NOISE = 1e-100, 1e100  # divergences are of its square


def composed_epsilon(history: History, delta: float, method: Method, relation: Relation) -> float:
    """Epsilon at ``delta`` of all steps together.

    Args:
        history: of the steps.
        delta: in (0, 1).
        method: "pld" or "rdp".
        relation: which datasets are neighbours. "zero_out" and "add_remove" have the same privacy loss: in both, one
            example's term is there or is not.

    **Guarantee.** An upper bound for Gaussian noise of ``sigma`` times the sensitivity on Poisson samples of rate q.
    """
    history = merged((min(sigma, _MOST_NOISE), q, n) for sigma, q, n in history if n)
    if not history:
        return 0.0
    if any(sigma == 0 for sigma, _, _ in history):
        return math.inf
    with _quiet():
        return _epsilon(history, delta, method, relation == "replace_one")


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


def composed_deltas(history: History, epsilons: Sequence[float], *, coarser: int = 1) -> list[float]:
    """Delta at each epsilon of all steps together, for "zero_out" and "add_remove".

    Args:
        history: of the steps.
        epsilons: 0 or more.
        coarser: how many times wider the grid may be: quicker, and larger deltas.

    **Guarantee.** As of :func:`composed_epsilon`: upper bounds.
    """
    history = merged((min(sigma, _MOST_NOISE), q, n) for sigma, q, n in history if n)
    if not history:
        return [0.0] * len(epsilons)
    if any(sigma < _LEAST_NOISE for sigma, _, _ in history):
        return [1.0] * len(epsilons)
    with _quiet():
        interval = _interval(history, 1e-5, replaced=False)
        if interval is None:
            accountant = _renyi_accountant(history, replaced=False)
            return [min(1.0, float(accountant.get_delta(e))) for e in epsilons]
        total = cast(Any, _composed(history, interval * coarser, replaced=False))
        return [float(delta) for delta in total.get_delta_for_epsilon(list(epsilons))]


def _epsilon(history: History, delta: float, method: Method, replaced: bool) -> float:
    interval = _interval(history, delta, replaced) if method == "pld" else None
    if interval is None:
        return _renyi_bound(history, delta, replaced)
    bound = float(_composed(history, interval, replaced).get_epsilon_for_delta(delta))
    exact = interval == _INTERVAL and bound < math.inf
    return bound if exact else min(bound, _renyi_bound(history, delta, replaced))


def _composed(history: History, interval: float, replaced: bool) -> Any:
    """The privacy loss distribution of all steps, on a grid of this width or, for many kinds of steps, a wider one."""
    fewer = rounded_down(history, _DISTINCT)
    width = interval * 2 ** max(0, math.ceil(math.log2(len(fewer) / _FINE)))
    first, *rest = (_one_step(sigma, q, width, replaced).self_compose(n) for sigma, q, n in fewer)
    return functools.reduce(lambda a, b: a.compose(b), rest, first)


def merged(history: Iterable[tuple[float, float, int]]) -> History:
    """Equal steps counted together: their order does not matter to what they cost."""
    counts: dict[tuple[float, float], int] = {}
    for sigma, q, n in history:
        counts[sigma, q] = counts.get((sigma, q), 0) + n
    return [(sigma, q, n) for (sigma, q), n in counts.items()]


def rounded_down(history: History, most: int) -> History:
    """At most so many kinds of steps for each sample rate, none with more noise than it had.

    A schedule gives every step a sigma of its own, and every sigma takes a privacy loss distribution. Within a group
    sigma is the smallest one of the group; groups are equally wide by ratio.
    """
    if len(history) <= most:
        return history
    found = []
    for rate in sorted({q for _, q, _ in history}):
        runs = sorted((sigma, n) for sigma, q, n in history if q == rate)
        width = math.log(runs[-1][0] / runs[0][0]) / most or 1.0
        groups: dict[int, tuple[float, int]] = {}
        for sigma, n in runs:  # ascending: the first of a group is its smallest
            place = min(int(math.log(sigma / runs[0][0]) / width), most - 1)
            least, count = groups.get(place, (sigma, 0))
            groups[place] = least, count + n
        found += [(least, rate, count) for least, count in groups.values()]
    return found


def _renyi_bound(history: History, delta: float, replaced: bool) -> float:
    """Rényi's; of replaced examples as though all of them were in every step, since none is known of samples.

    With the same examples drawn of both datasets, the sums differ by at most two sensitivities, and the divergence of
    mixtures is at most that of their parts (joint quasi-convexity; van Erven and Harremoës 2014, theorem 13).
    """
    if any(sigma < _LEAST_NOISE for sigma, _, _ in history):
        return math.inf
    return float(_renyi_accountant(history, replaced).get_epsilon(delta))


def _renyi_accountant(history: History, replaced: bool) -> Any:
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant()
    for sigma, q, n in rounded_down(history, _DISTINCT_RENYI):
        accountant.compose(sampled_gaussian(sigma / 2, 1.0) if replaced else sampled_gaussian(sigma, q), n)
    return accountant


def _interval(history: History, delta: float, replaced: bool) -> float | None:
    """The finest grid, down to the usual one, that is composed in seconds; None if there is none.

    How far losses reach is estimated: in one step, at ten standard deviations of the noise; composed, by epsilon, and
    by dp-accounting's bound on the tails that it keeps, which grows with the variance over the loss of one step.
    """
    one = tails = divergences = 0.0
    for sigma, q, n in history:
        if sigma < 1 / _LARGEST_LOSS or 0.5 / sigma**2 + 10 / sigma > _LARGEST_LOSS:
            return None
        loss = math.log1p(q * math.expm1(0.5 / sigma**2 + 10 / sigma))
        if replaced:  # what one example adds to the loss, and what the other one's absence does
            loss += min(-math.log1p(-q), 1.5 / sigma**2 + 10 / sigma) if q < 1 else 1.5 / sigma**2 + 10 / sigma
            if loss > _LARGEST_LOSS:
                return None
        distance = (4 if replaced else 1) * sigma**-2
        divergence = n * math.log1p(q**2 * math.expm1(min(distance, _LARGEST_LOSS)))  # Rényi's, of order 2
        loss = max(loss, 3 * _INTERVAL)
        rounded = max(divergence, n * loss * _INTERVAL / 10)  # the grid moves small losses apart
        one, tails, divergences = max(one, loss), tails + rounded / loss, divergences + divergence
    points = max(one / _ONE_STEP, max(tails, divergences) / _COMPOSED) / _INTERVAL
    if points > 1 and divergences > tails:  # often far too large
        epsilon = _renyi_bound(history, delta, replaced)
        if epsilon > _LARGEST_LOSS and not replaced:
            return None
        points = max(one / _ONE_STEP, max(tails, min(epsilon, divergences)) / _COMPOSED) / _INTERVAL
    interval = _INTERVAL * 2 ** math.ceil(math.log2(max(points, 1)))
    return interval if points <= 1 or interval < one / 10 else None


@functools.lru_cache(maxsize=2 * _DISTINCT)
def _one_step(sigma: float, q: float, interval: float, replaced: bool) -> Any:
    """The privacy loss distribution of one step: what takes time, and is the same for every number of steps."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        value_discretization_interval=interval,
        neighboring_relation=NeighboringRelation.REPLACE_ONE if replaced else NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
