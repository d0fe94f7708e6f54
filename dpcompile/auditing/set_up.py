"""From what the user has to the run that is audited, its attack, and who is in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from dpcompile.auditing import copies
from dpcompile.auditing.attacks import Attack, ExampleAttack, PlaceAttack
from dpcompile.auditing.canaries import OWN, AuditedData, AuditedModel, coins, spread_places
from dpcompile.auditing.run import Loss, Run, one_each
from dpcompile.data.loader import PoissonLoader
from dpcompile.errors import PrivacyError
from dpcompile.module import engine_of
from dpcompile.optim.optimizer import DPOptimizer

__all__ = ["Given", "Kind", "set_up"]

Kind: TypeAlias = Literal["dirac", "spread", "data"]
_BEYOND = 10.0  # gradients before clipping, in units of C, and at least this: automatic clipping has a constant


@dataclass(frozen=True, slots=True)
class Given:
    """What :func:`dpcompile.audit` was given; its docstring explains each."""

    model: Any
    optimizer: DPOptimizer
    loader: PoissonLoader
    loss: Loss
    canaries: int
    kind: Kind
    steps: int
    seed: int


def set_up(given: Given) -> tuple[Run, Attack, Tensor]:
    """The run, the attack that is to watch it, and bool ``[canaries]``: which are in."""
    generator = torch.Generator().manual_seed(given.seed % 2**63)
    inside = coins(given.canaries, generator)
    return (_among_rows if given.kind == "data" else _in_gradients)(given, inside, generator)


def _in_gradients(given: Given, inside: Tensor, generator: torch.Generator) -> tuple[Run, Attack, Tensor]:
    engine = engine_of(given.model)
    module = copies.copied_model(engine)
    norm = _BEYOND * max(engine.max_grad_norm, 1.0)
    users = given.loader.users
    each = 1 if users is None else users.examples_per_user  # rows of a canary
    if given.kind == "dirac":
        targets, own = [OWN], given.canaries
        places, rows = torch.arange(own)[:, None], len(given.loader.dataset)
    else:
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        targets, own = [f"model.{name}" for name in trained], 0
        places = spread_places([p.numel() for p in trained.values()], given.canaries, generator)
        rows = 0
    audited = AuditedModel(module, targets, norm, own)
    weights = torch.zeros(rows + given.canaries * each, 2)
    weights[:rows, 0] = 1
    weights[rows:, 1] = inside.repeat_interleave(each).float()
    known = torch.arange(0) if users is None or not rows else users.of_examples
    owners = torch.arange(given.canaries).repeat_interleave(each) + (users.count if len(known) and users else 0)
    data = AuditedData(
        given.loader.dataset,
        [*range(rows), *[0] * (given.canaries * each)],
        torch.cat([torch.full((rows, len(targets)), -1), places.repeat_interleave(each, 0)]),
        weights,
        None if users is None else torch.cat([known, owners]),
    )
    run = _run(given, module, audited, data)
    numbers = [_numbers_of(given, step) for step in range(given.steps)]
    return run, PlaceAttack(targets, places, numbers, max_grad_norm=engine.max_grad_norm), inside


def _numbers_of(given: Given, step: int) -> tuple[float, float]:
    """Sample rate and noise multiplier of a step."""
    by_step, noise = given.loader.schedule, given.optimizer.noise_schedule
    rate = given.loader.sample_rate if by_step is None else by_step.at(step).sample_rate
    return rate, given.optimizer.noise_multiplier * (1.0 if noise is None else noise(step))


def _among_rows(given: Given, inside: Tensor, generator: torch.Generator) -> tuple[Run, Attack, Tensor]:
    size, users = len(given.loader.dataset), given.loader.users
    owners = torch.arange(size) if users is None else users.of_examples
    units, called = (size, "rows") if users is None else (users.count, "users")
    if given.canaries > units:
        raise PrivacyError(
            f"{given.canaries} canaries among {units} {called} of the dataset",
            remedy="take fewer canaries, or kind='dirac', which makes its own",
        )
    chosen = torch.randperm(units, generator=generator)[: given.canaries]
    counts = torch.ones(units)
    counts[chosen] = inside.float()
    weights = torch.zeros(size, 2)
    weights[:, 0] = counts[owners]
    places = torch.full((size, 1), -1)
    data = AuditedData(given.loader.dataset, list(range(size)), places, weights, None if users is None else owners)
    module = copies.copied_model(engine_of(given.model))
    attacker = copies.copied_model(engine_of(given.model))
    rows = [(owners == unit).nonzero().flatten().tolist() for unit in chosen]
    losses = [partial(_loss_of, given.loss, given.loader, own) for own in rows]
    attack = ExampleAttack(attacker, losses, engine_of(given.model).max_grad_norm)
    return _run(given, module, None, data), attack, inside


def _loss_of(loss: Loss, loader: PoissonLoader, rows: list[int], model: nn.Module) -> Tensor:
    return one_each(loss(model, loader.collate_fn([loader.dataset[i] for i in rows])), len(rows)).sum()


def _run(given: Given, module: nn.Module, audited: AuditedModel | None, data: AuditedData) -> Run:
    private = copies.compiled_like(
        given.model, module if audited is None else audited, more_arguments=audited is not None
    )
    ours = dict(module.named_parameters())
    counterparts = {id(p): ours[name] for name, p in engine_of(given.model).module.named_parameters()}
    more = [] if audited is None else [p for name, p in audited.named_parameters() if name == OWN]
    padding = given.loader.padding_example
    if padding is not None:
        padding = (padding, data.places[0], torch.zeros(2))
    loader = copies.loader_like(given.loader, data, given.steps, padding, given.seed)
    accountant = copies.accountant_like(given.optimizer, loader)
    optimizer = copies.optimizer_like(given.optimizer, private, counterparts, more, given.seed, accountant)
    return Run(private, optimizer, loader.attach(private, optimizer), given.loss, audited)
