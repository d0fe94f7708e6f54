"""States of an optimizer and of a loader, entry by entry: what their messages say to do, tried."""

from __future__ import annotations

from typing import Any

from private_steps import over, parts, steps
from remedies import Right, data, plain, private, refused, sgd, trains
from torch import nn

from dpcompile import AdaptiveClip, DPOptimizer, PoissonLoader, PrivacyAccountant, dp_compile
from dpcompile.noise.exact import ExactMechanism

UNCHANGED = "load what DPOptimizer.state_dict() returned, unchanged"


def groups_of(model: Any) -> list[dict[str, Any]]:
    return [{"params": [model.weight]}, {"params": [model.bias]}]


@refused("load all groups of one saved optimizer")
def test_groups_of_two_states(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    optimizer = over(model, groups_of(model), seed=3)
    steps(model, optimizer)
    first = optimizer.state_dict()
    steps(model, optimizer)
    second = optimizer.state_dict()
    other = second if told else first
    again = over(model, groups_of(model))
    again.load_state_dict(
        {"state": second["state"], "param_groups": [other["param_groups"][0], second["param_groups"][1]]}
    )
    assert again.logical_step == 2
    return steps(model, again)


class Forgetful(PrivacyAccountant):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict({**state_dict, "history": []})


@refused("let load_state_dict take up what state_dict returned")
def test_an_accountant_that_forgets_what_it_loads(told: int) -> Right:
    kind = PrivacyAccountant if told else Forgetful
    made: dict[str, Any] = {"noise_multiplier": 1.0, "sample_rate": 0.3, "method": "rdp"}
    model, optimizer = parts(accountant=kind(**made))
    steps(model, optimizer, 2)
    again = over(model, accountant=kind(**made))
    again.load_state_dict(optimizer.state_dict())
    return steps(model, again)


def loaded(told: int, saving: Any, right: Any, wrong: Any, model: Any = None) -> Right:
    """A state that options ``saving`` made, in an optimizer of ``wrong`` ones, or as told of ``right`` ones."""

    def made(options: Any) -> tuple[Any, DPOptimizer]:
        options = options() if callable(options) else options
        options = options if "mechanism" in options else {"noise_multiplier": 1.0, "expected_batch_size": 8, **options}
        private_model: Any = dp_compile(model() if model else plain(), backend="eager")
        return private_model, DPOptimizer(sgd(private_model), private_model, **options)

    first, saved = made(saving)
    steps(first, saved)
    again, optimizer = made(right if told else wrong)
    again.load_state_dict(first.state_dict())
    optimizer.load_state_dict(saved.state_dict())
    return steps(again, optimizer)


def grid(bits: int) -> Any:
    return lambda: {"mechanism": ExactMechanism(1.0, 1.0, 8, 7, bits=bits)}


@refused("make the DPOptimizer without exact")
def test_a_state_without_a_grid(told: int) -> Right:
    return loaded(told, {"secure": True}, {"secure": True}, {"exact": True})


@refused("make the DPOptimizer with mechanism=ExactMechanism(..., bits=40), or with exact=True", ways=2)
def test_a_state_on_a_grid(told: int) -> Right:
    return loaded(told, {"exact": True}, grid(40) if told == 1 else {"exact": True}, {"secure": True})


@refused("make the DPOptimizer with mechanism=ExactMechanism(..., bits=43)")
def test_a_state_on_another_grid(told: int) -> Right:
    return loaded(told, grid(43), grid(43), {"exact": True})


def resumed(told: int, **changes: Any) -> Right:
    model, optimizer, loader = private(max_grad_norm=AdaptiveClip())
    trains(model, optimizer, loader)
    state = optimizer.state_dict()
    again = private(max_grad_norm=AdaptiveClip())
    own = {**state["dpcompile"], **({} if told else changes)}
    again[0].load_state_dict(model.state_dict())
    again[1].load_state_dict({**state, "dpcompile": own})
    again[2].load_state_dict(loader.state_dict())
    return trains(*again)


@refused(UNCHANGED)
def test_a_state_of_bounds_that_are_none(told: int) -> Right:
    return resumed(told, clip_shares=[1.0])


@refused(UNCHANGED)
def test_a_state_of_a_bound_below_zero(told: int) -> Right:
    return resumed(told, max_grad_norm=-1.0)


@refused(UNCHANGED)
def test_a_state_of_more_steps_than_were_counted(told: int) -> Right:
    return resumed(told, logical_step=9)


@refused("load what PoissonLoader.state_dict() returned, unchanged")
def test_a_loader_further_in_its_pass_than_in_all(told: int) -> Right:
    model, optimizer, loader = private()
    trains(model, optimizer, loader)
    state = loader.state_dict()
    loader.load_state_dict(state if told else {**state, "position": state["step"] + 1})
    return trains(model, optimizer, loader)


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))


def by_layer(trained: int) -> tuple[Any, DPOptimizer]:
    """The last one or two of two layers are trained."""
    ordinary = two_layers()
    ordinary[0].requires_grad_(trained == 2)
    model: Any = dp_compile(ordinary, clipping="per_layer", backend="eager")
    return model, over(model, adaptive_clip=AdaptiveClip())


@refused("compile the model with the clipping of the saved run, and make the same layers trainable", slow=True)
def test_a_state_of_bounds_of_other_layers(told: int) -> Right:
    saved, there = by_layer(2), by_layer(2 if told else 1)
    steps(*saved)
    there[0].load_state_dict(saved[0].state_dict())
    there[1].load_state_dict(saved[1].state_dict())
    return steps(*there)


@refused(
    "make the DPOptimizer with adaptive_clip=AdaptiveClip(...), when everything that is to be trained, and nothing "
    "else, has requires_grad=True; a new one after freezing or unfreezing whole layers or blocks",
    slow=True,
)
def test_a_layer_that_is_frozen_beside_its_bound(told: int) -> Right:
    model, optimizer = by_layer(2)
    steps(model, optimizer)
    optimizer.zero_grad()
    model[0].requires_grad_(False)
    if told:
        optimizer = over(model, adaptive_clip=AdaptiveClip())
    return steps(model, optimizer)


@refused("call make_private with the noise_schedule of the saved run", slow=True)
def test_resuming_with_another_noise_schedule(told: int) -> Right:
    def saved(step: int) -> float:
        return 1.0 + step / 9

    def other(step: int) -> float:
        return 2.0 + step / 9

    first = private(noise_schedule=saved)
    trains(*first)
    again = private(noise_schedule=saved if told else other)
    for part, before in zip(again, first, strict=True):
        part.load_state_dict(before.state_dict())
    return trains(*again)


@refused("leave it; the function is PoissonLoader's expected_batch_size")
def test_a_batch_size_set_beside_those_by_the_step(told: int) -> Right:
    model, optimizer, loader = private(PoissonLoader(data().dataset, expected_batch_size=lambda step: 6.0 + step))
    if not told:
        optimizer.expected_batch_size = 8.0
    return trains(model, optimizer, loader)


@refused(UNCHANGED)
def test_a_state_of_two_groups_for_one(told: int) -> Right:
    model, optimizer = parts()
    steps(model, optimizer)
    state = optimizer.state_dict()
    if not told:
        state = {**state, "param_groups": 2 * state["param_groups"]}
    again = over(model)
    again.load_state_dict(state)
    return steps(model, again)
