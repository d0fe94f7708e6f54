"""Mechanisms: how the clipped sums of one logical step are released, and what that costs.

:class:`Mechanism` is what `DPOptimizer` needs of one. Here is the Gaussian mechanism, in `banded` one whose noise is
correlated. Source: Dwork and Roth 2014, appendix A; Abadi et al. 2016, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dpcompile.accounting.events import sampled_gaussian
from dpcompile.noise.counter import Stream
from dpcompile.noise.normal import add_gaussian_

if TYPE_CHECKING:
    from dp_accounting import DpEvent

__all__ = ["GaussianMechanism", "Mechanism", "Release", "add_noise_", "pieces_of", "privatize_"]


@dataclass(frozen=True, slots=True)
class Release:
    """The clipped sums of one logical step, to be made private in place.

    Attributes:
        totals: clipped sums, float32 or wider, each of its parameter's shape, or a part of it.
        parameters: their indices in the model, no two equal.
        step: the logical step.
        runs: for parts of parameters: where each total's elements lie in its parameter (:func:`privatize_`); None:
            totals are whole.
    """

    totals: Sequence[Tensor]
    parameters: Sequence[int]
    step: int
    runs: Sequence[Sequence[tuple[int, int]]] | None = None


class Mechanism(Protocol):
    """What turns clipped sums into private mean gradients.

    Attributes:
        noise_multiplier: sigma; 0: no noise.
        max_grad_norm: C: by how much all sums together change, in L2 norm, when one example is taken out.
        expected_batch_size: the constant that divides the sums.
        seed: of the noise, a secret.
        secure: whether the noise is cryptographic.
        bands: b: noise of steps that lie b or more apart is added to no common example (:mod:`dpcompile.noise.banded`);
            1: noise is independent from step to step.
    """

    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: float
    seed: int
    secure: bool

    @property
    def bands(self) -> int:
        """See the class."""
        ...

    def release(self, release: Release) -> None:
        """Put private mean gradients in the place of the totals.

        **Guarantee.** The steps released so far cost what :meth:`event` says, composed: once for each step, or with
        ``bands`` once for each ``bands`` steps that were begun (:func:`dpcompile.accounting.events.rounds`).
        """
        ...

    def event(self, sample_rate: float) -> DpEvent:
        """What one release costs, of a Poisson sample of this rate."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs so that no noise is drawn twice; plain numbers, and the same on all ranks.

        ``seed``, ``noise_multiplier``, ``expected_batch_size`` and ``secure`` are among them.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the mechanism stood that gave this state, whose numbers, the seed apart, are these."""
        ...


@dataclass(slots=True)
class GaussianMechanism:
    """Independent Gaussian noise in every step (:func:`privatize_`); see :class:`Mechanism` for the attributes."""

    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: float
    seed: int
    secure: bool = False

    @property
    def bands(self) -> int:
        """Noise is independent from step to step."""
        return 1

    @property
    def std(self) -> float:
        """Standard deviation of the noise on the sums."""
        return self.noise_multiplier * self.max_grad_norm

    def release(self, release: Release) -> None:
        """See :class:`Mechanism`."""
        privatize_(
            release.totals,
            parameters=release.parameters,
            runs=release.runs,
            std=self.std,
            expected_batch_size=self.expected_batch_size,
            seed=self.seed,
            step=release.step,
            secure=self.secure,
        )

    def event(self, sample_rate: float) -> DpEvent:
        """See :class:`Mechanism`."""
        return sampled_gaussian(self.noise_multiplier, sample_rate)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Mechanism`."""
        return {
            "seed": self.seed,
            "noise_multiplier": self.noise_multiplier,
            "expected_batch_size": self.expected_batch_size,
            "secure": self.secure,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Mechanism`: the noise of a step is a function of the seed and the step."""
        self.seed = state["seed"]


def privatize_(
    totals: Sequence[Tensor],
    *,
    parameters: Sequence[int],
    runs: Sequence[Sequence[tuple[int, int]]] | None = None,
    std: float,
    expected_batch_size: float,
    seed: int,
    step: int,
    secure: bool = False,
) -> None:
    """Turn clipped sums into private mean gradients, in place: ``(total + std * noise) / expected_batch_size``.

    Args:
        totals: clipped sums, float32 or wider, each of its parameter's shape, or a part of it.
        parameters: their indices in the model, no two equal.
        runs: for parts of parameters: where each total's elements, row by row, lie in its parameter, flattened, as
            ``(first, how many)``. A total of several runs is contiguous. By default totals are whole.
        std: standard deviation of the noise, sigma * C; 0 draws none.
        expected_batch_size: a constant, never the drawn size.
        seed: of the noise.
        step: the logical step.
        secure: ChaCha20 instead of Philox.

    **Guarantee.** If all ``totals`` together change by at most C in L2 norm when one example is taken out, the
    result is the Gaussian mechanism of noise multiplier ``std / C``, provided that (seed, step) was used for no other
    release. That is a statement about real numbers: floating-point sums are rounded (Mironov 2012).

    =======================================  ==============================================
    edge case                                outcome
    =======================================  ==============================================
    a total of zeros                         noise alone
    ``std`` 0                                the exact mean: no privacy
    a total of float16 or bfloat16           PrivacyError: the noise would be rounded away
    not finite total                         stays so: clipping gives such examples weight 0
    =======================================  ==============================================
    """
    if not std > 0:
        for total in totals:
            total.div_(expected_batch_size)
        return
    release = Release(totals, parameters, step, runs)
    add_noise_(release, std=std, seed=seed, number=step, secure=secure, divisor=expected_batch_size)


def add_noise_(
    release: Release,
    *,
    std: float,
    seed: int,
    number: int,
    secure: bool,
    divisor: float = 1.0,
    stream: Stream = Stream.GRADIENT,
) -> None:
    """Add ``std`` times the noise of this number to the totals, in place, and divide them.

    Args:
        release: the totals; its step has no part in it.
        std: of either sign.
        seed: see :func:`dpcompile.noise.normal.add_gaussian_`, as for the rest.
        number: in the place of its ``step``.
        secure: "
        divisor: "
        stream: "
    """
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, int, int]]] = {}
    for i, (total, parameter) in enumerate(zip(release.totals, release.parameters, strict=True)):
        for piece, start in pieces_of(total, None if release.runs is None else release.runs[i]):
            groups.setdefault((piece.device, piece.dtype), []).append((piece, parameter, start))
    for members in groups.values():
        add_gaussian_(
            [piece for piece, _, _ in members],
            parameters=[parameter for _, parameter, _ in members],
            starts=[start for _, _, start in members],
            std=std,
            seed=seed,
            step=number,
            secure=secure,
            divisor=divisor,
            stream=stream,
        )


def pieces_of(total: Tensor, runs: Sequence[tuple[int, int]] | None) -> list[tuple[Tensor, int]]:
    """Views of a total, one for each run, and the index of their first element."""
    if runs is None:
        return [(total, 0)]
    lengths = [length for _, length in runs]
    assert sum(lengths) == total.numel(), "every element has a place in its parameter"
    parts = [total] if len(runs) == 1 else total.view(-1).split(lengths) if runs else []
    return [(part, start) for part, (start, _) in zip(parts, runs, strict=True)]
