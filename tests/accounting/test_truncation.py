"""Truncated Poisson samples: what they cost, against known values and against the mechanism's own density."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    SelfComposedDpEvent,
    TruncatedSubsampledGaussianDpEvent,
    pld,
)
from scipy import stats

from benchmarks.mechanisms import caps
from dpcompile import plan_privacy, solve
from dpcompile.accounting import composition
from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.accounting.calibration import calibrate_noise
from dpcompile.accounting.caps import smallest_cap
from dpcompile.accounting.composition import Composed, composed_epsilon
from dpcompile.accounting.events import sampled_gaussian, truncated
from dpcompile.accounting.renyi import Renyi
from dpcompile.accounting.truncation import TruncatedRate
from dpcompile.errors import PrivacyError

DELTA = 1e-5


def accountant(cap: int | None = 20, steps: int = 0, sigma: float = 4.0, n: int = 100, **options: Any) -> Any:
    truncation = None if cap is None else (n, cap)
    counted = PrivacyAccountant(noise_multiplier=sigma, sample_rate=0.1, truncation=truncation, **options)
    counted.step(steps)
    return counted


# ---- the bound


@pytest.mark.full
def test_known_values() -> None:
    assert caps() == pytest.approx({1000: 1.82824, 32: 1.82827, 16: 5.60371, 10: 9.59612}, abs=1e-5)


@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
@pytest.mark.parametrize("cap", [12, 20])
def test_it_says_what_dp_accounting_says(cap: int, relation: Any) -> None:
    counted = accountant(cap, 50, relation=relation)
    event = TruncatedSubsampledGaussianDpEvent(100, 0.1, cap, 4.0)
    assert counted.event == ComposedDpEvent([SelfComposedDpEvent(event, 50)])
    own = pld.PLDAccountant(composition.neighbours(relation))
    own.compose(event, 50)
    assert counted.epsilon(DELTA) == pytest.approx(own.get_epsilon(DELTA), rel=1e-6)
    whole = accountant(None, 50, relation=relation)
    assert counted.epsilon(DELTA) > whole.epsilon(DELTA) and counted.delta(0.5) > whole.delta(0.5)


def density(drawn_by: tuple[float, ...], own: float, keeps: float, cap: int, q: float, sigma: float, x: Any) -> Any:
    """Of a step's noised sum: others add these numbers, one example adds ``own`` and is drawn with odds ``keeps``."""
    values, odds = (*drawn_by, own), (*[q] * len(drawn_by), keeps)
    total = np.zeros_like(x)
    for drawn in itertools.product([0, 1], repeat=len(values)):
        weight = math.prod(p if d else 1 - p for d, p in zip(drawn, odds, strict=True))
        members = [v for v, d in zip(values, drawn, strict=True) if d]
        subsets = list(itertools.combinations(members, min(cap, len(members))))
        for kept in subsets:
            total += weight / len(subsets) * stats.norm.pdf(x, sum(kept), sigma)
    return total


@pytest.mark.parametrize(
    ("n", "cap", "q", "sigma", "more"), [(4, 1, 0.5, 1.0, True), (5, 2, 0.4, 0.7, False), (4, 2, 1.0, 2.0, True)]
)
def test_it_bounds_the_mechanism_itself(n: int, cap: int, q: float, sigma: float, more: bool) -> None:
    """One step of numbers, its density written down: never drawn, of gradient zero in its place, and replaced.

    ``more``: it is above what a step without a cap would cost, so that the cap has to be counted.
    """
    x = np.linspace(-20, 20, 2001)
    rate = TruncatedRate(q, n, cap)
    above = 0
    for relation, pairs in {
        "zero_out": [((1.0, q), (0.0, 0.0)), ((1.0, q), (0.0, q))],
        "replace_one": [((1.0, q), (-1.0, q)), ((1.0, q), (0.0, q)), ((0.3, q), (-1.0, q))],
    }.items():
        bound, whole = (Composed([(sigma, r, 1)], "pld", relation, coarser=8) for r in (rate, q))  # type: ignore[arg-type]
        for others in itertools.combinations_with_replacement([-1.0, 1.0], n - 1):
            for pair in pairs:
                one, other = (density(others, own, keeps, cap, q, sigma, x) for own, keeps in pair)
                for a, b in ((one, other), (other, one)):
                    for epsilon in (0.0, 0.3, 1.0, 2.0, 4.0):
                        true = float(np.clip(a - math.exp(epsilon) * b, 0, None).sum() * (x[1] - x[0]))
                        assert true <= bound.delta(epsilon) + 1e-6
                        above += true > whole.delta(epsilon) + 1e-6
    assert (above > 0) == more


