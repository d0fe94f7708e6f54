"""The noise of ``make_private``'s target, and a warning where another batch size would be far better."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from dpcompile.accounting.batch_sizes import better_batch_size
from dpcompile.accounting.by_step import ByStep
from dpcompile.accounting.calibration import calibrate_noise
from dpcompile.data.loader import PoissonLoader
from dpcompile.module import Engine

__all__ = ["calibrated_noise"]


def calibrated_noise(
    loader: PoissonLoader,
    engine: Engine,
    noise: ByStep | None,
    counted: Mapping[str, Any],
    target: Mapping[str, Any],
) -> float:
    """Sigma, as :func:`dpcompile.calibrate_noise` finds it.

    Warns, once per call, of a batch size in whose place another one is far better
    (:func:`dpcompile.accounting.batch_sizes.better_batch_size`): of steps that are all equal, independent and not
    capped, and for relations of which a Rényi bound is known.
    """
    shape = {"bands": loader.bands, "schedule": noise, "truncation": loader.truncation}
    sigma = calibrate_noise(**target, **counted, **shape)
    plain = loader.bands == 1 and noise is None and loader.truncation is None and loader.schedule is None
    if not plain or loader.rank > 0 or counted["relation"] == "replace_one":
        return sigma
    size, numel = loader.expected_batch_size, sum(p.numel() for p in engine.trained().values())
    run = {"noise_multiplier": sigma, "expected_batch_size": size, "numel": numel, **target}
    advice = better_batch_size(**run, sample_rate=counted["sample_rate"], method=counted["method"])
    if advice is not None:
        warnings.warn(
            f"batches of {size:,.6g} in {target['steps']:,} steps meet epsilon {target['target_epsilon']:g} with a "
            f"noise multiplier of {sigma:.3g}. So would batches of {advice}. To try it: batch size "
            f"{advice.expected_batch_size}, steps={advice.steps}; plan_privacy compares others.",
            stacklevel=3,
        )
    return sigma
