"""``advise``: what to begin with, for a dataset size and a target."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from dpcompile.accounting.arguments import (
    Method,
    check_bound,
    check_delta,
    check_size,
    check_target,
    number,
    refuse_large_delta,
)
from dpcompile.accounting.sweeps import sweep_cost
from dpcompile.advising.advice import Advice
from dpcompile.advising.choosing import Run, choose_run
from dpcompile.advising.measured import measured_physical_batch
from dpcompile.advising.physical import PhysicalBatch, check_inputs, free_memory, largest_physical_batch, plain_module
from dpcompile.data.sampling import default_physical_batch_size
from dpcompile.errors import PrivacyError
from dpcompile.module import engine_of
from dpcompile.runtime.replicas import inner_module

__all__ = ["advise"]

_SWEEP = (1, 2, 4, 8, 16)
_C = 1.0
_RATES = {"adam": 1e-3, "sgd": 0.5}
_NUMEL = 1_000_000  # of a model that nobody gave


def advise(
    dataset_size: int,
    *,
    target_epsilon: float,
    target_delta: float | None = None,
    model: nn.Module | None = None,
    inputs: Any = None,
    trainable: int | None = None,
    epochs: int | None = None,
    optimizer: Literal["adam", "sgd"] = "adam",
    runs: int = 1,
    memory: int | None = None,
    measure: bool = False,
    accountant: Method = "pld",
) -> Advice:
    """Batch size, length, noise, C and learning rate to begin with; what fits; and what looks at the data cost.

    It reads no data: what it says depends on its arguments alone, and costs no privacy. Batch, length and noise follow
    from accounting (:func:`dpcompile.advising.choosing.choose_run`); C and the learning rate are where others began,
    and no theory gives them. ``print`` the result: each number says why, and where it is from.

    Args:
        dataset_size: n, number of examples (of users, with ``groups``).
        target_epsilon: that training may cost, above 0.
        target_delta: below 1 / n; None: a tenth of it, rounded down to one digit.
        model: that will be trained. It is neither run nor changed; with ``measure`` a copy of it runs.
        inputs: arguments of one call of it in training, examples along dimension 0: a tensor, a tuple, or a dict of
            keyword arguments. With them the largest physical batch is told.
        trainable: how many numbers are trained, if no ``model`` is given; None: about a million.
        epochs: passes over the data, if computing time sets them.
        optimizer: "adam" (AdamW too) or "sgd" without momentum.
        runs: trainings on this data of which the results will be looked at; the target is for all of them together.
        memory: bytes for a step; None: those that are free now, where the model lies.
        measure: find the largest physical batch by running steps of a copy of the model, which takes a compilation for
            every size that is tried; else it is foretold by plans. Make the model private first to have it run with the
            options that it will be trained with.
        accountant: "pld", or "rdp": at once, and with a few per cent more noise.

    Returns:
        The advice. ``advice.batch_size`` is for the DataLoader, ``advice.learning_rate`` for the optimizer, and
        ``make_private(model, optimizer, loader, **advice.settings)`` takes the rest.

    Raises:
        PrivacyError: an argument out of its range, ``inputs`` or ``memory`` without a model, ``measure`` without
            ``inputs``, or no good batch size.
        DPCompileError: not one example fits, or what the model is refused for.

    **Guarantee.** None on accuracy. A training with these settings, or ``runs`` of them, costs at most the target by
    the accountant, and ``make_private`` warns of none of them.
    """
    check_bound(accountant, "zero_out")
    delta = _checked(dataset_size, target_epsilon, target_delta, trainable, epochs, optimizer, runs)
    if model is None and (inputs is not None or memory is not None):
        raise PrivacyError(
            "inputs or memory without a model: nothing to be measured", remedy="give model= too, or leave them out"
        )
    if measure and inputs is None:
        raise PrivacyError(
            "measure=True without inputs: nothing can be run", remedy="give inputs= too, or leave it out"
        )
    if inputs is not None:
        check_inputs(inputs)
    if memory is not None and not 0 < number(memory) < math.inf:
        raise PrivacyError(f"memory is {memory!r}", remedy="give a number of bytes, above 0, or leave it out")
    plain = None if model is None else plain_module(model)
    bound = _C if plain is None or plain is model else engine_of(model).max_grad_norm
    numel = trainable or _NUMEL
    if plain is not None:
        numel = sum(p.numel() for p in plain.parameters() if p.requires_grad)
        if not numel:
            raise PrivacyError("the model has no trainable parameter", remedy="unfreeze what is to be trained")
    run = choose_run(dataset_size, target_epsilon, delta, numel, epochs, runs, accountant)
    known: dict[str, Any] = {"sample_rate": run.batch_size / dataset_size, "steps": run.steps, "method": accountant}
    known |= {"noise_multiplier": run.noise_multiplier, "target_delta": delta}
    sweep = [sweep_cost(runs=k, **known) for k in sorted({*_SWEEP, runs})]
    usual = default_physical_batch_size(run.batch_size, dataset_size)
    physical = None
    if plain is not None and inputs is not None:
        device = next(plain.parameters()).device
        sized = inputs, memory or free_memory(device), usual
        measured = measured_physical_batch(inner_module(model), *sized) if measure else None
        physical = measured or largest_physical_batch(plain, *sized)
    settings: dict[str, Any] = {"target_epsilon": run.epsilon, "target_delta": delta, "epochs": run.epochs}
    settings |= {"max_grad_norm": bound, **({} if accountant == "pld" else {"accountant": accountant})}
    if physical is not None and physical.rows < usual:
        settings["physical_batch_size"] = physical.rows
        if plain is model:
            settings["memory_budget"] = physical.budget
    return Advice(
        dataset_size=dataset_size, target_epsilon=target_epsilon, target_delta=delta, batch_size=run.batch_size,
        epochs=run.epochs, steps=run.steps, noise_multiplier=run.noise_multiplier, epsilon=run.epsilon,
        max_grad_norm=bound, learning_rate=_RATES[optimizer], optimizer=optimizer, runs=runs, physical_batch=physical,
        sweep=sweep, settings=settings,
        reasons=dict(_reasons(run, numel, epochs, optimizer, runs, physical, usual, accountant)),
    )  # fmt: skip


def _checked(
    size: int,
    target_epsilon: float,
    target_delta: float | None,
    trainable: int | None,
    epochs: int | None,
    optimizer: str,
    runs: int,
) -> float:
    """Delta."""
    check_size(size)
    check_target(target_epsilon)
    for name, value in (("trainable", trainable), ("epochs", epochs), ("runs", runs)):
        if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise PrivacyError(f"{name} is {value!r}", remedy="give an integer, 1 or more")
    if optimizer not in _RATES:
        raise PrivacyError(f"optimizer is {optimizer!r}", remedy="give 'adam' or 'sgd'")
    if target_delta is None:
        scale = 10.0 ** math.floor(math.log10(0.1 / size))
        return float(f"{math.floor(0.1 / size / scale * (1 + 1e-9)) * scale:.0e}")
    check_delta(target_delta)
    refuse_large_delta(number(target_delta), size)
    return target_delta


def _reasons(
    run: Run,
    numel: int,
    epochs: int | None,
    optimizer: str,
    runs: int,
    physical: PhysicalBatch | None,
    usual: int,
    accountant: Method,
) -> Iterator[tuple[str, str]]:
    yield (
        "batch size",
        f"at {run.epochs} epochs the power of two at which noise in the mean of all updates is near its least: what "
        "noise costs is sigma over the batch size, and flattens (Ponomareva et al. 2023, How to DP-fy ML; "
        "McKenna et al. 2025, Scaling laws for differentially private language models). None is known that is far "
        f"better, for {numel:,} trained numbers.",
    )
    why = "about 1,000 steps, and no more than 100 epochs" if epochs is None else "as asked for"
    yield (
        "length",
        f"{why}. More compute at the same epsilon, that is more epochs with a larger batch, helps or does no harm (De "
        "et al. 2022, Unlocking high-accuracy differentially private image classification through scale).",
    )
    together = "" if runs == 1 else f", so that {runs} runs together cost it; each alone epsilon {run.epsilon:.4g}"
    yield "noise multiplier", f"the smallest that meets the target, by dp-accounting's {accountant.upper()}{together}."
    yield (
        "C",
        "in SGD C and the learning rate act as a product while nearly all gradients are clipped, and Adam is next to "
        "indifferent to C then: leave C, and move the learning rate (Li et al. 2022, Large language models can be "
        "strong differentially private learners; De et al. 2022). Where few gradients are clipped take a "
        "smaller one, or let it follow them: max_grad_norm=AdaptiveClip().",
    )
    yield (
        "learning rate",
        f"a beginning for {optimizer}; no theory gives it. Try a third and three times as much, on public data or by "
        "the table below. Private training likes larger batches and larger rates than ordinary training (Li et al. "
        "2022).",
    )
    if physical is not None:
        rest = f" of {usual} that a draw usually has, in one forward"
        if physical.rows < usual:
            rest = f", where a draw has up to {usual}: several forwards behind one call; with "
            rest += f"memory_budget={physical.budget}, for what is quickest may need more"
        yield (
            "physical batch",
            f"what {'was run and seen' if physical.measured else 'the planner expects'} to fit{rest}. "
            f"{physical.peak / 2**20:,.0f} MiB with weights, gradients and Adam's moments, of "
            f"{physical.memory / 2**20:,.0f}. It changes time and memory, not what is learned.",
        )
    yield (
        "looks",
        "Training with several settings and keeping the best looks at the data each time, and so do validation scores "
        "on examples that are trained on. Settings that were found on public or synthetic data cost nothing. Epsilon "
        "of several runs with this noise, if everything is seen, or if their number is drawn from the geometric "
        "distribution of that mean, each run's settings at random, and only the best run is ever seen (Papernot and "
        "Steinke 2022, Hyperparameter tuning with Rényi differential privacy, theorem 2; advise(runs=k) plans for "
        "the former):",
    )
