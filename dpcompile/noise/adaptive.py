"""The Gaussian mechanism that also releases how many gradients are within C, and moves C by it.

Source: Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially Private Learning with Adaptive Clipping" (NeurIPS),
algorithm 1 and theorem 1, with the constant expected batch size in the place of the number of users.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dpcompile.accounting.arguments import number
from dpcompile.errors import PrivacyError
from dpcompile.noise.counter import Stream
from dpcompile.noise.mechanism import GaussianMechanism
from dpcompile.noise.normal import gaussian

__all__ = ["AdaptiveClip", "AdaptiveGaussianMechanism"]

_SHARE = 1 / 20  # of the expected batch size: the noise of the count (section 3.1)
_LEAST = 2.0  # times sigma: the noise of the count in small batches; that of the sums is then 3.3 % more
_REACH = 2.0**30  # times the first C, and its inverse: how far C may go
_MOST = 40.0  # of the logarithm of C in one step: more than all of its reach


@dataclass(frozen=True, slots=True)
class AdaptiveClip:
    """C follows a quantile of the examples' gradient norms.

    After every step ``C *= exp(-learning_rate * (share - quantile))``, where ``share`` is the noised part of the step's
    examples whose gradient was within C.

    Args:
        quantile: the part of the examples that is to be within C, in (0, 1).
        learning_rate: of C, above 0; 0.2 moves it by a fifth where all examples are on one side.
        initial: the first C; None: that of the model, 1.0 if it is still to be compiled.
        count_noise: standard deviation of the noise on the count of examples within C; more than half of sigma. None: a
            twentieth of the expected batch size, and twice sigma at least.

    Raises:
        PrivacyError: one of them is out of its range.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    initial: float | None = None
    count_noise: float | None = None

    def __post_init__(self) -> None:
        if not 0 < number(self.quantile) < 1:
            raise PrivacyError(f"quantile is {self.quantile!r}, not in (0, 1)", remedy="0.5 is a common choice")
        for name in ("learning_rate", "initial", "count_noise"):
            value = getattr(self, name)
            if (value is not None or name == "learning_rate") and not 0 < number(value) < math.inf:
                raise PrivacyError(f"{name} of AdaptiveClip is {value!r}", remedy="give a finite number above 0")


@dataclass(slots=True)
class AdaptiveGaussianMechanism(GaussianMechanism):
    """Sums and count in one Gaussian mechanism; see :class:`dpcompile.noise.mechanism.Mechanism` for the attributes.

    An example adds a vector of norm C at most to the sums, and 1/2 or -1/2 to the count. Divided by the standard
    deviations ``C s`` and ``count_noise`` of their noise, both together have the squared norm ``1 / s**2 + 1 / (2
    count_noise)**2`` at most. With s such that this is ``1 / noise_multiplier**2``, a release costs what one of the
    sums alone does.

    Attributes:
        clip: how C moves.
        first: C at the beginning; 0: as it is.

    **Guarantee.** The steps released so far, and all C that came of them, cost what :meth:`event` says, composed.

    ===============================================  =====================================================
    edge case                                        outcome
    ===============================================  =====================================================
    sigma 1, ``count_noise`` 12.8                    the noise of the sums is C times 1.00076
    sigma 0                                          no noise on either: epsilon is infinite
    ``count_noise`` half of sigma or less            refused: nothing would be left for the sums
    no example in a step, or no count                0 votes, and noise
    C far from the first one                         stays within a factor of 2**30
    a restored state                                 C as it was
    ===============================================  =====================================================
    """

    clip: AdaptiveClip = field(default_factory=AdaptiveClip)
    first: float = 0.0

    def __post_init__(self) -> None:
        self.first = self.first or self.max_grad_norm
        _ = self.std  # raises

    @property
    def count_std(self) -> float:
        """Standard deviation of the noise on the count."""
        if self.noise_multiplier == 0:
            return 0.0
        given = self.clip.count_noise
        return max(_SHARE * self.expected_batch_size, _LEAST * self.noise_multiplier) if given is None else given

    @property
    def std(self) -> float:
        """Standard deviation of the noise on the sums."""
        sigma = self.noise_multiplier
        if sigma == 0:
            return 0.0
        left = 1 - (sigma / (2 * self.count_std)) ** 2
        if not left > 0:
            raise PrivacyError(
                f"count_noise {self.count_std} is not more than half of the noise multiplier {sigma}: the count alone "
                "would cost more privacy than the whole step may",
                remedy="leave count_noise out, or take a twentieth of the expected batch size or more",
            )
        return sigma * self.max_grad_norm / math.sqrt(left)

    def next_bound(self, votes: float, step: int) -> float:
        """C of the steps to come.

        Args:
            votes: how many examples of the step were within C, less how many were not.
            step: the logical step, whose count has been released for no other votes.
        """
        drawn = gaussian(
            self.seed,
            step=step,
            parameter=0,
            numel=1,
            dtype=torch.float64,
            secure=self.secure,
            stream=Stream.VOTES,
        )
        share = 0.5 + (votes / 2 + self.count_std * float(drawn)) / self.expected_batch_size
        change = -self.clip.learning_rate * (share - self.clip.quantile)
        moved = self.max_grad_norm * math.exp(min(max(change, -_MOST), _MOST))
        return min(max(moved, self.first / _REACH), self.first * _REACH)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`dpcompile.noise.mechanism.Mechanism`."""
        return {**GaussianMechanism.state_dict(self), "max_grad_norm": self.max_grad_norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`dpcompile.noise.mechanism.Mechanism`; of a state without a C the sums go on with this one."""
        GaussianMechanism.load_state_dict(self, state)
        saved = state.get("max_grad_norm")
        self.max_grad_norm = self.max_grad_norm if saved is None else float(saved)
