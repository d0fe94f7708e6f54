"""Banded matrix factorization: noise that is correlated over b steps, so that less of it adds up in the weights.

Sources: Choquette-Choo et al., "(Amplified) Banded Matrix Factorization: A unified approach to private training"
(NeurIPS 2023), algorithms 1, 2 and 9, theorem 4; McKenna, "Scaling up the Banded Matrix Factorization Mechanism for
Differentially Private ML" (ICLR 2025), for Toeplitz matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpcompile.errors import PrivacyError
from dpcompile.noise.correlation import CorrelatedMechanism
from dpcompile.noise.mechanism import GaussianMechanism, Release
from dpcompile.noise.rows import Rows, places_of
from dpcompile.noise.strategy import check_coefficients, default_restart

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BandedMechanism"]


class BandedMechanism(CorrelatedMechanism):
    """At step t the sum plus ``sigma * max_grad_norm * y[t]``, with ``C y = z`` and z independent normal numbers.

    C is lower-triangular, with ``bands`` bands and columns of norm at most 1, and every example is in at most one of
    ``bands`` consecutive steps: `PoissonLoader` with the same ``bands`` sees to that, and `DPOptimizer` to that row t
    of the noise goes with draw t of the loader.

    C falls into blocks of ``restart`` steps that share nothing. **Why:** y[t] depends on z of all steps of its block
    before (C is banded, its inverse is not), so it cannot be drawn by itself. Kept in a checkpoint, ``bands - 1`` rows
    would be ``bands - 1`` times the model. So nothing is kept: of the seed, a resumed run draws the rows of its block
    again, at most ``restart`` of them, on any number of ranks, each its own elements. The price is that errors do not
    cancel from block to block: 5 per cent more at most (:func:`dpcompile.noise.strategy.default_restart`), and none in
    runs that are shorter. In memory ``bands - 1`` rows are held: as many times the parameters.

    Args:
        noise_multiplier: sigma; 0: no noise.
        max_grad_norm: the model's, which clips to it.
        expected_batch_size: the constant that divides the sums.
        seed: of the noise, a secret.
        secure: whether the noise is cryptographic.
        coefficients: c, of the first column of C, divided by their norm here; their number is ``bands``. See
            :func:`dpcompile.noise.strategy.optimal_coefficients`. A single one: the Gaussian mechanism.
        restart: steps of a block; None: 128 times ``bands - 1``.

    Raises:
        PrivacyError: coefficients that are none, or a ``restart`` below 1.

    **Guarantee.** With such a loader and in such order, what is released up to step t - 1 costs ``rounds(t, bands)``
    times :meth:`event` (:func:`dpcompile.accounting.events.rounds`), for "zero_out" and "add_remove". Noise is a
    function of seed, step, parameter and element, and of coefficients and ``restart``. It is a statement about real
    numbers, as :func:`dpcompile.noise.mechanism.privatize_`'s.

    ==================================================  ==================================================
    edge case                                           outcome
    ==================================================  ==================================================
    ``bands`` 1                                         :class:`GaussianMechanism`, bit by bit
    ``noise_multiplier`` 0                              the exact mean: no privacy
    a step left out                                     its row is never released: costs no more
    a run of any length, or stopped early               columns that are cut off have a smaller norm
    sigma, C or the matrix changed after the first row  refused: no bound is known
    another divisor                                     right: what is divided has its noise already
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
        coefficients: Sequence[float],
        restart: int | None = None,
    ) -> None:
        super().__init__(noise_multiplier, max_grad_norm, expected_batch_size, seed, secure)
        self.coefficients, self.restart = check_matrix(coefficients, restart)
        self._rows: Rows | None = None

    @property
    def bands(self) -> int:
        """b: over how many steps noise is correlated."""
        return len(self.coefficients)

    @property
    def matrix(self) -> Any:
        """See :class:`dpcompile.noise.correlation.CorrelatedMechanism`."""
        return self.coefficients, self.restart

    @property
    def std(self) -> float:
        """What y is multiplied by."""
        return self.noise_multiplier * self.max_grad_norm

    def release(self, release: Release) -> None:
        """See :class:`dpcompile.noise.mechanism.Mechanism`."""
        if self.bands == 1 or not self.std > 0:
            self.begin()
            self._independent.release(release)
            return
        for piece, row in self.noise(release):
            piece.add_(row.view(piece.shape), alpha=self.std)
        for total in release.totals:
            total.div_(self.expected_batch_size)

    def noise(self, release: Release) -> list[tuple[Tensor, Tensor]]:
        """Views of the totals, and for each y of its elements, to be read before the next call; ``bands`` above 1."""
        self.begin()
        if self._rows is None:
            self._rows = Rows(self.coefficients, self.restart, self.seed, self.secure)
        pieces, places = places_of(release)
        return list(zip(pieces, self._rows.at(release.step, places), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """See :class:`dpcompile.noise.mechanism.Mechanism`; no noise is in it."""
        return {
            **self.numbers(),
            "coefficients": list(self.coefficients),
            "restart": self.restart,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`dpcompile.noise.mechanism.Mechanism`: the matrix is the saved run's."""
        self.coefficients, self.restart = check_matrix(state["coefficients"], state["restart"])
        self.seed = state["seed"]
        self._rows = None
        self.go_on(state)

    @property
    def _independent(self) -> GaussianMechanism:
        """The mechanism of the same numbers whose noise is not correlated."""
        return GaussianMechanism(
            self.noise_multiplier, self.max_grad_norm, self.expected_batch_size, self.seed, self.secure
        )


def check_matrix(coefficients: Sequence[float], restart: int | None) -> tuple[tuple[float, ...], int]:
    """Coefficients of norm 1, and the rows of a block."""
    c = check_coefficients(coefficients)
    restart = default_restart(len(c)) if restart is None else restart
    if isinstance(restart, bool) or not isinstance(restart, int) or restart < 1:
        raise PrivacyError(f"restart is {restart!r}", remedy="give an integer, 1 or more, or leave it out")
    return c, restart
