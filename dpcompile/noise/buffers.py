"""Rows of noise by a few buffers: y with C y = z, where C is Toeplitz and its coefficients are sums of powers.

Source: McMahan et al. 2024, "Efficient and Near-Optimal Noise Generation for Streaming Differential Privacy" (FOCS),
section 4 (buffered linear Toeplitz matrices, BLT), and "A Hassle-free Algorithm for Private Learning in Practice: Don't
Use Tree Aggregation, Use BLTs" (2024, arXiv:2408.08868), sections 3 and 4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpcompile.errors import PrivacyError
from dpcompile.noise.counter import STEPS, Span, Stream, check_range, check_seed
from dpcompile.noise.normal import gaussians
from dpcompile.noise.rows import Place
from dpcompile.noise.strategy import counts_of

__all__ = ["BufferedRows", "Powers", "optimal_powers", "saved_powers"]

_LONGEST = 2**14  # steps for which powers are sought; later coefficients are next to nothing
_SAVED = ("weights", "decays")
_DIGITS = 6  # of what is found: machines round differently


@dataclass(frozen=True, slots=True)
class Powers:
    """Coefficients of C: 1, then ``sum_i weights[i] * decays[i]**(t - 1)`` at t = 1, 2, ...

    Attributes:
        weights: above 0, together 1 at most: coefficients do not increase, and noise does not grow from row to row.
        decays: in (0, 1).

    Raises:
        PrivacyError: they are not, or not as many.
    """

    weights: tuple[float, ...]
    decays: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = [*self.weights, *self.decays]
        fits = len(self.weights) == len(self.decays) > 0 and all(isinstance(x, float) for x in numbers)
        if not fits or not all(0 < x < 1 for x in numbers) or sum(self.weights) > 1:
            raise PrivacyError(
                f"weights are {self.weights!r}, decays are {self.decays!r}",
                remedy="give as many of both, in (0, 1), weights that add up to 1 at most, such as "
                "dpcompile.noise.buffers.optimal_powers(steps) returns",
            )

    def norm(self, steps: int) -> float:
        """L2 norm of the first ``steps`` coefficients, rounded up."""
        return _norm(np.asarray(self.weights), np.asarray(self.decays), steps) * (1 + 1e-12)

    def error(self, steps: int, length: int) -> float:
        """Root mean square, over ``steps`` prefix sums, of the noise in them, in units of ``sigma * C_clip``.

        ``length`` are the rows of a block.
        """
        counts = counts_of(steps, length)
        return math.sqrt(math.exp(_log_error(np.asarray(self.weights), np.asarray(self.decays), counts, length)))


@functools.lru_cache(maxsize=16)
def optimal_powers(length: int, steps: int | None = None, buffers: int = 4) -> Powers:
    """The powers whose mean squared error of prefix sums is small, by a search from those nearest to 1 / sqrt(pi t).

    Privacy does not depend on them. With four buffers errors are within 1 per cent of the best matrix's for passes of
    256 steps.

    Args:
        length: of a block, 1 or more.
        steps: of the run; None: one block.
        buffers: how many.
    """
    from scipy import optimize

    reach = min(max(length, 2), _LONGEST)
    counts = counts_of(max(steps or length, 1), length)[:reach]
    decays = np.exp(-0.5 * reach ** -np.linspace(0.0, 1.0, buffers))
    t = np.unique(np.geomspace(1, reach, 64).astype(int))
    fitted, _ = optimize.nnls(decays ** (t[:, None] - 1) * np.sqrt(t)[:, None], np.sqrt(t / (np.pi * (t + 0.25))))
    start = np.concatenate([np.log(decays / (1 - decays)), np.log(fitted.clip(1e-4))])
    objective = lambda free: _log_error(*_numbers(free), counts, reach)  # noqa: E731
    for method in ("L-BFGS-B", "Nelder-Mead", "L-BFGS-B"):
        start = min(start, optimize.minimize(objective, start, method=method).x, key=objective)
    return _rounded(start)


def saved_powers(state: Mapping[str, Any]) -> Powers:
    """Of the state of a mechanism.

    Raises:
        PrivacyError: it has none.
    """
    powers = state.get("powers")
    if not isinstance(powers, Mapping) or not all(isinstance(powers.get(k), (list, tuple)) for k in _SAVED):
        raise PrivacyError(
            "the state of the mechanism lacks its matrix: 'powers', with 'weights' and 'decays'",
            remedy="load what DPOptimizer.state_dict() returned, unchanged",
        )
    return Powers(*(tuple(powers[k]) for k in _SAVED))


def _numbers(free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights and decays of unbounded numbers: logarithms of the ones and logits of the others."""
    half = len(free) // 2
    weights = np.exp(free[half:].clip(-12, 3))
    return weights / max(1.0, weights.sum() * (1 + 1e-5)), 1 / (1 + np.exp(-free[:half].clip(-9, 14)))


