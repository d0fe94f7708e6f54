"""``audit``: train a copy with canaries, guess which of them were in, and compare with what was proved."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import torch
from torch import nn

from dpcompile.accounting.arguments import check_delta, number
from dpcompile.accounting.composition import composed_epsilon
from dpcompile.auditing import copies
from dpcompile.auditing.judging import error_rates, guesses
from dpcompile.auditing.noise_level import most_noise, scaled
from dpcompile.auditing.report import AuditReport
from dpcompile.auditing.run import Loss, Run, shows_gradients
from dpcompile.auditing.set_up import Given, Kind, set_up
from dpcompile.auditing.statistics import one_run_epsilon
from dpcompile.data.checks import check_count
from dpcompile.data.loader import PoissonLoader
from dpcompile.distributed.ranks import from_first
from dpcompile.errors import PrivacyError
from dpcompile.module import engine_of
from dpcompile.noise.counter import fresh_seed
from dpcompile.optim.optimizer import DPOptimizer

__all__ = ["audit"]

_FEWEST = 20


def audit(
    model: nn.Module,
    optimizer: DPOptimizer,
    loader: PoissonLoader,
    loss: Loss,
    *,
    canaries: int = 1000,
    kind: Kind = "dirac",
    steps: int | None = None,
    delta: float = 1e-5,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditReport:
    """Bound epsilon from below, by what a private run gives away of canaries, beside the proved bound from above.

    Canaries are examples that are in the run or out of it by a fair coin each. A copy of the model is trained for
    ``steps`` logical steps as the given model would be: with its options, weights, kind of optimizer, noise multiplier
    or mechanism, sample rate and physical batch size, also where they go by the step, under DistributedDataParallel if
    it is. Where the loader draws users, canaries are users. Model, optimizer, loader and torch's random numbers stay as
    they are, and nothing is counted for them. What the report says is not private, as it comes of a run that nobody
    counted: on "data" and "dirac" the rows of the dataset take part.

    Args:
        model: what `make_private` or `dp_compile` returned.
        optimizer: of the model.
        loader: its dataset, rates and collation are used.
        loss: called as ``loss(model, batch)`` on batches as the loader gives them; it calls that model once and returns
            one loss per example, ``[B]``.
        canaries: how many; half of them choose the attack, and half judge it.
        kind: "dirac": the gradient of each canary is one element of a parameter that is added to the model, beyond C
            before clipping; the dataset's rows train along. "spread": one element of every trainable parameter of the
            model, without the rows; the model's parameters have one use more in the graph then. "data": rows, or
            users, of the dataset, through the model's own graph.
        steps: None: ``len(loader)``.
        delta: for which epsilon is given.
        confidence: of the lower bound.
        seed: of noise, draws and coins, for audits that are to repeat; None draws one.

    Returns:
        See :class:`dpcompile.auditing.report.AuditReport`; ``print(report)``, ``report.contradicted``,
        ``report.to_json()``.

    Raises:
        PrivacyError: numbers that make no sense, more canaries than there is room for, a loss that is not one value per
            example, or what cannot be copied.
        UnsupportedGraphError: a model under FSDP2.

    **Guarantee.** If the run is what was proved and counted, ``report.contradicted`` is True with a probability of at
    most ``1 - confidence``. Nothing follows from its being False (docs/auditing.md). The bound ``any_mechanism``
    assumes nothing of the mechanism; ``independent`` that canaries are told apart independently of each other, which is
    true of a right engine under "dirac" and "spread", and is not claimed under "data", nor where a cap on draws lets
    canaries put each other out of them.

    Sources: Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846); Nasr et al. 2023 (arXiv:2302.07956).
    """
    engine = engine_of(model)
    steps = len(loader) if steps is None else steps
    _check(canaries, kind, steps, confidence)
    check_delta(delta)
    copies.refuse_uncopied(engine, optimizer, more_arguments=kind != "data")
    drawn = from_first(fresh_seed()) if engine.distributed else fresh_seed()
    given = Given(model, optimizer, loader, loss, canaries, kind, steps, drawn if seed is None else seed)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        run, attack, inside = set_up(given)
        run.watched_by(attack)
    scores = {name: np.nan_to_num(values) for name, values in attack.scores(engine_of(run.model).module).items()}
    return _report(run, scores, inside.numpy(), kind, delta, confidence)


def _check(canaries: int, kind: str, steps: int, confidence: float) -> None:
    if kind not in get_args(Kind):
        raise PrivacyError(f"unknown kind of canaries {kind!r}", remedy="use 'dirac', 'spread' or 'data'")
    check_count("canaries", canaries)
    check_count("steps", steps)
    if canaries < _FEWEST:
        raise PrivacyError(
            f"{canaries} canaries: half of them choose the attack, and the other half show nothing",
            remedy=f"take {_FEWEST} or more; hundreds, to bound an epsilon above 1",
        )
    if not 0.5 <= number(confidence) < 1:
        raise PrivacyError(f"confidence is {confidence!r}, not in [0.5, 1)", remedy="0.95 is a common choice")


def _report(
    run: Run, scores: dict[str, np.ndarray], inside: np.ndarray, kind: Kind, delta: float, confidence: float
) -> AuditReport:
    optimizer = run.optimizer
    accountant = optimizer.accountant
    apart = kind != "data" and run.loader.truncation is None
    share = (1 - confidence) / (2 if apart else 1)
    found = guesses(scores, inside, share)
    general = one_run_epsilon(found.canaries, found.made, found.right, delta=delta, significance=share)
    attacks, independent, noise = [found.attack], None, None
    if apart:
        attack, rates = error_rates(scores, inside, share)
        attacks.append(attack)
        independent = rates.epsilon(delta)
        if accountant is not None:
            noise = most_noise(accountant.history, rates)
            if noise < math.inf:
                history = scaled(accountant.history, noise)
                independent = max(
                    independent, composed_epsilon(history, delta, getattr(accountant, "method", "pld"), "zero_out")
                )
    return AuditReport(
        kind=kind,
        steps=optimizer.logical_step,
        canaries=len(inside),
        guesses=found.made,
        right=found.right,
        delta=delta,
        confidence=confidence,
        any_mechanism=general,
        independent=independent,
        noise=noise,
        proved=None if accountant is None else accountant.epsilon(delta),
        observed="gradients" if shows_gradients(optimizer.optimizer) else "weights",
        attack=tuple(attacks),
    )
