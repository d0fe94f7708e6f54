"""What a history of steps and other releases costs together, by dp-accounting.

Sources: Mironov 2017 and Mironov, Talwar, Zhang 2019 (RDP), Koskela, Jälkö, Honkela 2020 and Doroshenko et al. 2022
(privacy loss distributions, PLD).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dpcompile.accounting.arguments import Method, Relation
from dpcompile.accounting.events import sampled_gaussian_of
from dpcompile.accounting.known import neighbours
from dpcompile.accounting.losses import delta_reader
from dpcompile.accounting.releases import event_of, largest_loss, leaves
from dpcompile.accounting.renyi import Renyi
from dpcompile.accounting.runs import History, Releases, merged, rounded_down
from dpcompile.accounting.truncation import Rate, TruncatedRate, plain_rate

if TYPE_CHECKING:  # it takes as long to import as the rest of the package
    from dp_accounting import DpEvent

__all__ = ["Composed", "composed", "composed_epsilon"]

_INTERVAL = 1e-4  # of the PLD's grid, in units of epsilon; dp-accounting's own default
_ONE_STEP, _COMPOSED = 4e5, 8e6  # so many points at most: some seconds, and below a gigabyte
_QUICK, _LARGE, _LOST = 2.5e5, 10.0, 0.004  # of an epsilon above, see `_interval`
_LARGEST_LOSS = 500.0  # its exponential is to stay below float64's largest number
# Kinds of steps that are told apart, and of which the grid is as fine as of one.
_DISTINCT, _FINE = 32, 4
_LEAST_NOISE, _MOST_NOISE = 1e-100, 1e100  # divergences are of its square
_OFTEN, _FEW = 10**5, 1000  # compositions at once, of so few points
_TAILS = 1e-15  # mass that may be cut off in all
_USUAL_DELTA = 1e-5  # at which it is estimated how far losses reach
_CERTAIN = 1e-12  # what Fourier transforms and truncated tails leave of a smaller delta is not much


def composed_epsilon(history: History, delta: float, method: Method, relation: Relation, *, coarser: int = 1) -> float:
    """Epsilon at ``delta`` of all steps together: :class:`Composed`."""
    return Composed(history, method, relation, coarser=coarser).epsilon(delta)


@functools.lru_cache(maxsize=1)
def composed(
    history: tuple[tuple[float, Rate, int], ...],
    releases: tuple[tuple[str, int], ...],
    method: Method,
    relation: Relation,
) -> Composed:
    """Steps and releases, which are given as :func:`dpcompile.accounting.releases.text_of`; the last one is kept."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, TruncatedSubsampledGaussianDpEvent

    runs, others = list(history), []
    for text, count in releases:
        for event, n in leaves(event_of(json.loads(text)), count):
            if isinstance(event, GaussianDpEvent):
                runs.append((event.noise_multiplier, 1.0, n))
            elif isinstance(event, TruncatedSubsampledGaussianDpEvent) or (
                isinstance(event, PoissonSampledDpEvent) and isinstance(event.event, GaussianDpEvent)
            ):
                runs.append((*sampled_gaussian_of(event), n))
            else:
                others.append((event, n))
    return Composed(runs, method, relation, others)


