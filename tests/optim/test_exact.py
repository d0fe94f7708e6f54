"""Exact noise: sums on a grid, what it costs, what is refused, and how it goes with everything else."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dp_accounting import GaussianDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from small_models import labelled, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import (
    AdaptiveClip,
    DPOptimizer,
    PoissonLoader,
    PrivacyAccountant,
    PrivacyError,
    audit,
    compile_step,
    dp_compile,
    make_private,
)
from dpcompile.checkpoint import load_checkpoint, save_checkpoint
from dpcompile.noise.counter import Span
from dpcompile.noise.discrete import discrete_gaussian
from dpcompile.noise.exact import EXCESS, STEPS, ExactMechanism, excess
from dpcompile.noise.grid import LARGEST, ROUNDINGS, default_bits, spacing, to_grid, within
from dpcompile.noise.mechanism import GaussianMechanism, Release
from dpcompile.runtime import reductions
from dpcompile.schedules import ClipSchedule, NoiseSchedule, exponential

SEED, B = 2**200 + 11, 9


def mechanism(sigma: float = 0.8, C: float = 0.7, divisor: float = 9.0, **options: Any) -> ExactMechanism:
    return ExactMechanism(sigma, C, divisor, SEED, **options)


def noise_of(own: ExactMechanism, parameter: int, numel: int, among: int, step: int = 0) -> list[int]:
    if not own.noise_multiplier:
        return [0] * numel
    s = float(own.units(among))
    return discrete_gaussian(own.seed, step=step, spans=[Span(parameter, numel)], s=s)[0].tolist()


def by_fractions(own: ExactMechanism, total: Tensor | None, parameter: int, among: int, step: int = 0) -> Tensor:
    """What a release leaves, in rational arithmetic up to the last rounding."""
    assert total is not None
    unit = Fraction(own.grid)
    noise = noise_of(own, parameter, total.numel(), among, step)
    units = [round(Fraction(x) / unit) + z for x, z in zip(total.flatten().tolist(), noise, strict=True)]
    means = [float(k * unit / Fraction(own.expected_batch_size)) for k in units]
    return torch.tensor(means, dtype=torch.float64).to(total.dtype).view(total.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.8, 0.0])
def test_a_release_is_integers_up_to_the_division(dtype: torch.dtype, sigma: float) -> None:
    own = mechanism(sigma)
    totals = [torch.randn(40, 3, dtype=dtype), torch.zeros(5, dtype=dtype), torch.randn(7, 11, dtype=dtype).t() * 1e-13]
    totals.append(torch.tensor(3.0, dtype=dtype))
    wanted = [by_fractions(own, t, i, 120 + 5 + 77 + 1, step=4) for i, t in enumerate(totals)]
    own.release(Release(totals, range(4), 4))
    for found, value in zip(totals, wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=2**-50 if dtype == torch.float64 else 2**-23, atol=0)
        assert (found == 0).all() or sigma or found.dtype == dtype
    assert not totals[2].is_contiguous()


def test_parts_are_released_as_the_whole_is() -> None:
    whole, own = torch.randn(10, 4), mechanism()
    parts = [whole[:, :1].clone(), whole[:, 1:].clone()]
    runs = [[(4 * i, 1) for i in range(10)], [(4 * i + 1, 3) for i in range(10)]]
    own.release(Release(parts, [0, 0], 2, runs))
    own.release(Release([whole], [0], 2))
    assert torch.equal(torch.cat(parts, 1), whole)
    with pytest.raises(PrivacyError, match="a parameter index occurs twice"):
        own.release(Release([torch.zeros(3), torch.zeros(3)], [1, 1], 3))


@given(
    C=st.floats(1e-30, 1e30),
    bits=st.integers(16, 43),
    numbers=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20),
    changes=st.lists(st.floats(-1, 1, width=32), min_size=20, max_size=20),
    ranks=st.integers(1, 4),
)
def test_neighbours_on_the_grid_differ_by_what_the_noise_is_for(
    C: float, bits: int, numbers: list[float], changes: list[float], ranks: int
) -> None:
    """As integers, rounded rank by rank, after one example moved by C in L2 norm."""
    grid = spacing(C, bits)
    assert Fraction(C) / 2 ** (bits + 1) < Fraction(grid) <= Fraction(C) / 2**bits and math.frexp(grid)[0] == 0.5
    sums = torch.tensor([numbers] * ranks, dtype=torch.float64) * C / torch.arange(1, ranks + 1)[:, None]
    change = torch.tensor(changes[: len(numbers)], dtype=torch.float64)
    change = change / change.norm().clamp_min(1e-9) * C
    other = sums.clone()
    other[-1] += change
    one, two = ([round(Fraction(x) / Fraction(grid)) for x in rows.flatten().tolist()] for rows in (sums, other))
    assert one == to_grid(sums, grid).long().flatten().tolist()
    difference = torch.tensor(two).view(ranks, -1).sum(0) - torch.tensor(one).view(ranks, -1).sum(0)
    moved = math.isqrt(sum(d * d for d in difference.tolist()))
    own = ExactMechanism(1.0, C, 1.0, 0, bits=43) if bits == 43 else None
    bound = Fraction(C) / Fraction(grid) + ranks * (math.isqrt(len(numbers)) + 1)
    assert moved <= bound * (1 + Fraction(1, 2**40))
    assert own is None or own.units(len(numbers)) >= bound


def test_the_noise_is_for_c_and_roundings() -> None:
    for sigma, C, d in ((1.0, 1.0, 10**6), (0.3, 0.7, 1), (5.0, 1e-8, 10**9)):
        own = mechanism(sigma, C)
        s = own.units(d)
        exact = sigma * (C / own.grid + ROUNDINGS * math.sqrt(d))
        assert exact <= s <= exact + sigma * ROUNDINGS + 1
        assert s * own.grid >= sigma * C
    assert mechanism(1.0, 1.0).units(10**6) / 2**40 - 1 < 1e-6
    assert mechanism(0.0).units(10) == 0


def test_the_grid_leaves_room_for_large_batches() -> None:
    assert [default_bits(b) for b in (1, 512, 513, 1024, 2**16, 2**40)] == [40, 40, 39, 39, 33, 16]
    for b in (1.0, 300.0, 5000.0, 2.0**20):
        own = mechanism(divisor=b)
        assert own.bits == default_bits(b) and 4 * b * own.max_grad_norm <= LARGEST * own.grid


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_epsilon_is_the_gaussian_mechanisms() -> None:
    own, gaussian = mechanism(1.1), GaussianMechanism(1.1, 0.7, 9.0, 3)
    assert own.event(0.01) == gaussian.event(0.01)
    one, two = (PrivacyAccountant(noise_multiplier=1.1, sample_rate=0.01) for _ in range(2))
    one.step(1000)
    for _ in range(1000):
        two.step(event=own.event(0.01))
    assert one.epsilon(1e-5) == two.epsilon(1e-5)
    assert excess(own.units(10**6), 10**6, 1000) < 1e-12
    assert f"{one.epsilon(1e-5):.4f}" == f"{two.epsilon(1e-5) + excess(own.units(10**6), 10**6, 1000):.4f}"


@pytest.mark.parametrize("s", [0.6, 1.0, 3.7, 20.0])
def test_renyi_of_a_shift_is_the_gaussians_or_less(s: float) -> None:
    """Canonne, Kamath, Steinke 2020, proposition 5, by sums; dp-accounting has the Gaussian's."""
    k = np.arange(-4000, 4001)
    f = -((k / s) ** 2) / 2
    f -= np.log(np.exp(f).sum())
    for shift in (1, 2, 5):
        moved = -(((k - shift) / s) ** 2) / 2
        moved -= np.log(np.exp(moved).sum())
        for order in (1.5, 2.0, 4.0, 16.0):
            divergence = np.logaddexp.reduce(order * moved + (1 - order) * f) / (order - 1)
            assert divergence <= order * shift**2 / (2 * s**2) * (1 + 1e-9)
    accountant = RdpAccountant([4.0]).compose(GaussianDpEvent(s / 2))
    assert accountant._rdp[0] == pytest.approx(4 * 2**2 / (2 * s**2))


