"""The Gaussian mechanism on integers: nothing that is released, and no sum over ranks, is rounded by floating point.

Sources: Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy" (NeurIPS); Kairouz, Liu,
Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation" (ICML), for
sums that are rounded to a grid. What it is against: Mironov 2012, "On significance of the least significant bits for
differential privacy" (CCS).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from dpcompile.errors import PrivacyError
from dpcompile.noise import grid as grids
from dpcompile.noise.counter import Span, refuse_twice
from dpcompile.noise.discrete import LARGEST, discrete_pieces
from dpcompile.noise.mechanism import GaussianMechanism, Release, pieces_of

__all__ = ["EXCESS", "STEPS", "ExactMechanism", "excess"]

EXCESS = 1e-5  # of epsilon, after
STEPS = 2**24  # steps, at most
_TAIL = 2000  # exp(-2000) is the probability that is left out


@dataclass(slots=True)
class ExactMechanism(GaussianMechanism):
    """Sums on a grid, as integers, plus discrete Gaussian noise; see :class:`Mechanism` for the other attributes.

    Attributes:
        secure: True: the noise comes from ChaCha20.
        bits: the grid is the largest power of two not above C, divided by ``2**bits``; 0: what
            :func:`dpcompile.noise.grid.default_bits` says, once for all.

    **Guarantee.** Let the clipped sums of neighbouring datasets, as the ranks have them, differ by C at most in L2 norm
    when those of all ranks are added up as real numbers. Then, where the steps of :meth:`event`, composed, are
    (epsilon, delta)-differentially private, what was released is so for epsilon + eta and ``exp(eta) delta``, with eta
    of :func:`excess`: below 1e-5 whatever sigma, C and the number of elements were at each step, and of a million
    elements and ten thousand steps 1e-14. It is a function of integers: of the sums on the grid and of noise whose law
    holds exactly (:mod:`dpcompile.noise.discrete`). So there are no low bits that tell what the noise was added to.

    *The sensitivity.* The sum of one rank is rounded by half a unit per element. Of at most :data:`ROUNDINGS` ranks, in
    both datasets and d elements, that is ``ROUNDINGS * sqrt(d)`` units in L2 norm, beside C. The standard deviation is
    sigma times both together, rounded up to an integer: with 40 bits and a million elements one millionth more
    (:meth:`units`). It does not depend on how many ranks there are.

    *The event.* Of integers, continuous Gaussian noise rounded to integers is a function of what the Gaussian mechanism
    releases: its privacy loss is that one's or less, of Poisson samples and composed too. The noise here has another
    law, but one so close that eta is all the difference it makes (:func:`excess`).

    *What is not covered.* That the sums, as numbers of float32 (float64 for models of float64), differ by no more than
    C. They are added up in some order before they are rounded, and each order rounds in its own way (Casacuberta,
    Shoemate, Vadhan, Wagaman 2022, "Widespread Underestimation of Sensitivity in Differentially Private Libraries and
    How to Fix It" (CCS)). Where n clipped gradients are added up one by one, the sum is off by ``n**2 u C`` at most, u
    = 2**-24 (float32) or 2**-53 (Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 4.2), so that
    neighbours may differ by ``C (1 + 2 n**2 u)``: of 100 examples by 1.2e-3 C more, or 2e-12 C. Sums over positions
    within products of matrices may be off by more, if their terms cancel: no bound is known for those. If the sums
    differ by ``(1 + r) C``, the noise multiplier is sigma / (1 + r). Nor is it covered how long things take.

    ==============================================  ==========================================================
    edge case                                       outcome
    ==============================================  ==========================================================
    ``noise_multiplier`` 0                          the sums on the grid, without noise: no privacy
    a sum that is not finite                        refused, before any of the step is released
    a sum of more than 2**52 units in an element    refused, likewise: 2**(51 - bits) examples in one place
    a total of zeros                                noise alone
    parts of parameters                             right if all are in one release: it counts the elements
    sigma so small that eta is not below 1e-5       refused
    C moved after a step                            the grid moves with it
    another expected batch size                     the same grid; what is divided has its noise already
    a state of another grid                         refused by `DPOptimizer`
    devices, ranks                                  the same noise, bit by bit
    steps from number 2**24 on                      refused: eta is not bounded for more
    ==============================================  ==========================================================
    """

    secure: bool = True
    bits: int = 0

    def __post_init__(self) -> None:
        if not self.secure:
            raise PrivacyError(
                "exact noise without a cryptographic generator: what its law promises, its bits would not keep",
                remedy="leave secure out, or give True",
            )
        self.bits = self.bits or grids.default_bits(self.expected_batch_size)
        grids.check_grid(self.max_grad_norm, self.bits)

    @property
    def grid(self) -> float:
        """The unit: a power of two."""
        return grids.spacing(self.max_grad_norm, self.bits)

    def units(self, numel: int) -> int:
        """The standard deviation of the noise in units of the grid, for sums of so many elements in all.

        Raises:
            PrivacyError: sigma is too small or too large for the grid.
        """
        if self.noise_multiplier == 0:
            return 0
        s = self._units(self.bits, numel)
        if not _fits(s, numel):
            large = s > LARGEST
            others = [bits for bits in grids.BITS if _fits(self._units(bits, numel), numel)]
            raise PrivacyError(
                f"noise of multiplier {self.noise_multiplier} on {numel} elements and a grid of {self.bits} bits: "
                + ("it does not fit in integers of 64 bits" if large else "it is too coarse to be as good as Gaussian"),
                remedy=f"take {'a smaller' if large else 'a larger'} noise multiplier"
                + (f", or ExactMechanism(..., bits={others[-1]}) as DPOptimizer(mechanism=...)" if others else ""),
            )
        return s

    def _units(self, bits: int, numel: int) -> int:
        unit = Fraction(grids.spacing(self.max_grad_norm, bits))
        sensitivity = Fraction(self.max_grad_norm) / unit + grids.ROUNDINGS * (math.isqrt(numel) + 1)
        return math.ceil(Fraction(self.noise_multiplier) * sensitivity)

    def release(self, release: Release) -> None:
        """See :class:`dpcompile.noise.mechanism.Mechanism`."""
        if release.step >= STEPS:
            raise PrivacyError(
                f"logical step {release.step} with exact noise, whose cost is bounded for {STEPS} steps",
                remedy="train on without exact=True, in a run of its own, and compose both",
            )
        grids.check_grid(self.max_grad_norm, self.bits)
        self._refuse_unfit(release)
        s = self.units(sum(total.numel() for total in release.totals))
        pieces, spans = [], []
        for i, (total, parameter) in enumerate(zip(release.totals, release.parameters, strict=True)):
            for piece, start in pieces_of(total, None if release.runs is None else release.runs[i]):
                pieces.append(piece)
                spans.append(Span(parameter, piece.numel(), start))
        refuse_twice(spans)
        for device in dict.fromkeys(piece.device for piece in pieces):
            own = [i for i, piece in enumerate(pieces) if piece.device == device]
            self._add([pieces[i] for i in own], [spans[i] for i in own], s, release.step, device)

    def _refuse_unfit(self, release: Release) -> None:
        """Every sum is of numbers that fit on the grid; nothing is changed before."""
        largest = grids.LARGEST * self.grid
        reached = [torch.linalg.vector_norm(total, torch.inf) for total in release.totals if total.numel()]
        named = [p for p, total in zip(release.parameters, release.totals, strict=True) if total.numel()]
        for parameter, value in zip(named, [r.item() for r in reached], strict=True):
            if not value <= largest:
                raise PrivacyError(
                    f"the clipped sum of parameter number {parameter} has an element of size {value:g}, and the grid "
                    f"of 2**{math.log2(self.grid):g} ends at {largest:g}",
                    remedy=f"if so many examples are in a step, {self._room_for(value, release)}; a sum that is not "
                    "finite has not been clipped",
                )

    def _room_for(self, value: float, release: Release) -> str:
        """What holds a sum with an element of this size, and the noise."""
        numel, c = sum(total.numel() for total in release.totals), self.max_grad_norm
        found = [b for b in grids.BITS if _fits(self._units(b, numel), numel)]
        if math.isfinite(value):
            found = [b for b in found if value <= grids.LARGEST * grids.spacing(c, b)]
        fewer = [b for b in found if b <= self.bits - 8] or [b for b in found if b < self.bits]
        if not fewer:
            return "take fewer, or exact=False: no grid has room for them and is fine enough for the noise"
        return f"take a grid of fewer bits: ExactMechanism(..., bits={fewer[-1]}) as DPOptimizer(mechanism=...)"

    def _add(self, pieces: list[Tensor], spans: list[Span], s: int, step: int, device: torch.device) -> None:
        """Of pieces that lie on one device."""
        work = torch.device("cpu") if device.type == "mps" else device  # no float64 there
        flat = [piece.contiguous().view(-1) for piece in pieces]
        for i, offset, noise in self._noise(spans, s, step, work):
            part = flat[i][offset : offset + noise.numel()]
            units = grids.to_grid(part.to(work), self.grid).to(torch.int64) + noise
            part.copy_(units.double() * self.grid / self.expected_batch_size)
        for piece, done in zip(pieces, flat, strict=True):
            if not piece.is_contiguous():
                piece.copy_(done.view(piece.shape))

    def _noise(self, spans: list[Span], s: int, step: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        if s:
            return discrete_pieces(self.seed, step=step, spans=spans, s=float(s), device=device)
        zeros = torch.zeros((), dtype=torch.int64, device=device)
        return ((i, 0, zeros.expand(span.numel)) for i, span in enumerate(spans))

    def state_dict(self) -> dict[str, Any]:
        """See :class:`dpcompile.noise.mechanism.Mechanism`."""
        return {**GaussianMechanism.state_dict(self), "grid_bits": self.bits}


def _fits(s: int, numel: int) -> bool:
    return s <= LARGEST and excess(s, numel, STEPS) <= EXCESS


def excess(s: int, numel: int, steps: int) -> float:
    """Eta: how much more discrete Gaussian noise costs than Gaussian noise rounded to integers, at most.

    Args:
        s: standard deviation of the noise, in units.
        numel: elements of a step.
        steps: of the run.

    **Guarantee.** If a run with rounded Gaussian noise is (epsilon, delta)-differentially private, epsilon below 1000,
    the same run with this noise is so for ``epsilon + eta`` and ``exp(eta) delta + exp(epsilon - 1990)``, with ``eta =
    (N + 2000) / s**2`` for N = ``numel * steps`` numbers.

    Let ``f(x) = exp(-x**2 / 2 s**2)``, I its integral, Z its sum over the integers, p(k) = f(k) / Z the law of this
    noise, and q(k), of the other one, the integral of f / I from k - 1/2 to k + 1/2. Z is I or more by Poisson's
    summation, and ``log(Z / I)`` below ``3 exp(-2 pi**2 s**2)``, which is no number here. ``q(k) I / f(k)`` is the
    integral of ``2 cosh(k t / s**2) exp(-t**2 / 2 s**2)`` over t from 0 to 1/2, so it lies between ``exp(-1 / 8 s**2)``
    and ``exp(k**2 / 8 s**4)``, as ``1 <= cosh x <= exp(x**2 / 2)``. Hence ``p <= exp(1 / 8 s**2) q`` everywhere, and
    ``q <= exp(k**2 / 8 s**4 + log(Z / I)) p``.

    A run is a function of its N noises, of its draws and of the data. So with P and Q for the two noises, P' and Q' on
    a neighbouring dataset, ``P(S) <= exp(N / 8 s**2) Q(S)``, and ``Q'(S) <= exp(b) P'(S) + exp(-x)``, where the squares
    of the noises add up to ``8 s**4 b`` at most but with probability ``exp(-x)``. A rounded X has the square ``2 X**2 +
    1/2`` at most, and the squares of N of them, in units of s, add up to more than ``2 N + 3 x`` with probability
    ``exp(-x)`` at most (Laurent and Massart 2000, "Adaptive estimation of a quadratic functional by model selection",
    lemma 1, with ``2 sqrt(N x) <= N + x``). So ``b = (4 N + 6 x + N / 2 s**2) / 8 s**2`` will do, and with ``N / 8
    s**2`` it is below ``(N + x) / s**2``. Take x = 2000, and ``P(S) <= exp(N / 8 s**2) (exp(epsilon) Q'(S) + delta)``.
    """
    return (numel * steps + _TAIL) / s**2 if s >= 1024 else math.inf
