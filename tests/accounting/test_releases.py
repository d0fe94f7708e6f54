"""Releases beside the steps: composed, saved, loaded, never forgotten."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    RandomizedResponseDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
    ZCDpEvent,
    pld,
    rdp,
)
from dp_accounting.dp_event import DiscreteLaplaceDpEvent, RepeatAndSelectDpEvent

from benchmarks.mechanisms import tuned
from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.accounting.events import sampled_gaussian
from dpcompile.accounting.known import neighbours
from dpcompile.accounting.releases import event_of, plain, text_of
from dpcompile.errors import PrivacyError

KNOWN: list[tuple[DpEvent, str, str]] = [
    (LaplaceDpEvent(3), "pld", "zero_out"),
    (LaplaceDpEvent(3.0), "rdp", "add_remove"),
    (DiscreteLaplaceDpEvent(0.1, 2), "pld", "add_remove"),
    (RandomizedResponseDpEvent(0.3, 5), "pld", "replace_one"),
    (RandomizedResponseDpEvent(0.3, 5), "rdp", "zero_out"),
    (ZCDpEvent(0.1), "rdp", "zero_out"),
    (PoissonSampledDpEvent(0.1, LaplaceDpEvent(1.0)), "pld", "zero_out"),
    (PoissonSampledDpEvent(0.1, ComposedDpEvent([GaussianDpEvent(2.0), GaussianDpEvent(0.7)])), "rdp", "zero_out"),
    (ComposedDpEvent([GaussianDpEvent(1), SelfComposedDpEvent(LaplaceDpEvent(5.0), 3)]), "pld", "zero_out"),
    (RepeatAndSelectDpEvent(sampled_gaussian(1.0, 0.01), 3, 1.0), "rdp", "add_remove"),
]
ABSENT: list[tuple[DpEvent, str, str, str]] = [
    (LaplaceDpEvent(3.0), "pld", "replace_one", "known for relation 'zero_out' and 'add_remove'"),
    (RandomizedResponseDpEvent(0.3, 5), "rdp", "add_remove", "known for relation 'zero_out'"),
    (ZCDpEvent(0.1), "pld", "zero_out", "make the accountant with method='rdp'"),
    (DiscreteLaplaceDpEvent(0.1, 2), "rdp", "zero_out", "make the accountant with method='pld'"),
    (RepeatAndSelectDpEvent(GaussianDpEvent(1.0), 3, 1.0), "pld", "zero_out", "method='rdp'"),
    (ZCDpEvent(0.1), "pld", "replace_one", "add its own epsilon and delta"),
]


def accountant(method: Any = "pld", relation: Any = "zero_out", steps: int = 0) -> PrivacyAccountant:
    result = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.01, method=method, relation=relation)
    result.step(steps)
    return result


@pytest.mark.parametrize(("event", "method", "relation"), KNOWN)
def test_a_release_costs_what_dp_accounting_says(event: DpEvent, method: str, relation: Any) -> None:
    """Also together with steps; twice is more than once, and JSON brings it back."""
    kind = {"pld": pld.PLDAccountant, "rdp": rdp.RdpAccountant}[method]
    reference = kind(neighboring_relation=neighbours(relation)).compose(event).compose(event)
    if relation != "replace_one":
        reference.compose(sampled_gaussian(1.0, 0.01), 20)
    counted = accountant(method, relation, 0 if relation == "replace_one" else 20)
    counted.compose(event)
    once = counted.epsilon(1e-5)
    counted.compose(event)
    assert counted.epsilon(1e-5) == pytest.approx(reference.get_epsilon(1e-5), rel=2e-4, abs=1e-6)
    assert counted.delta(0.3) == pytest.approx(reference.get_delta(0.3), rel=2e-3, abs=1e-9)
    assert once < counted.epsilon(1e-5)
    assert [count for _, count in counted.releases] == [2] and text_of(counted.releases[0][0]) == text_of(event)
    again = accountant(method, relation)
    again.load_state_dict(json.loads(json.dumps(counted.state_dict(), allow_nan=False)))
    assert again.releases == counted.releases and again.epsilon(1e-5) == counted.epsilon(1e-5)
    assert "releases=2" in repr(again)


@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
def test_gaussian_noise_is_as_a_step_of_everything(relation: str) -> None:
    """And as a step at its rate, on a Poisson sample: whichever way it came."""
    one, other = accountant(relation=relation, steps=3), accountant(relation=relation, steps=3)
    one.compose(GaussianDpEvent(4), 2)
    one.compose(sampled_gaussian(2.0, 0.1))
    other.step(2, event=sampled_gaussian(4.0, 1.0))
    other.step(event=sampled_gaussian(2.0, 0.1))
    assert one.epsilon(1e-5) == other.epsilon(1e-5) and one.steps == 3 and other.steps == 6
    assert accountant(relation=relation, steps=3).epsilon(1e-5) < one.epsilon(1e-5)


def test_a_tuning_run() -> None:
    """Papernot and Steinke 2022: the best of a Poisson number of runs, 10 on average."""
    run, tuning = accountant("rdp", steps=1000), accountant("rdp")
    assert run.epsilon(1e-5) == pytest.approx(2.10137, abs=1e-5)
    tuning.compose(RepeatAndSelectDpEvent(run.event, 10, math.inf))
    assert tuning.epsilon(1e-5) == pytest.approx(4.32950, abs=1e-5) and tuned() == tuning.epsilon(1e-5)
    assert tuning.delta(tuning.epsilon(1e-5)) == pytest.approx(1e-5)
    tuning.step(1000)
    assert tuning.epsilon(1e-5) > 4.33
    whole = accountant("rdp")
    whole.compose(tuning.event)
    assert whole.epsilon(1e-5) == pytest.approx(tuning.epsilon(1e-5), rel=1e-9)


@pytest.mark.parametrize(
    "event",
    [
        GaussianDpEvent(0),
        GaussianDpEvent(1e-200),
        LaplaceDpEvent(0.0),
        NonPrivateDpEvent(),
        RandomizedResponseDpEvent(0.0, 3),
        PoissonSampledDpEvent(0.5, ComposedDpEvent([GaussianDpEvent(1.0), GaussianDpEvent(0)])),
        RepeatAndSelectDpEvent(sampled_gaussian(1e-150, 0.01), 3, math.inf),
    ],
)
def test_no_noise_costs_everything(event: DpEvent) -> None:
    counted = accountant("rdp", steps=2)
    counted.compose(event)
    assert counted.epsilon(1e-5) == math.inf and counted.delta(1e6) == 1
    assert counted.gaussian_bound().mu == math.inf


@pytest.mark.parametrize(
    "event", [NoOpDpEvent(), ComposedDpEvent([]), RandomizedResponseDpEvent(1.0, 3), RandomizedResponseDpEvent(0.1, 1)]
)
def test_what_releases_nothing_costs_nothing(event: DpEvent) -> None:
    counted = accountant()
    counted.compose(event, 5)
    assert counted.epsilon(1e-5) == 0 == counted.delta(0.0)
    counted.compose(GaussianDpEvent(0), 0)
    assert counted.epsilon(1e-5) == 0


@pytest.mark.parametrize(
    "event",
    [
        LaplaceDpEvent(1e-3),
        LaplaceDpEvent(1e-90),
        SelfComposedDpEvent(LaplaceDpEvent(0.1), 10**9),
        SelfComposedDpEvent(LaplaceDpEvent(1e3), 10**6),
        DiscreteLaplaceDpEvent(600.0, 1),
    ],
)
def test_losses_that_no_grid_holds(event: DpEvent) -> None:
    counted = accountant()
    counted.compose(event)
    assert 0 < counted.epsilon(1e-5) and 0 < counted.delta(0.1) <= 1


@pytest.mark.parametrize(("event", "method", "relation", "remedy"), ABSENT)
def test_releases_without_a_bound_are_refused(event: DpEvent, method: str, relation: str, remedy: str) -> None:
    counted = accountant(method, relation)
    with pytest.raises(PrivacyError, match=rf"(?s)no bound of .* is known for method '{method}'.*{remedy}"):
        counted.compose(event)
    state = {"history": [], "releases": [[plain(event), 1]], "relation": relation}
    with pytest.raises(PrivacyError, match="no bound of"):
        counted.load_state_dict(state)
    assert counted.releases == []


@pytest.mark.parametrize(
    "event",
    [
        GaussianDpEvent(math.nan),
        GaussianDpEvent(-1),
        LaplaceDpEvent(math.inf),
        DiscreteLaplaceDpEvent(0.0, 1),
        PoissonSampledDpEvent(1.5, GaussianDpEvent(1.0)),
        SelfComposedDpEvent(GaussianDpEvent(1.0), -1),
        SelfComposedDpEvent(GaussianDpEvent(1.0), 1.5),  # type: ignore[arg-type]
        RepeatAndSelectDpEvent(GaussianDpEvent(1.0), 0.5, 1.0),
        RepeatAndSelectDpEvent(GaussianDpEvent(1.0), 2.0, math.nan),
        ComposedDpEvent([GaussianDpEvent(math.nan)]),
    ],
)
def test_numbers_without_sense_are_refused(event: DpEvent) -> None:
    counted = accountant("rdp")
    with pytest.raises(PrivacyError, match=r"(?s) of \w+DpEvent is .*the number that dp_accounting documents"):
        counted.compose(event)
    assert counted.releases == []


@pytest.mark.parametrize(
    "event", [SampledWithoutReplacementDpEvent(9, 1, GaussianDpEvent(1.0)), None, "gaussian", DpEvent]
)
def test_what_is_no_known_event_is_refused(event: Any) -> None:
    with pytest.raises(PrivacyError, match=r"(?s)cannot be composed: dpcompile knows .*basic composition"):
        accountant().compose(event)
    for count in (-1, 1.5, None):
        with pytest.raises(PrivacyError, match="number of steps is"):
            accountant().compose(GaussianDpEvent(1.0), count)  # type: ignore[arg-type]


def test_no_release_is_forgotten() -> None:
    """A state is loaded only if all that was composed here is in it, as often."""
    saved = accountant(steps=3)
    saved.compose(LaplaceDpEvent(3.0), 2)
    state = saved.state_dict()
    for count, fine in ((0, True), (1, True), (2, True), (3, False)):
        counted = accountant()
        counted.compose(LaplaceDpEvent(3.0), count)
        if fine:
            counted.load_state_dict(state)
            assert counted.state_dict() == state
        else:
            with pytest.raises(PrivacyError, match=r"(?s)counts 3 times Laplace.* 2 times.*load the state first"):
                counted.load_state_dict(state)
            assert counted.steps == 0
    other = accountant()
    other.compose(GaussianDpEvent(9.0))
    with pytest.raises(PrivacyError, match="0 times: epsilon would leave some out"):
        other.load_state_dict({"history": [[1.0, 0.01, 3]]})
    other = accountant()
    other.load_state_dict(state)
    other.compose(GaussianDpEvent(9.0))  # what the remedy says
    assert len(other.releases) == 2


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [1],
        [[], 1],
        [{"event_class": "GaussianDpEvent"}, 1],
        [{"event_class": "os"}, 1],
        [{"event_class": ["os"]}, 1],
        [{"event_class": "GaussianDpEvent", "noise_multiplier": "1"}, 1],
        [{"event_class": "GaussianDpEvent", "noise_multiplier": 1.0}, -1],
        [{"event_class": "ComposedDpEvent", "events": 3}, 1],
    ],
)
def test_a_saved_release_that_is_none_is_refused(entry: Any) -> None:
    counted = accountant(steps=3)
    with pytest.raises(PrivacyError):
        counted.load_state_dict({"history": [], "releases": [entry]})
    with pytest.raises(PrivacyError, match=r"in place of \(event, count\)"):
        counted.load_state_dict({"history": [], "releases": "abc"})
    assert counted.steps == 3


def test_whole_numbers_are_noise_multipliers_too() -> None:
    """dp-accounting's Rényi accountant looks at the first part alone, if that one's is an int."""
    whole, real = accountant("rdp"), accountant("rdp")
    whole.compose(PoissonSampledDpEvent(0.1, ComposedDpEvent([GaussianDpEvent(2), GaussianDpEvent(0.7)])))
    real.compose(PoissonSampledDpEvent(0.1, ComposedDpEvent([GaussianDpEvent(2.0), GaussianDpEvent(0.7)])))
    assert whole.epsilon(1e-5) == real.epsilon(1e-5)


def test_events_are_saved_as_they_are() -> None:
    for event, _, _ in KNOWN:
        assert text_of(event_of(json.loads(text_of(event)))) == text_of(event)
    assert text_of(GaussianDpEvent(1)) == text_of(GaussianDpEvent(1.0)) != text_of(GaussianDpEvent(1.0000000000000002))


def test_accountants_pickled_before_there_were_releases_load() -> None:
    old = accountant(steps=3)
    del old.__dict__["_releases"]
    assert old.releases == [] and old.epsilon(1e-5) == accountant(steps=3).epsilon(1e-5)
    old.load_state_dict({"history": [[1.0, 0.1, 2]], "relation": "zero_out"})
    assert old.steps == 2
