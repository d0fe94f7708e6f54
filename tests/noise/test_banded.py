"""Correlated noise against a dense matrix in float64; its rows as a function of where they are; the matrices."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from benchmarks.mechanisms import strategies
from dpcompile.errors import PrivacyError
from dpcompile.kernels import gaussian as native
from dpcompile.noise.banded import BandedMechanism
from dpcompile.noise.mechanism import GaussianMechanism, Mechanism, Release
from dpcompile.noise.normal import gaussian
from dpcompile.noise.rows import Place, Rows
from dpcompile.noise.strategy import (
    check_coefficients,
    default_restart,
    optimal_coefficients,
    prefix_error,
    square_root_coefficients,
)

SHAPES = {3: (700,), 1: (3, 5)}
SIGMA, C, BATCH, SEED = 2.0, 0.5, 4.0, 7


def dense(coefficients: Any, steps: int, restart: int) -> np.ndarray:
    """The matrix C, entry by entry."""
    matrix = np.zeros((steps, steps))
    for row in range(steps):
        for j, value in enumerate(coefficients):
            if row - j >= 0 and (row - j) // restart == row // restart:
                matrix[row, row - j] = value
    return matrix


def mechanism(bands: int, restart: int | None = None, **more: Any) -> BandedMechanism:
    coefficients = optimal_coefficients(bands, 40)
    return BandedMechanism(SIGMA, C, BATCH, more.pop("seed", SEED), coefficients=coefficients, restart=restart, **more)


def released(mechanism: Mechanism, steps: range, dtype: torch.dtype = torch.float64) -> Tensor:
    """What is released of sums of ones: ``[steps, elements]``."""
    rows = []
    for step in steps:
        totals = [torch.ones(shape, dtype=dtype) for shape in SHAPES.values()]
        mechanism.release(Release(totals, list(SHAPES), step))
        rows.append(torch.cat([total.flatten() for total in totals]))
    return torch.stack(rows)


@pytest.fixture(params=[True, False], ids=["kernel", "torch"])
def kernel(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(native, "takes", lambda tensors: False)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(("bands", "restart"), [(2, None), (4, 10), (5, 7), (3, 1), (8, None)])
def test_noise_is_that_of_the_inverse_of_a_dense_matrix(kernel: None, bands: int, restart: int, secure: bool) -> None:
    steps = range(25)
    own = mechanism(bands, restart, secure=secure)
    drawn = [
        [gaussian(SEED, step=t, parameter=p, numel=math.prod(s), dtype=torch.float64, secure=secure)
         for p, s in SHAPES.items()] for t in steps
    ]  # fmt: skip
    z = np.stack([torch.cat(row).numpy() for row in drawn])
    y = np.linalg.inv(dense(own.coefficients, len(steps), own.restart)) @ z
    wanted = (1 + SIGMA * C * y) / BATCH
    np.testing.assert_allclose(released(own, steps).numpy(), wanted, rtol=1e-12, atol=1e-13)
    narrow = released(mechanism(bands, restart, secure=secure), steps, torch.float32)
    np.testing.assert_allclose(narrow.numpy(), wanted, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_band_is_the_gaussian_mechanism(dtype: torch.dtype) -> None:
    plain = released(GaussianMechanism(SIGMA, C, BATCH, SEED), range(5), dtype)
    assert torch.equal(released(mechanism(1), range(5), dtype), plain)
    assert not torch.equal(released(mechanism(2), range(5), dtype), plain)


def test_without_noise_it_is_the_mean() -> None:
    own = BandedMechanism(0.0, C, BATCH, SEED, coefficients=(1.0, 0.5))
    assert torch.equal(released(own, range(3)), torch.full((3, 715), 1 / BATCH, dtype=torch.float64))


def test_a_row_is_a_function_of_its_step(kernel: None) -> None:
    """From any step on, with steps left out, back again: the same bits as all in order."""
    wanted = released(mechanism(4, 10), range(25), torch.float32)
    own = mechanism(4, 10)
    for step in (0, 1, 7, 8, 12, 24, 11, 3, 3, 19, 20, 0):
        assert torch.equal(released(own, range(step, step + 1), torch.float32)[0], wanted[step])
    resumed = mechanism(4, 10, seed=8)
    resumed.load_state_dict({**own.state_dict(), "logical_step": 17})
    assert torch.equal(released(resumed, range(17, 25), torch.float32), wanted[17:])


def test_nothing_of_the_noise_is_in_the_state() -> None:
    own = mechanism(4)
    before = own.state_dict()
    released(own, range(7))
    assert own.state_dict() == before
    assert all(isinstance(x, (int, float)) for value in before.values() for x in np.atleast_1d(value).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shards_have_the_rows_of_the_whole(kernel: None, dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")

    def rows() -> Rows:
        return Rows(optimal_coefficients(5, 40), 30, SEED, False)

    whole, parts = rows(), rows()
    cuts = [0, 1, 2, 17, 1025, 20_001]
    places = [Place(5, a, b - a, dtype, cpu) for a, b in zip(cuts, cuts[1:], strict=False)]
    for step in (0, 1, 2, 9, 29, 30, 31):
        (wanted,) = whole.at(step, [Place(5, 0, cuts[-1], dtype, cpu)])
        assert torch.equal(torch.cat(parts.at(step, places)), wanted)
    resharded = parts.at(31, places[1::2])  # other pieces than before are drawn anew
    assert torch.equal(resharded[0], wanted[1:2]) and len(parts.held) == 2


def test_parameters_that_come_later_have_the_same_rows(kernel: None) -> None:
    places = [Place(p, 0, 40, torch.float32, torch.device("cpu")) for p in range(3)]
    one, other = (Rows((0.8, 0.6), 9, SEED, False) for _ in range(2))
    for step in range(12):
        wanted = one.at(step, places)
        chosen = places if step % 3 == 0 else places[1:]
        for place, row in zip(chosen, other.at(step, chosen), strict=True):
            assert torch.equal(row, wanted[place.parameter])


def test_strided_sums_get_the_noise_of_their_elements() -> None:
    wanted, found = torch.zeros(4, 6), torch.zeros(6, 4).t()
    for total in (wanted, found):
        mechanism(3).release(Release([total], [2], 5))
    assert torch.equal(wanted, found)


def test_variance_and_covariance_over_steps_are_those_of_the_matrix() -> None:
    """One parameter of many elements: every element is a sample of the same ``T`` numbers."""
    steps, n = 8, 200_000
    own = mechanism(4, 6)
    rows = []
    for step in range(steps):
        total = torch.zeros(n, dtype=torch.float64)
        own.release(Release([total], [0], step))
        rows.append(total * (BATCH / (SIGMA * C)))
    y = torch.stack(rows).numpy()
    inverse = np.linalg.inv(dense(own.coefficients, steps, own.restart))
    wanted = inverse @ inverse.T
    spread = np.sqrt((np.outer(np.diag(wanted), np.diag(wanted)) + wanted**2) / n)
    assert (abs(np.cov(y) - wanted) < 5 * spread).all()
    assert (abs(y.mean(1)) < 5 * np.sqrt(np.diag(wanted) / n)).all()
    white = dense(own.coefficients, steps, own.restart) @ y
    assert stats.kstest(white.flatten(), "norm").pvalue > 1e-3
    assert (abs(np.corrcoef(white**2) - np.eye(steps)) < 5 / math.sqrt(n)).all()


def test_numbers_that_change_in_a_run() -> None:
    for name, value in {"noise_multiplier": 1.0, "max_grad_norm": 2.0, "seed": 3, "restart": 5}.items():
        own = mechanism(3)
        setattr(own, name, value)
        released(own, range(1))
        own.expected_batch_size = 9.0  # divides what has its noise already
        released(own, range(1, 2))
        setattr(own, name, value + 1)
        with pytest.raises(PrivacyError, match="(?s)changed in a run: rows of its noise belong.*as they were at the"):
            released(own, range(2, 3))
        setattr(own, name, value)
        released(own, range(2, 3))


@pytest.mark.parametrize("bad", [(), (0.0, 0.0), (1.0, 2.0), (1.0, -0.1), (math.nan,), (1.0, math.inf), ((1.0,),)])
def test_coefficients_without_sense(bad: Any) -> None:
    with pytest.raises(PrivacyError, match="(?s)the coefficients are .*optimal_coefficients"):
        BandedMechanism(1.0, 1.0, 1.0, 0, coefficients=bad)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_blocks_without_sense(bad: Any) -> None:
    with pytest.raises(PrivacyError, match=f"restart is {bad}"):
        BandedMechanism(1.0, 1.0, 1.0, 0, coefficients=(1.0,), restart=bad)
    for call in (square_root_coefficients, lambda b: optimal_coefficients(b, 10)):
        with pytest.raises(PrivacyError, match=f"bands is {bad}"):
            call(bad)
    with pytest.raises(PrivacyError, match="steps is 0, restart is"):
        optimal_coefficients(2, 0)


@pytest.mark.parametrize(("steps", "restart", "bands"), [(37, 10, 4), (30, 10, 4), (7, 10, 4), (25, 1, 3), (60, 60, 8)])
def test_columns_have_norm_one_and_errors_are_those_of_the_dense_matrix(steps: int, restart: int, bands: int) -> None:
    for c in (optimal_coefficients(bands, steps, restart), square_root_coefficients(bands)):
        matrix = dense(c, steps, restart)
        assert np.linalg.norm(matrix, axis=0).max() <= 1 + 1e-15
        sums = np.tril(np.ones((steps, steps))) @ np.linalg.inv(matrix)
        assert prefix_error(c, steps, restart) == pytest.approx(math.sqrt((sums**2).sum() / steps), rel=1e-9)


def test_square_roots_are_the_published_ones() -> None:
    c = np.asarray(square_root_coefficients(5))
    np.testing.assert_allclose(c / c[0], [1, 1 / 2, 3 / 8, 5 / 16, 35 / 128])
    assert c @ c == pytest.approx(1)


@pytest.mark.parametrize(("bands", "steps", "error"), [(8, 1000, 8.35164), (16, 1000, 6.27816), (16, 4000, 11.75241)])
def test_optimal_coefficients_are_as_good_as_those_of_jax_privacy(bands: int, steps: int, error: float) -> None:
    """Of its version 2.0.0: ``toeplitz.optimize_banded_toeplitz``, over the norm; without blocks."""
    c = optimal_coefficients(bands, steps, steps)
    assert prefix_error(c, steps, steps) == pytest.approx(error, rel=2e-5)
    assert error < prefix_error(square_root_coefficients(bands), steps, steps) < 1.2 * error


@pytest.mark.slow
def test_strategies_of_jax_privacy_where_it_is_installed() -> None:
    """No better than ours; and its coefficients are taken as they are."""
    pytest.importorskip("jax_privacy", reason="pip install dpcompile[audit]")
    found = strategies(((8, 1000),), (64,))
    assert len(found) == 2 and all(ours <= theirs * (1 + 1e-6) for ours, theirs in found.values() if theirs)
    assert all(theirs for _, theirs in found.values())


def test_what_strategies_prints_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax_privacy.matrix_factorization", None)
    found = strategies(((2, 100),), (8,))
    assert found["2 bands, 100 steps"] == (prefix_error(optimal_coefficients(2, 100, 100), 100, 100), None)
    assert list(found) == ["2 bands, 100 steps", "buffers, 8 steps"]


@pytest.mark.parametrize("bands", [2, 4, 8, 16])
def test_blocks_cost_at_most_five_per_cent(bands: int) -> None:
    steps, restart = 20_000, default_restart(bands)
    found = prefix_error(optimal_coefficients(bands, steps), steps)
    assert found < 1.05 * prefix_error(optimal_coefficients(bands, steps, 4 * restart), steps, 4 * restart)


def test_no_optimum_is_worse_than_the_square_root() -> None:
    for bands, steps in ((2, 1), (3, 2), (8, 3), (5, 17)):
        c = optimal_coefficients(bands, steps)
        assert len(c) == bands and c == check_coefficients(c)
        assert prefix_error(c, steps) <= prefix_error(square_root_coefficients(bands), steps)
