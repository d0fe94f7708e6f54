"""The smallest cap on draws that costs next to nothing."""

from __future__ import annotations

import functools
import math

from dpcompile.accounting.arguments import Relation, check_delta, check_mechanism, check_size, check_steps
from dpcompile.accounting.composition import composed_epsilon
from dpcompile.accounting.truncation import Rate, TruncatedRate, check_truncated
from dpcompile.errors import PrivacyError

__all__ = ["smallest_cap"]

_MORE = 1.001  # times epsilon without a cap
_COARSER = 8  # the grid: a step takes seconds on the fine one


def smallest_cap(
    *,
    noise_multiplier: float,
    sample_rate: float,
    dataset_size: int,
    steps: int,
    target_delta: float,
    relation: Relation = "zero_out",
    multiple: int = 1,
) -> int:
    """The smallest multiple of a number whose epsilon, by PLD, is at most 0.1 % above that of whole draws.

    Work grows with the cap, as every step has that many rows. Below the expected draw none is tried.

    Args:
        noise_multiplier: sigma, above 0.
        sample_rate: in (0, 1].
        dataset_size: number of examples.
        steps: logical steps, 1 or more.
        target_delta: at which epsilon is compared.
        relation: which datasets are neighbours.
        multiple: of what the cap is to be one: of the physical batches of all ranks together.

    Returns:
        The cap; at least the size of the dataset, where nothing is truncated, if no smaller one will do.

    Raises:
        PrivacyError: an argument out of its range, or a relation for which no bound is known.

    **Guarantee.** None but the 0.1 %: epsilon of a cap is what the accountant says.
    """
    check_mechanism(noise_multiplier, sample_rate)
    check_size(dataset_size)
    check_steps(steps)
    check_delta(target_delta)
    check_truncated((dataset_size, multiple), "pld", relation)
    if not noise_multiplier or not steps:
        why = "without noise epsilon is infinite" if steps else "no step is taken"
        raise PrivacyError(
            f"the cap is to be chosen by what it costs, and {why}",
            remedy="give max_batch_size a number",
        )

    def epsilon(rate: Rate) -> float:
        return composed_epsilon([(noise_multiplier, rate, steps)], target_delta, "pld", relation, coarser=_COARSER)

    most = epsilon(sample_rate) * _MORE

    @functools.cache
    def costs_more(count: int) -> bool:
        return epsilon(TruncatedRate(sample_rate, dataset_size, count * multiple)) > most

    low, end = math.ceil(sample_rate * dataset_size / multiple) - 1, math.ceil(dataset_size / multiple)
    low, high, width = max(low, 0), end, math.ceil(math.sqrt(dataset_size * sample_rate) / multiple)
    while low + width < end:  # the bound falls quickly beyond a few standard deviations
        if not costs_more(low + width):
            high = low + width
            break
        low += width
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if costs_more(middle) else (low, middle)
    return high * multiple
