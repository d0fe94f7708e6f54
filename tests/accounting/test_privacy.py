"""The accountant and the calibration, against dp-accounting and known values."""

from __future__ import annotations

import math
import pathlib
import pickle
import re
from typing import Any

import dp_accounting
import pytest
from dp_accounting import DpEvent, GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent, pld, rdp

from benchmarks.mechanisms import bands, relations
from dpcompile.accounting import accountant as accountants
from dpcompile.accounting import composition
from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.accounting.calibration import calibrate_noise
from dpcompile.accounting.events import rounds, sampled_gaussian
from dpcompile.errors import PrivacyError
from dpcompile.noise.banded import BandedMechanism
from dpcompile.noise.mechanism import GaussianMechanism


def accountant(sigma: float = 1.5, q: float = 0.04, method: Any = "pld", steps: int = 0) -> PrivacyAccountant:
    result = PrivacyAccountant(noise_multiplier=sigma, sample_rate=q, method=method)
    result.step(steps)
    return result


def direct(runs, delta: float, method: str) -> float:
    reference = {"pld": pld.PLDAccountant, "rdp": rdp.RdpAccountant}[method]()
    for sigma, q, n in runs:
        gaussian = dp_accounting.GaussianDpEvent(sigma)
        reference.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(q, gaussian), n))
    return reference.get_epsilon(delta)


@pytest.mark.parametrize(("method", "epsilon"), [("rdp", 7.329), ("pld", 6.769)])
def test_known_values(method, epsilon):
    assert accountant(method=method, steps=2250).epsilon(1e-5) == pytest.approx(epsilon, abs=1e-3)


@pytest.mark.parametrize("method", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("sigma", "q", "n", "delta"), [(1.0, 0.01, 100, 1e-5), (4.0, 1.0, 7, 1e-3), (2.0, 0.2, 1, 1e-6)]
)
def test_it_says_what_dp_accounting_says(method, sigma, q, n, delta):
    assert accountant(sigma, q, method, n).epsilon(delta) == pytest.approx(direct([(sigma, q, n)], delta, method), 1e-9)


@pytest.mark.parametrize("method", ["pld", "rdp"])
def test_a_restored_history_is_composed_with_what_follows(method):
    first, second = accountant(2.0, 0.1, method, 20), accountant(1.5, 0.05, method, 3)
    second.load_state_dict(first.state_dict())
    second.step(5)
    second.step(5)
    assert second.history == [(2.0, 0.1, 20), (1.5, 0.05, 10)] and second.steps == 30
    assert second.epsilon(1e-5) == pytest.approx(direct(second.history, 1e-5, method), 1e-9)


def test_steps_one_by_one_are_one_run():
    one_by_one = accountant(method="rdp")
    for _ in range(10):
        one_by_one.step()
    assert one_by_one.history == [(1.5, 0.04, 10)]
    assert one_by_one.epsilon(1e-5) == accountant(method="rdp", steps=10).epsilon(1e-5)


def test_epsilon_is_computed_once_per_steps_and_delta(monkeypatch):
    calls = []
    monkeypatch.setattr(accountants, "composed", lambda *a: calls.append(a) or composition.composed(*a))
    counted = accountant(method="rdp", steps=3)
    assert counted.epsilon(1e-5) == counted.epsilon(1e-5) and len(calls) == 1
    assert counted.epsilon(1e-6) > counted.epsilon(1e-5) and len(calls) == 2
    before = counted.epsilon(1e-5)
    counted.step()
    assert counted.epsilon(1e-5) > before and len(calls) == 3


@pytest.mark.parametrize("method", ["pld", "rdp"])
def test_no_steps_cost_nothing_and_no_noise_costs_everything(method):
    silent = accountant(0.0, 0.1, method)
    assert silent.epsilon(1e-5) == 0.0 == accountant(method=method).epsilon(1e-5)
    silent.step()
    assert silent.epsilon(1e-5) == math.inf


@pytest.mark.full
@pytest.mark.parametrize("method", ["pld", "rdp"])
@pytest.mark.parametrize(("epsilon", "q", "steps"), [(3.0, 0.04, 500), (1.0, 1.0, 10), (8.0, 0.1, 100)])
def test_calibrated_noise_meets_the_target_and_no_less_would(method, epsilon, q, steps):
    sigma = calibrate_noise(target_epsilon=epsilon, target_delta=1e-5, sample_rate=q, steps=steps, method=method)
    assert accountant(sigma, q, method, steps).epsilon(1e-5) <= epsilon
    assert accountant(sigma * 0.999, q, method, steps).epsilon(1e-5) > epsilon


