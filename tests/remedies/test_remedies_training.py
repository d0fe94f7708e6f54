"""The loop, the optimizer and its states: what their messages say to do, tried."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from remedies import Right, about, data, equals, plain, private, refused, right, sgd, stepped, trains
from torch import Tensor, nn

from dpcompile import AdaptiveClip, DPOptimizer, PoissonLoader, PrivacyAccountant, dp_compile, set_mask
from dpcompile.schedules import ClipSchedule, NoiseSchedule, exponential

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
Y = torch.arange(8) % 3


def parts(model: nn.Module | None = None, **options: Any) -> tuple[Any, DPOptimizer]:
    private_model: Any = dp_compile(plain() if model is None else model, backend="eager")
    return private_model, over(private_model, **options)


def over(model: Any, parameters: Any = None, **options: Any) -> DPOptimizer:
    inner = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr=0.1)
    return DPOptimizer(inner, model, **{"noise_multiplier": 1.0, "expected_batch_size": 8, **options})


def backward(model: Any, x: Tensor = X, y: Tensor = Y) -> None:
    F.cross_entropy(model(x), y).backward()


def steps(model: Any, optimizer: Any, count: int = 1) -> Right:
    before, begun = [p.detach().clone() for p in model.parameters() if p.requires_grad], optimizer.logical_step
    for _ in range(count):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, before, begun + count)


# --- the loop -------------------------------------------------------------------------------------------------------


@refused(
    "call loss.backward() on an output of the compiled model first; for an empty draw run the padded batch "
    "that PoissonLoader gives",
)
def test_a_step_without_a_backward(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    if told:
        backward(model)
    optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused("run forward, loss.backward() and optimizer.zero_grad() between two steps")
def test_a_second_step_on_the_same_gradients(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    optimizer.step()
    if told:
        optimizer.zero_grad()
        backward(model)
    optimizer.step()
    return stepped(model, optimizer, before, 2)


@refused("call optimizer.zero_grad() after optimizer.step()")
def test_no_zero_grad(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        backward(model)
        optimizer.step()
        if told:
            optimizer.zero_grad()
    return stepped(model, optimizer, before, 2)


@refused(
    "call the model once per backward (put both passes in one forward: return self.net(real), "
    "self.net(fake)), or run one backward per micro-batch",
    ways=2,
)
def test_two_calls_and_one_backward(told: int) -> Right:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain()

        def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(real), self.net(fake)

    model, optimizer = parts(Both() if told == 1 else None)
    before = [p.detach().clone() for p in model.parameters()]
    if told == 1:
        real, fake = model(X, -X)
        (F.cross_entropy(real, Y) + F.cross_entropy(fake, Y)).backward()
    elif told == 2:
        optimizer.accumulating = True
        backward(model)
        optimizer.accumulating = False
        backward(model, -X)
    else:
        (F.cross_entropy(model(X), Y) + F.cross_entropy(model(-X), Y)).backward()
    optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused("run the forward again, or add the losses before one backward", ways=2)
def test_two_backwards_through_one_forward(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.accumulating = told == 1
    output = model(X)
    if told == 2:
        (F.cross_entropy(output, Y) + output.square().mean()).backward()
    else:
        F.cross_entropy(output, Y).backward(retain_graph=True)
        optimizer.accumulating = False
        (model(X) if told else output).square().mean().backward()
    optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused(
    "leave out what changed it: clip_grad_norm_ or clip_grad_value_ (every example's gradient is clipped "
    "already: max_grad_norm), a backward of the undecorated model, a regulariser on parameters in the loss "
    "(use weight_decay), an all_reduce or scaling of p.grad; to scale the loss use torch.amp.GradScaler; "
    "then call zero_grad()",
)
def test_gradients_that_are_changed(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    if not told:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused(
    "call loss.backward() on an output of the compiled model first; for an empty draw run the padded batch "
    "that PoissonLoader gives",
)
def test_a_gradient_that_was_taken_out(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    if told:
        optimizer.zero_grad()
    backward(model)
    if not told:
        optimizer.zero_grad()
    optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused(
    "call zero_grad() of the DPOptimizer, which waits for the end of the step, and not that of the model or "
    "of the wrapped optimizer; optimizer.discard() gives the step up",
    ways=2,
)
def test_zeroed_within_a_step(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.accumulating = True
    backward(model)
    optimizer.step()
    if told == 2:
        optimizer.discard()
    elif told == 1:
        optimizer.zero_grad()
    else:
        model.zero_grad(set_to_none=False)
    optimizer.accumulating = False
    backward(model, -X)
    optimizer.step()
    return stepped(model, optimizer, before, 1)


@refused("step the DPOptimizer, and no other optimizer over the parameters of the private model")
def test_the_inner_optimizer_is_stepped(told: int) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    (optimizer if told else optimizer.optimizer).step()
    return stepped(model, optimizer, before, 1)


@refused("step the DPOptimizer, and no other optimizer over the parameters of the private model")
def test_another_optimizer_is_stepped(told: int) -> Right:
    model, optimizer = parts()
    other: Any = optimizer if told else torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    other.step()
    return stepped(model, optimizer, before, 1)


@refused("remove the hook; change clipped sums in p.grad only through DPOptimizer")
def test_a_hook_on_a_gradient(told: int) -> Right:
    model, optimizer = parts()
    hook = next(model.parameters()).register_hook(lambda g: 2 * g)
    if told:
        hook.remove()
    return steps(model, optimizer)


@refused(
    "call dp_compile again after changing the model, and make the optimizer from the result; hold modules in "
    "nn.ModuleList or nn.ModuleDict",
)
def test_a_parameter_that_was_replaced(told: int) -> Right:
    ordinary = plain()
    model, optimizer = parts(ordinary)
    ordinary.bias = nn.Parameter(torch.zeros(3))
    if told:
        model = dp_compile(ordinary, backend="eager")
        optimizer = over(model)
    return steps(model, optimizer)


@refused(
    "call dp_compile again after changing the model, and make the optimizer from the result; hold modules in "
    "nn.ModuleList or nn.ModuleDict",
)
def test_modules_in_a_list(told: int) -> Right:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.rest: Any = nn.ModuleList([plain()]) if told else [plain()]

        def forward(self, x: Tensor) -> Tensor:
            return self.rest[0](self.first(x))

    return steps(*parts(Listed()))


@refused(
    "call the model once per batch with gradients (other calls under torch.no_grad()), and iterate over the "
    "loader anew for every epoch",
    slow=True,
)
def test_a_batch_used_twice(told: int) -> Right:
    model, optimizer, loader = private()
    before = [p.detach().clone() for p in model.parameters()]
    for x, y in loader:
        backward(model, x, y)
        if told:
            with torch.no_grad():
                model(x)
        else:
            backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, before, 3)


@refused(
    "iterate over the loader that make_private returned, and call the model with gradients once per batch "
    "(other calls under torch.no_grad()); for batches of your own use dp_compile and DPOptimizer without "
    "attaching a loader",
)
def test_the_old_loader_in_the_loop(told: int) -> Right:
    old = data()
    model, optimizer, loader = private(old)
    return trains(model, optimizer, loader if told else old)


@refused(
    "call optimizer.step() after every batch of the loader (it waits by itself where a draw goes on), or "
    "optimizer.discard() to skip one",
    ways=2,
)
def test_a_draw_without_a_step(told: int) -> Right:
    model, optimizer, loader = private()
    before, taken = [p.detach().clone() for p in model.parameters()], 0
    for i, (x, y) in enumerate(loader):
        backward(model, x, y)
        if i == 0 and told != 1:
            if told == 2:
                optimizer.discard()
            continue
        optimizer.step()
        optimizer.zero_grad()
        taken += 1
    return stepped(model, optimizer, before, taken)


@refused(
    "call the model on the batch that the loader gave, whole (other calls under torch.no_grad()); every view "
    "of an example is part of the example: give it a dimension of its own",
)
def test_half_of_the_batch(told: int) -> Right:
    model, optimizer, loader = private(physical_batch_size=8)
    before = [p.detach().clone() for p in model.parameters()]
    for x, y in loader.parts():
        backward(model, x if told else x[:4], y if told else y[:4])
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, before, 3)


@refused(
    "where batches are taken ahead, call the model on the batch's own tensors or copies of them; compute new "
    "ones (normalise, augment) in the dataset, in collate_fn or in the model",
)
def test_tensors_computed_from_batches_taken_ahead(told: int) -> Right:
    model, optimizer, loader = private()
    before = [p.detach().clone() for p in model.parameters()]
    batches = iter(loader)
    ahead = [next(batches), next(batches)]
    for x, y in ahead:
        backward(model, x if told else 2 * x, y)
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, before, 2)


@refused("True marks an example, False a padding row")
def test_a_mask_of_numbers(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    mask = torch.ones(8, dtype=torch.bool if told else torch.float32)
    set_mask(model, mask)
    return right(model, X, mask=mask)


@refused("call the model on the batch that the loader gave, whole", slow=True)
def test_a_mask_of_other_rows(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    mask = torch.ones(8 if told else 7, dtype=torch.bool)
    set_mask(model, mask)
    return right(model, X, mask=mask)


@refused(
    "iterate over the loader and leave the mask to it, or do not attach one and use loader.batches()",
    ways=2,
)
def test_a_mask_beside_a_loader(told: int) -> Right:
    if told == 2:
        model, optimizer = parts()
        before = [p.detach().clone() for p in model.parameters()]
        loader = PoissonLoader(data().dataset, expected_batch_size=8)
        for batch in loader.batches():
            set_mask(model, batch.mask)
            optimizer.accumulating = not batch.ends_step
            backward(model, *batch.data)
            optimizer.step()
            optimizer.zero_grad()
        return stepped(model, optimizer, before, 3)
    model, optimizer, loader = private()
    if not told:
        set_mask(model, torch.ones(8, dtype=torch.bool))
    return trains(model, optimizer, loader)


@refused("leave it to the loader, or iterate over loader.batches() without attaching it", ways=2)
def test_accumulating_beside_a_loader(told: int) -> Right:
    if told == 2:
        return loop_of_ones_own()
    model, optimizer, loader = private()
    if not told:
        optimizer.accumulating = True
    return trains(model, optimizer, loader)


def loop_of_ones_own() -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    for batch in PoissonLoader(data().dataset, expected_batch_size=8, physical_batch_size=4).batches():
        set_mask(model, batch.mask)
        optimizer.accumulating = not batch.ends_step
        backward(model, *batch.data)
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, before, 3)


@refused("call loss.backward() first")
def test_norms_before_a_backward(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    if told:
        backward(model)
    return equals(model.grad_norms.shape, (8,))


@refused("call the model once, or model.trace(*example_inputs), then look", ways=2)
def test_a_plan_before_a_call(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    if told == 1:
        model(X)
    elif told == 2:
        model.trace(X)
    return equals("weight" in model.plan.rules(), True)


@refused("call optimizer.report(delta) of the DPOptimizer", slow=True)
def test_a_report_of_the_model_alone(told: int) -> Right:
    model, optimizer = parts(accountant=PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.3, method="rdp"))
    steps(model, optimizer)
    return equals("epsilon" in str((optimizer if told else model).report(1e-3)).lower(), True)


# --- the optimizer --------------------------------------------------------------------------------------------------


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


# --- states ---------------------------------------------------------------------------------------------------------


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
