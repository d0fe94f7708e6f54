"""Delta at a given epsilon, and what it says of attacks: against closed forms of one Gaussian, and dp-accounting."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from dpcompile.accounting import losses
from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.accounting.composition import Composed
from dpcompile.accounting.events import sampled_gaussian
from dpcompile.accounting.renyi import Renyi
from dpcompile.accounting.tradeoff import gaussian_bound, true_positive_rate
from dpcompile.errors import PrivacyError

BOUNDS = [
    ("pld", "zero_out"),
    ("pld", "add_remove"),
    ("pld", "replace_one"),
    ("rdp", "zero_out"),
    ("rdp", "add_remove"),
]
SETTINGS = [(1.0, 0.01, 1000), (2.0, 0.3, 100), (0.1, 0.1, 10**4), (1e9, 0.01, 3)]


def accountant(
    sigma: float, q: float, steps: int, method: Any = "pld", relation: Any = "zero_out"
) -> PrivacyAccountant:
    result = PrivacyAccountant(noise_multiplier=sigma, sample_rate=q, method=method, relation=relation)
    result.step(steps)
    return result


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Balle and Wang 2018, theorem 8."""
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)))


# ---- delta


@pytest.mark.parametrize(("method", "relation"), BOUNDS)
@pytest.mark.parametrize(("sigma", "q", "steps"), SETTINGS)
def test_delta_goes_with_epsilon(sigma: float, q: float, steps: int, method: str, relation: str) -> None:
    counted = accountant(sigma, q, steps, method, relation)
    for delta in (1e-12, 1e-9, 1e-5, 1e-2, 0.3):
        epsilon = counted.epsilon(delta)
        assert counted.delta(epsilon) <= delta * (1 + 1e-5) + 1e-13
        if epsilon > 0:  # and no more of it than is needed
            assert counted.delta(epsilon * 0.98) > delta
    deltas = [delta for _, delta in counted.curve([0, 1e-6, 0.01, 0.3, 1, 2, 5, 20, 1e3, 1e7, math.inf])]
    assert all(0 <= b <= a + 1e-14 <= 1 + 1e-14 for a, b in zip(deltas, deltas[1:], strict=False))
    assert deltas[-1] == 0


@settings(max_examples=8, deadline=None)
@given(st.floats(0.3, 30), st.floats(0, 8), st.sampled_from(["pld", "rdp"]))
def test_delta_is_an_upper_bound(sigma: float, epsilon: float, method: str) -> None:
    found = accountant(sigma, 1.0, 1, method).delta(epsilon)
    exact = gaussian_delta(1 / sigma, epsilon)
    assert exact <= found + 1e-13
    if method == "pld":
        assert found <= exact * (1 + 1e-3) + 1e-7


@pytest.mark.parametrize("method", ["pld", "rdp"])
@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.0, 0.01, 1000), (0.8, 0.2, 10)])
def test_delta_is_what_dp_accounting_says(sigma: float, q: float, steps: int, method: str) -> None:
    reference = {"pld": pld.PLDAccountant, "rdp": rdp.RdpAccountant}[method]()
    reference.compose(sampled_gaussian(sigma, q), steps)
    for epsilon in (0.0, 0.5, 1.5, 2.123456789):
        assert accountant(sigma, q, steps, method).delta(epsilon) == pytest.approx(reference.get_delta(epsilon), 1e-6)


@pytest.mark.parametrize(
    ("method", "relation", "delta"),
    [
        ("pld", "zero_out", 2.61250e-3),
        ("pld", "add_remove", 2.61250e-3),
        ("pld", "replace_one", 3.29624e-2),
        ("rdp", "zero_out", 8.34680e-3),
    ],
)
def test_delta_of_each_relation(method: str, relation: str, delta: float) -> None:
    assert accountant(1.0, 0.01, 1000, method, relation).delta(1.0) == pytest.approx(delta, rel=1e-4)


