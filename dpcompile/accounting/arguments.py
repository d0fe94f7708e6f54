"""What is given to an accountant, checked."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias, get_args

from dpcompile.errors import PrivacyError, running_line

__all__ = [
    "Method",
    "Relation",
    "check_bands",
    "check_bound",
    "check_delta",
    "check_epsilon",
    "check_mechanism",
    "check_plan",
    "check_rate",
    "check_size",
    "check_slack",
    "check_steps",
    "check_target",
    "number",
    "refuse_large_delta",
]

Method: TypeAlias = Literal["pld", "rdp"]
Relation: TypeAlias = Literal["zero_out", "add_remove", "replace_one"]


def number(x: Any) -> float:
    """Not a number where it is none."""
    try:
        return float(x) if not isinstance(x, str) else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def check_mechanism(noise_multiplier: float, sample_rate: float) -> None:
    """Sigma is finite and q a probability, above 0."""
    if not 0 <= number(noise_multiplier) < math.inf:
        raise PrivacyError(
            f"noise_multiplier is {noise_multiplier!r}",
            remedy="give a finite number, 0 or more (0: epsilon is infinite)",
        )
    if not 0 < number(sample_rate) <= 1:
        raise PrivacyError(
            f"sample_rate is {sample_rate!r}, not in (0, 1]",
            remedy="give the expected batch size divided by the size of the dataset",
        )


def check_delta(delta: float) -> None:
    """A probability, neither 0 nor 1."""
    if not 0 < number(delta) < 1:
        raise PrivacyError(
            f"delta is {delta!r}, not in (0, 1)", remedy="give a number well below 1 / size of the dataset"
        )


def refuse_large_delta(delta: float, size: int) -> None:
    """Below 1 / size of the dataset: with more, publishing one example at random would satisfy the promise."""
    if delta >= 1 / size:
        raise PrivacyError(
            f"delta is {delta:g}, and there are {size} in the dataset: at 1 / {size} = {1 / size:.2g} or more, "
            "publishing one of them at random would be private too",
            where=running_line(),
            remedy=f"give a delta well below that, such as {0.1 / size:.1g}",
        )


def check_epsilon(epsilon: float) -> None:
    """0 or more; infinity is one."""
    if not number(epsilon) >= 0:
        raise PrivacyError(f"epsilon is {epsilon!r}", remedy="give a number, 0 or more")


def check_rate(false_positive_rate: float) -> None:
    """A share of those that an attack could accuse wrongly."""
    if not 0 <= number(false_positive_rate) <= 1:
        raise PrivacyError(f"false_positive_rate is {false_positive_rate!r}", remedy="give a number in [0, 1]")


def check_size(dataset_size: int) -> None:
    """A number of examples."""
    if isinstance(dataset_size, bool) or not isinstance(dataset_size, int) or dataset_size < 1:
        raise PrivacyError(f"dataset_size is {dataset_size!r}", remedy="give the number of examples, 1 or more")


def check_target(target_epsilon: float) -> None:
    """An epsilon that can be met."""
    if not 0 < number(target_epsilon) < math.inf:
        raise PrivacyError(f"target_epsilon is {target_epsilon!r}", remedy="give a finite number above 0")


def check_slack(slack: float) -> None:
    """A probability that is neglected."""
    if not 0 < number(slack) < 1:
        raise PrivacyError(f"slack is {slack!r}, not in (0, 1)", remedy="give a number far below delta, such as 1e-8")


def check_steps(n: int) -> None:
    """A count that is saved exactly."""
    if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**63:
        raise PrivacyError(f"the number of steps is {n!r}", remedy="give an integer, 0 or more and below 2**63")


def check_bands(bands: int, relation: str) -> None:
    """A number of bands, and a relation for which their cost is proved (:func:`dpcompile.accounting.events.rounds`)."""
    if isinstance(bands, bool) or not isinstance(bands, int) or bands < 1:
        raise PrivacyError(f"bands is {bands!r}", remedy="give an integer, 1 or more (1: noise without correlation)")
    if bands > 1 and relation == "replace_one":
        raise PrivacyError(
            f"noise that is correlated over {bands} steps, for relation 'replace_one': what it costs is proved for an "
            "example that counts or does not",
            remedy="take relation='zero_out' or 'add_remove', or bands=1",
        )


def check_bound(method: str, relation: str) -> None:
    """A bound is known for this method and this relation."""
    if method not in get_args(Method):
        raise PrivacyError(f"accounting method {method!r} is not known", remedy="take 'pld' or 'rdp'")
    if relation not in get_args(Relation):
        raise PrivacyError(
            f"relation {relation!r} is not known", remedy="take 'zero_out', 'add_remove' or 'replace_one'"
        )
    if (method, relation) == ("rdp", "replace_one"):
        raise PrivacyError(
            "no Rényi bound is known for Poisson samples of datasets in which one example is replaced",
            remedy="take method='pld' (accountant='pld' in make_private)",
        )


def check_plan(
    noise_multiplier: float | None,
    target_epsilon: float | None,
    target_delta: float | None,
    epochs: int | None,
    steps: int | None,
) -> None:
    """A noise multiplier, or a target and how long training will be."""
    if (noise_multiplier is None) == (target_epsilon is None):
        given = "neither" if noise_multiplier is None else "both"
        raise PrivacyError(
            f"{given} of noise_multiplier and target_epsilon given",
            remedy="give noise_multiplier, or target_epsilon with target_delta and epochs",
        )
    if target_epsilon is None:
        return
    if target_delta is None:
        raise PrivacyError(
            "target_epsilon without target_delta", remedy="give target_delta, well below 1 / size of the dataset"
        )
    if (epochs is None) == (steps is None):
        raise PrivacyError(
            f"target_epsilon with {'neither' if epochs is None else 'both'} of epochs and steps",
            remedy="say how long training will be: give one of them",
        )
    for name, value in (("epochs", epochs), ("steps", steps)):
        if value is not None and not (math.isfinite(value) and value >= 1 and value == int(value)):
            raise PrivacyError(
                f"{name} is {value!r}",
                remedy="give an integer, 1 or more; with steps= training may end within a pass",
            )