class Composed:
    """All steps and releases together.

    Args:
        history: of the steps.
        method: "pld" or "rdp".
        relation: which datasets are neighbours. "zero_out" and "add_remove" have the same privacy loss: in both, one
            example's term is there or is not.
        releases: others, none of which is Gaussian noise on a Poisson sample, nor composed of others.
        coarser: how many times wider the grid of losses is to be: quicker, and larger bounds.

    Attributes:
        free: nothing was released.
        infinite: something was released without noise.

    **Guarantee.** :meth:`epsilon` and :meth:`delta` are upper bounds, for Gaussian noise of ``sigma`` times the
    sensitivity on Poisson samples of rate q, or truncated ones (:func:`dpcompile.accounting.events.truncated`), and for
    the releases.
    """

    def __init__(
        self, history: History, method: Method, relation: Relation, releases: Releases = (), *, coarser: int = 1
    ) -> None:
        from dp_accounting import NonPrivateDpEvent

        self._history = merged((min(sigma, _MOST_NOISE), _effective(q), n) for sigma, q, n in history if n)
        self._releases = tuple(releases)
        self._relation: Relation = relation
        self.free = not self._history and not self._releases
        self.infinite = any(sigma < _LEAST_NOISE for sigma, _, _ in self._history) or any(
            isinstance(event, NonPrivateDpEvent) for event, _ in self._releases
        )
        interval = None
        if method == "pld" and not self.free and not self.infinite:
            with _quiet():
                interval = _interval(self._history, self._releases, relation == "replace_one", self._usual_epsilon)
        self._fine = interval == _INTERVAL and coarser == 1
        self._losses: Any = None if interval is None else self._composed_losses(interval * coarser)

    def epsilon(self, delta: float) -> float:
        """Epsilon at ``delta``, in (0, 1)."""
        if self.free or self.infinite:
            return math.inf if self.infinite else 0.0
        with _quiet():
            if self._losses is None:
                return self._renyi.epsilon(delta)
            bound = float(self._losses.get_epsilon_for_delta(delta))
            return bound if self._fine and bound < math.inf else min(bound, self._renyi.epsilon(delta))

    def delta(self, epsilon: float) -> float:
        """Delta at ``epsilon``, 0 or more."""
        if self.free or self.infinite:
            return 1.0 if self.infinite else 0.0
        with _quiet():
            if self._losses is None:
                return self._renyi.delta(epsilon)
            bound, tails = (min(max(self._delta(e), 0.0), 1.0) for e in (epsilon, math.inf))
            sharp = self._fine and bound > max(_CERTAIN, 4 * tails)
            return bound if sharp else min(bound, self._renyi.delta(epsilon))

    @functools.cached_property
    def _renyi(self) -> Renyi:
        return Renyi(self._history, self._releases, self._relation)

    def _usual_epsilon(self) -> float:
        """An estimate alone: of truncated samples, and of replaced examples, the bound is far too large."""
        replaced = self._relation == "replace_one"
        if not replaced and not any(isinstance(q, TruncatedRate) for _, q, _ in self._history):
            return self._renyi.epsilon(_USUAL_DELTA)
        whole = [(sigma, plain_rate(q), n) for sigma, q, n in self._history]
        return (2 if replaced else 1) * Renyi(whole, self._releases, "zero_out").epsilon(_USUAL_DELTA)

    def _composed_losses(self, interval: float) -> Any:
        fewer = rounded_down(self._history, _DISTINCT)
        width = interval * 2 ** max(0, math.ceil(math.log2(max(len(fewer) + len(self._releases), 1) / _FINE)))
        replaced = self._relation == "replace_one"
        parts = [
            _repeated(_one_step(sigma, q, width, replaced), n, _largest_loss(sigma, q, replaced) / width)
            for sigma, q, n in fewer
        ]
        parts += [
            _repeated(_one_release(event, width, self._relation), n, largest_loss(event, replaced) / width)
            for event, n in self._releases
        ]
        return functools.reduce(lambda a, b: a.compose(b), parts)

    @functools.cached_property
    def _delta(self) -> Callable[[float], float]:
        said = self._losses.get_delta_for_epsilon
        return delta_reader(self._losses, lambda epsilon: float(said(epsilon)))


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


def _effective(q: Rate) -> Rate:
    """The rate alone where an example is never in a truncated draw, so far as floating point can tell."""
    return q.sample_rate if isinstance(q, TruncatedRate) and not q.odds[1] else q


def _cases(sigma: float, q: Rate, replaced: bool) -> list[tuple[float, float, float, bool]]:
    """What a step may be, as odds, noise, rate and whether one example is replaced: one case, or two of truncation."""
    if not isinstance(q, TruncatedRate):
        return [(1.0, sigma, q, replaced)]
    odds, kept = q.odds
    return [(1 - odds, sigma, q.sample_rate, replaced), (odds, sigma / 2, kept, True)]


def _largest_loss(sigma: float, q: Rate, replaced: bool) -> float:
    return max(_loss(noise, rate, both) for _, noise, rate, both in _cases(sigma, q, replaced))


def _divergence(sigma: float, q: Rate, replaced: bool) -> float:
    """About Rényi's, of order 2, of one step."""
    return math.log1p(
        sum(
            odds * rate**2 * math.expm1(min((4 if both else 1) * noise**-2, _LARGEST_LOSS))
            for odds, noise, rate, both in _cases(sigma, q, replaced)
        )
    )


def _loss(sigma: float, q: float, replaced: bool) -> float:
    """About the largest loss of one step, at ten standard deviations of the noise; infinity if it is far too large."""
    if sigma < 1 / _LARGEST_LOSS or 0.5 / sigma**2 + 10 / sigma > _LARGEST_LOSS:
        return math.inf
    loss = math.log1p(q * math.expm1(0.5 / sigma**2 + 10 / sigma))
    if replaced:  # what one example adds to the loss, and what the other one's absence does
        loss += min(-math.log1p(-q), 1.5 / sigma**2 + 10 / sigma) if q < 1 else 1.5 / sigma**2 + 10 / sigma
    return loss