def test_odds() -> None:
    """How often a cap of the others is drawn, and how often one is kept then, by counting."""
    rate = TruncatedRate(0.3, 8, 2)
    odds = [stats.binom.pmf(k, 7, 0.3) for k in range(8)]
    assert rate.odds[0] == pytest.approx(sum(odds[2:]))
    assert rate.odds[1] == pytest.approx(
        sum(p * 0.3 * 2 / (k + 1) for k, p in enumerate(odds) if k >= 2) / sum(odds[2:])
    )


@pytest.mark.parametrize("cap", [100, 99, 10**6])
def test_a_cap_that_is_never_met_costs_nothing(cap: int) -> None:
    """Also where the odds of a draw of all but one of the examples are below the least floating-point number."""
    counted = PrivacyAccountant(noise_multiplier=2.0, sample_rate=1e-6, truncation=(100, cap))
    whole = PrivacyAccountant(noise_multiplier=2.0, sample_rate=1e-6)
    for a in (counted, whole):
        a.step(10)
    assert counted.epsilon(1e-9) == whole.epsilon(1e-9)


def test_no_noise_and_next_to_none() -> None:
    assert accountant(steps=1, sigma=0.0).epsilon(DELTA) == math.inf
    little = accountant(steps=3, sigma=0.01)  # no grid holds its losses: as if all were in every step
    assert little.epsilon(DELTA) == Renyi([(0.005, 1.0, 3)], (), "zero_out").epsilon(DELTA) < math.inf


def test_every_cap_is_counted_with_its_own_noise() -> None:
    """A history of several: schedules, a restored run without a cap, and one of another."""
    counted = accountant(12, 5)
    counted.move_noise_multiplier(3.0)
    counted.step(5)
    history = [(4.0, TruncatedRate(0.1, 100, 12), 5), (3.0, TruncatedRate(0.1, 100, 12), 5)]
    assert counted.history == history and counted.truncation == (100, 12)
    other = accountant(None, 3)
    other.load_state_dict(counted.state_dict())
    other.step(2)
    assert other.history == [*history, (4.0, 0.1, 2)] and other.steps == 12
    assert other.epsilon(DELTA) == composed_epsilon(other.history, DELTA, "pld", "zero_out")
    back = accountant(16)
    back.load_state_dict(accountant(None, 3).state_dict())
    back.step()
    assert back.history == [(4.0, 0.1, 3), (4.0, TruncatedRate(0.1, 100, 16), 1)]


def test_many_kinds_are_rounded_to_less_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "_DISTINCT", 2)
    history = [(4.0 + 0.1 * i, rate, 2) for i in range(4) for rate in (0.1, TruncatedRate(0.1, 100, 12))]
    rounded = composed_epsilon(history, DELTA, "pld", "zero_out")
    monkeypatch.setattr(composition, "_DISTINCT", 32)
    exact = composed_epsilon(history, DELTA, "pld", "zero_out")
    assert exact < rounded < exact * 1.1


# ---- states, events, refusals


def test_states_and_pickles() -> None:
    counted = accountant(12, 5)
    state = counted.state_dict()
    assert state["history"] == [[4.0, [0.1, 100, 12], 5]]  # plain: torch.load takes nothing else by default
    other = accountant(12)
    other.load_state_dict(state)
    assert other.history == counted.history and isinstance(other.history[0][1], TruncatedRate)
    for twin in (copy.deepcopy(counted), pickle.loads(pickle.dumps(counted))):
        assert twin.history == counted.history and twin.truncation == (100, 12)
    assert "truncation=(100, 12)" in repr(counted) and "truncation" not in repr(accountant(None))


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ([0.1, 100], "holds the rate"),
        ([0.1, 100, 12, 3], "holds the rate"),
        ([1.5, 100, 12], "sample_rate is 1.5"),
        ([0.1, 100, 0], "truncation is"),
        ([0.1, 2.5, 12], "truncation is"),
    ],
)
def test_rates_that_are_none_are_refused(rate: Any, message: str) -> None:
    counted = accountant(12, 2)
    with pytest.raises(PrivacyError, match=f"(?s){message}.*what to do: "):
        counted.load_state_dict({"history": [[1.0, rate, 3]]})
    assert counted.steps == 2


