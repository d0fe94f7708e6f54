"""What ``make_private`` calibrates: noise, and a cap; and a warning where another batch size would be far better."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from dpcompile.accounting.arguments import Method
from dpcompile.accounting.batch_sizes import better_batch_size
from dpcompile.accounting.by_step import ByStep
from dpcompile.accounting.calibration import calibrate_noise
from dpcompile.accounting.caps import smallest_cap
from dpcompile.accounting.protocol import Accountant
from dpcompile.accounting.truncation import check_truncated, no_bound_of_parts
from dpcompile.data.loader import PoissonLoader
from dpcompile.distributed.ranks import from_first
from dpcompile.errors import PrivacyError
from dpcompile.module import Engine

__all__ = ["calibrated_cap", "calibrated_noise"]


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


def calibrated_cap(
    loader: PoissonLoader,
    accountant: Method | Accountant,
    noise_multiplier: float | None,
    physical_batch_size: int | None,
    counted: Mapping[str, Any],
    target: Mapping[str, Any],
) -> int:
    """The cap of "auto", for a loader that has none yet; the same on all ranks."""
    if not isinstance(accountant, str):
        raise PrivacyError(
            "max_batch_size is 'auto', and the accountant is made already: it counts draws of one cap, or whole ones",
            remedy="give max_batch_size the number that accountant.truncation has, or accountant='pld'",
        )
    if loader.bands > 1:
        raise no_bound_of_parts("'auto'", loader.bands)
    check_truncated((loader.dataset_size, 1), counted["method"], counted["relation"])
    if noise_multiplier is None:
        noise_multiplier = calibrate_noise(**target, **counted)
    steps, delta = target["steps"], target["target_delta"]
    cap = smallest_cap(
        noise_multiplier=noise_multiplier,
        sample_rate=loader.sample_rate,
        dataset_size=loader.dataset_size,
        steps=len(loader) if steps is None else steps,
        target_delta=0.1 / loader.dataset_size if delta is None else delta,
        relation=counted["relation"],
        multiple=loader.world_size * (physical_batch_size or 8),
    )
    return cap if loader.world_size == 1 else from_first(cap)  # machines may round differently
