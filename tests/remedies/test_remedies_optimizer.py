"""The optimizer: what its messages say to do, tried."""

from __future__ import annotations

import copy
from typing import Any

import torch
from private_steps import backward, over, parts, steps
from remedies import Right, about, equals, plain, private, refused, sgd, stepped, trains
from torch import Tensor, nn

from dpcompile import AdaptiveClip, DPOptimizer, PrivacyAccountant, dp_compile
from dpcompile.schedules import ClipSchedule, NoiseSchedule, exponential


@refused("give a finite number, 0 or more (0: no privacy)")
def test_sigma_below_zero(told: int) -> Right:
    return steps(*parts(noise_multiplier=1.0 if told else -1.0))


@refused("give the sample rate times the size of the dataset, a positive number")
def test_a_batch_of_minus_one(told: int) -> Right:
    return steps(*parts(expected_batch_size=8 if told else -1))


@refused(
    "give both, or a mechanism; make_private and calibrate_noise find the noise_multiplier of a target",
    ways=2,
)
def test_an_optimizer_without_numbers(told: int) -> Right:
    if told == 2:
        from dpcompile.noise.mechanism import GaussianMechanism

        model: Any = dp_compile(plain(), backend="eager")
        return steps(model, DPOptimizer(sgd(model), model, mechanism=GaussianMechanism(1.0, 1.0, 8, 7)))
    return steps(*parts(noise_multiplier=1.0 if told else None))


def with_mechanism(bound: float, **options: Any) -> Right:
    from dpcompile.noise.mechanism import GaussianMechanism

    model: Any = dp_compile(plain(), backend="eager")
    return steps(model, DPOptimizer(sgd(model), model, mechanism=GaussianMechanism(1.0, bound, 8, 7), **options))


@refused("give them to the mechanism, and the mechanism alone to DPOptimizer")
def test_a_mechanism_and_numbers(told: int) -> Right:
    return with_mechanism(1.0, **{} if told else {"noise_multiplier": 1.0})


@refused("give both the same max_grad_norm")
def test_a_mechanism_for_another_bound(told: int) -> Right:
    return with_mechanism(1.0 if told else 0.5)