@pytest.mark.full
def test_pld_needs_less_noise_than_rdp():
    common = {"target_epsilon": 1.0, "target_delta": 1e-5, "sample_rate": 1.0, "steps": 10}
    assert calibrate_noise(**common) < calibrate_noise(**common, method="rdp")


@pytest.mark.parametrize("epsilon", [0, -1, math.inf, math.nan])
def test_targets_without_sense_are_refused(epsilon):
    with pytest.raises(PrivacyError, match="target_epsilon is"):
        calibrate_noise(target_epsilon=epsilon, target_delta=1e-5, sample_rate=0.1, steps=1)


@pytest.mark.parametrize("delta", [0, 1, -1e-5, 2, math.nan])
def test_delta_outside_its_range_is_refused(delta):
    with pytest.raises(PrivacyError, match=r"delta is .*, not in \(0, 1\)"):
        accountant().epsilon(delta)
    with pytest.raises(PrivacyError, match=r"delta is .*, not in \(0, 1\)"):
        calibrate_noise(target_epsilon=1.0, target_delta=delta, sample_rate=0.1, steps=1)


@pytest.mark.parametrize("q", [0, -0.1, 1.5, math.nan])
def test_a_sample_rate_outside_its_range_is_refused(q):
    with pytest.raises(PrivacyError, match=r"sample_rate is .*, not in \(0, 1\]"):
        accountant(q=q)
    with pytest.raises(PrivacyError, match=r"sample_rate is .*, not in \(0, 1\]"):
        calibrate_noise(target_epsilon=1.0, target_delta=1e-5, sample_rate=q, steps=1)


@pytest.mark.parametrize("sigma", [-1, math.inf, math.nan])
def test_noise_without_sense_is_refused(sigma):
    with pytest.raises(PrivacyError, match="noise_multiplier is"):
        accountant(sigma)
    with pytest.raises(PrivacyError, match="noise_multiplier is"):
        accountant().load_state_dict({"history": [[sigma, 0.1, 3]]})


@pytest.mark.parametrize("steps", [-1, 1.5, True])
def test_steps_without_sense_are_refused(steps):
    with pytest.raises(PrivacyError, match="number of steps is"):
        accountant().step(steps)
    with pytest.raises(PrivacyError, match="number of steps is"):
        calibrate_noise(target_epsilon=1.0, target_delta=1e-5, sample_rate=0.1, steps=steps)


def test_calibrating_for_no_steps_is_refused():
    with pytest.raises(PrivacyError, match="steps is 0"):
        calibrate_noise(target_epsilon=1.0, target_delta=1e-5, sample_rate=0.1, steps=0)


def test_an_unknown_method_is_refused():
    with pytest.raises(PrivacyError, match="'gdp' is not known.*\n.*'pld' or 'rdp'"):
        accountant(method="gdp")


def test_an_unreachable_target_is_refused():
    with pytest.raises(PrivacyError, match="no noise multiplier up to"):
        calibrate_noise(target_epsilon=1e-9, target_delta=1e-12, sample_rate=1.0, steps=10**6, method="rdp")


LITTLE_NOISE = [
    (1e-120, 1.0, 1),
    (1e-10, 0.01, 1),
    (1e-3, 0.01, 1),
    (0.05, 0.01, 1),
    (0.1, 0.1, 10**4),
    (0.5, 1.0, 10**4),
]
MANY_STEPS = [(1.0, 0.01, 10**15), (1e4, 1.0, 10**10), (1.0, 1e-9, 10**12), (1e300, 0.5, 1000)]


@pytest.mark.parametrize(("sigma", "q", "steps"), LITTLE_NOISE + MANY_STEPS)
def test_pld_answers_where_its_grid_would_not_fit(sigma, q, steps, monkeypatch):
    composed = []
    original = composition._one_step

    def one_step(*args: float) -> Any:
        result = original(*args)
        composed.append(result._pmf_remove.size)
        return result

    monkeypatch.setattr(composition, "_one_step", one_step)
    bound, looser = (accountant(sigma, q, m, steps).epsilon(1e-5) for m in ("pld", "rdp"))
    assert 0 <= bound <= looser and all(size < 5e5 for size in composed)


