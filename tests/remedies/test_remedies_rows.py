"""Noise that is correlated over steps, in a run: what its messages say to do, tried."""

from __future__ import annotations

import gc
import itertools
from typing import Any

from private_steps import backward
from remedies import Right, data, private, refused, stepped, trains

from dpcompile import PoissonLoader
from dpcompile.schedules import NoiseSchedule


def weights(model: Any) -> list[Any]:
    return [p.detach().clone() for p in model.parameters()]


def train(model: Any, optimizer: Any, loader: Any, stop: int | None = None) -> None:
    for x, y in itertools.islice(loader, stop):
        backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()


def other_loader(seed: int | None = None) -> PoissonLoader:
    return PoissonLoader(data().dataset, expected_batch_size=8, bands=2, seed=seed)


@refused(
    "go on with the loader of the run; when resuming, load its state too (loader.load_state_dict, or load_checkpoint "
    "with the loader), for as many examples",
    ways=2,
    slow=True,
)
def test_rows_on_draws_of_another_loader(told: int) -> Right:
    model, optimizer, loader = private(bands=2)
    before = weights(model)
    train(model, optimizer, loader)
    if told == 2:
        states = model.state_dict(), optimizer.state_dict(), loader.state_dict()
        del model, optimizer, loader
        gc.collect()
        model, optimizer, loader = private(bands=2)
        for part, state in zip((model, optimizer, loader), states, strict=True):
            part.load_state_dict(state)
    elif not told:
        del loader
        gc.collect()
        loader = other_loader().attach(model, optimizer)
    train(model, optimizer, loader)
    return stepped(model, optimizer, before, 6)


@refused("go on with the loader of the first step")
def test_rows_and_a_second_loader(told: int) -> Right:
    model, optimizer, loader = private(bands=2)
    before = weights(model)
    train(model, optimizer, loader)
    second = loader if told else other_loader().attach(model, optimizer)
    train(model, optimizer, second)
    return stepped(model, optimizer, before, 6)


@refused(
    "step once after the backward of each batch, in the order in which the loader gives them; a batch that is left out "
    "(optimizer.discard()) is lost",
)
def test_rows_out_of_order(told: int) -> Right:
    model, optimizer, loader = private(bands=2)
    before, batches = weights(model), iter(loader)
    two = [next(batches), next(batches)]
    train(model, optimizer, two if told else two[::-1])
    return stepped(model, optimizer, before, 2)


@refused("leave it; schedules of noise and C are for noise that is independent (bands=1)", ways=2)
def test_rows_of_several_sizes(told: int) -> Right:
    model, optimizer, loader = private(bands=1 if told == 2 else 2)
    train(model, optimizer, loader)
    if told != 1:
        schedule = NoiseSchedule(optimizer, lambda step: 2.0)
        assert schedule is not None
    return trains(model, optimizer, loader)


@refused(
    "leave the seed out, or give each run its own; to repeat an experiment, delete the other optimizer",
    ways=3,
    slow=True,
)
def test_rows_of_one_seed_in_two_optimizers(told: int) -> Right:
    seeds = [(11, 11), (None, None), (12, 13), (14, 14)][told]
    first = private(bands=2, seed=seeds[0])
    trains(*first)
    if told == 3:
        del first
        gc.collect()
    return trains(*private(bands=2, seed=seeds[1]))


def resumed_rows(told: int, change: dict[str, Any], own: dict[str, Any] | None = None, **options: Any) -> Right:
    """A run that goes on with options ``change`` in the place of its own, or after its entry was changed by ``own``."""
    options = options or {"bands": 2}
    model, optimizer, loader = private(**options)
    train(model, optimizer, loader)
    states = model.state_dict(), optimizer.state_dict(), loader.state_dict()
    if own and not told:
        states[1]["dpcompile"].update(own)
    del model, optimizer, loader
    gc.collect()
    model, optimizer, loader = private(**(options if told else {**options, **change}))
    before = weights(model)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    loader.load_state_dict(states[2])
    before = weights(model)
    train(model, optimizer, loader)
    return stepped(model, optimizer, before, 6)


@refused("make the run with bands=2")
def test_resuming_with_other_bands(told: int) -> Right:
    return resumed_rows(told, {"bands": 3})


@refused("make the run with the mechanism of the saved run")
def test_resuming_with_another_matrix(told: int) -> Right:
    return resumed_rows(told, {"in_turn": "buffers"}, in_turn="tree")


@refused("load what DPOptimizer.state_dict() returned, unchanged")
def test_resuming_without_the_coefficients(told: int) -> Right:
    return resumed_rows(told, {}, {"coefficients": None})


@refused("load what DPOptimizer.state_dict() returned, unchanged")
def test_resuming_without_the_powers(told: int) -> Right:
    return resumed_rows(told, {}, {"powers": None}, in_turn="buffers")


@refused("load what DPOptimizer.state_dict() returned, unchanged")
def test_resuming_with_bands_of_zero(told: int) -> Right:
    return resumed_rows(told, {}, {"bands": 0})
