"""Noise, by itself and in an optimizer: what its messages say to do, tried."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from private_steps import steps
from remedies import Right, about, equals, plain, private, refused, sgd, trains

from dpcompile import AdaptiveClip, DPOptimizer, PoissonLoader, PrivacyAccountant, dp_compile
from dpcompile.noise import fresh_seed
from dpcompile.noise.adaptive import AdaptiveGaussianMechanism
from dpcompile.noise.banded import BandedMechanism
from dpcompile.noise.buffered import BufferedMechanism
from dpcompile.noise.buffers import Powers, optimal_powers
from dpcompile.noise.counter import Span, Stream
from dpcompile.noise.discrete import discrete_gaussian
from dpcompile.noise.exact import ExactMechanism
from dpcompile.noise.mechanism import GaussianMechanism, Release
from dpcompile.noise.normal import add_gaussian_, gaussian, uniform
from dpcompile.noise.strategy import counts_of, optimal_coefficients
from dpcompile.noise.tree import TreeMechanism


def trained(mechanism: Any, count: int = 1) -> Right:
    model: Any = dp_compile(plain(), max_grad_norm=mechanism.max_grad_norm, backend="eager")
    return steps(model, DPOptimizer(sgd(model), model, mechanism=mechanism), count)


def released(mechanism: Any, value: float = 0.0, step: int = 0) -> Right:
    total = torch.full((1000,), value, dtype=torch.float64)
    mechanism.release(Release([total], [0], step))
    total -= value / mechanism.expected_batch_size
    return about(float(total.std()), mechanism.noise_multiplier / mechanism.expected_batch_size, rel=0.2)


def in_turn(kind: Any, **options: Any) -> Right:
    loader = PoissonLoader(private()[2].dataset, expected_batch_size=8, in_turn=True)
    model: Any = dp_compile(plain(), backend="eager")
    optimizer = DPOptimizer(sgd(model), model, mechanism=kind(1.0, 1.0, 8, 7, **options))
    return trains(model, optimizer, loader.attach(model, optimizer))


@refused("leave shares out: all clipped as one group")
def test_bounds_of_no_group(told: int) -> Right:
    shares: Any = {} if told else {"shares": {}}
    return trained(AdaptiveGaussianMechanism(1.0, 1.0, 8, 7, clip=AdaptiveClip(), **shares))


@refused("give an integer, 1 or more, or leave it out", ways=2)
def test_rows_that_never_begin_anew(told: int) -> Right:
    restart: Any = ({"restart": 0}, {"restart": 4}, {})[told]
    return released(BandedMechanism(1.0, 1.0, 8, 7, coefficients=(1.0, 0.0), **restart))


@refused("give an integer, 1 or more")
def test_buffers_for_no_steps(told: int) -> Right:
    return in_turn(BufferedMechanism, steps=3 if told else 0)


@refused("give an integer, 1 or more")
def test_a_tree_for_no_steps(told: int) -> Right:
    return in_turn(TreeMechanism, steps=3 if told else 0)


@refused(
    "give as many of both, in (0, 1), weights that add up to 1 at most, such as "
    "dpcompile.noise.buffers.optimal_powers(steps) returns",
    ways=2,
)
def test_powers_that_grow(told: int) -> Right:
    powers = optimal_powers(3) if told == 2 else Powers((0.5, 0.4 if told else 0.7), (0.9, 0.5))
    return in_turn(BufferedMechanism, steps=3, powers=powers)


@refused("leave them as they were at the first step")
def test_another_seed_within_rows_that_belong_together(told: int) -> Right:
    model, optimizer, loader = private(bands=2)

    def loss(model: Any, batch: Any) -> Any:
        if not told and optimizer.logical_step == 1:
            optimizer.mechanism.seed = 5
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    return trains(model, optimizer, loader, loss=loss)


def drawn(**options: Any) -> Right:
    values = gaussian(**{"seed": 3, "step": 0, "parameter": 0, "numel": 4000, **options})
    return about(float(values.std()), 1.0, rel=0.05)


@refused("give an integer in that range, such as dpcompile.noise.fresh_seed() returns", ways=2)
def test_a_seed_of_70_bits(told: int) -> Right:
    return drawn(seed=(2**70, 2**63, fresh_seed())[told])


@refused("give an integer in that range")
def test_a_step_below_zero(told: int) -> Right:
    return drawn(step=0 if told else -1)


@refused("give every tensor an index of its own, or elements of its own", ways=2)
def test_two_tensors_of_one_index(told: int) -> Right:
    tensors = [torch.zeros(2000), torch.zeros(2000)]
    add_gaussian_(
        tensors, parameters=[0, int(told == 1)], std=1.0, seed=3, step=0, starts=[0, 2000] if told == 2 else None
    )
    assert abs(float(np.corrcoef(tensors[0], tensors[1])[0, 1])) < 0.1
    return about(float(torch.cat(tensors).std()), 1.0, rel=0.05)


@refused("take one above 0, 2.2518e+15 at most")
def test_discrete_noise_of_no_size(told: int) -> Right:
    values = discrete_gaussian(fresh_seed(secure=True), step=0, spans=[Span(0, 4000)], s=20.0 if told else 0.0)[0]
    return about(float(values.double().std()), 20.0, rel=0.05)


@refused("leave secure out, or give True", ways=2)
def test_exact_noise_of_a_fast_generator(told: int) -> Right:
    secure: Any = ({"secure": False}, {}, {"secure": True})[told]
    return trained(ExactMechanism(1.0, 1.0, 8, 7, **secure))


@refused("take a larger noise multiplier, or ExactMechanism(..., bits=43) as DPOptimizer(mechanism=...)", ways=2)
def test_a_grid_that_is_too_coarse(told: int) -> Right:
    return trained(ExactMechanism(1e5 if told == 1 else 1e-3, 1.0, 8, 7, bits=43 if told == 2 else 16))


@refused("take a smaller noise multiplier, or ExactMechanism(..., bits=37) as DPOptimizer(mechanism=...)", ways=2)
def test_a_grid_that_is_too_fine(told: int) -> Right:
    return trained(ExactMechanism(1.0 if told == 1 else 1e4, 1.0, 8, 7, bits=37 if told == 2 else 40))


@refused("take a larger noise multiplier")
def test_noise_that_no_grid_has(told: int) -> Right:
    return trained(ExactMechanism(1.0 if told else 1e-12, 1.0, 8, 7))


@refused("train on without exact=True, in a run of its own, and compose both")
def test_exact_noise_for_a_step_too_many(told: int) -> Right:
    if told:
        alone, model = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.3, method="rdp"), plain()
        alone.step(2)
        _, optimizer, loader = private(model=model)
        optimizer.accountant.compose(alone.event)
        assert optimizer.accountant.epsilon(1e-5) == alone.epsilon(1e-5)
        return equals(len(loader), 3)
    return released(ExactMechanism(1.0, 1.0, 8, 7), step=2**24)


@refused(
    "if so many examples are in a step, take a grid of fewer bits: ExactMechanism(..., bits=32) as "
    "DPOptimizer(mechanism=...); a sum that is not finite has not been clipped"
)
def test_sums_beyond_the_grid(told: int) -> Right:
    return released(ExactMechanism(1.0, 1.0, 8, 7, bits=32 if told else 40), 5000.0)


@refused(
    "if so many examples are in a step, take fewer, or exact=False: no grid has room for them and is fine enough for "
    "the noise; a sum that is not finite has not been clipped",
    ways=2,
)
def test_sums_beyond_all_grids(told: int) -> Right:
    kind = GaussianMechanism if told == 2 else ExactMechanism
    return released(kind(1.0, 1.0, 8, 7), 1e3 if told == 1 else 1e9)


@refused("give an integer from 16 to 43, or leave it out", ways=2)
def test_a_grid_of_50_bits(told: int) -> Right:
    bits: Any = ({"bits": 50}, {"bits": 43}, {})[told]
    return trained(ExactMechanism(1.0, 1.0, 8, 7, **bits))


@refused("take one between 2**-400 and 2**400, or leave exact=True out", ways=2)
def test_a_bound_that_no_grid_has(told: int) -> Right:
    bound = 1e-30 if told == 1 else 1e-200
    return equals(math.isfinite(private(max_grad_norm=bound, exact=told < 2)[1].noise_multiplier), True)


@refused("take Stream.GRADIENT, or another stream of noise", ways=2)
def test_noise_from_a_stream_of_draws(told: int) -> Right:
    return drawn(stream=(Stream.SAMPLING, Stream.GRADIENT, Stream.VOTES)[told])


@refused("take another stream, such as Stream.SAMPLING; those of noise are kept for it")
def test_draws_from_a_stream_of_noise(told: int) -> Right:
    values = uniform(3, step=0, stream=Stream.SAMPLING if told else Stream.GRADIENT, numel=4000)
    return about(float(values.mean()), 0.5, rel=0.1)


@refused("draw float32, add, then cast the sum")
def test_noise_in_half_precision(told: int) -> Right:
    total = torch.zeros(4000, dtype=torch.float16)
    noise = gaussian(3, step=0, parameter=0, numel=4000, dtype=torch.float32 if told else torch.float16)
    total = (total.float() + noise).to(total.dtype)
    return about(float(total.float().std()), 1.0, rel=0.05)


@refused(
    "give finite numbers that do not increase, the first above 0 and none below, such as "
    "dpcompile.noise.strategy.optimal_coefficients(bands, steps) returns",
    ways=2,
)
def test_coefficients_that_grow(told: int) -> Right:
    coefficients = ((1.0, 2.0), (1.0, 0.5), optimal_coefficients(2, 3))[told]
    return about(BandedMechanism(1.0, 1.0, 8, 7, coefficients=coefficients).noise_multiplier)


@refused("give integers, 1 or more")
def test_a_matrix_for_no_steps(told: int) -> Right:
    return about(float(counts_of(3 if told else 0, 2)[0]))
