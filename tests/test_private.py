"""``make_private`` on real compiled models: the loop, the sums, the accounting, the refusals."""

from __future__ import annotations

import gc
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from dpcompile import compile_step, dp_compile
from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.accounting.calibration import calibrate_noise
from dpcompile.accounting.events import rounds
from dpcompile.data.cyclic import deal
from dpcompile.data.loader import PoissonLoader
from dpcompile.data.sampling import poisson_draw
from dpcompile.errors import PrivacyError
from dpcompile.module import engine_of
from dpcompile.noise.banded import BandedMechanism
from dpcompile.noise.mechanism import GaussianMechanism
from dpcompile.noise.normal import gaussian
from dpcompile.noise.strategy import optimal_coefficients
from dpcompile.optim.optimizer import DPOptimizer
from dpcompile.private import make_private

N = 40


def parts(batch_size: int = 8, **loader_options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    dataset = TensorDataset(torch.randn(N, 4), torch.randint(0, 3, (N,)))
    return model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(dataset, batch_size, **loader_options)


def private(noise_multiplier: float | None = 1.0, **options) -> Any:
    options = {"noise_multiplier": noise_multiplier, "seed": 3, "backend": "eager", **options}
    return make_private(*parts(), **options)


def accountant_of(optimizer: DPOptimizer) -> PrivacyAccountant:
    assert isinstance(optimizer.accountant, PrivacyAccountant)
    return optimizer.accountant


def epoch(model, optimizer, loader, n: int = 10**9) -> None:
    for i, (x, y) in enumerate(loader):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if i + 1 == n:
            break


def by_hand(steps: int, c: float, sigma: float, seed: int, draw_seed: int) -> nn.Module:
    """The same training, one example at a time."""
    model, optimizer, loader = parts()
    xs, ys = loader.dataset.tensors  # type: ignore[attr-defined]
    params = list(model.parameters())
    for step in range(steps):
        total = [torch.zeros_like(p) for p in params]
        for i in poisson_draw(draw_seed, step=step, size=N, sample_rate=8 / N):
            grads = torch.autograd.grad(nn.functional.cross_entropy(model(xs[i : i + 1]), ys[i : i + 1]), params)
            norm = torch.sqrt(sum((g**2).sum() for g in grads))  # type: ignore[arg-type]
            for t, g in zip(total, grads, strict=True):
                t += g * torch.clamp(c / norm, max=1.0)
        for k, (p, t) in enumerate(zip(params, total, strict=True)):
            noise = gaussian(seed, step=step, parameter=k, numel=p.numel()).view(p.shape)
            p.grad = (t + sigma * c * noise) / 8
        optimizer.step()
    return model


@pytest.mark.parametrize("physical", [3, 7, N])
def test_the_ordinary_loop_is_dp_sgd(physical):
    """Padding, masks, several physical batches: the parameters are those of the textbook algorithm."""
    c, sigma = 0.3, 0.7
    model, optimizer, loader = private(sigma, max_grad_norm=c, physical_batch_size=physical)
    for _ in range(2):
        epoch(model, optimizer, loader)
    expected = by_hand(10, c, sigma, seed=3, draw_seed=3)
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert optimizer.logical_step == loader.step == accountant_of(optimizer).steps == 10


def test_an_empty_draw_is_a_step_of_noise():
    model, optimizer, _ = parts()
    dataset = TensorDataset(torch.randn(N, 4), torch.randint(0, 3, (N,)))
    empty = PoissonLoader(dataset, expected_batch_size=1e-6, physical_batch_size=4, steps=1, seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    private_model, private_optimizer, loader = make_private(
        model, optimizer, empty, noise_multiplier=1e-6, seed=1, backend="eager"
    )
    epoch(private_model, private_optimizer, loader)
    for k, (p, old) in enumerate(zip(private_model.parameters(), before, strict=True)):
        noise = gaussian(1, step=0, parameter=k, numel=p.numel()).view(p.shape)
        torch.testing.assert_close(p.detach(), old - 0.5 * noise, rtol=1e-4, atol=1e-6)


def test_everything_fits_together():
    model, optimizer, loader = private(1.5, accountant="rdp", secure=True, max_grad_norm=0.5)
    assert engine_of(model).max_grad_norm == 0.5 and optimizer.engine is engine_of(model)
    assert optimizer.expected_batch_size == loader.expected_batch_size == 8
    accountant = accountant_of(optimizer)
    assert accountant.method == "rdp" and accountant.sample_rate == loader.sample_rate
    assert (optimizer.secure, loader.secure, optimizer.seed, loader.seed) == (True, True, 3, 3)
    assert accountant.epsilon(1e-5) == 0.0
    epoch(model, optimizer, loader)
    direct = PrivacyAccountant(noise_multiplier=1.5, sample_rate=0.2, method="rdp")
    direct.step(5)
    assert accountant.epsilon(1e-5) == direct.epsilon(1e-5)


def test_seeds_are_fresh_and_shared_by_noise_and_draws():
    one, two = private(seed=None), private(seed=None)
    assert one[1].seed == one[2].seed != two[1].seed == two[2].seed


def test_a_loader_used_twice_does_not_share_the_noise():
    _, _, plain = parts()
    loader = PoissonLoader.from_dataloader(plain, seed=0)
    seeds = [make_private(*parts()[:2], loader, noise_multiplier=1.0, backend="eager")[1].seed for _ in range(2)]
    assert len({*seeds, 0}) == 3


@pytest.mark.parametrize("length", [{"epochs": 2}, {"steps": 10}])
def test_a_target_is_met_at_the_end(length):
    _, optimizer, loader = private(None, target_epsilon=3.0, target_delta=1e-4, accountant="rdp", **length)
    expected = calibrate_noise(target_epsilon=3.0, target_delta=1e-4, sample_rate=0.2, steps=10, method="rdp")
    assert optimizer.noise_multiplier == expected and len(loader) == 5
    accountant_of(optimizer).step(10)
    assert 2.99 < accountant_of(optimizer).epsilon(1e-4) <= 3.0


@pytest.mark.filterwarnings("ignore:all .* planned steps are taken")
def test_more_steps_than_a_target_was_calibrated_for_are_refused():
    target = {"target_epsilon": 3.0, "target_delta": 1e-4, "epochs": 1, "accountant": "rdp"}
    for whole in (False, True):
        model, optimizer, loader = private(None, **target)
        step = compile_step(model, nn.functional.cross_entropy, optimizer)
        epoch(model, optimizer, loader)
        with pytest.raises(PrivacyError, match="step 6 of a run whose noise is calibrated for 5"):
            for x, y in loader:
                if whole:
                    step(x, y)
                else:
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()
        assert accountant_of(optimizer).steps == 5


def test_a_resumed_run_knows_how_many_steps_are_left():
    target = {"target_epsilon": 3.0, "target_delta": 1e-4, "steps": 7, "accountant": "rdp"}
    first = private(None, **target)
    epoch(*first)
    second = private(None, **target)
    for part, saved in zip(second, first, strict=True):
        part.load_state_dict(saved.state_dict())
    with pytest.raises(PrivacyError, match="step 8 of a run whose noise is calibrated for 7"):
        epoch(*second)


@pytest.mark.filterwarnings("error")
def test_more_steps_may_be_asked_for():
    target = {"target_epsilon": 3.0, "target_delta": 1e-4, "epochs": 1, "accountant": "rdp"}
    model, optimizer, loader = private(None, **target, on_exceed="warn", seed=None)
    epoch(model, optimizer, loader)
    with pytest.warns(RuntimeWarning, match="epsilon is above the target; report what the accountant says"):
        epoch(model, optimizer, loader)
    epoch(model, optimizer, loader)
    model, optimizer, loader = private(None, **target, on_exceed="ignore", seed=None)
    for _ in range(2):
        epoch(model, optimizer, loader)
    assert accountant_of(optimizer).steps == 10
    with pytest.raises(PrivacyError, match="on_exceed is 'log'"):
        private(None, **target, on_exceed="log")


def test_no_noise_is_infinite_epsilon():
    model, optimizer, loader = private(0.0)
    epoch(model, optimizer, loader, n=1)
    assert accountant_of(optimizer).epsilon(1e-5) == math.inf


def test_training_resumes_as_if_uninterrupted():
    def run(*passes: int, states=None):
        model, optimizer, loader = private(seed=3 if states is None else None, physical_batch_size=N)
        if states is not None:
            for part, state in zip((model, optimizer, loader), states, strict=True):
                part.load_state_dict(state)
        for n in passes:
            epoch(model, optimizer, loader, n)
        return model, optimizer, loader

    whole = run(10**9, 10**9)
    first = run(10**9, 2)
    second = run(10**9, states=[part.state_dict() for part in first])
    for got, want in zip(second[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(got, want)
    assert accountant_of(second[1]).steps == second[2].step == 10


def test_a_compiled_model_is_kept():
    plain, optimizer, loader = parts()
    compiled = dp_compile(plain, max_grad_norm=0.25, backend="eager")
    model, private_optimizer, _ = make_private(compiled, optimizer, loader, noise_multiplier=1.0)
    assert model is compiled and private_optimizer.engine.max_grad_norm == 0.25
    model, _, _ = make_private(compiled, optimizer, loader, noise_multiplier=1.0, max_grad_norm=0.25)
    assert model is compiled
    with pytest.raises(PrivacyError, match="compiled already with max_grad_norm=0.25, not 1.0"):
        make_private(compiled, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0)
    with pytest.raises(PrivacyError, match="these options come too late: backend, norm"):
        make_private(compiled, optimizer, loader, noise_multiplier=1.0, norm="ghost", backend="eager")


def test_an_undecorated_backward_is_refused():
    plain, inner, data_loader = parts()
    model, optimizer, loader = make_private(plain, inner, data_loader, noise_multiplier=1.0, backend="eager")
    x, y = next(iter(loader))
    nn.functional.cross_entropy(plain(x), y).backward()
    with pytest.raises(PrivacyError, match="did not come out of the clipped backward"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither of noise_multiplier and target_epsilon given"),
        ({"noise_multiplier": 1.0, "target_epsilon": 3.0}, "both of noise_multiplier and target_epsilon given"),
        ({"target_epsilon": 3.0, "epochs": 1}, "target_epsilon without target_delta"),
        ({"target_epsilon": 3.0, "target_delta": 1e-5}, "neither of epochs and steps"),
        ({"target_epsilon": 3.0, "target_delta": 1e-5, "epochs": 1, "steps": 2}, "both of epochs and steps"),
        ({"target_epsilon": 3.0, "target_delta": 1e-5, "epochs": 0}, "epochs is 0"),
        ({"target_epsilon": 3.0, "target_delta": 1e-5, "steps": 1.5}, "steps is 1.5"),
        ({"target_epsilon": -3.0, "target_delta": 1e-5, "epochs": 1}, "target_epsilon is -3.0"),
        ({"target_epsilon": 3.0, "target_delta": 1.0, "epochs": 1}, "delta is 1.0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0"),
        ({"noise_multiplier": 1.0, "max_grad_norm": 0.0}, "max_grad_norm"),
        ({"noise_multiplier": 1.0, "physical_batch_size": 0}, "physical_batch_size is 0"),
        ({"noise_multiplier": 1.0, "accountant": "gdp"}, "accounting method 'gdp' is not known"),
    ],
)
def test_requests_without_sense_are_refused(options, message):
    with pytest.raises(PrivacyError, match=message):
        make_private(*parts(), backend="eager", **options)


def test_parts_that_do_not_fit_are_refused():
    model, optimizer, loader = parts()
    with pytest.raises(PrivacyError, match="sampler is SubsetRandomSampler"):
        make_private(*parts(sampler=SubsetRandomSampler(range(9))), noise_multiplier=1.0, backend="eager")
    poisson = PoissonLoader.from_dataloader(loader, physical_batch_size=4)
    with pytest.raises(PrivacyError, match="physical_batch_size is 5, and the PoissonLoader has 4"):
        make_private(model, optimizer, poisson, noise_multiplier=1.0, physical_batch_size=5, backend="eager")
    _, wrapped, _ = private()
    assert isinstance(wrapped, DPOptimizer)
    with pytest.raises(PrivacyError, match="is a DPOptimizer already"):
        make_private(model, wrapped, loader, noise_multiplier=1.0, backend="eager")


@pytest.mark.parametrize("how", ["the DataLoader of before", "its dataset", "all of it", "a cycle"])
def test_batches_that_are_no_draws_are_refused(how):
    plain, inner, before = parts()
    model, optimizer, loader = make_private(plain, inner, before, noise_multiplier=1.0, backend="eager")
    batches: Any = {
        "the DataLoader of before": before,
        "its dataset": DataLoader(loader.dataset, 16),
        "all of it": [before.dataset.tensors],  # type: ignore[attr-defined]
        "a cycle": itertools.cycle(loader),
    }[how]
    with pytest.raises(PrivacyError, match="a backward on what is no batch of the loader, or on one a second time"):
        epoch(model, optimizer, batches)


def test_all_of_the_data_in_the_place_of_a_draw_are_refused():
    model, optimizer, loader = private()
    with pytest.raises(PrivacyError, match="has 16 rows, and the model was called with 40"):
        for _ in loader:
            model(loader.dataset.tensors[0])


@pytest.mark.parametrize("how", ["itself", "its class", "a scaler"])
def test_the_optimizer_of_before_is_refused(how):
    plain, inner, before = parts()
    model, optimizer, loader = make_private(plain, inner, before, noise_multiplier=1.0, backend="eager")
    scaler = torch.amp.GradScaler("cpu")
    step = {
        "itself": inner.step,
        "its class": lambda: torch.optim.SGD.step(inner),
        "a scaler": lambda: scaler.step(inner),
    }
    x, y = next(iter(loader))
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    weights = [p.detach().clone() for p in plain.parameters()]
    with pytest.raises(PrivacyError, match="its update would have no noise"):
        step[how]()
    assert all(map(torch.equal, weights, plain.parameters()))


def test_the_number_of_examples_drawn_recompiles_nothing():
    model, optimizer, loader = private(physical_batch_size=3)
    torch._dynamo.utils.counters.clear()
    epoch(model, optimizer, loader)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_seeds_do_not_come_from_torchs_generator():
    seeds = []
    for _ in range(2):
        torch.manual_seed(0)
        seeds.append(private(seed=None)[1].seed)
    assert seeds[0] != seeds[1]


@pytest.mark.full
def test_the_relation_is_that_of_calibration_and_accountant() -> None:
    found = {}
    for relation in ("zero_out", "replace_one"):
        target = {"target_epsilon": 3.0, "target_delta": 1e-3, "epochs": 1}
        _, optimizer, loader = private(None, relation=relation, **target)
        counted = accountant_of(optimizer)
        assert counted.relation == relation
        counted.step(len(loader))
        assert 2.9 < counted.epsilon(1e-3) <= 3.0
        found[relation] = optimizer.noise_multiplier
    assert found["replace_one"] > found["zero_out"]


def test_add_remove_takes_a_loader_whose_rate_was_given() -> None:
    with pytest.raises(PrivacyError, match=r"(?s)comes from the size of the dataset.*PoissonLoader both sample_rate="):
        private(relation="add_remove")
    model, optimizer, loader = parts()
    given = PoissonLoader.from_dataloader(loader, sample_rate=0.2, seed=1)
    model, private_optimizer, loader = make_private(
        model, optimizer, given, noise_multiplier=1.0, relation="add_remove", backend="eager"
    )
    epoch(model, private_optimizer, loader)
    counted = accountant_of(private_optimizer)
    assert (counted.relation, counted.sample_rate, counted.steps, loader.expected_batch_size) == (
        "add_remove",
        0.2,
        5,
        8,
    )


# ---- noise that is correlated over steps


def matrix(optimizer: DPOptimizer) -> tuple[float, ...]:
    assert isinstance(optimizer.mechanism, BandedMechanism)
    return optimizer.mechanism.coefficients


def test_bands_by_hand() -> None:
    """Draws from parts by turns, and the noise of the inverse of a dense matrix."""
    sigma, c, bands, steps = 1.5, 0.3, 4, 7
    model, optimizer, loader = private(sigma, max_grad_norm=c, bands=bands, steps=steps)
    epoch(model, optimizer, loader)
    epoch(model, optimizer, loader, steps - len(loader))
    assert optimizer.logical_step == steps
    wanted, inner, plain = parts()
    xs, ys = plain.dataset.tensors  # type: ignore[attr-defined]
    params, members = list(wanted.parameters()), deal(3, size=N, bands=bands)
    coefficients = matrix(optimizer)
    y: list[list[torch.Tensor]] = []
    for step in range(steps):
        z = [gaussian(3, step=step, parameter=k, numel=p.numel()).view(p.shape) for k, p in enumerate(params)]
        for j in range(1, min(bands - 1, step) + 1):
            z = [a - coefficients[j] * b for a, b in zip(z, y[step - j], strict=True)]
        y.append([a / coefficients[0] for a in z])
        part = members[step % bands]
        total = [torch.zeros_like(p) for p in params]
        for place in poisson_draw(3, step=step, size=len(part), sample_rate=8 * bands / N):
            i = int(part[place])
            grads = torch.autograd.grad(nn.functional.cross_entropy(wanted(xs[i : i + 1]), ys[i : i + 1]), params)
            norm = torch.sqrt(sum((g**2).sum() for g in grads))  # type: ignore[arg-type]
            for t, g in zip(total, grads, strict=True):
                t += g * torch.clamp(c / norm, max=1.0)
        for p, t, noise in zip(params, total, y[step], strict=True):
            p.grad = (t + sigma * c * noise) / 8
        inner.step()
    for p, q in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert accountant_of(optimizer).history == [(sigma, 8 * bands / N, rounds(steps, bands))]


def test_bands_of_one_are_what_was() -> None:
    plain, one = private(), private(bands=1)
    assert isinstance(one[1].mechanism, GaussianMechanism)
    for run in (plain, one):
        epoch(*run)
    for p, q in zip(plain[0].parameters(), one[0].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore:all .* planned steps are taken")
def test_bands_for_a_target() -> None:
    target = {"target_epsilon": 3.0, "target_delta": 1e-5, "epochs": 2}
    model, optimizer, loader = private(None, bands=4, **target)
    for _ in range(2):
        epoch(model, optimizer, loader)
    assert 2.9 < accountant_of(optimizer).epsilon(1e-5) <= 3.0
    assert matrix(optimizer) == optimal_coefficients(4, 10)
    with pytest.raises(PrivacyError, match="step 11 of a run whose noise is calibrated for 10"):
        epoch(model, optimizer, loader)
    sigma = optimizer.noise_multiplier
    wanted = {"target_epsilon": 3.0, "target_delta": 1e-5, "sample_rate": loader.sample_rate, "steps": 10}
    assert sigma == calibrate_noise(**wanted, bands=4)


def test_bands_of_the_loader() -> None:
    model, inner, plain = parts()
    loader = PoissonLoader.from_dataloader(plain, bands=4)
    with pytest.raises(PrivacyError, match="(?s)bands is 2, and the PoissonLoader has 4.*leave it out"):
        make_private(model, inner, loader, noise_multiplier=1.0, bands=2)
    _, optimizer, found = make_private(model, inner, loader, noise_multiplier=1.0, backend="eager")
    assert (optimizer.mechanism.bands, found) == (4, loader)


def test_bands_that_are_refused() -> None:
    with pytest.raises(PrivacyError, match="(?s)over 4 steps, for relation 'replace_one'.*or bands=1"):
        private(bands=4, relation="replace_one")
    with pytest.raises(PrivacyError, match="bands is 0"):
        private(bands=0)


def test_bands_in_one_graph() -> None:
    """compile_step steps on the same rows."""
    model, optimizer, loader = private(bands=3, steps=9)
    epoch(model, optimizer, loader)
    wanted = [p.detach().clone() for p in model.parameters()]
    del model, optimizer, loader  # of the seed that is used again
    gc.collect()
    model, optimizer, loader = private(bands=3, steps=9)
    step = compile_step(model, nn.functional.cross_entropy, optimizer)
    for x, y in loader:
        step(x, y)
    for p, q in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-5)
