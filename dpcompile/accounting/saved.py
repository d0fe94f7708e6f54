"""What an accountant saved, read back: whole, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpcompile.accounting.arguments import check_mechanism, check_steps
from dpcompile.accounting.releases import event_of, text_of
from dpcompile.accounting.truncation import Rate, saved_rate
from dpcompile.errors import PrivacyError

__all__ = ["saved_releases", "saved_runs"]

_REMEDY = "load what PrivacyAccountant.state_dict() returned"


def saved_runs(state: Any) -> list[tuple[float, Rate, int]]:
    """The runs of equal steps in an accountant's state: noise multiplier, sample rate, how many.

    Raises:
        PrivacyError: there is no list "history", or an entry is no possible run of steps.
    """
    runs = state.get("history") if isinstance(state, Mapping) else None
    if not isinstance(runs, (list, tuple)):
        raise PrivacyError(
            "the accountant's state has no list 'history': which steps it counted is unknown", remedy=_REMEDY
        )
    history: list[tuple[float, Rate, int]] = []
    for run in runs:
        if not isinstance(run, (list, tuple)) or len(run) != 3:
            raise PrivacyError(
                f"the accountant's history holds {run!r} in place of (noise_multiplier, sample_rate, steps)",
                remedy=_REMEDY,
            )
        noise_multiplier, sample_rate, n = run
        check_mechanism(noise_multiplier, 1.0)
        check_steps(n)
        history.append((noise_multiplier, saved_rate(sample_rate), n))
    return history


def saved_releases(state: Mapping[str, Any]) -> dict[str, int]:
    """The releases in a PrivacyAccountant's state, as text, and how often; none in states from before there were any.

    Raises:
        PrivacyError: no list of them, or an entry that is none.
    """
    found: dict[str, int] = {}
    entries = state.get("releases", ())
    for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise PrivacyError(f"the accountant's releases hold {entry!r} in place of (event, count)", remedy=_REMEDY)
        check_steps(entry[1])
        text = text_of(event_of(entry[0]))
        found[text] = found.get(text, 0) + entry[1]
    return found
