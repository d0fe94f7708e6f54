"""What a step costs: as dp-accounting has it, and as the plain numbers that are saved and compared.

The one file that knows which events steps are: a mechanism with another kind of noise adds its own here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpcompile.accounting.truncation import (
    Rate,
    TruncatedRate,
    Truncation,
    check_truncated,
    plain_rate,
    sampled_at,
)
from dpcompile.errors import PrivacyError

if TYPE_CHECKING:  # it takes as long to import as the rest of the package
    from dp_accounting import DpEvent

__all__ = ["rounds", "sampled_gaussian", "sampled_gaussian_of", "truncated"]


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


def sampled_gaussian(noise_multiplier: float, rate: Rate) -> DpEvent:
    """The event of one such step; of a truncated sample that of :func:`truncated`."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, TruncatedSubsampledGaussianDpEvent

    sigma = float(noise_multiplier)
    if isinstance(rate, TruncatedRate):
        return TruncatedSubsampledGaussianDpEvent(rate.dataset_size, rate.sample_rate, rate.max_batch_size, sigma)
    return PoissonSampledDpEvent(float(rate), GaussianDpEvent(sigma))


def sampled_gaussian_of(event: DpEvent) -> tuple[float, Rate]:
    """Sigma and rate of an event.

    Raises:
        PrivacyError: it is another one, of which the accountant knows no bound.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, TruncatedSubsampledGaussianDpEvent

    if isinstance(event, PoissonSampledDpEvent) and isinstance(event.event, GaussianDpEvent):
        return float(event.event.noise_multiplier), float(event.sampling_probability)
    if isinstance(event, TruncatedSubsampledGaussianDpEvent):
        truncation = event.dataset_size, event.truncated_batch_size
        check_truncated(truncation, "pld", "zero_out")
        return float(event.noise_multiplier), sampled_at(event.sampling_probability, truncation)
    raise PrivacyError(
        f"{event!r} cannot be counted: it is no Gaussian mechanism on a Poisson sample",
        remedy="count it with compose(), once for each time that it was released; step() is for the steps of "
        "dpcompile's mechanism",
    )


def truncated(event: DpEvent, truncation: Truncation | None) -> DpEvent:
    """A step of a mechanism, on draws of which at most a cap of examples is kept.

    Args:
        event: of the mechanism, on the whole Poisson sample.
        truncation: ``(dataset_size, max_batch_size)``, N and B; None: the event itself.

    Raises:
        PrivacyError: the event is no Gaussian mechanism on a Poisson sample.

    **Guarantee.** Let a step draw each of N examples with probability q, keep of more than B a uniform subset of B, and
    add Gaussian noise of sigma C to the sum of what they add, each of norm C at most. Then dp-accounting's privacy loss
    distribution for N, q, B and sigma bounds that of the step, for one example x that is, in the one of the datasets,

    - "zero_out": never drawn, so that another one takes its place; or drawn and kept as before, its gradient zero;
    - "replace_one": another example.

    Whether at least B of the other N - 1 are drawn, event T, does not depend on x. Without T nothing is left out: x is
    in the sum with probability q, as without a cap. With T a uniform subset S of B of the others is kept, and with
    probability p = P(x is drawn and kept | T) x stands in the place of a random y of S; S does not depend on that, as
    the others are alike. Given S and y the sums are S's, or with probability p that sum moved by u in the one dataset
    and by v in the other, each of norm 2 C at most (x less y; nothing or zero less y; x' less y). Let P(u) be the
    mixture. For a >= 1 the divergence of P(u) and P(v), as an expectation under the normal distribution around u, is
    that of a convex function of a sum of two log-normal variables of mean 1, and such a sum is largest in convex order
    if both are as wide as can be and grow together: if u = -v, of norm 2 C. That is "replace one" at rate p and noise
    sigma / 2. For a < 1 the two change places. The two cases are mixed by the odds of T (joint convexity).

    =============================================  ============================================================
    edge case                                      outcome
    =============================================  ============================================================
    a cap of N or more                             what no cap costs
    the gradient of x is no number                 as a gradient of zero: x keeps its place
    "add_remove"                                   refused: N is protected, and epsilon would tell it
    =============================================  ============================================================
    """
    if truncation is None:
        return event
    sigma, rate = sampled_gaussian_of(event)
    return sampled_gaussian(sigma, sampled_at(plain_rate(rate), truncation))
