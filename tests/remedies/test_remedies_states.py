"""States of an optimizer: what their messages say to do, tried."""

from __future__ import annotations

from typing import Any

from private_steps import over, parts, steps
from remedies import Right, plain, refused, sgd

from dpcompile import PrivacyAccountant


def resumed(told: int, change: Any, seed: int | None = None, **options: Any) -> Right:
    model, optimizer = parts(seed=seed)
    steps(model, optimizer, 2)
    state = optimizer.state_dict()
    again = over(model, seed=seed, **({} if told else options))
    again.load_state_dict(state if told else change(state))
    return steps(model, again)


def own(**changes: Any) -> Any:
    return lambda state: {**state, "dpcompile": {**state["dpcompile"], **changes}}


@refused(
    "load what DPOptimizer.state_dict(), torch's get_optimizer_state_dict or "
    "dpcompile.checkpoint.save_checkpoint saved; load a plain optimizer's state into .optimizer",
)
def test_a_state_without_our_entry(told: int) -> Right:
    return resumed(told, lambda s: sgd(plain()).state_dict())


@refused("load what DPOptimizer.state_dict() returned")
def test_a_state_without_groups(told: int) -> Right:
    return resumed(told, lambda s: {k: v for k, v in s.items() if k != "param_groups"})


@refused("load what was saved, unchanged", slow=True)
def test_a_state_with_a_group_that_is_none(told: int) -> Right:
    return resumed(told, lambda s: {**s, "param_groups": [3]})


@refused("load what DPOptimizer.state_dict() returned, unchanged", slow=True)
def test_a_state_whose_entry_is_a_list(told: int) -> Right:
    return resumed(told, lambda s: {**s, "dpcompile": []})


@refused("load what DPOptimizer.state_dict() returned, unchanged", slow=True)
def test_a_state_without_its_seed(told: int) -> Right:
    return resumed(told, lambda s: {**s, "dpcompile": {k: v for k, v in s["dpcompile"].items() if k != "seed"}})


@refused("load what DPOptimizer.state_dict() returned, unchanged")
def test_a_state_of_a_step_below_zero(told: int) -> Right:
    return resumed(told, own(logical_step=-1))


@refused(
    "make the DPOptimizer with noise_multiplier=1.0; with a NoiseSchedule, load the schedule's state first", slow=True
)
def test_a_state_of_another_sigma(told: int) -> Right:
    return resumed(told, lambda s: s, noise_multiplier=2.0)


@refused("load what DPOptimizer.state_dict() returned, unchanged")
def test_a_state_of_another_generator(told: int) -> Right:
    return resumed(told, own(seed=2**200))


@refused("resume from the latest state, or make a new DPOptimizer with another seed", ways=2, slow=True)
def test_a_state_of_an_earlier_step(told: int) -> Right:
    model, optimizer = parts(seed=3)
    earlier = optimizer.state_dict()
    steps(model, optimizer)
    if told == 2:
        optimizer = over(model, seed=4)
    optimizer.load_state_dict(optimizer.state_dict() if told else earlier)
    return steps(model, optimizer)


def counted(**options: Any) -> PrivacyAccountant:
    return PrivacyAccountant(**{"noise_multiplier": 1.0, "sample_rate": 0.3, "method": "rdp", **options})


@refused("load it into a new DPOptimizer with a new accountant, and the weights of that run into the model", slow=True)
def test_a_state_of_another_run(told: int) -> Right:
    saved, there = parts(accountant=counted()), parts(accountant=counted())
    steps(*saved)
    state = saved[1].state_dict()
    if told:
        there = parts(accountant=counted())
        there[0].load_state_dict(saved[0].state_dict())
    else:
        steps(*there)
    there[1].load_state_dict(state)
    return steps(*there)


@refused("load it into a DPOptimizer without accountant, or give the saving run an accountant", ways=2, slow=True)
def test_a_state_of_steps_that_nobody_counted(told: int) -> Right:
    model, optimizer = parts(accountant=counted() if told == 2 else None)
    steps(model, optimizer)
    again = over(model, accountant=None if told == 1 else counted())
    again.load_state_dict(optimizer.state_dict())
    return steps(model, again)


@refused("load accountant states through load_state_dict of a new DPOptimizer only")
def test_an_accountant_that_was_set_back(told: int) -> Right:
    model, optimizer = parts(accountant=counted())
    steps(model, optimizer, 2)
    if told:
        again = over(model, accountant=counted())
        again.load_state_dict(optimizer.state_dict())
        return steps(model, again)
    optimizer.accountant.load_state_dict(counted().state_dict())  # type: ignore[union-attr]
    return steps(model, optimizer)
