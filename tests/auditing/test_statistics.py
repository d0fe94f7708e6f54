"""Bounds from guesses: published values, another library's, and how often they are wrong."""

from __future__ import annotations

import importlib.util
import math

import dp_accounting
import numpy as np
import pytest
from scipy.stats import beta, binom, norm

from dpcompile.accounting.composition import Composed, composed_epsilon
from dpcompile.auditing.judging import error_rates, guesses
from dpcompile.auditing.noise_level import contradicts, most_noise, scaled
from dpcompile.auditing.statistics import (
    ErrorRates,
    first_crossing,
    one_run_epsilon,
    one_run_p_value,
    rate_at_most,
)

# Of jax-privacy 2.0, tests/auditing_test.py: 10,000 scores in and out, the quantiles of unit Gaussians this far apart,
# significance 0.05, delta 1e-6: CanaryScoreAuditor.epsilon_one_run, whose thresholds are the corners of the ROC curve's
# hull, with Bonferroni's correction for their number.
PUBLISHED = {0: 0.0, 1: 1.13346, 2: 2.311945, 4: 4.395568}


def quantiles(mean: float, n: int = 10_000) -> np.ndarray:
    return norm.ppf((np.arange(n) + 0.5) / n) + mean


@pytest.mark.parametrize("shift", [0, 1, 2, 4])
def test_published_values(shift: int) -> None:
    n = 10_000
    inside, out = quantiles(shift), quantiles(0)
    thresholds = np.concatenate([inside, out])
    in_above, out_above = n - np.searchsorted(inside, thresholds), n - np.searchsorted(out, thresholds)
    corners = _hull(np.append(out_above, 0), np.append(in_above, 0))
    best, significance = 0.0, 0.05 / len(corners)
    for wrong, right in sorted(corners, key=lambda c: c[0] / max(sum(c), 1)):
        made = wrong + right
        if made and one_run_p_value(2 * n, made, right, epsilon=best, delta=1e-6) <= significance:
            best = max(best, one_run_epsilon(2 * n, made, right, delta=1e-6, significance=significance))
    assert best == pytest.approx(PUBLISHED[shift], rel=1e-5, abs=1e-5)


def _hull(x: np.ndarray, y: np.ndarray) -> list[tuple[int, int]]:
    """Corners of the upper hull of points."""
    corners: list[tuple[int, int]] = []
    for point in sorted(set(zip(x.tolist(), y.tolist(), strict=True))):
        while len(corners) > 1:
            (a, b), (c, d) = corners[-2:]
            if (c - a) * (point[1] - b) < (d - b) * (point[0] - a):
                break
            corners.pop()
        corners.append(point)
    return corners


@pytest.mark.skipif(importlib.util.find_spec("jax_privacy") is None, reason="pip install dpcompile[audit]")
def test_another_librarys_values() -> None:
    from jax_privacy.auditing import CanaryScoreAuditor, Explicit  # type: ignore[import-not-found]

    rng = np.random.default_rng(0)
    for shift in (0.5, 1.5, 3.0):
        inside, out = rng.normal(shift, size=300), rng.normal(size=280)
        theirs = CanaryScoreAuditor(inside, out)
        for threshold in (0.0, 1.0, 2.0):
            right, wrong = int((inside >= threshold).sum()), int((out >= threshold).sum())
            for delta in (1e-6, 1e-4):
                ours = one_run_epsilon(580, right + wrong, right, delta=delta, significance=0.05)
                wanted = theirs.epsilon_one_run(0.05, delta, threshold_strategy=Explicit(threshold))
                assert ours == pytest.approx(wanted, abs=1e-4)
            rates = ErrorRates.counted(wrong, 280, 300 - right, 300, 0.05)
            strategy = Explicit(threshold)
            wanted = theirs.epsilon_clopper_pearson(0.05, 1e-5, one_sided=False, threshold_strategy=strategy)
            assert rates.epsilon(1e-5) == pytest.approx(wanted, abs=1e-6)