@pytest.mark.parametrize(("sigma", "q", "steps", "coarser"), [(0.5, 0.01, 30, 8e-4), (0.7, 0.1, 100, 3.2e-3)])
def test_a_coarser_grid_rounds_up(sigma, q, steps, coarser, monkeypatch):
    finer = accountant(sigma, q, "pld", steps).epsilon(1e-5)
    monkeypatch.setattr(composition, "_interval", lambda *_: coarser)
    assert finer <= accountant(sigma, q, "pld", steps).epsilon(1e-5) < finer * 1.001


def test_a_target_so_loose_that_pld_would_not_fit():
    sigma = calibrate_noise(target_epsilon=2000.0, target_delta=1e-5, sample_rate=0.1, steps=100)
    assert 1999 < accountant(sigma, 0.1, steps=100).epsilon(1e-5) <= 2000


@pytest.mark.parametrize("odd", ["3", None, [1.0], 10**400, 1 + 2j])
def test_what_is_no_number_is_refused(odd):
    with pytest.raises(PrivacyError, match="noise_multiplier is"):
        accountant(odd)
    with pytest.raises(PrivacyError, match="sample_rate is"):
        accountant(q=odd)
    with pytest.raises(PrivacyError, match="delta is"):
        accountant(steps=1).epsilon(odd)
    with pytest.raises(PrivacyError, match="target_epsilon is"):
        calibrate_noise(target_epsilon=odd, target_delta=1e-5, sample_rate=0.1, steps=1)
    with pytest.raises(PrivacyError, match="number of steps is"):
        accountant().step(odd)


@pytest.mark.parametrize("state", [None, {}, [], {"history": None}, {"history": "abc"}, {"steps": 3}])
def test_a_state_without_history_is_refused(state):
    with pytest.raises(PrivacyError, match="no list 'history'"):
        accountant().load_state_dict(state)


@pytest.mark.parametrize("run", [None, 3, [], [1.0, 0.1], [1.0, 0.1, 3, 4], "abc"])
def test_a_run_that_is_none_is_refused_and_nothing_is_changed(run):
    counted = accountant(steps=3)
    with pytest.raises(PrivacyError, match=r"in place of \(noise_multiplier, sample_rate, steps\)"):
        counted.load_state_dict({"history": [[1.0, 0.1, 3], run]})
    assert counted.steps == 3


def test_steps_are_counted_as_the_events_that_they_were() -> None:
    accountant, own = (PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1) for _ in range(2))
    accountant.step(3, event=GaussianMechanism(1.0, 5.0, 8.0, seed=0).event(0.1))
    own.step(3)
    assert accountant.history == own.history
    accountant.step(event=sampled_gaussian(2, 0.5))
    assert accountant.history == [(1.0, 0.1, 3), (2.0, 0.5, 1)]
    assert accountant.epsilon(1e-5) == pytest.approx(direct(accountant.history, 1e-5, "pld"), 1e-9)


@pytest.mark.parametrize("event", [GaussianDpEvent(1.0), PoissonSampledDpEvent(0.1, LaplaceDpEvent(1.0))])
def test_events_without_a_bound_are_not_counted(event: DpEvent) -> None:
    accountant = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(PrivacyError, match=r"(?s)cannot be counted.*what to do: count it with compose"):
        accountant.step(event=event)
    with pytest.raises(PrivacyError, match="sample_rate is 1.5"):
        accountant.step(event=sampled_gaussian(1.0, 1.5))
    assert accountant.steps == 0


# ---- which datasets are neighbours


@pytest.mark.parametrize(
    ("relation", "method", "epsilon"),
    [
        ("add_remove", "pld", 1.82824),
        ("zero_out", "pld", 1.82824),
        ("replace_one", "pld", 2.84345),
        ("add_remove", "rdp", 2.10137),
        ("zero_out", "rdp", 2.10137),
    ],
)
def test_epsilon_of_each_relation(relation: Any, method: Any, epsilon: float) -> None:
    counted = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.01, method=method, relation=relation)
    counted.step(1000)
    assert counted.epsilon(1e-5) == pytest.approx(epsilon, abs=1e-5)
    assert counted.relation == relation and f"relation={relation!r}" in repr(counted)