def _interval(history: History, releases: Releases, replaced: bool, usual: Callable[[], float]) -> float | None:
    """The finest grid, down to the usual one, that is composed in seconds; None if there is none.

    How far losses reach is estimated: in one step, at ten standard deviations of the noise; composed, by epsilon, and
    by dp-accounting's bound on the tails that it keeps, which grows with the variance over the loss of one step.

    A grid of width h adds to epsilon about a tenth of h**2 in each step, at most. Of a large epsilon 5 parts in 10,000
    may be added, if that makes the points fewer than 250,000: memory, and the time of a search, are theirs.
    """
    one = tails = divergences = 0.0
    for event, n in releases:
        loss = largest_loss(event, replaced)
        if loss > _LARGEST_LOSS:
            return None
        divergence = n * min(loss, loss**2)
        reach = min(n * loss, divergence + 10 * loss * math.sqrt(n))
        one, tails, divergences = max(one, loss), tails + reach, divergences + divergence
    for sigma, q, n in history:
        loss = _largest_loss(sigma, q, replaced)
        if loss > _LARGEST_LOSS:
            return None
        divergence = n * _divergence(sigma, q, replaced)
        loss = max(loss, 3 * _INTERVAL)
        rounded = max(divergence, n * loss * _INTERVAL / 10)  # the grid moves small losses apart
        one, tails, divergences = max(one, loss), tails + rounded / loss, divergences + divergence
    width = max(one / _ONE_STEP, max(tails, divergences) / _COMPOSED)
    if max(tails, divergences) > _QUICK * _INTERVAL:  # often far too large
        epsilon = min(usual(), max(tails, divergences))  # of some releases no Rényi bound is known
        steps = sum(n for _, n in releases) + sum(n for _, _, n in history)
        width = max(one / _ONE_STEP, max(tails, min(epsilon, divergences)) / _COMPOSED)
        if epsilon > _LARGEST_LOSS:  # of so many a share is enough, and a search for noise takes many of them
            width = max(width, epsilon / 30 * _INTERVAL)
        elif epsilon > _LARGE:
            quick = max(tails, min(2 * epsilon, divergences)) / _QUICK
            width = max(width, min(quick, math.sqrt(_LOST * epsilon / steps)))
    points = width / _INTERVAL
    interval = _INTERVAL * 2 ** math.ceil(math.log2(max(points, 1)))
    return interval if points <= 1 or interval < one / 10 else None


def _repeated(distribution: Any, n: int, points: float) -> Any:
    """``n`` times; of few points by thousands, as dp-accounting takes their number to the n-th power."""
    if n <= _OFTEN or points > _FEW:
        return distribution.self_compose(n)
    total, tails, weight = None, _TAILS / n, 1
    while n:
        n, digit = divmod(n, 1000)
        if digit:
            part = distribution.self_compose(digit, tails * weight)
            total = part if total is None else total.compose(part)
        weight *= 1000
        distribution = distribution.self_compose(1000, tails * weight) if n else distribution
    return total


@functools.lru_cache(maxsize=2 * _DISTINCT)
def _one_step(sigma: float, q: Rate, interval: float, replaced: bool) -> Any:
    """The privacy loss distribution of one step: what takes time, and is the same for every number of steps."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    if isinstance(q, TruncatedRate):
        return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            q.dataset_size,
            q.sample_rate,
            q.max_batch_size,
            sigma,
            value_discretization_interval=interval,
            neighboring_relation=neighbours("replace_one" if replaced else "zero_out"),
        )
    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        value_discretization_interval=interval,
        neighboring_relation=NeighboringRelation.REPLACE_ONE if replaced else NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _one_release(event: DpEvent, interval: float, relation: Relation) -> Any:
    """The privacy loss distribution of a release that is no Gaussian noise; dp-accounting's accountant takes these."""
    from dp_accounting import dp_event
    from dp_accounting.pld import privacy_loss_distribution as pld

    width: dict[str, Any] = {"value_discretization_interval": interval}
    match event:
        case dp_event.LaplaceDpEvent():
            return pld.from_laplace_mechanism(event.noise_multiplier, **width)
        case dp_event.PoissonSampledDpEvent(event=dp_event.LaplaceDpEvent() as laplace):
            return pld.from_laplace_mechanism(
                laplace.noise_multiplier, sampling_prob=event.sampling_probability, **width
            )
        case dp_event.DiscreteLaplaceDpEvent():
            return pld.from_discrete_laplace_mechanism(event.noise_parameter, event.sensitivity, **width)
        case dp_event.RandomizedResponseDpEvent():
            return pld.from_randomized_response(
                event.noise_parameter, event.num_buckets, neighboring_relation=neighbours(relation), **width
            )
    raise AssertionError(event)