@refused("take an optimizer that uses one gradient per step, such as SGD or Adam")
def test_lbfgs(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    inner: Any = torch.optim.Adam(model.parameters()) if told else torch.optim.LBFGS(model.parameters())
    return steps(model, DPOptimizer(inner, model, noise_multiplier=1.0, expected_batch_size=8))


@refused("give a torch.optim.Optimizer, or a list of them for parts of the model", slow=True)
def test_an_optimizer_of_nothing(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    inner: Any = sgd(model) if told else model.parameters()
    return steps(model, DPOptimizer(inner, model, noise_multiplier=1.0, expected_batch_size=8))


@refused("wrap the plain torch optimizer once")
def test_a_private_optimizer_wrapped_again(told: int) -> Right:
    model, optimizer = parts()
    inner: Any = sgd(model) if told else optimizer
    return steps(model, DPOptimizer(inner, model, noise_multiplier=1.0, expected_batch_size=8))


@refused("call step() of the DPOptimizer; a second DPOptimizer takes a torch optimizer of its own")
def test_two_around_one_optimizer(told: int) -> Right:
    model, optimizer = parts()
    inner = sgd(model) if told else optimizer.optimizer
    return steps(model, DPOptimizer(inner, model, noise_multiplier=1.0, expected_batch_size=8))


@refused("wrap it first: model = dp_compile(model, max_grad_norm=1.0)")
def test_a_model_that_is_not_private(told: int) -> Right:
    model: Any = plain()
    if told:
        model = dp_compile(model, max_grad_norm=1.0, backend="eager")
    return steps(model, over(model))


@refused("build it over model.parameters() of the compiled model and nothing else")
def test_another_models_parameters(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    return steps(
        model, over(model, model.parameters() if told else [*model.parameters(), *nn.Linear(2, 2).parameters()])
    )


@refused(
    "add them to the optimizer (add_param_group); give several optimizers for parts of the model as one "
    "list, DPOptimizer([first, second], model, ...); or freeze them with requires_grad_(False)",
    ways=3,
    slow=True,
)
def test_a_parameter_that_no_optimizer_has(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    numbers: Any = {"noise_multiplier": 1.0, "expected_batch_size": 8}
    inner: Any = torch.optim.SGD([model.weight], lr=0.1)
    if told == 1:
        inner.add_param_group({"params": [model.bias]})
    elif told == 2:
        inner = [inner, torch.optim.Adam([model.bias])]
    elif told == 3:
        model.bias.requires_grad_(False)
    return steps(model, DPOptimizer(inner, model, **numbers))


@refused("call optimizer.zero_grad() after freezing it, or set its .grad to None", ways=2, slow=True)
def test_a_frozen_parameter_with_a_gradient(told: int) -> Right:
    ordinary = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    model, optimizer = parts(ordinary)
    backward(model)
    optimizer.step()
    ordinary[0].requires_grad_(False)
    if told == 1:
        optimizer.zero_grad()
    else:
        ordinary[1].zero_grad()
        optimizer.zero_grad() if told else None
        ordinary[0].get_parameter("weight").grad = None if told else torch.ones(4, 5)
    before = [p.detach().clone() for p in ordinary[1].parameters()]
    backward(model)
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(before, ordinary[1].parameters(), strict=True))
    return equals(optimizer.logical_step, 2)


class Wave(nn.Module):
    def __init__(self, real: int) -> None:
        super().__init__()
        value = torch.randn(5, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
        self.real = real
        self.w = nn.Parameter(torch.view_as_real(value) if real else value)

    def forward(self, x: Tensor) -> Tensor:
        w = torch.view_as_complex(self.w) if self.real else self.w
        return (x.to(torch.complex64) @ w).abs()


@refused("hold it as a real parameter and use torch.view_as_complex in forward")
def test_a_complex_parameter(told: int) -> Right:
    return steps(*parts(Wave(told)))


@refused(
    "give both the same noise_multiplier; to change it on the way, take dpcompile.schedules.NoiseSchedule, "
    "which tells the accountant",
    ways=2,
    slow=True,
)
def test_an_accountant_of_another_sigma(told: int) -> Right:
    counts = PrivacyAccountant(noise_multiplier=2.0 if told == 1 else 1.0, sample_rate=0.3, method="rdp")
    model, optimizer = parts(noise_multiplier=2.0, accountant=counts) if told < 2 else parts(accountant=counts)
    if told == 2:
        NoiseSchedule(optimizer, lambda t: 2.0 if t == 0 else 1.0)
    return steps(model, optimizer)


@refused("leave it; to train without one, make the DPOptimizer without")
def test_the_accountant_is_taken_away(told: int) -> Right:
    counts = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.3, method="rdp")
    model, optimizer = parts(accountant=counts)
    if not told:
        optimizer.accountant = None
    return steps(model, optimizer)


def another_accountant(told: int, kept: dict[str, Any], other: dict[str, Any]) -> Right:
    first: dict[str, Any] = {"noise_multiplier": 1.0, "sample_rate": 0.3, "method": "pld", **kept}
    model, optimizer = parts(accountant=PrivacyAccountant(**first))
    optimizer.accountant = PrivacyAccountant(**{**first, **({} if told else other)})
    return steps(model, optimizer)


@refused("make it with relation='zero_out'")
def test_an_accountant_of_another_promise_in_its_place(told: int) -> Right:
    return another_accountant(told, {}, {"relation": "replace_one"})


@refused("make it with truncation=(24, 12)")
def test_an_accountant_of_another_cap_in_its_place(told: int) -> Right:
    return another_accountant(told, {"truncation": (24, 12)}, {"truncation": None})


@refused("make it with the same sample_rate and load the old one's state_dict into it")
def test_an_accountant_that_knows_less_in_its_place(told: int) -> Right:
    model, optimizer = parts(accountant=PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.3, method="rdp"))
    steps(model, optimizer)
    new = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.3, method="rdp")
    if told:
        new.load_state_dict(optimizer.accountant.state_dict())  # type: ignore[union-attr]
    optimizer.accountant = new
    return steps(model, optimizer)


@refused(
    "make it with accountant=PrivacyAccountant(noise_multiplier=.., sample_rate=..), or by make_private",
)
def test_epsilon_without_an_accountant(told: int) -> Right:
    counts = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.3, method="rdp") if told else None
    model, optimizer = parts(accountant=counts)
    steps(model, optimizer)
    return about(optimizer.epsilon(1e-3))