def test_how_far_it_is_from_rounded_gaussian_noise() -> None:
    """The two bounds that the proof rests on, number by number."""
    s = 1024.0
    k = np.arange(0, 9 * 1024)
    rounded = stats.norm.sf((k - 0.5) / s) - stats.norm.sf((k + 0.5) / s)
    discrete = np.exp(-((k / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi))
    ratio = np.log(rounded / discrete)
    tiny = 1e-10  # of the functions here
    assert (ratio >= -1 / (8 * s**2) - tiny).all() and (ratio <= k**2 / (8 * s**4) + tiny).all()
    for n, x in ((1, 2000), (10**6, 2000), (10**15, 2000)):  # the sum of both, for N numbers
        assert n / 8 + (4 * n + 6 * x + n / (2 * s**2)) / 8 < n + x
        if n < 10**15:
            assert stats.chi2.logsf(2 * n + 3 * x, n) <= -x
    assert excess(1023, 1, 1) == math.inf and excess(2**20, 10, 100) == 3000 / 2**40


def test_a_grid_too_coarse_or_too_fine_for_the_noise() -> None:
    coarse = mechanism(1.0, bits=16)
    with pytest.raises(
        PrivacyError, match=r"(?s)a grid of 16 bits: it is too coarse to be as good.*larger.*bits=43"
    ) as e:
        coarse.units(1000)
    assert excess(mechanism(1.0, bits=43).units(1000), 1000, STEPS) < EXCESS and "43" in str(e.value)
    with pytest.raises(PrivacyError, match=r"(?s)it does not fit in integers of 64 bits.*a smaller noise.*bits=37"):
        mechanism(1e4).units(1000)
    assert mechanism(1e4, bits=37).units(1000) > 0


def test_sums_that_do_not_fit() -> None:
    own = mechanism(1.0, 1.0)
    for value, text in ((math.nan, "nan"), (math.inf, "inf"), (-math.inf, "inf"), (5000.0, "5000")):
        totals = [torch.ones(4), torch.zeros(0), torch.tensor([0.0, value])]
        message = (
            rf"(?s)parameter number 7 has an element of size {text}, and the grid of 2\*\*-40 ends at 4096.*bits=32"
        )
        with pytest.raises(PrivacyError, match=message):
            own.release(Release(totals, [2, 3, 7], 0))
        assert torch.equal(totals[0], torch.ones(4)), "nothing was done"
    mechanism(1.0, 1.0, bits=32).release(Release([torch.tensor([5000.0])], [0], 0))
    own.release(Release([torch.tensor([4096.0])], [0], 0))
    assert not within(torch.tensor([1.0, math.nan])) and within(torch.tensor([-4.0, 3.0]), 4)


def test_more_ranks_than_there_are_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reductions.dist, "get_world_size", lambda group: 1025)
    with pytest.raises(PrivacyError, match=r"(?s)exact sums over 1025 replicas.*1024 times.*fewer replicas, or leave"):
        reductions.add_up_exactly([torch.zeros(3)], None, 1.0)


