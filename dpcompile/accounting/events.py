"""What a step costs, as dp-accounting has it, and as plain numbers that are saved and compared.

The one file that knows which events there are: a mechanism with another kind of noise adds its own here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpcompile.errors import PrivacyError

if TYPE_CHECKING:  # it takes as long to import as the rest of the package
    from dp_accounting import DpEvent

__all__ = ["SampledGaussian", "sampled_gaussian", "sampled_gaussian_of"]


@dataclass(frozen=True, slots=True)
class SampledGaussian:
    """A step of the Gaussian mechanism on a Poisson sample.

    Attributes:
        noise_multiplier: sigma, 0 or more.
        sample_rate: q in (0, 1].
    """

    noise_multiplier: float
    sample_rate: float

    def __str__(self) -> str:
        return f"noise multiplier {self.noise_multiplier} and sample rate {self.sample_rate}"


def sampled_gaussian(noise_multiplier: float, sample_rate: float) -> DpEvent:
    """The event of one such step."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    return PoissonSampledDpEvent(float(sample_rate), GaussianDpEvent(float(noise_multiplier)))


def sampled_gaussian_of(event: DpEvent) -> SampledGaussian:
    """Sigma and q of an event.

    Raises:
        PrivacyError: it is another one, of which the accountant knows no bound.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    if isinstance(event, PoissonSampledDpEvent) and isinstance(event.event, GaussianDpEvent):
        return SampledGaussian(event.event.noise_multiplier, event.sampling_probability)
    raise PrivacyError(
        f"{event!r} cannot be counted: it is no Gaussian mechanism on a Poisson sample",
        remedy="count it with dp_accounting itself, and the steps of dpcompile's mechanism here",
    )
