"""The Gaussian mechanism that also releases how many gradients are within C, and moves C by it.

Source: Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially Private Learning with Adaptive Clipping" (NeurIPS),
algorithm 1 and theorem 1, with the constant expected batch size in the place of the number of users. With a C for each
of several clip groups: He et al. 2023, "Exploring the Limits of Differentially Private Deep Learning with Group-wise
Clipping" (ICLR).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpcompile.accounting.arguments import number
from dpcompile.clipping.groups import Bounds
from dpcompile.errors import PrivacyError
from dpcompile.noise.counter import Stream
from dpcompile.noise.mechanism import GaussianMechanism
from dpcompile.noise.normal import gaussian

__all__ = ["AdaptiveClip", "AdaptiveGaussianMechanism"]

_SHARE = 1 / 20  # of the expected batch size: the noise of the count (section 3.1)
_LEAST = 2.0  # times sigma, of one count: its noise in small batches; that of the sums is then 3.3 % more
_REACH = 2.0**30  # times the first C, and its inverse: how far C may go
_MOST = 40.0  # of the logarithm of C in one step: more than all of its reach


@dataclass(frozen=True, slots=True)
class AdaptiveClip:
    """C follows a quantile of the examples' gradient norms.

    After every step ``C *= exp(-learning_rate * (share - quantile))``, where ``share`` is the noised part of the step's
    examples whose gradient was within C. Under ``clipping="per_layer"`` and ``"per_block"`` each layer or block has a C
    of its own, that follows the quantile of its own norms.

    Args:
        quantile: the part of the examples that is to be within C, in (0, 1).
        learning_rate: of C, above 0; 0.2 moves it by a fifth where all examples are on one side.
        initial: the first C; None: that of the model, 1.0 if it is still to be compiled. Each of k layers or blocks
            begins with C/√k.
        count_noise: standard deviation of the noise on the count of examples within C; more than half of sigma, times
            √k where there are k counts. None: a twentieth of the expected batch size, and four times that least.

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
    """Sums and counts in one Gaussian mechanism; see :class:`dpcompile.noise.mechanism.Mechanism` for the attributes.

    There are K counts, one for each clip group: K is 1 under flat clipping. An example adds a vector of norm C at most
    to the sums, where C is the root of the sum of the groups' ``C_k**2``, and 1/2 or -1/2 to each count. Divided by the
    standard deviations ``C s`` and ``count_noise`` of their noise, all together have the squared norm ``1 / s**2 + K /
    (2 count_noise)**2`` at most. With s such that this is ``1 / noise_multiplier**2``, a release costs what one of the
    sums alone does.

    The sums of all groups have noise of the same size, as under per-layer clipping with a fixed C. Noise by the group's
    own bound, ``s C_k √K``, would cost the same: it would be less where C_k is small, and its sum of squares over the
    parameters more or less, as those are spread over groups. One size goes with one C, whatever else is to be clipped.

    Attributes:
        clip: how C moves.
        first: C at the beginning; 0: as it is.
        shares: clip group -> its own bound, as a part of C (:class:`dpcompile.clipping.groups.Bounds`); one group: "".

    **Guarantee.** The steps released so far, and all C that came of them, cost what :meth:`event` says, composed.

    ===============================================  =====================================================
    edge case                                        outcome
    ===============================================  =====================================================
    sigma 1, ``count_noise`` 12.8                    the noise of the sums is C times 1.00076
    the same, and K groups                           times ``(1 - K / 655.36) ** -0.5``
    sigma 0                                          no noise on either: epsilon is infinite
    ``count_noise`` half of sigma √K or less         refused: nothing would be left for the sums
    no example in a step, or no count                0 votes, and noise
    a group without a gradient in a step             its norms are 0: all examples are within its bound
    C, or that of a group, far from the first one    stays within a factor of 2**30
    a restored state                                 C as it was, group by group
    ===============================================  =====================================================
    """

    clip: AdaptiveClip = field(default_factory=AdaptiveClip)
    first: float = 0.0
    shares: Mapping[str, float] = field(default_factory=lambda: {"": 1.0})

    def __post_init__(self) -> None:
        self.first = self.first or self.max_grad_norm
        if not self.shares:
            raise PrivacyError("a mechanism without clip groups", remedy="leave shares out: all clipped as one group")
        _ = self.bounds, self.std  # raise

    @property
    def bounds(self) -> Bounds:
        """C, and that of each group."""
        return Bounds(self.max_grad_norm, self.shares)

    @property
    def count_std(self) -> float:
        """Standard deviation of the noise on each of the counts."""
        if self.noise_multiplier == 0:
            return 0.0
        given, least = self.clip.count_noise, _LEAST * math.sqrt(len(self.shares)) * self.noise_multiplier
        return max(_SHARE * self.expected_batch_size, least) if given is None else given

    @property
    def std(self) -> float:
        """Standard deviation of the noise on the sums."""
        sigma = self.noise_multiplier
        if sigma == 0:
            return 0.0
        counts = len(self.shares)
        left = 1 - counts * (sigma / (2 * self.count_std)) ** 2
        if not left > 0:
            times, alone = ("", "the count") if counts == 1 else (f" times √{counts}", f"{counts} counts")
            raise PrivacyError(
                f"count_noise {self.count_std} is not more than half of the noise multiplier {sigma}{times}: {alone} "
                "alone would cost more privacy than the whole step may",
                remedy="leave count_noise out, or take a twentieth of the expected batch size or more",
            )
        return sigma * self.max_grad_norm / math.sqrt(left)

    def next_bounds(self, votes: Sequence[float], step: int) -> Bounds:
        """C of the steps to come, and that of each group.

        Args:
            votes: for each group, in their order, how many examples of the step were within its bound, less how many
                were not.
            step: the logical step, whose counts have been released for no other votes.
        """
        drawn = gaussian(
            self.seed,
            step=step,
            parameter=0,
            numel=len(self.shares),
            dtype=torch.float64,
            secure=self.secure,
            stream=Stream.VOTES,
        )
        groups = zip(self.shares.items(), votes, drawn.tolist(), strict=True)
        return Bounds.each({group: self._moved(part, own, z) for (group, part), own, z in groups})

    def _moved(self, part: float, votes: float, z: float) -> float:
        """The next bound of a group that has this part of C."""
        share = 0.5 + (votes / 2 + self.count_std * z) / self.expected_batch_size
        change = -self.clip.learning_rate * (share - self.clip.quantile)
        moved = part * self.max_grad_norm * math.exp(min(max(change, -_MOST), _MOST))
        first = self.first / math.sqrt(len(self.shares))
        return min(max(moved, first / _REACH), first * _REACH)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`dpcompile.noise.mechanism.Mechanism`."""
        of_groups = {} if set(self.shares) == {""} else {"clip_shares": dict(self.shares)}
        return {**GaussianMechanism.state_dict(self), "max_grad_norm": self.max_grad_norm, **of_groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`dpcompile.noise.mechanism.Mechanism`; of a state without a C the sums go on with this one."""
        GaussianMechanism.load_state_dict(self, state)
        saved, shares = state.get("max_grad_norm"), state.get("clip_shares")
        self.max_grad_norm = self.max_grad_norm if saved is None else float(saved)
        self.shares = self.shares if shares is None else {group: float(shares[group]) for group in self.shares}