@pytest.mark.full
def test_a_replaced_example_is_as_one_taken_out_and_one_put_in() -> None:
    """(2 epsilon, (1 + e^epsilon) delta): two steps from neighbour to neighbour; and never below one of them."""
    for sigma, q, n in [
        (1.0, 0.01, 1000),
        (0.5, 1.0, 3),
        (4.0, 1.0, 50),
        (2.0, 0.3, 100),
        (0.3, 0.5, 1),
        (0.7, 1.0, 1),
    ]:
        zero, replaced = (
            PrivacyAccountant(noise_multiplier=sigma, sample_rate=q, relation=r) for r in ("zero_out", "replace_one")
        )
        zero.step(n)
        replaced.step(n)
        one = zero.epsilon(1e-6)
        assert one <= replaced.epsilon(1e-6)
        assert replaced.epsilon(min(1e-6 * (1 + math.exp(one)), 0.5)) <= 2 * one + 1e-3


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_a_replaced_example_of_a_whole_batch_is_twice_as_far(sigma: float) -> None:
    """Without sampling the mechanism is Gaussian, with half the noise for the distance."""
    replaced = PrivacyAccountant(noise_multiplier=sigma, sample_rate=1.0, relation="replace_one")
    halved = PrivacyAccountant(noise_multiplier=sigma / 2, sample_rate=1.0)
    replaced.step(5)
    halved.step(5)
    assert replaced.epsilon(1e-5) == pytest.approx(halved.epsilon(1e-5), rel=1e-3)


@pytest.mark.parametrize(("sigma", "q", "steps"), LITTLE_NOISE + MANY_STEPS)
def test_replaced_examples_where_the_grid_would_not_fit(sigma: float, q: float, steps: int) -> None:
    replaced = PrivacyAccountant(noise_multiplier=sigma, sample_rate=q, relation="replace_one")
    replaced.step(steps)
    assert 0 <= replaced.epsilon(1e-5) <= accountant(sigma / 2, 1.0, "rdp", steps).epsilon(1e-5)


def test_noise_is_calibrated_for_the_relation() -> None:
    target: dict[str, Any] = {"target_epsilon": 2.0, "target_delta": 1e-5, "sample_rate": 0.05, "steps": 100}
    zero, replaced = (calibrate_noise(**target, relation=r) for r in ("zero_out", "replace_one"))
    assert replaced > zero
    for sigma, enough in ((replaced, True), (replaced * 0.999, False)):
        counted = PrivacyAccountant(noise_multiplier=sigma, sample_rate=0.05, relation="replace_one")
        counted.step(100)
        assert (counted.epsilon(1e-5) <= 2.0) == enough


def test_accountants_pickled_before_there_were_relations_load() -> None:
    old = pickle.loads(pickle.dumps(accountant(steps=3)))
    del old.__dict__["_relation"]
    again = pickle.loads(pickle.dumps(old))
    assert again.relation == "zero_out" and again.epsilon(1e-5) == accountant(steps=3).epsilon(1e-5)


def test_relations_without_a_bound_are_refused() -> None:
    with pytest.raises(
        PrivacyError, match=r"relation 'swap' is not known.*\n.*'zero_out', 'add_remove' or 'replace_one'"
    ):
        PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1, relation="swap")  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match=r"no Rényi bound is known.*replaced.*\n.*method='pld'"):
        PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1, method="rdp", relation="replace_one")
    with pytest.raises(PrivacyError, match=r"no Rényi bound is known"):
        calibrate_noise(
            target_epsilon=1, target_delta=1e-5, sample_rate=0.1, steps=1, method="rdp", relation="replace_one"
        )


def test_steps_whose_rate_told_the_size_are_not_counted_for_add_remove() -> None:
    add_remove = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1, relation="add_remove")
    for state in (accountant(steps=3).state_dict(), {"history": [[1.0, 0.1, 3]]}):
        with pytest.raises(
            PrivacyError, match=r"(?s)counted for relation 'zero_out'.*with the relation of the saved run"
        ):
            add_remove.load_state_dict(state)
    add_remove.step(2)
    for relation in ("zero_out", "replace_one", "add_remove"):
        other = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1, relation=relation)  # type: ignore[arg-type]
        other.load_state_dict(add_remove.state_dict())
        assert other.steps == 2 and other.relation == relation


