"""Batch sizes, rates, caps and bands of a loader: what their messages say to do, tried."""

from __future__ import annotations

from typing import Any

from poisson_parts import SIZE, attached, poisson
from remedies import Right, data, equals, plain, private, refused, sgd, trains

from dpcompile import DPOptimizer, PoissonLoader, PrivacyAccountant, dp_compile


@refused("leave sample_rate out and give expected_batch_size, or leave in_turn out", ways=2)
def test_in_turn_at_a_rate(told: int) -> Right:
    loader = poisson(in_turn=True if told < 2 else None, sample_rate=None if told == 1 else 0.3)
    return equals(sum(len(b.mask) > 0 for b in loader.batches()) > 0, True)


@refused("give the mean number of examples in a step")
def test_in_turn_with_a_batch_larger_than_the_data(told: int) -> Right:
    loader = poisson(in_turn=True, expected_batch_size=8 if told else 25)
    return equals(len(loader), 3)


@refused(
    "attach the loader, as make_private does, and iterate over it or over loader.parts(); or give "
    "expected_batch_size a number",
    ways=2,
)
def test_batches_by_the_step_without_attaching(told: int) -> Right:
    loader = poisson(expected_batch_size=8 if told == 2 else lambda t: 6.0 + t)
    if told == 1:
        return trains(*private(loader))
    return equals(len(list(loader.batches())) > 0, True)


@refused("give the mean size that a logical batch should have, expected_batch_size=", slow=True)
def test_neither_size_nor_rate(told: int) -> Right:
    return attached(PoissonLoader(data().dataset, **SIZE if told else {}))


@refused("give the chance of each example to be in a logical batch")
def test_a_chance_above_one(told: int) -> Right:
    return attached(poisson(sample_rate=0.3 if told else 3))


@refused("give the mean size that a logical batch should have, within this interval")
def test_a_batch_larger_than_the_data(told: int) -> Right:
    return attached(poisson(expected_batch_size=8 if told else 25))


@refused("give expected_batch_size a number, or leave bands out", ways=2, slow=True)
def test_a_batch_size_by_the_step_and_bands(told: int) -> Right:
    sizes: Any = 8 if told == 1 else (lambda t: 6.0 + t)
    return trains(*private(poisson(expected_batch_size=sizes, bands=1 if told == 2 else 2)))


@refused("give PoissonLoader steps=, how many are one pass", slow=True)
def test_a_batch_size_by_the_step_that_ends_nowhere(told: int) -> Right:
    loader = poisson(expected_batch_size=lambda t: 1e-9, **{"steps": 3} if told else {})
    return equals(len(loader), 3)


@refused(
    "give PoissonLoader both sample_rate= and expected_batch_size=, numbers that were fixed without looking "
    "at the data (and steps=, if not one pass is 1 / sample_rate of them); or take relation='zero_out', "
    "which has the same epsilon and takes the size as public",
    ways=2,
    slow=True,
)
def test_add_remove_and_a_rate_from_the_size(told: int) -> Right:
    loader = poisson(sample_rate=0.25) if told == 1 else data()
    return trains(*private(loader, relation="zero_out" if told == 2 else "add_remove"))


@refused("make the PrivacyAccountant with sample_rate=loader.sample_rate")
def test_other_rates_of_loader_and_accountant(told: int) -> Right:
    loader = poisson()
    rate = loader.sample_rate if told else 0.1
    return trains(*private(loader, accountant=PrivacyAccountant(noise_multiplier=1.0, sample_rate=rate, method="rdp")))


@refused("make the PrivacyAccountant with truncation=loader.truncation")
def test_other_caps_of_loader_and_accountant(told: int) -> Right:
    loader = poisson(max_batch_size=12)
    cap = loader.truncation if told else None
    counts = PrivacyAccountant(noise_multiplier=1.0, sample_rate=loader.sample_rate, truncation=cap)
    return trains(*private(loader, accountant=counts))


@refused(
    "give PoissonLoader bands=2 and attach it to model and optimizer, or give make_private bands= and a DataLoader",
    ways=2,
    slow=True,
)
def test_bands_of_the_loader_alone(told: int) -> Right:
    if told == 2:
        return trains(*private(bands=2))
    from dpcompile.noise.banded import BandedMechanism
    from dpcompile.noise.strategy import optimal_coefficients

    model = dp_compile(plain(), backend="eager")
    mechanism = BandedMechanism(1.0, 1.0, 8, 7, coefficients=optimal_coefficients(2, 3))
    optimizer = DPOptimizer(sgd(model), model, mechanism=mechanism)
    return trains(model, optimizer, poisson(bands=2 if told else 1).attach(model, optimizer))
