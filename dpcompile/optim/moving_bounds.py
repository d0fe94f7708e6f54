"""C of the optimizer, which is the model's and the mechanism's: set by hand, by a schedule, or by votes."""

from __future__ import annotations

import struct
import zlib

from torch import Tensor

from dpcompile.clipping.groups import Bounds
from dpcompile.module import Engine
from dpcompile.noise.adaptive import AdaptiveGaussianMechanism
from dpcompile.noise.mechanism import Mechanism
from dpcompile.optim.correlated import refuse_move
from dpcompile.optim.quantiles import refuse_other_groups, votes_of_all

__all__ = ["MovesBounds"]


class MovesBounds:
    """What moves C, in one place, so that model and mechanism always have the same.

    Attributes:
        engine: of the model.
        mechanism: what releases the sums.
        logical_step: how many draws of noise have been used up.
    """

    mechanism: Mechanism
    engine: Engine
    logical_step: int

    @property
    def max_grad_norm(self) -> float:
        """C, that the model clips to and the mechanism adds noise for; a new one counts from the next forward on."""
        return self.engine.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self.move_max_grad_norm(value)

    def move_max_grad_norm(self, value: float) -> None:
        """Take another C, of model and noise, from the next forward on; nothing is compiled for it.

        Raises:
            PrivacyError: within a logical step, or a C that cannot be (:class:`dpcompile.runtime.bound.ClipBound`).
        """
        refuse_move(self.mechanism, self.logical_step, "max_grad_norm", self.engine.max_grad_norm, value)
        self.move_bounds(self.engine.clip.now.times(value))

    def move_bounds(self, bounds: Bounds) -> None:
        """The same, with that of each clip group."""
        self.engine.move_bounds(bounds)
        self.mechanism.max_grad_norm = self.engine.max_grad_norm
        if isinstance(self.mechanism, AdaptiveGaussianMechanism):
            self.mechanism.shares = self.engine.clip.now.shares
        self.note_numbers()

    def follow_mechanism(self) -> None:
        """Take C as a mechanism has it that loaded a state."""
        bounds, mechanism = self.engine.clip.now.times(self.mechanism.max_grad_norm), self.mechanism
        if isinstance(mechanism, AdaptiveGaussianMechanism):
            bounds = mechanism.bounds
        if bounds != self.engine.clip.now:
            self.move_bounds(bounds)

    def watch_quantile(self) -> None:
        """Let examples vote on C, if the mechanism moves it; else clip groups have equal parts of it.

        Raises:
            PrivacyError: the model's clipping is not a function of norms over C, or of other groups.
        """
        now, self.engine.votes = self.engine.clip.now, isinstance(self.mechanism, AdaptiveGaussianMechanism)
        if isinstance(self.mechanism, AdaptiveGaussianMechanism):
            refuse_other_groups(self.mechanism, self.engine)
            first = self.mechanism.clip.initial
            self.move_bounds(self.mechanism.bounds.times(now.total if first is None else first))
            self.mechanism.first = self.mechanism.max_grad_norm
        elif now.shares:
            self.engine.move_bounds(Bounds(now.total))

    def adapt(self, votes: Tensor | None, step: int) -> None:
        """After a step, whose examples voted like this (None: there was none): take the next C, if it moves."""
        if isinstance(self.mechanism, AdaptiveGaussianMechanism):
            every = votes_of_all(self.engine, votes, len(self.mechanism.shares))
            self.move_bounds(self.mechanism.next_bounds(every, step))

    def note_numbers(self) -> None:
        """For the comparison with other ranks, which every backward makes."""
        bounds = self.engine.clip.now
        numbers = (bounds.total, self.mechanism.noise_multiplier, *bounds.shares.values())
        self.engine.numbers = zlib.crc32(struct.pack(f"<{len(numbers)}d", *numbers))
