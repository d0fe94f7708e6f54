"""Noise that is correlated over a whole pass, by a few buffers: for data that are taken in turn.

Sources: see `buffers`. ``python -m benchmarks.mechanisms --in-turn`` prints how much less of it
adds up in the weights than of that in a tree (`tree`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpcompile.errors import PrivacyError
from dpcompile.noise.buffers import BufferedRows, Powers, optimal_powers, saved_powers
from dpcompile.noise.correlation import CorrelatedMechanism
from dpcompile.noise.counter import STEPS
from dpcompile.noise.mechanism import Release
from dpcompile.noise.rows import places_of

__all__ = ["BufferedMechanism"]


class BufferedMechanism(CorrelatedMechanism):
    """At step t the sum plus ``sigma * max_grad_norm * |c| * y[t]``, with ``C y = z`` and z independent normal numbers.

    C is lower-triangular and Toeplitz, with coefficients c of :class:`dpcompile.noise.buffers.Powers`, in blocks of one
    pass, which share nothing. Rows are made from as many buffers as there are powers, each as large as the model;
    nothing of them is saved: of the seed, a resumed run draws the rows of its pass again.

    Args:
        noise_multiplier: sigma, of one pass as a whole; 0: no noise.
        max_grad_norm: C_clip, the model's, which clips to it.
        expected_batch_size: the constant that divides the sums.
        seed: of the noise, a secret.
        secure: whether the noise is cryptographic.
        steps: of a pass, T, as in :class:`dpcompile.noise.tree.TreeMechanism`.
        powers: of C; None: :func:`dpcompile.noise.buffers.optimal_powers` of T.

    Raises:
        PrivacyError: steps that are no number of steps.

    **Guarantee.** With a loader whose examples come again after T steps, not before, and row t of the noise going with
    draw t, what is released up to step t - 1 costs ``rounds(t, T)`` times :meth:`event`, for "zero_out" and
    "add_remove": that of :func:`dpcompile.accounting.events.rounds`, for C over ``|c|``, whose columns have norm 1 at
    most, with as many bands as a block has rows. It is a statement about real numbers, as
    :func:`dpcompile.noise.mechanism.privatize_`'s.

    ==================================================  ==================================================
    edge case                                           outcome
    ==================================================  ==================================================
    a pass of one step                                  the Gaussian mechanism of sigma
    a step left out                                     its row is never released: costs no more
    a run that stops within a pass                      the pass counts whole
    sigma, C_clip, C or the steps of a pass changed     refused: no bound is known
    ==================================================  ==================================================
    """

    def __init__(
        self,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        seed: int,
        secure: bool = False,
        *,
        steps: int,
        powers: Powers | None = None,
    ) -> None:
        super().__init__(noise_multiplier, max_grad_norm, expected_batch_size, seed, secure)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < STEPS:
            raise PrivacyError(f"steps of a pass is {steps!r}", remedy="give an integer, 1 or more")
        self.steps, self.powers = steps, optimal_powers(steps) if powers is None else powers
        self._rows: BufferedRows | None = None

    @property
    def bands(self) -> int:
        """T: noise of steps that lie so far apart is added to no common example."""
        return self.steps

    @property
    def matrix(self) -> Any:
        """See :class:`dpcompile.noise.correlation.CorrelatedMechanism`."""
        return self.steps, self.powers

    @property
    def std(self) -> float:
        """What y is multiplied by."""
        return self.noise_multiplier * self.max_grad_norm * self.powers.norm(self.steps)

    def release(self, release: Release) -> None:
        """See :class:`dpcompile.noise.mechanism.Mechanism`."""
        self.begin()
        if self.std > 0:
            if self._rows is None:
                self._rows = BufferedRows(self.powers, self.steps, self.seed, self.secure)
            pieces, places = places_of(release)
            for piece, row in zip(pieces, self._rows.at(release.step, places), strict=True):
                piece.add_(row.view(piece.shape), alpha=self.std)
        for total in release.totals:
            total.div_(self.expected_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`dpcompile.noise.mechanism.Mechanism`; no noise is in it."""
        powers = {"weights": list(self.powers.weights), "decays": list(self.powers.decays)}
        return {**self.numbers(), "in_turn": "buffers", "powers": powers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`dpcompile.noise.mechanism.Mechanism`: the matrix is the saved run's."""
        self.powers = saved_powers(state)
        self.seed, self._rows = state["seed"], None
        self.go_on(state)