def _rounded(free: np.ndarray) -> Powers:
    weights, decays = (np.round(x, _DIGITS).clip(1e-6, 1 - 1e-6) for x in _numbers(free))
    weights = weights / max(1.0, weights.sum() * (1 + 1e-12))
    return Powers(tuple(weights.tolist()), tuple(decays.tolist()))


def _norm(weights: np.ndarray, decays: np.ndarray, length: int) -> float:
    products = np.outer(decays, decays)
    sums = -np.expm1((length - 1) * np.log(products)) / (1 - products)
    return math.sqrt(1 + float(weights @ sums @ weights))


def _log_error(weights: np.ndarray, decays: np.ndarray, counts: np.ndarray, length: int) -> float:
    """Logarithm of the mean squared error: that of C^-1's prefix sums, times the squared norm of C's columns.

    C's generating function is N / P with P the product of ``1 - decay x``, so that of its inverse is P / N.
    """
    from scipy import signal

    factors = [np.array([1.0, -d]) for d in decays]
    product = functools.reduce(np.convolve, factors)
    numerator = product.copy()
    for i, weight in enumerate(weights):
        others = functools.reduce(np.convolve, factors[:i] + factors[i + 1 :], np.array([1.0]))
        numerator[1 : 1 + len(others)] += weight * others
    impulse = np.zeros(len(counts))
    impulse[0] = 1.0
    sums = np.cumsum(signal.lfilter(product, numerator, impulse))
    error = float(counts @ sums**2)
    return (math.log(error) if 0 < error < math.inf else 700.0) + 2 * math.log(_norm(weights, decays, length))


@dataclass(slots=True)
class _Held:
    """``[buffers, numel]``, after so many rows of block number ``block``; and the last row."""

    values: Tensor
    block: int
    made: int = 0
    last: Tensor | None = None


class BufferedRows:
    """The rows of one seed's noise, for the elements that were asked for last.

    Args:
        powers: of C.
        length: rows of a block; blocks share nothing.
        seed: see :func:`dpcompile.noise.gaussian`.
        secure: see there.

    **Guarantee.** As :class:`dpcompile.noise.rows.Rows`: :meth:`at` is a function of these, the step, and each
    element's place; what is held is a copy, and may be dropped: rows are then drawn again from the begin of the block.
    """

    def __init__(self, powers: Powers, length: int, seed: int, secure: bool) -> None:
        self._powers, self._length, self._seed, self._secure = powers, length, seed, secure
        self._held: dict[Place, _Held] = {}

    def at(self, step: int, places: Sequence[Place]) -> list[Tensor]:
        """The row of a step: ``[numel]`` for each place, no two equal; to be read before the next call."""
        check_seed(self._seed, secure=self._secure)
        check_range("logical step", step, STEPS)
        block, row = divmod(step, self._length)
        self._held = {place: self._begun(place, block, row) for place in places}
        while late := [place for place in places if self._held[place].made <= row]:
            made = min(self._held[place].made for place in late)
            together = [place for place in late if self._held[place].made == made]
            for kind in dict.fromkeys((p.dtype, p.device) for p in together):
                self._make([p for p in together if (p.dtype, p.device) == kind], block * self._length + made)
        rows = [self._held[place].last for place in places]
        assert all(r is not None for r in rows)
        return rows  # type: ignore[return-value]

    def _begun(self, place: Place, block: int, row: int) -> _Held:
        held = self._held.get(place)
        if held is not None and held.block == block and (held.made <= row or held.made == row + 1):
            return held
        shape = (len(self._powers.weights), place.numel)
        return _Held(torch.zeros(shape, dtype=place.dtype, device=place.device), block)

    def _make(self, places: Sequence[Place], step: int) -> None:
        spans = [Span(p.parameter, p.numel, p.start) for p in places]
        options: dict[str, Any] = {"dtype": places[0].dtype, "device": places[0].device, "secure": self._secure}
        drawn = gaussians(self._seed, step=step, spans=spans, stream=Stream.BUFFERED, **options)
        for place, row in zip(places, drawn, strict=True):
            held = self._held[place]
            for weight, value in zip(self._powers.weights, held.values, strict=True):
                row.sub_(value, alpha=weight)
            for decay, value in zip(self._powers.decays, held.values, strict=True):
                value.mul_(decay).add_(row)
            held.last, held.made = row, held.made + 1