def test_numbers_that_make_no_grid() -> None:
    with pytest.raises(PrivacyError, match=r"(?s)without a cryptographic generator.*leave secure out, or give True"):
        mechanism(secure=False)
    for bits in (15, 44, True, 20.0):
        with pytest.raises(PrivacyError, match=r"(?s)bits of the grid is .*an integer from 16 to 43"):
            mechanism(bits=bits)
    for C in (2.0**-400, 2.0**400):
        with pytest.raises(PrivacyError, match=r"(?s)of which a grid is to be a part.*between 2\*\*-400 and 2\*\*400"):
            mechanism(C=C)
    mechanism(C=2.0**-399).release(Release([torch.ones(3, dtype=torch.float64) * 2.0**-399], [0], 0))
    with pytest.raises(
        PrivacyError, match=r"(?s)logical step 16777216 with exact noise.*16777216 steps.*run of its own"
    ):
        mechanism().release(Release([torch.zeros(3)], [0], STEPS))


# --- in an optimizer --------------------------------------------------------------------------------------------------


def wrapped(module: nn.Module, inner: Any = None, **options: Any) -> tuple[Any, DPOptimizer]:
    model = dp_compile(module, max_grad_norm=0.7, backend="eager")
    accountant = PrivacyAccountant(noise_multiplier=options.get("sigma", 0.8), sample_rate=0.1)
    numbers = {"noise_multiplier": options.pop("sigma", 0.8), "expected_batch_size": B, "seed": SEED}
    inner = torch.optim.SGD(module.parameters(), lr=0.1) if inner is None else inner
    if "mechanism" in options:
        numbers = {}
    return model, DPOptimizer(inner, model, accountant=accountant, **{**numbers, "exact": True, **options})


