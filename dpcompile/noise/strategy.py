"""Which matrix correlates the noise of banded matrix factorization: its coefficients, and how large its errors are.

The matrix C is lower-triangular and Toeplitz with b bands, row t being ``c[0]`` at t, ``c[1]`` at t - 1, ..., and falls
into blocks of ``restart`` rows that share nothing (:class:`dpcompile.noise.banded.BandedMechanism` says why). What is
released at step t is the sum of that step plus ``sigma * C_clip * (C^-1 z)[t]``, so models see prefix sums of it.

Sources: Choquette-Choo et al., "(Amplified) Banded Matrix Factorization" (NeurIPS 2023), sections 3 and 4; McKenna,
"Scaling up the Banded Matrix Factorization Mechanism for Differentially Private ML" (ICLR 2025), section 3;
Fichtenberger, Henzinger, Upadhyay, "Constant Matters" (ICML 2023) for the square root.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch

from dpcompile.accounting.arguments import check_bands
from dpcompile.errors import PrivacyError

__all__ = [
    "check_coefficients",
    "counts_of",
    "default_restart",
    "optimal_coefficients",
    "prefix_error",
    "square_root_coefficients",
]

_GROUPS = 128  # see `default_restart`
_DIGITS = 6  # of optimal coefficients: machines round differently
_ULPS = 1e-15
_OVERFLOW = 700.0  # in place of a logarithm that is not finite


def default_restart(bands: int) -> int:
    """Rows of a block of the matrix: 128 (b - 1), for which a run of any length has errors at most 5 per cent larger.

    So many rows at most are drawn again when a run is resumed.
    """
    return max(_GROUPS * (bands - 1), 1)


def square_root_coefficients(bands: int) -> tuple[float, ...]:
    """The first ``bands`` coefficients of the square root of the matrix of prefix sums, of norm 1.

    They are 1, 1/2, 3/8, 5/16, ... (Fichtenberger et al. 2023, section 3) over their norm: best for the largest error
    where every example takes part once and nothing is cut off.
    """
    check_bands(bands, "zero_out")
    k = np.arange(1, bands)
    return check_coefficients([1.0, *np.cumprod((2 * k - 1) / (2 * k)).tolist()])


@functools.lru_cache(maxsize=32)
def optimal_coefficients(bands: int, steps: int, restart: int | None = None) -> tuple[float, ...]:
    """The coefficients of norm 1 whose mean squared error of prefix sums over ``steps`` is the smallest.

    The objective is that of McKenna 2024, section 3.1, minimised by L-BFGS from the square root's coefficients; what it
    takes, a second at most, does not grow with ``steps`` beyond ``restart``. Privacy does not depend on them.

    Args:
        bands: b, 1 or more.
        steps: of the run, 1 or more.
        restart: rows of a block; None: :func:`default_restart`.

    Raises:
        PrivacyError: numbers below 1.
    """
    check_bands(bands, "zero_out")
    if bands == 1:
        return (1.0,)
    counts = counts_of(steps, restart or default_restart(bands))
    start = square_root_coefficients(bands)
    free = torch.tensor([c / start[0] for c in start[1:]], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [free], max_iter=200, history_size=20, tolerance_grad=1e-9, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> torch.Tensor:
        value, slope = _log_error(np.concatenate([[1.0], free.detach().numpy()]), counts)
        free.grad = torch.from_numpy(slope)
        return torch.tensor(value)

    search.step(closure)  # type: ignore[arg-type]
    found = np.round(np.concatenate([[1.0], free.detach().numpy()]), _DIGITS)
    best = check_coefficients(np.minimum.accumulate(np.clip(np.nan_to_num(found), 0, 1)).tolist())
    return min(best, start, key=lambda c: _log_error(np.asarray(c), counts)[0])


def prefix_error(coefficients: Sequence[float], steps: int, restart: int | None = None) -> float:
    """Root mean square, over ``steps`` prefix sums, of the noise in them, in units of ``sigma * C_clip``.

    Without correlation it is ``sqrt((steps + 1) / 2)``.
    """
    c = np.asarray(check_coefficients(coefficients))
    value, _ = _log_error(c, counts_of(steps, restart or default_restart(len(c))))
    return math.sqrt(math.exp(value))


def check_coefficients(coefficients: Sequence[float]) -> tuple[float, ...]:
    """The coefficients over their norm, which is 1 then up to rounding; of such ones they themselves.

    Raises:
        PrivacyError: none, or some that are negative, not finite or increasing: then noise may grow from step to step
            without bound.
    """
    c = np.asarray(coefficients, dtype=np.float64)
    if c.ndim != 1 or not len(c) or not np.isfinite(c).all() or c[0] <= 0 or c[-1] < 0 or (np.diff(c) > 0).any():
        raise PrivacyError(
            f"the coefficients are {coefficients!r}",
            remedy="give finite numbers that do not increase, the first above 0 and none below, such as "
            "dpcompile.noise.strategy.optimal_coefficients(bands, steps) returns",
        )
    if abs(float(np.sqrt(c @ c)) - 1) <= _ULPS:  # from a saved run: another last bit would be other noise
        return tuple(c.tolist())
    c = c / c[0]  # squares do not overflow
    return tuple((c / np.sqrt(c @ c)).tolist())


def counts_of(steps: int, restart: int) -> np.ndarray:
    """In how many prefix sums the noise of row s of a block counts, over ``steps``: ``[min(restart, steps)]``."""
    if steps < 1 or restart < 1:
        raise PrivacyError(f"steps is {steps}, restart is {restart}", remedy="give integers, 1 or more")
    whole, rest = divmod(steps, restart)
    # Sums of row t hold (t // restart) whole blocks, and rows up to t % restart of the last one.
    blocks = restart * whole * (whole - 1) // 2 + whole * rest
    last = whole * np.arange(restart, 0, -1) + np.maximum(rest - np.arange(restart), 0)
    return ((blocks + last) / steps)[: min(restart, steps)]


def _log_error(c: np.ndarray, counts: np.ndarray) -> tuple[float, np.ndarray]:
    """Logarithm of the mean squared error for coefficients of any norm, and its derivative by all but the first.

    With w the coefficients of 1 / c and W their prefix sums the error is ``|c|^2 sum_s counts[s] W[s]^2``, and
    ``dW / dc_j`` is -W * w, convolved, and moved by j.
    """
    n = len(counts)
    w = np.zeros(n)
    with np.errstate(all="ignore"):
        for t in range(n):
            m = min(t, len(c) - 1)
            w[t] = ((t == 0) - c[1 : m + 1] @ w[t - m : t][::-1]) / c[0]
        sums = np.cumsum(w)
        error, square = counts @ sums**2, c @ c
        moved = np.convolve(sums, w)[:n]
        slope = [-2 * ((counts * sums)[j:] @ moved[: n - j]) if j < n else 0.0 for j in range(1, len(c))]
        value, slope = float(np.log(error * square)), 2 * c[1:] / square + np.asarray(slope) / error
    fine = math.isfinite(value) and np.isfinite(slope).all()
    return (value, slope) if fine else (_OVERFLOW, np.zeros(len(c) - 1))  # a search may look at what grows
