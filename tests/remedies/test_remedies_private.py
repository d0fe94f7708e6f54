"""``make_private``, ``dp_compile`` and ``compile_step``: what their messages say to do, tried."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from remedies import Right, about, data, equals, plain, private, refused, right, sgd, stepped, trains
from torch import nn

from dpcompile import (
    AdaptiveClip,
    DPOptimizer,
    PrivacyAccountant,
    calibrate_noise,
    compile_step,
    dp_compile,
    make_private,
)

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
TARGET: dict[str, Any] = {"noise_multiplier": None, "target_epsilon": 3.0, "target_delta": 1e-4, "epochs": 1}


def counting(**options: Any) -> PrivacyAccountant:
    return PrivacyAccountant(**{"noise_multiplier": 1.0, "sample_rate": 8 / 24, "method": "rdp", **options})


@refused("give noise_multiplier, or target_epsilon with target_delta and epochs", ways=2, slow=True)
def test_neither_noise_nor_target(told: int) -> Right:
    return trains(*private(**({"noise_multiplier": None}, {}, TARGET)[told]))


@refused("give target_delta, well below 1 / size of the dataset", slow=True)
def test_a_target_without_delta(told: int) -> Right:
    return trains(*private(**{**TARGET, "target_delta": 1e-4 if told else None}))


@refused("say how long training will be: give one of them", ways=2, slow=True)
def test_a_target_without_a_length(told: int) -> Right:
    length: Any = ({}, {"epochs": 1}, {"steps": 3})[told]
    return trains(*private(**{**TARGET, "epochs": None, **length}))


@refused("give an integer, 1 or more; with steps= training may end within a pass", slow=True)
def test_half_an_epoch(told: int) -> Right:
    return trains(*private(**{**TARGET, "epochs": 1 if told else 0.5}))


@refused("give a delta well below that, such as 0.004")
def test_delta_as_large_as_one_of_the_data(told: int) -> Right:
    return trains(*private(**{**TARGET, "target_delta": 0.004 if told else 1 / 24}))


@refused("give one of 'raise', 'warn', 'ignore'", ways=3)
def test_on_exceed(told: int) -> Right:
    return trains(*private(on_exceed=("stop", "raise", "warn", "ignore")[told]))


def three_passes(**options: Any) -> Right:
    model, optimizer, loader = private(**{**TARGET, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="all 3 planned steps are taken")
        warnings.filterwarnings("ignore", message="step 4 of a run whose noise is calibrated for 3")
        return trains(model, optimizer, loader, passes=3)


@refused(
    "stop here, plan the run with more epochs or steps, or pass on_exceed='warn' to make_private and report "
    "what the accountant says",
    ways=3,
    slow=True,
)
def test_more_steps_than_planned(told: int) -> Right:
    if told == 1:  # stop here
        return trains(*private(**TARGET))
    return three_passes(**({}, {}, {"epochs": 3}, {"on_exceed": "warn"})[told])


@refused(
    "give make_private noise_schedule=factor beside the target, which calibrates the schedule as a whole; or "
    "calibrate_noise(..., schedule=factor) and make_private its noise_multiplier in place of the target",
    ways=2,
    slow=True,
)
def test_a_lower_sigma_than_the_target_needs(told: int) -> Right:
    def half(step: int) -> float:
        return 0.5 if step >= 1 else 1.0

    if told == 2:
        noise = calibrate_noise(target_epsilon=3.0, target_delta=1e-4, sample_rate=8 / 24, steps=3, schedule=half,
                                method="rdp")  # fmt: skip
        return trains(*private(noise_multiplier=noise, noise_schedule=half))
    model, optimizer, loader = private(**TARGET, noise_schedule=half if told else None)
    if not told:
        optimizer.move_noise_multiplier(0.5 * optimizer.noise_multiplier)
    return trains(model, optimizer, loader)


@refused("leave one of them out: noise_schedule, or NoiseSchedule and what else moves the noise", ways=2, slow=True)
def test_two_schedules_of_the_noise(told: int) -> Right:
    from dpcompile.schedules import NoiseSchedule, exponential

    model, optimizer, loader = private(noise_schedule=None if told == 1 else exponential(0.9))
    if told < 2:
        NoiseSchedule(optimizer, exponential(0.9)).step()
    return trains(model, optimizer, loader)


@refused("pass the plain torch optimizer")
def test_the_optimizer_is_private_already(told: int) -> Right:
    model, optimizer, _ = private()
    if not told:
        make_private(plain(), optimizer, data(), noise_multiplier=1.0)
    return trains(*make_private(m := plain(), sgd(m), data(), noise_multiplier=1.0, accountant="rdp", backend="eager"))


@refused("pass the ordinary model, or leave max_grad_norm out", ways=2)
def test_a_model_that_is_private_already(told: int) -> Right:
    model = dp_compile(plain(), max_grad_norm=1.0, backend="eager")
    bound = None if told == 2 else 0.5
    model = plain() if told == 1 else model
    options = {"backend": "eager"} if told == 1 else {"backend": None}
    return trains(*private(model=model, max_grad_norm=bound, **options))


@refused("pass the ordinary model, or give the options to dp_compile", ways=2)
def test_options_for_a_model_that_is_compiled(told: int) -> Right:
    model = plain() if told == 1 else dp_compile(plain(), backend="eager", norm="ghost" if told == 2 else "auto")
    return trains(*private(model=model, norm="ghost" if told < 2 else None, backend="eager" if told == 1 else None))


@refused("call dp_compile on the undecorated model, once")
def test_a_private_model_compiled_again(told: int) -> Right:
    ordinary = plain()
    model = dp_compile(ordinary, backend="eager")
    return right(dp_compile(ordinary if told else model, max_grad_norm=0.5, backend="eager"), X)


@refused("put a function and its parameters into an nn.Module")
def test_a_function_in_place_of_a_module(told: int) -> Right:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.w)

    w = torch.ones(3, 5, requires_grad=True)
    function: Any = lambda x: F.linear(x, w)  # noqa: E731
    return right(dp_compile(Line() if told else function, backend="eager"), X)


@refused(
    "use one of 'auto', 'ghost', 'instantiate', 'redo', 'direct', 'per_example', 'ghost_clipping', "
    "'mixed_ghost_clipping', 'book_keeping', 'bk_mixed_ghost', 'bk_mix_opt', 'two_pass'",
    ways=4,
    slow=True,
)
def test_an_unknown_norm(told: int) -> Right:
    norms: Any = ("fast", "auto", "ghost", "book_keeping", "bk_mixed_ghost")
    return right(dp_compile(plain(), norm=norms[told], backend="eager"), X)


@refused("it is C, the largest norm one example's gradient may have; 1.0 is a common choice")
def test_a_bound_of_zero(told: int) -> Right:
    return right(dp_compile(plain(), max_grad_norm=1.0 if told else 0.0, backend="eager"), X)


@refused(
    "use one of 'flat', 'automatic', 'per_layer', 'per_block', or a function from norms [B] to weights [B]",
    ways=3,
)
def test_an_unknown_clipping(told: int) -> Right:
    def half(norms: torch.Tensor) -> torch.Tensor:
        return 0.5 / (norms + 0.5)

    clipping: Any = ("global", "flat", "automatic", half)[told]
    return right(dp_compile(plain(), clipping=clipping, backend="eager"), X)


@refused("return a tensor of the shape of the norms")
def test_a_clipping_function_of_one_number(told: int) -> Right:
    def clipping(norms: torch.Tensor) -> torch.Tensor:
        return 1 / (norms + 1) if told else torch.ones(())

    return right(dp_compile(plain(), clipping=clipping, backend="eager"), X)


@refused("let weight i depend on norm i alone")
def test_a_clipping_function_of_the_mean_norm(told: int) -> Right:
    def clipping(norms: torch.Tensor) -> torch.Tensor:
        return 1 / ((norms if told else norms.mean() + 0 * norms) + 1)

    return right(dp_compile(plain(), clipping=clipping, backend="eager"), X)


@refused("write it with tensor operations on the norms [B], without Python branches on their values")
def test_a_clipping_function_with_a_branch(told: int) -> Right:
    def clipping(norms: torch.Tensor) -> torch.Tensor:
        if told:
            return torch.where(norms > 1, 1 / norms, 1.0)
        return torch.stack([1 / n if n > 1 else torch.ones(()) for n in norms])

    return right(dp_compile(plain(), clipping=clipping, backend="eager"), X)


@refused("say how many rows of a batch, one after the other, are one user's; 1: every row is an example", ways=2)
def test_users_of_half_a_row(told: int) -> Right:
    users: Any = (0.5, 2, 1)[told]
    return right(dp_compile(plain(), examples_per_user=users, backend="eager"), X) if told != 1 else about(
        float(dp_compile(plain(), examples_per_user=2, backend="eager")(X).shape[0]), 8.0
    )  # fmt: skip


@refused("leave dynamic out; batches of other sizes are compiled anew", slow=True)
def test_users_and_dynamic_sizes(told: int) -> Right:
    model = dp_compile(plain(), examples_per_user=2, dynamic=None if told else True, backend="eager")
    model(X).sum().backward()
    model.zero_grad()
    model(X[:4]).sum().backward()
    return equals(model.grad_norms.shape, (2,))


@refused("give a float, a multiple of the plain step's peak, or an int, bytes; or leave it out", ways=2)
def test_a_memory_budget_of_nothing(told: int) -> Right:
    budget: Any = (0, 1.5, 2**20)[told]
    return right(dp_compile(plain(), memory_budget=budget, backend="eager"), X)


@refused("give the nn.Module first, then the optimizer: make_private(model, optimizer, loader, ...)")
def test_the_optimizer_first(told: int) -> Right:
    model: Any = plain()
    both: tuple[Any, Any] = (model, sgd(model))
    first, second = both if told else both[::-1]
    return trains(*make_private(first, second, data(), noise_multiplier=1.0, backend="eager", accountant="rdp"))


@refused(
    "give a torch.utils.data.DataLoader or a PoissonLoader: make_private(model, optimizer, loader, ...)",
)
def test_a_loader_that_is_a_list(told: int) -> Right:
    batches: Any = data() if told else [(X, torch.zeros(8, dtype=torch.long))]
    return trains(*private(batches))


@refused("leave exact=True or bands out", ways=2)
def test_exact_and_bands(told: int) -> Right:
    return trains(*private(exact=told != 1 or None, bands=None if told == 2 else 2))


@refused("give max_grad_norm a number, or leave bands out", ways=2, slow=True)
def test_a_quantile_and_bands(told: int) -> Right:
    return trains(*private(max_grad_norm=1.0 if told == 1 else AdaptiveClip(), bands=None if told == 2 else 2))


@refused("give max_grad_norm a number, or leave exact=True out", ways=2, slow=True)
def test_a_quantile_and_exact(told: int) -> Right:
    return trains(*private(max_grad_norm=1.0 if told == 1 else AdaptiveClip(), exact=told != 2 or None))


@refused("give 'buffers' or 'tree', or leave it out: sampling", ways=3, slow=True)
def test_noise_in_turn_by_something_else(told: int) -> Right:
    return trains(*private(in_turn=("cyclic", "buffers", "tree", None)[told]))


@refused("leave out noise_schedule and batch sizes by the step, or take bands=1", ways=2)
def test_a_schedule_of_noise_and_bands(told: int) -> Right:
    schedule: Any = None if told == 1 else lambda step: 1.0 + step / 8
    return trains(*private(noise_schedule=schedule, bands=1 if told == 2 else 2))


def one_step(step: Any, model: Any, optimizer: Any) -> Right:
    before = [p.detach().clone() for p in model.parameters()]
    step(X, torch.arange(8) % 3)
    return stepped(model, optimizer, before, 1)


def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, y, reduction="none")


def wrapped(model: Any, **options: Any) -> DPOptimizer:
    return DPOptimizer(sgd(model), model, **{"noise_multiplier": 1.0, "expected_batch_size": 8, **options})


@refused("optimizer = DPOptimizer(optimizer, model, noise_multiplier=..., expected_batch_size=...)")
def test_a_compiled_step_with_a_plain_optimizer(told: int) -> Right:
    model = dp_compile(plain(), backend="eager")
    optimizer: Any = wrapped(model) if told else sgd(model)
    return one_step(compile_step(model, loss, optimizer), model, optimizer)


@refused("make the DPOptimizer with the model given here")
def test_a_compiled_step_with_the_optimizer_of_another_model(told: int) -> Right:
    model = dp_compile(plain(), backend="eager")
    optimizer = wrapped(model if told else dp_compile(plain(), backend="eager"))
    return one_step(compile_step(model, loss, optimizer), model, optimizer)


@refused(
    "use the ordinary loop: model(inputs), loss.backward(), optimizer.step(); or compile the model without regions",
    ways=2,
    slow=True,
)
def test_a_compiled_step_of_a_model_in_regions(told: int) -> Right:
    model = dp_compile(plain(), regions="breaks" if told < 2 else None, backend="eager")
    optimizer = wrapped(model)
    if told == 1:

        def step(x: torch.Tensor, y: torch.Tensor) -> None:
            loss(model(x), y).mean().backward()
            optimizer.step()

        return one_step(step, model, optimizer)
    return one_step(compile_step(model, loss, optimizer), model, optimizer)


@refused("make sure that the plain model runs on them")
def test_a_list_in_place_of_a_tensor(told: int) -> Right:
    model = dp_compile(plain(), backend="eager")
    if not told:
        model([X])
    return right(model, X)


@refused("leave it out; within one model a tied parameter is one, and its norm that of the sum")
def test_untied_without_a_pipeline(told: int) -> Right:
    options: dict[str, Any] = {} if told else {"untied": True}
    return equals(dp_compile(plain(), backend="eager", **options).training, True)