def train(model: Any, optimizer: DPOptimizer, steps: int = 2, begin: int = 0) -> list[Tensor]:
    for n in range(begin, begin + steps):
        torch.manual_seed(n)
        x, y = torch.randn(B, 6), torch.randint(0, 3, (B,))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def test_a_step_is_that_of_the_sums_on_the_grid() -> None:
    model, optimizer = wrapped(net())
    assert isinstance(optimizer.mechanism, ExactMechanism) and optimizer.secure
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(labelled(B)[0]), labelled(B)[1]).backward()
    d = sum(p.numel() for p in before)
    means = [by_fractions(optimizer.mechanism, p.grad, i, d) for i, p in enumerate(model.parameters())]
    optimizer.step()
    for p, q, mean in zip(model.parameters(), before, means, strict=True):
        torch.testing.assert_close(p.detach(), q - 0.1 * mean)
    assert optimizer.accountant is not None and optimizer.accountant.steps == 1


def adam(module: nn.Module) -> Any:
    return torch.optim.Adam(module.parameters(), lr=0.1)


def two(module: nn.Module) -> Any:
    first, *rest = module.parameters()
    return [torch.optim.SGD([first], lr=0.1), torch.optim.AdamW(rest, lr=0.1)]


@pytest.mark.parametrize("inner", [adam, two])
def test_other_optimizers(inner: Any) -> None:
    """Adam in one pass, and several as one, step on what the mechanism released."""
    module, twin = net(), net()
    weights = train(*wrapped(module, inner(module)), steps=3)
    plain, sums = inner(twin), dp_compile(twin, max_grad_norm=0.7, backend="eager")
    plain, own = plain if isinstance(plain, list) else [plain], mechanism()
    d = sum(p.numel() for p in twin.parameters())
    owner = DPOptimizer(torch.optim.SGD(twin.parameters(), lr=0.0), sums, noise_multiplier=0.0, expected_batch_size=1)
    for n in range(3):
        torch.manual_seed(n)
        F.cross_entropy(sums(torch.randn(B, 6)), torch.randint(0, 3, (B,))).backward()
        means = [by_fractions(own, p.grad, i, d, step=n) for i, p in enumerate(twin.parameters())]
        owner.zero_grad()
        for p, mean in zip(twin.parameters(), means, strict=True):
            p.grad = mean
        owner.engine.ledger.applied = True
        for part in plain:
            part.step()
        owner.engine.ledger.applied = False
        twin.zero_grad()
    for found, wanted in zip(weights, twin.parameters(), strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-6)


def test_one_graph_of_the_whole_step() -> None:
    models, runs = [net(), net()], []
    for module in models:
        runs.append(wrapped(module))
    whole = compile_step(runs[0][0], F.cross_entropy, runs[0][1])
    for n in range(2):
        torch.manual_seed(n)
        whole(torch.randn(B, 6), torch.randint(0, 3, (B,)))
    for p, q in zip(runs[0][0].parameters(), train(*runs[1]), strict=True):
        torch.testing.assert_close(p.detach(), q)


def test_a_resumed_run_draws_on(tmp_path: Any) -> None:
    model, optimizer = wrapped(net())
    train(model, optimizer)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    save_checkpoint(tmp_path / "saved", model, optimizer)
    wanted = train(model, optimizer, 2, begin=2)
    for load in ("state", "checkpoint"):
        again, resumed = wrapped(net(), seed=5)
        if load == "state":
            again.load_state_dict(weights)
            resumed.load_state_dict(state)
        else:
            load_checkpoint(tmp_path / "saved", again, resumed)
        assert resumed.logical_step == 2
        for p, q in zip(train(again, resumed, 2, begin=2), wanted, strict=True):
            assert torch.equal(p, q)


def test_a_state_of_another_grid() -> None:
    _, exact = wrapped(net())
    _, gaussian = wrapped(net(), exact=False, secure=True)
    fine = ExactMechanism(0.8, 0.7, B, SEED, bits=43)
    _, finer = wrapped(net(), exact=False, mechanism=fine)
    message = (
        r"(?s)released on a grid of 40 bits in the saved run, and are without a grid here.*bits=40\), or with exact"
    )
    with pytest.raises(PrivacyError, match=message):
        gaussian.load_state_dict(exact.state_dict())
    with pytest.raises(
        PrivacyError, match=r"(?s)without a grid in the saved run, and are on a grid of 40.*without exact"
    ):
        exact.load_state_dict(gaussian.state_dict())
    with pytest.raises(PrivacyError, match=r"(?s)on a grid of 43 bits in the saved run.*of 40 bits here.*bits=43\)"):
        exact.load_state_dict(finer.state_dict())
    other = ExactMechanism(0.8, 0.7, B, 3, bits=43)
    wrapped(net(), exact=False, mechanism=other)[1].load_state_dict(finer.state_dict())