@refused("make the optimizer with accountant=PrivacyAccountant(...), as make_private does", slow=True)
def test_a_report_without_an_accountant(told: int) -> Right:
    counts = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.3, method="rdp") if told else None
    model, optimizer = parts(accountant=counts)
    steps(model, optimizer)
    return equals("epsilon" in str(optimizer.report(1e-3)).lower(), True)


@refused("give a name that ends in .md, .json or .html", slow=True)
def test_a_report_of_another_kind(told: int, tmp_path: Any) -> Right:
    model, optimizer = parts(accountant=PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.3, method="rdp"))
    steps(model, optimizer)
    optimizer.report(1e-3).save(tmp_path / ("report.md" if told else "report.pdf"))
    return equals((tmp_path / "report.md").exists(), True)


@refused("save state_dict(), or make a second DPOptimizer with its own seed", ways=2)
def test_a_copy_of_an_optimizer(told: int) -> Right:
    model, optimizer = parts()
    if told == 1:
        again = over(model)
        again.load_state_dict(optimizer.state_dict())
        return steps(model, again)
    return steps(model, over(model, seed=5) if told else copy.deepcopy(optimizer))


@refused("change it after optimizer.step(), before the next forward", ways=2, slow=True)
def test_a_bound_moved_before_the_step(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    if told:
        optimizer.step()
        optimizer.zero_grad()
    optimizer.move_max_grad_norm(0.5)
    if not told:
        optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused("use one of 'flat', 'per_layer', 'per_block', or compile the model with the other C", ways=3, slow=True)
def test_a_bound_moved_of_automatic_clipping(told: int) -> Right:
    clipping: Any = "flat" if told == 1 else "per_layer" if told == 2 else "automatic"
    model: Any = dp_compile(plain(), max_grad_norm=0.5 if told == 3 else 1.0, clipping=clipping, backend="eager")
    optimizer = over(model)
    if told < 3:
        optimizer.move_max_grad_norm(0.5)
    return steps(model, optimizer)


@refused("give it what DPOptimizer or make_private returned")
def test_a_schedule_of_a_plain_optimizer(told: int) -> Right:
    model, optimizer = parts()
    inner: Any = optimizer if told else optimizer.optimizer
    NoiseSchedule(inner, exponential(1.1))
    return steps(model, optimizer)


@refused("leave out the schedule or AdaptiveClip", ways=2)
def test_a_schedule_and_a_quantile(told: int) -> Right:
    model, optimizer, loader = private(max_grad_norm=1.0 if told == 2 else AdaptiveClip())
    if told != 1:
        ClipSchedule(optimizer, exponential(0.9))
    return trains(model, optimizer, loader)


@refused("0.5 is a common choice")
def test_a_quantile_of_one(told: int) -> Right:
    return trains(*private(max_grad_norm=AdaptiveClip(quantile=0.5 if told else 1.0)))


@refused("give a finite number above 0")
def test_a_rate_of_the_quantile_of_zero(told: int) -> Right:
    return trains(*private(max_grad_norm=AdaptiveClip(learning_rate=0.2 if told else 0.0)))


@refused("leave count_noise out, or take a twentieth of the expected batch size or more", ways=2, slow=True)
def test_too_little_noise_on_the_count(told: int) -> Right:
    noise = (0.1, None, 0.6)[told]
    return trains(*private(max_grad_norm=AdaptiveClip(count_noise=noise)))