def test_the_p_value_term_by_term() -> None:
    for canaries, made, right, epsilon, delta in [(10, 8, 7, 0.5, 1e-3), (50, 20, 20, 1.0, 1e-2), (9, 5, 1, 0.0, 0.1)]:
        q = math.exp(epsilon) / (1 + math.exp(epsilon))
        masses = [float(binom.pmf(k, made, q)) for k in range(made + 1)]
        tail = sum(masses[right:])
        added = max(sum(masses[right - i : right]) / i for i in range(1, right + 1))
        wanted = min(1.0, tail + 2 * canaries * delta * added)
        found = one_run_p_value(canaries, made, right, epsilon=epsilon, delta=delta)
        assert found == pytest.approx(wanted)
    assert one_run_p_value(10, 0, 0, epsilon=1.0, delta=1e-5) == 1.0
    assert one_run_p_value(10, 10, 10, epsilon=30.0, delta=0.0) == pytest.approx(1.0)


def test_edges_of_the_one_run_bound() -> None:
    bound = one_run_epsilon(500, 500, 500, delta=0.0, significance=0.05)
    assert bound == pytest.approx(-math.log(0.05 ** (-1 / 500) - 1), abs=1e-5)
    assert one_run_epsilon(500, 0, 0, delta=1e-5, significance=0.05) == 0.0
    assert one_run_epsilon(500, 500, 260, delta=1e-5, significance=0.05) == 0.0
    assert one_run_epsilon(500, 500, 500, delta=1e-2, significance=0.05) < 1.0 < bound
    assert first_crossing(lambda epsilon: epsilon > 1e9) == pytest.approx(700, abs=0.5)
    assert first_crossing(lambda epsilon: 1 < epsilon < 1.3 or epsilon > 5) == pytest.approx(1.0, abs=1e-5)


def test_randomised_response_is_rarely_overestimated() -> None:
    """The mechanism for which the one-run bound is tight: each coin told rightly with chance e^eps / (1 + e^eps)."""
    rng, epsilon, wrong = np.random.default_rng(1), 1.0, 0
    for right in rng.binomial(200, math.e / (1 + math.e), size=400):
        wrong += one_run_epsilon(200, 200, int(right), delta=0.0, significance=0.05) > epsilon
    assert 8 <= wrong <= 28  # 20, less what counts leave out


def test_rates() -> None:
    for events, trials in [(0, 10), (3, 10), (9, 10)]:
        assert binom.cdf(events, trials, rate_at_most(events, trials, 0.02)) == pytest.approx(0.02)
    assert rate_at_most(10, 10, 0.02) == 1.0 == rate_at_most(0, 0, 0.02)
    rates = ErrorRates.counted(3, 100, 5, 120, 0.1)
    assert rates == ErrorRates(float(beta.ppf(0.95, 4, 97)), float(beta.ppf(0.95, 6, 115)))


def test_epsilon_of_error_rates() -> None:
    assert ErrorRates(0.1, 0.2).epsilon(0.0) == pytest.approx(math.log(0.9 / 0.2 if 0.9 / 0.2 > 8 else 8.0))
    assert ErrorRates(0.2, 0.1).epsilon(0.1) == pytest.approx(math.log(0.7 / 0.1))
    assert ErrorRates(0.5, 0.5).epsilon(0.0) == 0.0 == ErrorRates(1.0, 1.0).epsilon(1e-5)
    assert ErrorRates(0.0, 0.0).epsilon(1e-5) == math.inf
    for mu in (0.5, 1.0, 3.0):  # the best that can be told of a Gaussian is what it is
        true, x = dp_accounting.get_epsilon_gaussian(1 / mu, 0.05), np.linspace(-6, 6, 5001)
        found = max(
            ErrorRates(float(a), float(b)).epsilon(0.05) for a, b in zip(norm.sf(x), norm.cdf(x - mu), strict=True)
        )
        assert found == pytest.approx(true, abs=1e-3) and found <= true + 1e-9