@pytest.mark.parametrize(("method", "relation"), BOUNDS)
def test_no_steps_leak_nothing_and_no_noise_leaks_everything(method: str, relation: str) -> None:
    nothing, everything = (accountant(0.0, 0.1, steps, method, relation) for steps in (0, 1))
    for epsilon in (0, 3.0, math.inf):
        assert nothing.delta(epsilon) == 0 and everything.delta(epsilon) == 1
    assert nothing.gaussian_bound() == (0, 0) and everything.gaussian_bound() == (math.inf, 0)
    assert nothing.true_positive_rate(0.1) == 0.1 and everything.true_positive_rate(0.0) == 1
    assert accountant(1e-120, 0.1, 1, method, relation).delta(1.0) == 1


@pytest.mark.parametrize("method", ["pld", "rdp"])
@pytest.mark.parametrize(("sigma", "q"), [(1e6, 1.0), (1e9, 0.01), (1e12, 1.0), (1e30, 0.5)])
def test_next_to_nothing_is_not_nothing(method: str, sigma: float, q: float) -> None:
    """Divergences of such steps are below rounding, and were taken for 0 or less."""
    total_variation = 2 * q * (norm.cdf(0.5 / sigma) - 0.5)
    assert accountant(sigma, q, 1, method).delta(0.0) >= total_variation - 1e-15
    assert Renyi([(sigma, q, 1)], (), "zero_out").delta(0.0) >= total_variation


@pytest.mark.parametrize("odd", [-1, -1e-9, math.nan, None, "1", [1.0]])
def test_what_is_no_epsilon_rate_or_slack_is_refused(odd: Any) -> None:
    counted = accountant(1.0, 0.1, 1)
    with pytest.raises(PrivacyError, match=r"epsilon is .*\n.*0 or more"):
        counted.delta(odd)
    with pytest.raises(PrivacyError, match=r"epsilon is .*\n.*0 or more"):
        counted.curve([0.0, odd])
    with pytest.raises(PrivacyError, match=r"false_positive_rate is .*\n.*in \[0, 1\]"):
        counted.true_positive_rate(odd)
    with pytest.raises(PrivacyError, match=r"slack is .*\n.*such as 1e-8"):
        counted.gaussian_bound(odd)
    for rate in (1.5, math.inf):
        with pytest.raises(PrivacyError, match="false_positive_rate is"):
            counted.true_positive_rate(rate)
    for slack in (0, 1):
        with pytest.raises(PrivacyError, match="slack is"):
            counted.gaussian_bound(slack)


def test_delta_is_read_off_as_dp_accounting_reads_it() -> None:
    """And by dp-accounting itself where its distributions look otherwise."""
    whole = Composed([(0.7, 0.2, 7)], "pld", "zero_out")
    said = lambda epsilon: float(whole._losses.get_delta_for_epsilon(epsilon))  # noqa: E731
    read = losses.delta_reader(whole._losses, said)
    assert read is not said
    for epsilon in (0.0, 0.00005, 0.0001, 0.12345, 1.0, 3.333, 9.0, 1e3, math.inf):
        assert read(epsilon) == pytest.approx(said(epsilon), rel=1e-9, abs=1e-14)
    assert losses.delta_reader(SimpleNamespace(), said) is said
    other = Composed([(0.6, 0.2, 7)], "pld", "zero_out")
    assert losses.delta_reader(other._losses, said) is said


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 5000), (0.5, 10**4), (0.3, 100)])
def test_large_epsilons_are_tight_and_upper_bounds(sigma: float, steps: int) -> None:
    """Losses there are beyond what exponentials hold; so many Gaussians are one, of sigma over the root of steps."""
    counted, mu = accountant(sigma, 1.0, steps), math.sqrt(steps) / sigma
    for delta in (1e-9, 1e-5, 0.5, 0.999):
        epsilon = counted.epsilon(delta)
        assert epsilon > 400 and gaussian_delta(mu, epsilon) <= delta < gaussian_delta(mu, epsilon * 0.98)
        assert counted.delta(epsilon) <= delta * (1 + 1e-6)


def test_sampling_pays_where_there_is_little_noise() -> None:
    """Rényi's bound has too few orders there: it says 301307."""
    epsilons = [accountant(0.1, 0.1, 10**4, "pld", relation).epsilon(1e-5) for relation in ("zero_out", "replace_one")]
    assert 53_000 < epsilons[0] < 54_000 < epsilons[1] < 63_500


# ---- attacks


