"""What a step costs: as dp-accounting has it, and as the plain numbers that are saved and compared.

The one file that knows which events steps are: a mechanism with another kind of noise adds its own here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpcompile.errors import PrivacyError

if TYPE_CHECKING:  # it takes as long to import as the rest of the package
    from dp_accounting import DpEvent

__all__ = ["rounds", "sampled_gaussian", "sampled_gaussian_of"]


def rounds(steps: int, bands: int) -> int:
    """As how many steps of DP-SGD the first ``steps`` count: ``ceil(steps / bands)``.

    Args:
        steps: logical steps, draws that were skipped among them.
        bands: b of the mechanism and of the loader; 1: every step counts.

    **Guarantee.** Let C be lower-triangular with b bands and columns of norm at most 1, examples be dealt out to b
    parts without regard to what they are, and step t be a Poisson sample of rate q of part t mod b. Then what
    :class:`dpcompile.noise.banded.BandedMechanism` released up to step t - 1 has the privacy loss of ``rounds(t, b)``
    Gaussian mechanisms of the same noise multiplier on Poisson samples of rate q, composed, for "zero_out" and
    "add_remove" (Choquette-Choo et al. 2023, theorem 4 and algorithm 2).

    For: what is released tells, and is told by, the rows of C G + sigma z, with G the sums of all steps. An example of
    part j may be in steps j, j + b, ... alone. Its gradient g of step j + ib, computed from what was released before,
    enters rows j + ib up to j + (i + 1) b - 1, as c[0] g, c[1] g, ..., together of norm |g| at most, and no other of
    its gradients enters these. So each such group of rows, begun or complete, is a Gaussian mechanism on a Poisson
    sample, given those before; a part has at most ``rounds(t, b)`` groups.
    """
    return -(-steps // bands)


def sampled_gaussian(noise_multiplier: float, sample_rate: float) -> DpEvent:
    """The event of one such step."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    return PoissonSampledDpEvent(float(sample_rate), GaussianDpEvent(float(noise_multiplier)))


def sampled_gaussian_of(event: DpEvent) -> tuple[float, float]:
    """Sigma and q of an event.

    Raises:
        PrivacyError: it is another one, of which the accountant knows no bound.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    if isinstance(event, PoissonSampledDpEvent) and isinstance(event.event, GaussianDpEvent):
        return float(event.event.noise_multiplier), float(event.sampling_probability)
    raise PrivacyError(
        f"{event!r} cannot be counted: it is no Gaussian mechanism on a Poisson sample",
        remedy="count it with dp_accounting itself, and the steps of dpcompile's mechanism here",
    )
