"""What all ranks have in common: the seed that one of them drew, and the mechanism that all of them step by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpcompile.distributed.ranks import digest, from_first, refuse_disagreement
from dpcompile.errors import PrivacyError
from dpcompile.module import Engine
from dpcompile.noise.adaptive import AdaptiveClip
from dpcompile.noise.banded import BandedMechanism
from dpcompile.noise.buffered import BufferedMechanism
from dpcompile.noise.counter import check_seed, fresh_seed
from dpcompile.noise.exact import ExactMechanism
from dpcompile.noise.grid import default_bits
from dpcompile.noise.mechanism import GaussianMechanism, Mechanism
from dpcompile.noise.strategy import default_restart, optimal_coefficients
from dpcompile.noise.tree import TreeMechanism
from dpcompile.optim.checks import refuse_bad_numbers
from dpcompile.optim.quantiles import adaptive_mechanism

__all__ = ["banded_mechanism", "chosen_mechanism", "exact_mechanism", "mechanism_in_turn", "refuse_other_ranks"]


def banded_mechanism(
    engine: Engine,
    noise_multiplier: float,
    expected_batch_size: float,
    seed: int,
    secure: bool,
    bands: int,
    steps: int | None,
) -> BandedMechanism:
    """One with the best matrix for so many steps (None: for many), which is the same on all ranks."""
    coefficients = optimal_coefficients(bands, default_restart(bands) if steps is None else steps)
    if engine.distributed:  # machines may round differently
        coefficients = from_first(coefficients)
    check_seed(seed, secure=secure)
    C = engine.max_grad_norm
    return BandedMechanism(noise_multiplier, C, expected_batch_size, seed, secure, coefficients=coefficients)


def mechanism_in_turn(
    engine: Engine, kind: str, noise_multiplier: float, expected_batch_size: float, seed: int, secure: bool, steps: int
) -> Mechanism:
    """Noise that is correlated over each ``steps`` steps, by a "tree" or by "buffers", for the C of the model."""
    refuse_bad_numbers(noise_multiplier, expected_batch_size)
    check_seed(seed, secure=secure)
    made = {"tree": TreeMechanism, "buffers": BufferedMechanism}[kind]
    return made(noise_multiplier, engine.max_grad_norm, expected_batch_size, seed, secure, steps=steps)


def exact_mechanism(
    engine: Engine, noise_multiplier: float, expected_batch_size: float, seed: int, secure: bool, largest: float
) -> ExactMechanism:
    """Of batch sizes by the step: one whose grid holds the sums of the ``largest``."""
    check_seed(seed, secure=secure)
    refuse_bad_numbers(noise_multiplier, expected_batch_size)
    numbers = noise_multiplier, engine.max_grad_norm, expected_batch_size, seed, secure
    return ExactMechanism(*numbers, bits=default_bits(largest))


def chosen_mechanism(
    engine: Engine,
    given: Mechanism | None,
    noise_multiplier: float | None,
    expected_batch_size: float | None,
    seed: int | None,
    clip: AdaptiveClip | None,
    *,
    secure: bool,
    exact: bool,
) -> Mechanism:
    """The one that was given, or the Gaussian mechanism of these numbers, of one seed on all ranks."""
    numbers = (noise_multiplier, expected_batch_size, seed, clip)
    if engine.stage is not None and (given is not None or exact or clip is not None):
        raise PrivacyError(
            "a stage of a pipeline, and another mechanism than independent Gaussian noise for a fixed C",
            remedy="leave mechanism, exact, bands and adaptive_clip out",
        )
    if given is None:
        return _gaussian_mechanism(engine, *numbers, secure, exact)
    if any(number is not None for number in numbers) or secure or exact:
        raise PrivacyError(
            "a mechanism was given, and noise_multiplier, expected_batch_size, seed, secure, exact or adaptive_clip "
            "too",
            remedy="give them to the mechanism, and the mechanism alone to DPOptimizer",
        )
    return given


def _gaussian_mechanism(
    engine: Engine,
    noise_multiplier: float | None,
    expected_batch_size: float | None,
    seed: int | None,
    clip: AdaptiveClip | None,
    secure: bool,
    exact: bool,
) -> Mechanism:
    if exact and clip is not None:
        raise PrivacyError(
            "C that follows a quantile, and exact noise: the count of examples within C has floating-point noise",
            remedy="give max_grad_norm a number, or leave exact=True out",
        )
    secure = secure or exact
    if noise_multiplier is None or expected_batch_size is None:
        raise PrivacyError(
            "DPOptimizer was given no noise_multiplier or no expected_batch_size",
            remedy="give both, or a mechanism; make_private and calibrate_noise find the noise_multiplier of a target",
        )
    refuse_bad_numbers(noise_multiplier, expected_batch_size)
    drawn: int = fresh_seed(secure=secure)
    if engine.distributed:  # also where a seed is given: ranks that wait for one that others do not send hang
        drawn = from_first(drawn)
    seed = drawn if seed is None else seed
    check_seed(seed, secure=secure)
    numbers = (noise_multiplier, engine.max_grad_norm, expected_batch_size, seed, secure)
    if exact:
        return ExactMechanism(*numbers)
    return GaussianMechanism(*numbers) if clip is None else adaptive_mechanism(engine, numbers, clip)


def refuse_other_ranks(engine: Engine, mechanism: Mechanism, logical_step: int, schedule: Mapping[str, Any]) -> None:
    """All ranks have to mean the same step of the same mechanism on the same parameters."""
    options = engine.options
    refuse_disagreement(
        {
            "logical_step": logical_step,
            **mechanism.state_dict(),
            **schedule,
            "seed": digest(mechanism.seed),
            "max_grad_norm": engine.max_grad_norm,
            "clipping": options.clipping if isinstance(options.clipping, str) else "a function",
            "loss_reduction": options.loss_reduction,
            "examples_per_user": options.examples_per_user,
            **({} if engine.stage is not None else {"trainable parameters": engine.trainable()}),
        }
    )