def test_the_page_has_the_figures_of_the_command() -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs/sharp_edges.md").read_text()
    for relation, epsilon in relations().items():
        assert re.search(rf'\| `"{relation}"` \|.*\| {epsilon:.3f} \|', page)


# ---- noise that is correlated over steps


@pytest.mark.parametrize(("bands", "q", "count", "epsilon"), [(1, 0.01, 1000, 1.82824), (8, 0.08, 125, 6.22838)])
def test_known_values_of_correlated_noise(bands, q, count, epsilon):
    """The same expected batch, 1,000 steps, sigma 1."""
    assert rounds(1000, bands) == count
    assert accountant(1.0, q, steps=count).epsilon(1e-5) == pytest.approx(epsilon, abs=1e-5)


def test_rounds_are_counted_when_they_begin():
    assert [rounds(t, 3) for t in range(8)] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert [rounds(t, 1) for t in range(4)] == [0, 1, 2, 3]


def test_a_mechanism_of_bands_is_counted_as_its_gaussian():
    own = BandedMechanism(1.0, 1.0, 8.0, 0, coefficients=(1.0, 0.5))
    counted = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.08)
    counted.step(rounds(9, 2), event=own.event(0.08))
    assert counted.history == [(1.0, 0.08, 5)]


def test_calibrated_for_bands():
    common: Any = {"target_epsilon": 2.0, "target_delta": 1e-5, "sample_rate": 0.08}
    sigma = calibrate_noise(**common, steps=999, bands=8)
    assert sigma == calibrate_noise(**common, steps=125)
    assert accountant(sigma, 0.08, steps=rounds(999, 8)).epsilon(1e-5) <= 2.0


def test_what_is_not_proved_of_bands_is_refused():
    common: Any = {"target_epsilon": 2.0, "target_delta": 1e-5, "sample_rate": 0.08, "steps": 10}
    with pytest.raises(PrivacyError, match="(?s)over 8 steps, for relation 'replace_one'.*take relation='zero_out'"):
        calibrate_noise(**common, bands=8, relation="replace_one")
    with pytest.raises(PrivacyError, match="(?s)a schedule, and noise that is correlated over 8 steps.*leave out the"):
        calibrate_noise(**common, bands=8, schedule=lambda t: 1.0)
    for bad in (0, 1.5, True):
        with pytest.raises(PrivacyError, match=f"(?s)bands is {bad}.*give an integer, 1 or more"):
            calibrate_noise(**{**common, "bands": bad})


@pytest.mark.full
def test_the_table_of_bands():
    """More bands need more noise for a target; what adds up is less where epsilon is large."""
    found = bands(0.01, 1000, 8.0)
    assert found[1][0] == pytest.approx(1.82824, abs=1e-5) and found[8][0] == pytest.approx(6.22838, abs=1e-5)
    sigmas, errors = ([row[i] for row in found.values()] for i in (1, 2))
    assert sigmas == sorted(sigmas) and errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "relation"),
    [
        (0.4, 0.05, 300, "zero_out"),
        (1.0, 0.01, 200_000, "zero_out"),
        (20.0, 1.0, 40_000, "zero_out"),
        (1.0, 0.1, 500, "replace_one"),
        (1.0, 0.01, 100_000, "replace_one"),
    ],
)
def test_a_large_epsilon_on_fewer_points_is_the_same(
    monkeypatch: pytest.MonkeyPatch, sigma: float, rate: float, steps: int, relation: Any
) -> None:
    found = composition.composed_epsilon([(sigma, rate, steps)], 1e-5, "pld", relation)
    monkeypatch.setattr(composition, "_QUICK", math.inf)
    fine = composition.composed_epsilon([(sigma, rate, steps)], 1e-5, "pld", relation)
    assert fine > 20 and fine * (1 - 1e-6) <= found <= fine * 1.0005


def test_many_steps_of_replaced_examples_are_amplified_too() -> None:
    """By Rényi's bound, which knows of no samples here, it would be 880,111: how far losses reach is no such number."""
    counted = PrivacyAccountant(noise_multiplier=0.5, sample_rate=0.001, relation="replace_one")
    counted.step(100_000)
    assert 13.02 < counted.epsilon(1e-5) < 17.1
