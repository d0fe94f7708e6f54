"""Truncated Poisson samples: of a draw larger than a cap as many examples are kept, chosen at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from dpcompile.accounting.arguments import check_bound, check_mechanism
from dpcompile.errors import PrivacyError

__all__ = [
    "Rate",
    "Truncation",
    "TruncatedRate",
    "check_truncated",
    "no_bound_of_parts",
    "plain_rate",
    "saved_rate",
    "sampled_at",
]


class TruncatedRate(NamedTuple):
    """How a step is sampled: it stands where other steps have a sample rate.

    It is no number: what does not know of truncation must not take it for a rate, of which epsilon would be too small.
    """

    sample_rate: float
    """q, in (0, 1]."""
    dataset_size: int
    """N: how many examples are drawn from, the one in question among them."""
    max_batch_size: int
    """The cap: at most so many of a draw are kept."""

    def __str__(self) -> str:
        return f"{self.sample_rate:g} of {self.dataset_size}, {self.max_batch_size} at most"

    def __format__(self, spec: str) -> str:
        return str(self)

    @property
    def odds(self) -> tuple[float, float]:
        """How likely at least a cap of the others is drawn, and how likely, if so, this example is drawn and kept."""
        from scipy import stats

        others = float(stats.binom.sf(self.max_batch_size - 1, self.dataset_size - 1, self.sample_rate))
        if others == 0:
            return 0.0, 0.0
        kept = float(stats.binom.sf(self.max_batch_size, self.dataset_size, self.sample_rate))
        return others, kept * self.max_batch_size / others / self.dataset_size


Rate: TypeAlias = "float | TruncatedRate"
Truncation: TypeAlias = "tuple[int, int]"  # size of the dataset, and the cap


def sampled_at(sample_rate: float, truncation: Truncation | None) -> Rate:
    """The rate of steps that are truncated to ``(dataset_size, max_batch_size)``; None: that are not."""
    return float(sample_rate) if truncation is None else TruncatedRate(float(sample_rate), *truncation)


def plain_rate(rate: Rate) -> float:
    """Q alone."""
    return rate.sample_rate if isinstance(rate, TruncatedRate) else rate


def check_truncated(truncation: Any, method: str, relation: str) -> None:
    """A size and a cap, and a method and a relation for which a bound is known.

    Args:
        truncation: ``(dataset_size, max_batch_size)``; None passes.
        method: of the accountant.
        relation: of the accountant.

    Raises:
        PrivacyError: it is none, or no bound is known.
    """
    check_bound(method, relation)
    if truncation is None:
        return
    whole = isinstance(truncation, Sequence) and len(truncation) == 2
    if not whole or any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n < 2**53 for n in truncation):
        raise PrivacyError(
            f"truncation is {truncation!r}",
            remedy="give (dataset_size, max_batch_size), two integers above 0, as loader.truncation has them",
        )
    if method != "pld":
        raise PrivacyError(
            f"a cap of {truncation[1]} examples in a step, and method {method!r}: no Rényi bound is known for "
            "truncated Poisson samples",
            remedy="take method='pld' (accountant='pld' in make_private), or leave the cap out",
        )
    if relation == "add_remove":
        raise PrivacyError(
            f"a cap of {truncation[1]} examples in a step, for relation 'add_remove': how often it truncates, and so "
            "epsilon, depend on the size of the dataset, which that relation protects",
            remedy="take relation='zero_out' or 'replace_one', for which the size is public, or leave the cap out",
        )


def no_bound_of_parts(max_batch_size: int | str, bands: int) -> PrivacyError:
    """A cap, and noise that is correlated over steps."""
    return PrivacyError(
        f"max_batch_size {max_batch_size}, and draws from {bands} parts by turns for noise that is correlated over "
        "steps: no bound is known for truncated draws of it",
        remedy="leave out max_batch_size, or take bands=1",
    )


def saved_rate(value: Any) -> Rate:
    """A rate out of a saved run of steps: a number, or the three of a :class:`TruncatedRate`.

    Raises:
        PrivacyError: it is none.
    """
    if not isinstance(value, (list, tuple)):
        check_mechanism(1.0, value)
        return value
    if len(value) != 3:
        raise PrivacyError(
            f"the accountant's history holds the rate {value!r} in place of (sample_rate, dataset_size, "
            "max_batch_size)",
            remedy="load what PrivacyAccountant.state_dict() returned",
        )
    check_mechanism(1.0, value[0])
    check_truncated(tuple(value[1:]), "pld", "zero_out")
    return TruncatedRate(float(value[0]), *value[1:])