@pytest.mark.parametrize("truncation", [(100,), (0, 3), (100, 0), (100, True), (100, 2.0), 32, "ab", (100, "12")])
def test_truncations_without_sense_are_refused(truncation: Any) -> None:
    with pytest.raises(PrivacyError, match=r"(?s)truncation is .*two integers above 0, as loader.truncation has them"):
        PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1, truncation=truncation)
    with pytest.raises(PrivacyError, match="truncation is"):
        calibrate_noise(target_epsilon=1.0, target_delta=DELTA, sample_rate=0.1, steps=1, truncation=truncation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rdp"}, "no Rényi bound is known for truncated Poisson samples.*take method='pld'"),
        ({"relation": "add_remove"}, "depend on the size of the dataset, which that relation protects.*'zero_out'"),
    ],
)
def test_methods_and_relations_without_a_bound_are_refused(options: dict[str, Any], message: str) -> None:
    event, state = TruncatedSubsampledGaussianDpEvent(100, 0.1, 12, 4.0), accountant(12, 5).state_dict()
    whole = accountant(None, **options)
    for attempt in (
        lambda: accountant(12, **options),
        lambda: calibrate_noise(
            target_epsilon=1.0, target_delta=DELTA, sample_rate=0.1, steps=9, truncation=(100, 12), **options
        ),
        lambda: solve(
            noise_multiplier=1.0, target_delta=DELTA, sample_rate=0.1, steps=9, truncation=(100, 12), **options
        ),
        lambda: plan_privacy(
            dataset_size=100,
            expected_batch_sizes=[9],
            target_delta=DELTA,
            steps=[9],
            noise_multiplier=1.0,
            max_batch_size="auto",
            **options,
        ),  # fmt: skip
        lambda: whole.step(event=event),
        lambda: whole.load_state_dict({**state, "relation": whole.relation}),
    ):
        with pytest.raises(PrivacyError, match=f"(?s)a cap of .*{message}"):
            attempt()
    with pytest.raises(PrivacyError, match="(?s)no bound of .*(one is known for relation|method='pld')"):
        whole.compose(SelfComposedDpEvent(event, 3))
    assert whole.steps == 0 and whole.releases == []


def test_a_run_is_composed_with_another() -> None:
    counted, run = accountant(None, 10), accountant(12, 5)
    counted.compose(run.event)
    both = composed_epsilon([*counted.history, *run.history], DELTA, "pld", "zero_out")
    assert counted.epsilon(DELTA) == both > run.epsilon(DELTA)
    other = accountant(None)
    other.load_state_dict(counted.state_dict())
    assert other.epsilon(DELTA) == both
    other.compose(TruncatedSubsampledGaussianDpEvent(100, 0.1, 12, 0.0))
    assert other.epsilon(DELTA) == math.inf


@pytest.mark.parametrize("fields", [(0, 0.1, 12, 1.0), (100, 1.5, 12, 1.0), (100, 0.1, 0, 1.0), (100, 0.1, 12, -1.0)])
def test_releases_without_sense_are_refused(fields: Any) -> None:
    with pytest.raises(PrivacyError, match="of TruncatedSubsampledGaussianDpEvent is"):
        accountant().compose(TruncatedSubsampledGaussianDpEvent(*fields))


@pytest.mark.parametrize("event", [GaussianDpEvent(1.0), None])
def test_what_is_no_sampled_gaussian_is_not_truncated(event: DpEvent) -> None:
    with pytest.raises(PrivacyError, match="no Gaussian mechanism on a Poisson sample"):
        truncated(event, (100, 12))
    assert truncated(event, None) is event
    assert truncated(sampled_gaussian(2.0, 0.1), (100, 12)) == TruncatedSubsampledGaussianDpEvent(100, 0.1, 12, 2.0)


