"""Releases beside the steps: which are known, as the plain numbers that are saved, and cut into their parts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dpcompile.accounting.arguments import number
from dpcompile.accounting.events import sampled_gaussian
from dpcompile.accounting.truncation import Rate
from dpcompile.errors import PrivacyError

if TYPE_CHECKING:  # it takes as long to import as the rest of the package
    from dp_accounting import DpEvent

__all__ = ["event_of", "largest_loss", "leaves", "plain", "text_of", "whole_event"]

_LEAST_NOISE, _MOST_NOISE = 1e-100, 1e100  # divergences are of its square


def _noise(x: Any) -> bool:
    return 0 <= number(x) < math.inf


def _positive(x: Any) -> bool:
    return 0 < number(x) < math.inf


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 1 <= x < 2**63


def _probability(x: Any) -> bool:
    return 0 < number(x) <= 1


# Event -> its fields, with what they may be; "event" and "events" hold events.
_FIELDS: Mapping[str, Mapping[str, Callable[[Any], bool] | None]] = {
    "NoOpDpEvent": {},
    "NonPrivateDpEvent": {},
    "GaussianDpEvent": {"noise_multiplier": _noise},
    "LaplaceDpEvent": {"noise_multiplier": _noise},
    "DiscreteLaplaceDpEvent": {"noise_parameter": _positive, "sensitivity": _whole},
    "RandomizedResponseDpEvent": {"noise_parameter": lambda x: 0 <= number(x) <= 1, "num_buckets": _whole},
    "TruncatedSubsampledGaussianDpEvent": {
        "dataset_size": _whole,
        "sampling_probability": _probability,
        "truncated_batch_size": _whole,
        "noise_multiplier": _noise,
    },
    "ZCDpEvent": {"rho": _noise, "xi": _noise},
    "PoissonSampledDpEvent": {"sampling_probability": _probability, "event": None},
    "SelfComposedDpEvent": {"event": None, "count": _whole},
    "ComposedDpEvent": {"events": None},
    "RepeatAndSelectDpEvent": {
        "event": None,
        "mean": lambda x: 1 <= number(x) < math.inf,
        "shape": lambda x: number(x) >= 0,
    },
}


def plain(event: DpEvent) -> dict[str, Any]:
    """An event as what JSON holds: its class's name and its fields; infinity is "inf".

    Raises:
        PrivacyError: an event that is not known here, or a number out of its range.
    """
    name = type(event).__name__
    if type(event).__module__ != "dp_accounting.dp_event" or name not in _FIELDS:
        raise PrivacyError(
            f"{event!r} cannot be composed: dpcompile knows {', '.join(_FIELDS)} of dp_accounting",
            remedy="bound it by one of these, such as pure epsilon by ZCDpEvent(epsilon**2 / 2); or leave it out here, "
            "and add its own epsilon and delta to those of the accountant (basic composition)",
        )
    found: dict[str, Any] = {"event_class": name}
    for field, holds in _FIELDS[name].items():
        value = getattr(event, field)
        if field == "events":
            found[field] = [plain(e) for e in value]
        elif holds is None:
            found[field] = plain(value)
        elif not holds(value):
            raise PrivacyError(
                f"{field} of {name} is {value!r}", remedy="give the number that dp_accounting documents for it"
            )
        elif holds is _whole:
            found[field] = value
        else:
            found[field] = "inf" if number(value) == math.inf else float(value)
    return found


def text_of(event: DpEvent) -> str:
    """:func:`plain` as text: equal events have the same.

    Raises:
        PrivacyError: as there.
    """
    return json.dumps(plain(event), sort_keys=True, allow_nan=False)


def event_of(saved: Any) -> DpEvent:
    """The event of which ``saved`` is :func:`plain`.

    Raises:
        PrivacyError: it is none of any.
    """
    from dp_accounting import dp_event

    name = saved.get("event_class") if isinstance(saved, Mapping) else None
    if not isinstance(name, str) or name not in _FIELDS or set(saved) != {"event_class", *_FIELDS[name]}:
        raise PrivacyError(
            f"the accountant's state holds {saved!r} in place of a release",
            remedy="load what PrivacyAccountant.state_dict() returned",
        )
    fields: dict[str, Any] = {}
    for field, holds in _FIELDS[name].items():
        value = saved[field]
        if field == "events":
            fields[field] = [event_of(e) for e in value] if isinstance(value, (list, tuple)) else event_of(value)
        elif holds is None:
            fields[field] = event_of(value)
        else:
            fields[field] = math.inf if isinstance(value, str) and value == "inf" else value
    event = getattr(dp_event, name)(**fields)
    plain(event)
    return event


def whole_event(history: Iterable[tuple[float, Rate, int]], releases: Iterable[tuple[DpEvent, int]]) -> DpEvent:
    """Runs of steps and other releases as one event."""
    from dp_accounting import ComposedDpEvent, SelfComposedDpEvent

    parts: list[DpEvent] = [SelfComposedDpEvent(sampled_gaussian(sigma, q), n) for sigma, q, n in history if n]
    return ComposedDpEvent(parts + [SelfComposedDpEvent(event, count) for event, count in releases])


def leaves(event: DpEvent, count: int) -> Iterator[tuple[DpEvent, int]]:
    """The parts of which an event is composed, each with how often it happens, as dp-accounting can compose them.

    Noise that is next to none is none, as powers of it are beyond floating point; a mechanism on a sample of what has
    no noise is taken for one without noise.
    """
    from dp_accounting import dp_event as dp

    if isinstance(event, dp.SelfComposedDpEvent):
        yield from leaves(event.event, event.count * count)
    elif isinstance(event, dp.ComposedDpEvent):
        for part in event.events:
            yield from leaves(part, count)
    elif not isinstance(tamed := _tamed(event), dp.NoOpDpEvent):
        yield tamed, count


def _tamed(event: DpEvent) -> DpEvent:
    from dp_accounting import dp_event as dp

    match event:
        case dp.GaussianDpEvent() | dp.LaplaceDpEvent():
            sigma = float(event.noise_multiplier)
            return dp.NonPrivateDpEvent() if sigma < _LEAST_NOISE else type(event)(min(sigma, _MOST_NOISE))
        case dp.RandomizedResponseDpEvent():
            if event.num_buckets == 1 or event.noise_parameter == 1:
                return dp.NoOpDpEvent()
            return dp.NonPrivateDpEvent() if event.noise_parameter < _LEAST_NOISE else event
        case dp.TruncatedSubsampledGaussianDpEvent():
            sigma = float(event.noise_multiplier)
            rest = event.dataset_size, event.sampling_probability, event.truncated_batch_size
            return dp.NonPrivateDpEvent() if sigma < _LEAST_NOISE else type(event)(*rest, min(sigma, _MOST_NOISE))
        case dp.PoissonSampledDpEvent():
            inner = _tamed(event.event)
            return inner if _without_noise(inner) else dp.PoissonSampledDpEvent(event.sampling_probability, inner)
        case dp.SelfComposedDpEvent():
            return dp.SelfComposedDpEvent(_tamed(event.event), event.count)
        case dp.ComposedDpEvent():
            return dp.ComposedDpEvent([_tamed(part) for part in event.events])
        case dp.RepeatAndSelectDpEvent():
            inner = _tamed(event.event)
            return inner if _without_noise(inner) else dp.RepeatAndSelectDpEvent(inner, event.mean, event.shape)
        case _:
            return event


def _without_noise(event: DpEvent) -> bool:
    """Whether something in it has none."""
    from dp_accounting import dp_event as dp

    match event:
        case dp.NonPrivateDpEvent():
            return True
        case dp.ComposedDpEvent():
            return any(_without_noise(part) for part in event.events)
        case dp.SelfComposedDpEvent() | dp.PoissonSampledDpEvent() | dp.RepeatAndSelectDpEvent():
            return _without_noise(event.event)
        case _:
            return False


def largest_loss(event: DpEvent, replaced: bool) -> float:
    """The epsilon of a leaf that has one at delta 0; infinity where it has none, or none is known here."""
    from dp_accounting import dp_event as dp

    match event:
        case dp.LaplaceDpEvent():
            return 1 / event.noise_multiplier
        case dp.DiscreteLaplaceDpEvent():
            return event.noise_parameter * event.sensitivity
        case dp.PoissonSampledDpEvent() if not isinstance(event.event, dp.GaussianDpEvent):
            return largest_loss(event.event, replaced)
        case dp.RandomizedResponseDpEvent():
            p, k = event.noise_parameter, event.num_buckets
            return math.log(k / p - k + 1) if replaced else max(math.log(k * (1 - p) + p), -math.log(p))
        case _:
            return math.inf
