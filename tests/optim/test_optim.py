"""DPOptimizer: the noise of a step, what counts as a step, and every refusal."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from fakes import PrivateModel, engine_of
from scipy import stats

from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.errors import PrivacyError, PrivacyWarning
from dpcompile.noise.mechanism import privatize_
from dpcompile.noise.normal import gaussian
from dpcompile.optim import optimizer as optim
from dpcompile.optim.optimizer import DPOptimizer


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch):
    monkeypatch.setattr(optim, "engine_of", engine_of)


def model_of(max_grad_norm: float = 1.0, **sizes: int) -> PrivateModel:
    return PrivateModel(max_grad_norm, **{name: torch.zeros(n) for name, n in (sizes or {"a": 6, "b": 4}).items()})


def wrapped(model: PrivateModel, inner=None, **options) -> DPOptimizer:
    inner = inner or torch.optim.SGD(model.parameters(), lr=1.0)
    return DPOptimizer(inner, model, **{"noise_multiplier": 1.0, "expected_batch_size": 4.0, "seed": 0, **options})


def gradients(model: PrivateModel) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def one_step(model: PrivateModel, optimizer: DPOptimizer, **sums: torch.Tensor) -> None:
    model.engine.deliver(**sums)
    optimizer.step()
    optimizer.zero_grad()


# ---- the noise of a step


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_noise_is_added_once_per_logical_step(micro_batches):
    """Update variance is (sigma C / expected batch size)**2 whatever the number of backwards, and normal."""
    n, sigma, c, expected = 40_000, 1.7, 0.6, 5.0
    model = model_of(c, a=n)
    optimizer = wrapped(model, noise_multiplier=sigma, expected_batch_size=expected)
    for part in range(micro_batches):
        optimizer.accumulating = part < micro_batches - 1
        model.engine.deliver()
        optimizer.step()
        optimizer.zero_grad()
    update = -model.a.detach().double() / (sigma * c / expected)
    assert abs(update.var().item() - 1) < 4 * math.sqrt(2 / n)
    assert stats.kstest(update.numpy(), "norm").pvalue > 1e-3
    assert optimizer.logical_step == 1


@pytest.mark.parametrize("zero_first", [True, False])
def test_sums_of_the_physical_batches_of_a_step_add_up_in_either_order_of_zero_grad(zero_first):
    model = model_of(a=3)
    optimizer = wrapped(model, noise_multiplier=0.0)
    for accumulating in (False, True, True, False, True, False):
        optimizer.accumulating = accumulating
        if zero_first:
            optimizer.zero_grad()
        model.engine.deliver(a=torch.ones(3))
        optimizer.step()
        if not zero_first:
            optimizer.zero_grad()
    assert optimizer.logical_step == 3
    assert torch.equal(-model.a.detach() * 4, torch.full((3,), 6.0))


def test_the_private_gradient_is_sum_plus_noise_over_expected_batch_size():
    model = model_of(2.0)
    seen = []
    optimizer = wrapped(model, noise_multiplier=0.5, seed=7)
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(gradients(model)))
    sums = {"a": torch.arange(6.0), "b": torch.ones(4)}
    for step in range(2):
        one_step(model, optimizer, **{k: v.clone() for k, v in sums.items()})
        for index, (name, got) in enumerate(zip(sums, seen[step], strict=True)):
            noise = gaussian(7, step=step, parameter=index, numel=got.numel())
            torch.testing.assert_close(got, (sums[name] + 0.5 * 2.0 * noise) / 4.0)


def test_a_parameter_without_a_gradient_gets_noise():
    model = model_of()
    optimizer = wrapped(model)
    model.engine.ledger.deliver([("a", torch.zeros(6))], graph_task=-1)
    assert model.b.grad is None
    optimizer.step()
    assert model.b.detach().count_nonzero() == 4
    torch.testing.assert_close(model.b.detach(), -gaussian(0, step=0, parameter=1, numel=4) / 4)


def test_frozen_parameters_get_nothing_and_keep_the_index_of_the_others():
    model = model_of()
    model.a.requires_grad_(False)
    one_step(model, wrapped(model, torch.optim.SGD([model.b], lr=1.0)))
    assert model.a.detach().count_nonzero() == 0
    torch.testing.assert_close(model.b.detach(), -gaussian(0, step=0, parameter=1, numel=4) / 4)


def test_narrow_parameters_get_noise_in_float32_before_the_cast():
    model = PrivateModel(a=torch.zeros(50, dtype=torch.bfloat16))
    optimizer = wrapped(model)
    total = torch.linspace(0, 1, 50)
    model.engine.deliver(a=total.clone())
    optimizer.step()
    expected = ((total + gaussian(0, step=0, parameter=0, numel=50)) / 4).to(torch.bfloat16)
    assert model.a.grad is not None and model.a.grad.dtype == torch.bfloat16
    assert torch.equal(model.a.grad, expected)


def test_wide_parameters_keep_their_width():
    model = PrivateModel(a=torch.zeros(50, dtype=torch.float64))
    optimizer = wrapped(model)
    model.engine.ledger.deliver([("a", torch.zeros(50, dtype=torch.float64))], graph_task=-1)
    optimizer.step()
    noise = gaussian(0, step=0, parameter=0, numel=50, dtype=torch.float64)
    torch.testing.assert_close(model.a.detach(), -noise / 4, rtol=1e-12, atol=0)


def test_no_noise_multiplier_no_noise():
    model = model_of()
    one_step(model, wrapped(model, noise_multiplier=0), a=torch.full((6,), 8.0))
    assert torch.equal(model.a.detach(), torch.full((6,), -2.0)) and model.b.detach().count_nonzero() == 0


@pytest.mark.parametrize("secure", [False, True])
def test_seeds_and_generators_give_different_noise_and_equal_ones_the_same(secure):
    def update(seed: int, secure: bool) -> torch.Tensor:
        model = model_of(a=100)
        one_step(model, wrapped(model, seed=seed, secure=secure))
        return model.a.detach()

    assert torch.equal(update(3, secure), update(3, secure))
    assert not torch.equal(update(3, secure), update(4, secure))
    assert not torch.equal(update(3, secure), update(3, not secure))


def test_without_a_seed_every_optimizer_has_its_own():
    model = model_of()
    assert wrapped(model, seed=None).seed != wrapped(model, seed=None).seed
    assert max(wrapped(model, seed=None, secure=True).seed for _ in range(8)) >= 2**64


def test_the_arithmetic_of_a_step_is_traced_whole():
    def draw(a: torch.Tensor, b: torch.Tensor) -> None:
        privatize_([a, b], parameters=[0, 1], std=2.0, expected_batch_size=4.0, seed=1, step=2)

    eager, traced = (torch.ones(7), torch.ones(2, 3)), (torch.ones(7), torch.ones(2, 3))
    draw(*eager)
    torch.compile(draw, backend="eager", fullgraph=True)(*traced)
    assert all(map(torch.equal, eager, traced))


# ---- a torch optimizer


def test_it_is_an_optimizer_and_shares_the_inner_ones_live_objects():
    model = model_of()
    inner = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer = wrapped(model, inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    one_step(model, optimizer)
    inner.load_state_dict(inner.state_dict())
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    assert "noise_multiplier=1.0" in repr(optimizer) and "Adam" in repr(optimizer)


def test_the_seed_is_not_printed():
    assert "987654321" not in repr(wrapped(model_of(), seed=987654321))


def test_learning_rate_schedulers_work():
    model = model_of()
    optimizer = wrapped(model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), noise_multiplier=0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(3):
        one_step(model, optimizer)
        scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.125
    onecycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    one_step(model, optimizer)
    onecycle.step()


def test_closures_run_once_with_gradients_on_and_their_value_is_returned():
    model = model_of()
    optimizer = wrapped(model)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        model.engine.deliver()
        return 1.5

    assert optimizer.step(closure) == 1.5
    optimizer.accumulating = True
    assert optimizer.step(closure) == 1.5
    assert calls == [True, True] and optimizer.logical_step == 1


def test_step_hooks_run_once_per_logical_step():
    model = model_of()
    optimizer = wrapped(model)
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, a, k: calls.append(("pre", o is optimizer))),
        optimizer.register_step_post_hook(lambda o, a, k: calls.append(("post", o is optimizer))),
    ]
    for accumulating in (True, False):
        optimizer.accumulating = accumulating
        model.engine.deliver()
        optimizer.step()
    assert calls == [("pre", True), ("post", True)]
    for handle in handles:
        handle.remove()
    optimizer.zero_grad()
    one_step(model, optimizer)
    assert len(calls) == 2


def test_state_dict_hooks_run():
    model, calls = model_of(), []
    optimizer = wrapped(model)
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, s: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda o, s: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "saved", "load", "loaded"]


def test_groups_can_be_added():
    model = model_of()
    model.b.requires_grad_(False)
    optimizer = wrapped(model, torch.optim.SGD([model.a], lr=1.0))
    model.b.requires_grad_(True)
    with pytest.raises(PrivacyError, match=r"the optimizer does not hold: 'b'.*\n.*add_param_group"):
        optimizer.step()
    optimizer.add_param_group({"params": [model.b], "lr": 0.5})
    one_step(model, optimizer)
    assert model.b.detach().count_nonzero() == 4
    with pytest.raises(PrivacyError, match="1 parameter.s. that the model does not hold"):
        optimizer.add_param_group({"params": torch.nn.Parameter(torch.zeros(2))})


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_starts_anew(set_to_none):
    model = model_of()
    optimizer = wrapped(model, noise_multiplier=0)
    model.engine.deliver(a=torch.ones(6))
    optimizer.zero_grad(set_to_none=set_to_none)
    one_step(model, optimizer, b=torch.ones(4))
    assert model.a.detach().count_nonzero() == 0 and model.b.detach().count_nonzero() == 4


def test_an_unfinished_step_can_be_discarded():
    model = model_of()
    optimizer = wrapped(model, noise_multiplier=0)
    optimizer.accumulating = True
    model.engine.deliver(a=torch.ones(6))
    optimizer.step()
    optimizer.discard()
    optimizer.accumulating = False
    one_step(model, optimizer)
    assert model.a.detach().count_nonzero() == 0


# ---- saving and resuming


def test_a_resumed_run_goes_on_as_the_uninterrupted_one():
    def run(steps: int, state=None):
        model = model_of()
        inner = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        accountant = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1)
        optimizer = wrapped(model, inner, seed=5 if state is None else None, accountant=accountant)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        for _ in range(steps):
            one_step(model, optimizer)
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        return model, optimizer, torch.load(file, weights_only=True)

    whole, _, _ = run(5)
    _, first, saved = run(2)
    assert (saved[1]["dpcompile"]["logical_step"], saved[1]["dpcompile"]["seed"]) == (2, 5)
    resumed, second, _ = run(3, saved)
    assert torch.equal(whole.a, resumed.a)
    assert first.accountant is not None and second.accountant is not None
    assert (first.accountant.steps, second.accountant.steps, second.logical_step, second.seed) == (2, 5, 5, 5)


def test_a_foreign_state_dict_is_refused():
    model = model_of()
    optimizer = wrapped(model)
    with pytest.raises(PrivacyError, match=r"no 'dpcompile' entry.*\n.*DPOptimizer.state_dict"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=1.0).state_dict())


def test_a_state_behind_of_the_same_seed_is_refused_and_of_another_accepted():
    model = model_of()
    optimizer = wrapped(model)
    early = optimizer.state_dict()
    one_step(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(PrivacyError, match=r"stands at logical step 0, this optimizer at 1 of the same seed"):
        optimizer.load_state_dict(early)
    other = wrapped(model, seed=1)
    optimizer.load_state_dict(other.state_dict())
    assert (optimizer.seed, optimizer.logical_step) == (1, 0)


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 2.0}, {"expected_batch_size": 5.0}, {"secure": True}], ids=lambda c: next(iter(c))
)
def test_a_state_of_another_mechanism_is_refused(change):
    model = model_of()
    with pytest.raises(PrivacyError, match=rf"{next(iter(change))} was .* in the saved run and is .* here"):
        wrapped(model, **change).load_state_dict(wrapped(model).state_dict())


def test_steps_the_accountant_does_not_know_of_are_refused():
    model = model_of()
    without = wrapped(model)
    one_step(model, without)
    accountant = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(PrivacyError, match="1 steps without an accountant"):
        wrapped(model, accountant=accountant).load_state_dict(without.state_dict())


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(duplicate):
    with pytest.raises(PrivacyError, match=r"cannot be copied or pickled.*\n.*state_dict"):
        duplicate(wrapped(model_of()))


# ---- accounting


def test_the_accountant_counts_logical_steps():
    model = model_of()
    accountant = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1)
    optimizer = wrapped(model, accountant=accountant)
    for accumulating in (True, False, False):
        optimizer.accumulating = accumulating
        model.engine.deliver()
        optimizer.step()
        optimizer.zero_grad()
    assert accountant.steps == optimizer.logical_step == 2


def test_an_accountant_of_other_noise_is_refused():
    model = model_of()
    accountant = PrivacyAccountant(noise_multiplier=2.0, sample_rate=0.1)
    with pytest.raises(PrivacyError, match="noise of multiplier 1.0, its accountant counts 2.0"):
        wrapped(model, accountant=accountant)
    optimizer = wrapped(model, noise_multiplier=2.0, accountant=accountant)
    optimizer.noise_multiplier = 1.0
    model.engine.deliver()
    with pytest.raises(PrivacyError, match="noise of multiplier 1.0, its accountant counts 2.0"):
        optimizer.step()


def test_a_step_that_fails_half_way_has_used_its_noise(monkeypatch):
    model = model_of()
    accountant = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1)
    optimizer = wrapped(model, accountant=accountant)
    model.engine.deliver()
    with monkeypatch.context() as patch:
        patch.setattr(optimizer.optimizer, "step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    assert optimizer.logical_step == accountant.steps == 1
    with pytest.raises(PrivacyError, match="did not come out of the clipped backward"):
        optimizer.step()
    optimizer.zero_grad()
    one_step(model, optimizer)
    torch.testing.assert_close(model.a.detach(), -gaussian(0, step=1, parameter=0, numel=6) / 4)


# ---- refusals


@pytest.mark.parametrize("sigma", [-1.0, math.inf, math.nan])
def test_a_noise_multiplier_without_sense_is_refused(sigma):
    with pytest.raises(PrivacyError, match="noise_multiplier is"):
        wrapped(model_of(), noise_multiplier=sigma)


@pytest.mark.parametrize("size", [0, -4, math.inf, math.nan])
def test_an_expected_batch_size_without_sense_is_refused(size):
    with pytest.raises(PrivacyError, match="expected_batch_size is"):
        wrapped(model_of(), expected_batch_size=size)


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(PrivacyError, match="the seed"):
        wrapped(model_of(), seed=-1)


def test_foreign_parameters_are_refused():
    model = model_of()
    inner = torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.zeros(3, 2))], lr=1.0)
    with pytest.raises(PrivacyError, match=r"1 parameter\(s\) that the model does not hold, of shape \(3, 2\)"):
        wrapped(model, inner)


def test_missing_trainable_parameters_are_named():
    model = model_of()
    with pytest.raises(PrivacyError, match=r"the optimizer does not hold: 'b'.*\n.*requires_grad_\(False\)"):
        wrapped(model, torch.optim.SGD([model.a], lr=1.0))


def test_complex_parameters_are_refused():
    model = PrivateModel(w=torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(PrivacyError, match="trainable parameter 'w' is complex"):
        wrapped(model)


def test_an_ordinary_model_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(PrivacyError, match="Linear is not a dpcompile model"):
        DPOptimizer(torch.optim.SGD(model.parameters()), model, noise_multiplier=1, expected_batch_size=1)


def test_wrapping_twice_is_refused():
    model = model_of()
    with pytest.raises(PrivacyError, match="is a DPOptimizer already"):
        wrapped(model, wrapped(model))


def test_an_optimizer_that_needs_a_closure_is_refused():
    model = model_of()
    with pytest.raises(PrivacyError, match="LBFGS evaluates the loss several times"):
        wrapped(model, torch.optim.LBFGS(model.parameters()))


def test_a_frozen_parameter_with_a_gradient_is_refused():
    model = model_of()
    optimizer = wrapped(model)
    one_step(model, optimizer)
    model.a.requires_grad_(False).grad = torch.ones(6)
    model.engine.deliver()
    with pytest.raises(PrivacyError, match="the frozen parameter 'a' has a gradient"):
        optimizer.step()


def test_gradients_that_bypassed_clipping_are_refused():
    model = model_of()
    optimizer = wrapped(model)
    model.engine.deliver()
    (model.a.sum() + model.b.sum()).backward()
    before = model.a.detach().clone()
    with pytest.raises(PrivacyError, match="'a' did not come out of the clipped backward alone"):
        optimizer.step()
    assert torch.equal(before, model.a.detach()) and optimizer.logical_step == 0


def test_two_steps_on_the_same_gradients_are_refused():
    model = model_of()
    optimizer = wrapped(model)
    model.engine.deliver()
    optimizer.step()
    with pytest.raises(PrivacyError, match="a second optimizer step on the same gradients"):
        optimizer.step()


def test_a_step_without_a_backward_is_refused():
    with pytest.raises(PrivacyError, match="without a clipped backward"):
        wrapped(model_of()).step()


# ---- what may not change under it


def counted(rate: float = 0.1, steps: int = 0, sigma: float = 1.0) -> PrivacyAccountant:
    accountant = PrivacyAccountant(noise_multiplier=sigma, sample_rate=rate)
    accountant.step(steps)
    return accountant


class Loader:
    """What an optimizer sees of a loader."""

    def __init__(self, seed: int = 3, sample_rate: float = 0.1) -> None:
        self.seed, self.sample_rate, self.from_size, self.secure = seed, sample_rate, True, False
        self.bands = 1


@pytest.mark.parametrize("where", ["model", "inner", "by hand"])
def test_zero_grad_of_others_within_a_step_keeps_the_sums(where):
    model = model_of(a=3)
    optimizer = wrapped(model, noise_multiplier=0.0)
    for accumulating in (True, True, False):
        optimizer.accumulating = accumulating
        if where == "model":
            model.zero_grad()
        elif where == "inner":
            optimizer.optimizer.zero_grad()
        else:
            model.a.grad = None
        model.engine.deliver(a=torch.ones(3))
        if accumulating and where == "model":
            continue  # whether or not step() is called in between
        optimizer.step()
    assert torch.equal(-model.a.detach() * 4, torch.full((3,), 3.0))


def test_zeroing_in_place_within_a_step_is_refused_and_after_it_is_not():
    model = model_of(a=3)
    optimizer = wrapped(model, noise_multiplier=0.0)
    model.engine.deliver(a=torch.ones(3))
    optimizer.step()
    model.zero_grad(set_to_none=False)
    optimizer.accumulating = True
    model.engine.deliver(a=torch.ones(3))
    optimizer.accumulating = False
    model.zero_grad(set_to_none=False)
    with pytest.raises(PrivacyError, match=r"zero_grad\(\) within a logical step.*\n.*DPOptimizer"):
        model.engine.deliver(a=torch.ones(3))


def test_a_group_added_to_the_inner_optimizer_is_refused():
    model = model_of()
    optimizer = wrapped(model)
    optimizer.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    model.engine.deliver()
    with pytest.raises(PrivacyError, match="1 parameter.s. that the model does not hold"):
        optimizer.step()


def test_a_parameter_in_two_groups_is_refused():
    model = model_of()
    optimizer = wrapped(model)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [model.b]})
    model.engine.deliver()
    with pytest.raises(PrivacyError, match="parameter 'b' is in two groups"):
        optimizer.step()


def test_inner_optimizer_and_step_count_cannot_be_assigned():
    optimizer = wrapped(model_of())
    for name in ("optimizer", "logical_step"):
        with pytest.raises(AttributeError):
            setattr(optimizer, name, 0)


def test_numbers_without_sense_are_refused_when_assigned_too():
    model = model_of()
    optimizer = wrapped(model)
    model.engine.deliver()
    optimizer.noise_multiplier = math.nan
    with pytest.raises(PrivacyError, match="noise_multiplier is nan"):
        optimizer.step()
    optimizer.noise_multiplier, optimizer.expected_batch_size = 1.0, 0
    with pytest.raises(PrivacyError, match="expected_batch_size is 0"):
        optimizer.step()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (None, "was taken away"),
        (counted(rate=0.01, steps=1), "another accountant, of sample rate 0.01"),
        (counted(), "another accountant, of sample rate 0.1 and 0 steps"),
    ],
)
def test_another_accountant_is_refused(other, said):
    model = model_of()
    optimizer = wrapped(model, accountant=counted())
    one_step(model, optimizer)
    with pytest.raises(PrivacyError, match=said):
        optimizer.accountant = other
    optimizer.accountant = counted(steps=1)
    one_step(model, optimizer)
    assert optimizer.accountant.steps == 2


@pytest.mark.parametrize("history", [[], [(9.0, 0.001, 1)], [(9.0, 0.001, 7)]])
def test_an_accountant_that_forgets_is_refused(history):
    model = model_of()
    optimizer = wrapped(model, accountant=counted())
    one_step(model, optimizer)
    assert optimizer.accountant is not None
    own = optimizer.accountant.history
    optimizer.accountant.load_state_dict({"history": history})
    model.engine.deliver()
    with pytest.raises(PrivacyError, match="counts 0 steps of noise multiplier .* and sample rate .*, and counted 1"):
        optimizer.step()
    optimizer.accountant.load_state_dict({"history": [*history, *own]})
    optimizer.step()


def test_an_accountant_given_later_must_know_the_steps_and_the_rate_of_the_loader():
    model, loader = model_of(), Loader()
    optimizer = wrapped(model)
    optimizer.fed_by(loader)
    one_step(model, optimizer)
    with pytest.raises(PrivacyError, match="and 0 steps, in place of"):
        optimizer.accountant = counted()
    optimizer.accountant = counted(rate=0.01, steps=1)
    model.engine.deliver()
    with pytest.raises(PrivacyError, match="the loader samples at rate 0.1, the accountant assumes 0.01"):
        optimizer.step()


def test_a_step_on_the_draws_of_another_optimizer_is_refused():
    model, loader = model_of(), Loader()
    first, second = wrapped(model, seed=None), wrapped(model, seed=None)
    first.fed_by(loader)
    model.engine.deliver()
    with pytest.raises(PrivacyError, match=r"attached to another DPOptimizer.*\n.*loader.attach"):
        second.step()
    second.fed_by(loader)
    second.step()
    second.zero_grad()
    del loader
    one_step(model, first)


def test_a_state_without_that_of_the_loader_is_refused_at_the_step():
    model, loader = model_of(), Loader()
    optimizer = wrapped(model)
    optimizer.fed_by(loader)
    for draw in range(3):
        model.engine.feed.draws.last = draw
        one_step(model, optimizer)
    state = optimizer.state_dict()
    for seed, draw, refused in ((3, 2, True), (3, 3, False), (4, 0, False)):
        model, loader = model_of(), Loader(seed)
        optimizer = wrapped(model)
        optimizer.fed_by(loader)
        optimizer.load_state_dict(copy.deepcopy(state))
        model.engine.feed.draws.last = draw
        model.engine.deliver()
        if refused:
            with pytest.raises(PrivacyError, match=r"saved after draw 2 .*this is draw 2.*\n.*loader.load_state_dict"):
                optimizer.step()
        else:
            optimizer.step()


def test_a_state_of_another_run_after_counted_steps_is_refused():
    model = model_of()
    optimizer = wrapped(model, accountant=counted())
    one_step(model, optimizer)
    other = wrapped(model_of(), seed=9, accountant=counted())
    with pytest.raises(PrivacyError, match=r"has taken 1 steps, and the state is of another run.*\n.*new DPOptimizer"):
        optimizer.load_state_dict(other.state_dict())


def test_a_state_that_lacks_entries_is_refused():
    optimizer = wrapped(model_of())
    state = optimizer.state_dict()
    del state["dpcompile"]["seed"]
    with pytest.raises(PrivacyError, match="the DPOptimizer's state lacks 'seed'"):
        optimizer.load_state_dict(state)


def test_one_seed_in_two_optimizers_is_told_once():
    first, second = model_of(), model_of()
    one, two = (wrapped(m, seed=123456789) for m in (first, second))
    one_step(first, one)
    with pytest.warns(PrivacyWarning, match="two DPOptimizers of one seed: the noise of logical step 0"):
        one_step(second, two)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(second, two)
        one_step(first, one)


# ---- several optimizers


def several(model: PrivateModel) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([model.a], lr=1.0, momentum=0.5), torch.optim.Adam([model.b], lr=0.1)]


def test_several_optimizers_step_on_one_private_gradient():
    model, plain = model_of(), model_of()
    optimizer = wrapped(model, several(model), noise_multiplier=0.0)
    assert len(optimizer.param_groups) == 2
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    ordinary = several(plain)
    for _ in range(3):
        one_step(model, optimizer, a=torch.ones(6), b=torch.arange(4.0))
        scheduler.step()
        plain.a.grad, plain.b.grad = torch.ones(6) / 4, torch.arange(4.0) / 4
        for part in ordinary:
            part.step()
            part.param_groups[0]["lr"] *= 0.5
    assert torch.equal(model.a, plain.a) and torch.equal(model.b, plain.b)
    with pytest.raises(PrivacyError, match="the wrapped optimizer was stepped directly"):
        optimizer.optimizer.parts[1].step()  # type: ignore[attr-defined]


def test_several_optimizers_are_resumed():
    model = model_of()
    optimizer = wrapped(model, several(model))
    one_step(model, optimizer, a=torch.ones(6))
    twin = model_of()
    twin.load_state_dict(model.state_dict())
    resumed = wrapped(twin, several(twin))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, resumed)):
        one_step(m, o, a=torch.ones(6))
    assert torch.equal(model.a, twin.a) and torch.equal(model.b, twin.b)
    with pytest.raises(ValueError, match="other parameter groups"):
        resumed.optimizer.load_state_dict(torch.optim.SGD(twin.parameters()).state_dict())


def test_what_is_no_optimizer_or_leaves_parameters_out_is_refused():
    model = model_of()
    for given in ([], [model.a], model):
        with pytest.raises(PrivacyError, match=r"the optimizer is a .*\n.*or a list of them"):
            DPOptimizer(given, model, noise_multiplier=1.0, expected_batch_size=4)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match=r"does not hold: 'b'.*\n.*DPOptimizer\(\[first, second\]"):
        wrapped(model, several(model)[0])
    with pytest.raises(PrivacyError, match="parameter 'a' is in two groups"):
        wrapped(model, [*several(model), torch.optim.SGD([model.a])])
    with pytest.raises(PrivacyError, match=r"added to several optimizers at once"):
        wrapped(model, several(model)).add_param_group({"params": [model.a]})
    with pytest.raises(PrivacyError, match="LBFGS evaluates"):
        wrapped(model, [torch.optim.SGD([model.a]), torch.optim.LBFGS([model.b])])