def test_schedules_move_noise_and_grid() -> None:
    model, optimizer = wrapped(net())
    own = optimizer.mechanism
    assert isinstance(own, ExactMechanism)
    noise, clip = NoiseSchedule(optimizer, exponential(0.9)), ClipSchedule(optimizer, exponential(0.4))
    grids, units = [own.grid], [own.units(100)]
    for n in range(2):
        F.cross_entropy(model(labelled(B)[0]), labelled(B)[1]).backward()
        d = sum(p.numel() for p in model.parameters())
        means = [by_fractions(own, p.grad, i, d, step=n) for i, p in enumerate(model.parameters())]
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for p, q, mean in zip(model.parameters(), before, means, strict=True):
            torch.testing.assert_close(p.detach(), q - 0.1 * mean)
        optimizer.zero_grad()
        noise.step()
        clip.step()
        grids.append(own.grid)
        units.append(own.units(100))
    assert grids == [2.0**-41, 2.0**-42, 2.0**-44] and len(set(units)) == 3
    assert [run[0] for run in optimizer.accountant.history] == [0.8, 0.8 * 0.9]  # type: ignore[union-attr]


def test_what_does_not_go_with_it() -> None:
    with pytest.raises(
        PrivacyError, match=r"(?s)follows a quantile, and exact noise.*a number, or leave exact=True out"
    ):
        wrapped(net(), adaptive_clip=AdaptiveClip())
    with pytest.raises(PrivacyError, match=r"(?s)a mechanism was given, and .* exact or adaptive_clip too.*alone"):
        wrapped(net(), mechanism=ExactMechanism(0.8, 0.7, B, SEED))
    data, module = TensorDataset(*labelled(60)), net()
    with pytest.raises(PrivacyError, match=r"(?s)exact noise that is correlated over 3 steps.*exact=True or bands out"):
        make_private(module, torch.optim.SGD(module.parameters(), lr=0.1), DataLoader(data, batch_size=6), bands=3,
            noise_multiplier=1.0, exact=True, backend="eager")  # fmt: skip
    model, optimizer = wrapped(net())
    optimizer.mechanism = ExactMechanism(0.8, 0.7, B, SEED)
    with pytest.raises(PrivacyError, match=r"(?s)the exact mechanism took another's place.*make a DPOptimizer with it"):
        train(model, optimizer, 1)
    with pytest.raises(PrivacyError, match="it does not fit in integers of 64 bits"):
        wrapped(net(), sigma=1e5)


def test_made_private_with_a_report_of_the_grid() -> None:
    module, data = net(), DataLoader(TensorDataset(*labelled(83)), batch_size=10)
    inner = torch.optim.SGD(module.parameters(), lr=0.1)
    model, optimizer, loader = make_private(
        module, inner, data, noise_multiplier=1.5, max_grad_norm=0.5, exact=True, backend="eager"
    )
    assert loader.secure and optimizer.secure and isinstance(loader, PoissonLoader)
    for _, (x, y) in zip(range(2), loader, strict=False):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = optimizer.report(1e-4)
    privacy = report.sections["Privacy"]
    units = optimizer.mechanism.units(sum(p.numel() for p in model.parameters()))  # type: ignore[attr-defined]
    assert privacy["mechanism"].startswith("discrete Gaussian on integers")
    assert privacy["grid of the sums"] == f"2^-41, C in 40 bits; noise of {units} units a step"
    assert privacy["discrete for Gaussian noise"] == "adds less than 1e-05 to ε, and that part of δ to δ"
    assert privacy["generator of the noise"] == "ChaCha20, cryptographic"
    told = " ".join(report.not_covered)
    assert "Arithmetic before the grid" in told and "the noise is floating-point" not in told
    assert "Arithmetic before the grid" not in " ".join(_plain().not_covered)


def _plain() -> Any:
    return wrapped(net(), exact=False, seed=3)[1].report(1e-4)


def test_an_audit_is_of_the_same_mechanism() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20))
    data = TensorDataset(torch.randn(8, 20), torch.randint(0, 20, (8,)))
    loader = PoissonLoader(data, expected_batch_size=8, physical_batch_size=64, steps=3, seed=0, secure=True)
    given = make_private(
        module, torch.optim.SGD(module.parameters(), lr=0.1), loader, noise_multiplier=2.0, exact=True, backend="eager"
    )
    found = audit(*given, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), canaries=60, seed=1)
    assert found.proved is not None and found.any_mechanism <= found.proved
    assert given[1].logical_step == 0
