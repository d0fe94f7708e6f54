"""What a step costs: as dp-accounting has it, and as the plain numbers that are saved and compared.

The one file that knows which events steps are: a mechanism with another kind of noise adds its own here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpcompile.errors import PrivacyError

if TYPE_CHECKING:  # it takes as long to import as the rest of the package
    from dp_accounting import DpEvent

__all__ = ["sampled_gaussian", "sampled_gaussian_of"]


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