@pytest.mark.parametrize("history", [[(2.0, 1.0, 8)], [(1.0, 1.0, 3), (4.0, 1.0, 16)]])
def test_the_noise_that_errors_leave_room_for(history: list[tuple[float, float, int]]) -> None:
    mu = math.sqrt(sum(n / sigma**2 for sigma, _, n in history))
    for factor in (0.25, 0.5, 1.0, 2.0):
        error = float(norm.cdf(-mu / factor / 2))
        assert most_noise(history, ErrorRates(error, error)) == pytest.approx(factor, rel=1e-6)
        for more, wanted in ((0.9, False), (1.1, True)):  # by the privacy loss distributions, which samples go by
            assert contradicts(history, ErrorRates(error, error), factor * more) is wanted
    assert most_noise(history, ErrorRates(0.5, 0.5)) == math.inf == most_noise(history, ErrorRates(1.0, 1.0))
    assert most_noise([*history, (0.0, 1.0, 1)], ErrorRates(1e-9, 1e-9)) == math.inf
    assert most_noise(history, ErrorRates(0.0, 0.0)) == 1 / 32


def test_the_noise_of_samples() -> None:
    history = [(2.0, 0.2, 30)]
    epsilons = np.linspace(0, 4, 100)
    for factor in (0.7, 1.5):
        run = Composed(scaled(history, factor), "pld", "zero_out")
        deltas = np.array([run.delta(float(e)) for e in epsilons])
        equal = float(((1 - deltas) / (1 + np.exp(epsilons))).max())  # both errors, where they are the same
        found = most_noise(history, ErrorRates(equal, equal))
        assert factor * 0.99 < found <= factor * 1.05
    assert most_noise(history, ErrorRates(0.5, 0.5)) == math.inf


def test_deltas_belong_to_epsilons() -> None:
    for history in ([(2.0, 1.0, 8)], [(1.1, 0.02, 10), (1.3, 0.02, 10)]):
        epsilon = composed_epsilon(history, 1e-3, "pld", "zero_out")
        assert Composed(history, "pld", "zero_out").delta(epsilon) == pytest.approx(1e-3, rel=1e-2)
        assert Composed(history, "pld", "zero_out", coarser=32).delta(epsilon) >= 1e-3 * 0.99


def drawn(seed: int, mu: float, m: int = 400) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    inside = rng.random(m) < 0.5
    noise = {name: rng.normal(size=m) for name in ("all", *(f"part {i}" for i in range(8)))}
    return {**noise, "all": noise["all"] + mu * inside}, inside


def test_a_claim_that_is_true_is_rarely_contradicted() -> None:
    """Both bounds, at significance 0.2, on Gaussian scores of which the claim is true: seldom, and not never."""
    wrong = [0, 0]
    history, runs = [(1.0, 1.0, 1)], 150
    for seed in range(runs):
        scores, inside = drawn(seed, mu=1.0)
        _, rates = error_rates(scores, inside, 0.2)
        wrong[0] += most_noise(history, rates) < 1
        found = guesses(scores, inside, 0.2)
        low = one_run_epsilon(found.canaries, found.made, found.right, delta=1e-5, significance=0.2)
        wrong[1] += low > dp_accounting.get_epsilon_gaussian(1.0, 1e-5)
    assert 1 <= wrong[0] <= 0.2 * runs and wrong[1] == 0


def test_choosing_the_attack_costs_nothing() -> None:
    """Many attacks that see nothing: the best of them on one half is no better than chance on the other."""
    wrong = 0
    for seed in range(100):
        scores, inside = drawn(seed, mu=0.0)
        found = guesses(scores, inside, 0.2)
        wrong += one_run_epsilon(found.canaries, found.made, found.right, delta=0.0, significance=0.2) > 0
    assert wrong <= 20


def test_the_attack_that_sees_most_is_chosen() -> None:
    scores, inside = drawn(0, mu=0.5)
    scores["part 3"] = scores["part 3"] + 4.0 * inside
    found, (attack, rates) = guesses(scores, inside, 0.05), error_rates(scores, inside, 0.05)
    assert found.attack == attack == "part 3" and found.canaries == 200
    assert found.right > 0.9 * found.made > 0 and max(rates.false_negative, rates.false_positive) < 0.15
    scores, inside = drawn(0, mu=2.0)
    assert guesses(scores, inside, 0.05).attack == error_rates(scores, inside, 0.05)[0] == "all"


def test_scores_that_are_all_the_same() -> None:
    inside = np.arange(60) % 2 == 0
    assert error_rates({"all": np.zeros(60)}, inside, 0.05)[1].epsilon(1e-5) == 0.0
    assert guesses({"all": np.zeros(60)}, inside, 0.05).canaries == 30