@settings(max_examples=8, deadline=None)
@given(st.floats(0.2, 50), st.floats(0, 1), st.sampled_from(["pld", "rdp"]))
def test_no_attack_on_one_gaussian_is_better_than_what_is_said(sigma: float, rate: float, method: str) -> None:
    """Neyman and Pearson: the best attack has power Phi(Phi^-1(rate) + 1 / sigma)."""
    counted = accountant(sigma, 1.0, 1, method)
    best = norm.cdf(norm.ppf(rate) + 1 / sigma) if 0 < rate < 1 else rate
    assert best <= counted.true_positive_rate(rate) + 1e-12
    advantage = 2 * norm.cdf(0.5 / sigma) - 1
    assert advantage <= counted.attack_advantage() + 1e-12
    if method == "pld":
        assert counted.true_positive_rate(rate) <= best * 1.001 + 1e-4
        assert counted.attack_advantage() <= advantage * 1.001 + 1e-7


@pytest.mark.parametrize("rate", [0.0, 1e-300, 1e-9, 1e-3, 0.5, 1 - 1e-9, 1.0])
@pytest.mark.parametrize(("sigma", "q", "steps"), SETTINGS)
def test_rates_are_rates(sigma: float, q: float, steps: int, rate: float) -> None:
    assert rate <= accountant(sigma, q, steps).true_positive_rate(rate) <= 1


def test_a_pure_epsilon_bounds_rates_as_it_is_known_to() -> None:
    """(epsilon, 0): the power is at most min(e^epsilon rate, 1 - e^-epsilon (1 - rate))."""
    pure = lambda e: max(0.0, (math.exp(1) - math.exp(e)) / (math.exp(1) + 1))  # noqa: E731  # of randomised response
    for rate in (1e-6, 0.1, 1 / (math.e + 1), 0.6, 0.99):
        known = min(math.e * rate, 1 - (1 - rate) / math.e)
        assert known <= true_positive_rate(pure, rate) <= known * 1.001


# ---- mu


@settings(max_examples=6, deadline=None)
@given(st.floats(0.07, 100))
def test_mu_of_one_gaussian_is_its_own(sigma: float) -> None:
    mu, regret = accountant(sigma, 1.0, 1).gaussian_bound()
    assert 1 / sigma - 1e-6 <= mu <= 1.001 / sigma + 1e-4 and regret < 1e-3


def test_mu_of_a_curve_in_closed_form() -> None:
    for mu in (1e-3, 0.3, 1.0, 8.0, 40.0):
        assert mu <= gaussian_bound(lambda e, m=mu: gaussian_delta(m, e), 1e-12).mu + 1e-9 <= mu * 1.001


@pytest.mark.parametrize(("method", "relation"), BOUNDS)
@pytest.mark.parametrize(("sigma", "q", "steps"), SETTINGS[:3])
def test_the_curve_lies_below_that_of_mu(sigma: float, q: float, steps: int, method: str, relation: str) -> None:
    counted = accountant(sigma, q, steps, method, relation)
    mu, regret = counted.gaussian_bound()
    assert 0 < mu < math.inf and 0 <= regret < 1
    end = counted.epsilon(1e-8)
    tight = accountant(sigma, q, steps, "pld", relation)  # Rényi's curve is not convex, and more follows from it
    for i in range(400):
        epsilon = end * i / 350
        if mu < 30:
            assert tight.delta(epsilon) <= gaussian_delta(mu, epsilon) + 1e-8 + 1e-12
    smaller = mu * 0.99
    if mu < 30 and method == "pld":
        assert any(counted.delta(e) > gaussian_delta(smaller, e) + 1e-8 for e in (end * i / 400 for i in range(400)))


def test_mu_and_regret_of_a_usual_run() -> None:
    mu, regret = accountant(1.0, 0.01, 1000).gaussian_bound()
    assert mu == pytest.approx(0.48566, abs=1e-4) and regret == pytest.approx(0.01542, abs=1e-4)
    assert accountant(1.0, 0.01, 1000).attack_advantage() == pytest.approx(0.16102, abs=1e-5)
    assert accountant(1.0, 0.01, 1000).true_positive_rate(0.01) == pytest.approx(0.029139, abs=1e-5)