# ---- the other way round


def test_calibration() -> None:
    known: dict[str, Any] = {"target_epsilon": 2.0, "target_delta": DELTA, "sample_rate": 0.1, "steps": 20}
    sigma = calibrate_noise(**known, truncation=(100, 12))
    assert sigma > calibrate_noise(**known)
    counted = accountant(12, 20, sigma)
    assert 1.99 < counted.epsilon(DELTA) <= 2.0 < accountant(12, 20, sigma * 0.9998).epsilon(DELTA)
    with pytest.raises(PrivacyError, match="(?s)max_batch_size 12, and draws from 4 parts.*or take bands=1"):
        calibrate_noise(**known, truncation=(100, 12), bands=4)


def test_solving() -> None:
    known: dict[str, Any] = {"target_delta": DELTA, "expected_batch_size": 10, "dataset_size": 100}
    epsilon = solve(**known, noise_multiplier=4.0, steps=20, truncation=(100, 12))
    assert epsilon == accountant(12, 20).epsilon(DELTA)
    steps = solve(**known, noise_multiplier=4.0, target_epsilon=epsilon, truncation=(100, 12))
    assert steps == 20
    with pytest.raises(PrivacyError, match="(?s)truncation is of 99 examples, and dataset_size is 100.*the same size"):
        solve(**known, noise_multiplier=4.0, steps=20, truncation=(99, 12))
    with pytest.raises(PrivacyError, match="(?s)not known that epsilon grows with it.*leave out another one"):
        solve(target_delta=DELTA, target_epsilon=1.0, noise_multiplier=4.0, steps=20, truncation=(100, 12))


def test_the_cheapest_cap() -> None:
    known: dict[str, Any] = {"sample_rate": 0.1, "target_delta": DELTA}
    cap = smallest_cap(noise_multiplier=4.0, dataset_size=100, steps=20, multiple=2, **known)
    whole, at, below = (accountant(c, 20).epsilon(DELTA) for c in (None, cap, cap - 2))
    assert cap % 2 == 0 and 10 < cap < 40 and at <= whole * 1.001 < below
    assert smallest_cap(noise_multiplier=4.0, dataset_size=100, steps=20, multiple=64, **known) == 64
    assert smallest_cap(noise_multiplier=4.0, dataset_size=10, steps=20, multiple=64, **known) == 64
    everyone = smallest_cap(noise_multiplier=4.0, dataset_size=100, steps=2, sample_rate=1.0, target_delta=DELTA)
    assert everyone == 100  # nothing is truncated then
    for sigma, steps, why in ((0.0, 3, "without noise epsilon is infinite"), (1.0, 0, "no step is taken")):
        with pytest.raises(PrivacyError, match=f"(?s){why}.*give max_batch_size a number"):
            smallest_cap(noise_multiplier=sigma, dataset_size=100, steps=steps, **known)


def test_a_plan_with_caps() -> None:
    known: dict[str, Any] = {
        "dataset_size": 100, "expected_batch_sizes": [10], "target_delta": DELTA, "steps": [20],
        "noise_multiplier": 4.0,
    }  # fmt: skip
    (row,) = plan_privacy(**known, max_batch_size=12).rows
    assert (row.max_batch_size, row.examples, row.epsilon) == (12, 240, accountant(12, 20).epsilon(DELTA))
    plan = plan_privacy(**known, max_batch_size="auto")
    (auto,) = plan.rows
    cap = smallest_cap(
        noise_multiplier=4.0, sample_rate=0.1, dataset_size=100, steps=20, target_delta=DELTA, multiple=8
    )
    assert auto.max_batch_size == cap and auto.epsilon < row.epsilon
    assert [line[-1] for line in plan.cells()] == ["cap", str(cap)] and f'"max_batch_size": {cap}' in plan.json()
    (whole,) = plan_privacy(**known).rows
    assert whole.max_batch_size is None and whole.examples == 200
