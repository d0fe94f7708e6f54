"""Discrete Gaussian noise: the law at all sizes, decisions without error, and who draws what."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpcompile.errors import PrivacyError
from dpcompile.noise import chacha, discrete
from dpcompile.noise.counter import Span
from dpcompile.noise.decide import exp_bounds, is_below, leading_zeros
from dpcompile.noise.discrete import LARGEST, discrete_gaussian
from dpcompile.noise.normal import gaussian, uniform

SIZES = (0.3, 0.7, 1.0, 2.5, 3.99, 4.0, 13.7)


def drawn(s: float, numel: int, seed: int = 5, step: int = 1, start: int = 0, parameter: int = 0) -> torch.Tensor:
    (values,) = discrete_gaussian(seed, step=step, spans=[Span(parameter, numel, start)], s=s)
    return values


def law(s: float) -> tuple[np.ndarray, np.ndarray]:
    k = np.arange(-200, 201)
    mass = np.exp(-(k**2) / (2 * s**2))
    return k, mass / mass.sum()


def p_value(values: torch.Tensor, s: float) -> float:
    """Of chi-square, over all integers that five values at least are expected of, and the rest."""
    k, mass = law(s)
    expected, n = mass * values.numel(), values.numel()
    kept = expected > 5
    counts = np.array([(values == int(x)).sum().item() for x in k[kept]])
    expected = np.append(expected[kept], max(n - expected[kept].sum(), 1e-9))
    counts = np.append(counts, n - counts.sum())
    return float(stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1))


@pytest.mark.parametrize("s", SIZES)
def test_the_law_of_small_ones(s: float) -> None:
    assert p_value(drawn(s, 50_000), s) > 1e-3


@pytest.mark.parametrize("s", [2.0**20 * 1.1, 1.3 * 2.0**40, LARGEST])
def test_the_law_of_large_ones(s: float) -> None:
    n = 60_000
    values = drawn(s, n)
    z = values.double() / s
    assert abs(z.mean().item()) < 4 / math.sqrt(n) and abs(z.var().item() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**4).mean().item() - 3) < 4 * math.sqrt(96 / n)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    low = torch.stack([values >> bit & 1 for bit in range(8)]).double().mean(1)
    assert (low - 0.5).abs().max().item() < 4.5 / (2 * math.sqrt(n))
    far = (z.abs() > 3).sum().item()
    assert abs(far - n * 0.0026998) < 4 * math.sqrt(n * 0.0027)


@pytest.mark.parametrize("s", SIZES)
def test_what_a_proposal_gives_is_the_law_times_a_constant(s: float) -> None:
    """Exactly, over cells, places and signs, with the last cell's tail: of a table however coarse."""
    p = discrete._proposal(s)
    last, two = len(p.weights), Fraction(2)
    assert sum(p.weights) < discrete._CODES

    def rate(x: int) -> Fraction:
        """Probability of proposing x >= 0, times 2**14 m width; divided by what it is compared with."""
        cell = x // p.width
        weight = Fraction(p.weights[cell]) if cell < last else 1 / two ** (cell - last + 1)
        return weight * Fraction(p.height) / p.scale(cell)

    assert {rate(x) for x in range(4 * last * p.width)} == {Fraction(1)}
    for cell in range(last + 40):
        assert exp_bounds(p.exponent(cell * p.width), 53)[1] <= p.scale(cell), "taken with a probability of 1 at most"


def test_a_decision_of_floats_is_that_of_exact_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an interval so wide that every third is left open: the same numbers, element by element."""
    wanted = {s: drawn(s, 3000) for s in (0.7, 13.7, 1.3 * 2.0**40)}
    exactly = 0

    def counting(*args):
        nonlocal exactly
        exactly += 1
        return is_below(*args)

    monkeypatch.setattr(discrete, "is_below", counting)
    for s, values in wanted.items():
        drawn(s, 3000)
        few, exactly = exactly, 0
        monkeypatch.setattr(discrete, "_SLACK", 0.3)
        assert torch.equal(drawn(s, 3000), values)
        assert few < 10 and exactly > 300
        monkeypatch.setattr(discrete, "_SLACK", 2.0**-39)
        exactly = 0


def test_exp_of_this_machine_is_within_the_interval() -> None:
    """Where a decision is of floats, ``exp(-y)`` is of y up to 12 or so: off by far less than the slack."""
    s, p = 1.3 * 2.0**40, discrete._proposal(1.3 * 2.0**40)
    magnitudes = torch.randint(0, int(5 * s), (3000,), generator=torch.Generator().manual_seed(1))
    floats = torch.exp((magnitudes.double() / s).square_().mul_(-0.5))
    for magnitude, value in zip(magnitudes.tolist(), floats.tolist(), strict=True):
        lower, upper = exp_bounds(p.exponent(magnitude), 53)
        assert lower * (1 - Fraction(1, 2**45)) < Fraction(value) < upper * (1 + Fraction(1, 2**45))
    assert discrete._SLACK >= 2.0**-40


def test_exact_decisions_alone_give_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discrete, "_SLACK", 10.0)
    assert p_value(drawn(2.5, 4000, seed=8), 2.5) > 1e-3


def test_the_cell_without_an_end_gives_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a table of one cell, half of what is proposed lies beyond it."""
    table = discrete._Proposal(1.0, 1, 1.25, (1,))
    assert all(exp_bounds(table.exponent(x), 53)[1] <= table.scale(x) for x in range(40))
    monkeypatch.setattr(discrete, "_proposal", lambda s: table)
    monkeypatch.setattr(discrete, "_CODES", 2)
    assert p_value(drawn(1.0, 5000, seed=2), 1.0) > 1e-3


@given(
    known=st.integers(0, 2**53 - 1),
    rest=st.integers(0, 2**64 - 1),
    numerator=st.integers(0, 2**60),
    scale=st.fractions(Fraction(1, 10), 1),
)
def test_a_decision_is_that_of_many_digits(known: int, rest: int, numerator: int, scale: Fraction) -> None:
    exponent = Fraction(numerator, 2**55)
    u = Fraction(known << 64 | rest, 2**117)
    with localcontext() as context:
        context.prec = 120
        true = Fraction((-Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp())
    if abs(u * scale - true) > Fraction(1, 2**110):
        assert is_below(known, itertools.chain([rest], itertools.repeat(0)), exponent, scale) == (u * scale < true)


def test_a_decision_that_needs_hundreds_of_bits() -> None:
    """u is exp(-1/3) to 400 bits, and then above or below."""
    with localcontext() as context:
        context.prec = 300
        target = Fraction((-Decimal(1) / Decimal(3)).exp())
    bits = math.floor(target * 2**437)  # 53 + 6 * 64
    words = [bits >> 64 * (5 - i) & (2**64 - 1) for i in range(6)]
    for rest, wanted in ((0, True), (2**64 - 1, False)):
        more = iter([*words, rest, rest, rest])
        assert is_below(bits >> 384, more, Fraction(1, 3), Fraction(1)) is wanted
        assert len(list(more)) < 3


def test_bounds_of_exp_hold_it() -> None:
    for exponent in (Fraction(0), Fraction(1, 3), Fraction(100)):
        lower, upper = exp_bounds(exponent, 53)
        with localcontext() as context:
            context.prec = 200
            true = Fraction((-Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp())
        assert 0 < lower < true < upper and upper - lower < upper / 2**60
    assert exp_bounds(Fraction(10**20), 53) == (0, Fraction(1, 2**106))


def test_leading_zeros_over_words() -> None:
    assert leading_zeros(iter([2**63])) == 0 and leading_zeros(iter([1])) == 63
    assert leading_zeros(iter([0, 0, 2**60])) == 131


def test_shards_draw_the_numbers_of_the_whole() -> None:
    for s in (0.7, 1.3 * 2.0**40):
        whole = drawn(s, 1001)
        for starts in ([0, 1, 2, 3, 998], [0, 333, 334], [0, 500]):
            ends = [*starts[1:], 1001]
            spans = [Span(0, end - start, start) for start, end in zip(starts, ends, strict=True)]
            assert torch.equal(torch.cat(discrete_gaussian(5, step=1, spans=spans, s=s)), whole)
        shuffled = discrete_gaussian(5, step=1, spans=[Span(3, 7), Span(0, 501, 500), Span(1, 0), Span(0, 500)], s=s)
        assert torch.equal(torch.cat([shuffled[3], shuffled[1]]), whole)


def test_pieces_of_any_size_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = drawn(9.5, 700)
    monkeypatch.setattr(discrete, "_SCRATCH", 33)
    assert torch.equal(drawn(9.5, 700), wanted)


def test_steps_parameters_elements_and_seeds_differ() -> None:
    s, n = 1.3 * 2.0**30, 4000
    uses = itertools.product((0, 2**255), (0, 1), (0, 2**24 - 1), (0, 2**49))
    draws = [drawn(s, n, seed=seed, step=step, parameter=p, start=start) for seed, step, p, start in uses]
    correlation = torch.corrcoef(torch.stack(draws).double()) - torch.eye(len(draws))
    assert correlation.abs().max().item() < 5 / math.sqrt(n)


def test_every_attempt_and_decision_has_a_counter_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the ends of the ranges; none is shared with other noise or with draws."""
    seen: dict[tuple[int, ...], str] = {}
    real = chacha.chacha20

    def recording(counter, key):
        made = real(counter, key)
        for block in zip(*(c.tolist() for c in torch.broadcast_tensors(*counter)), strict=True):
            assert all(0 <= word < 2**32 for word in block)
            assert seen.setdefault(block, use) == use, block
        return made

    monkeypatch.setattr(discrete.chacha, "chacha20", recording)
    monkeypatch.setattr(discrete, "_SLACK", 10.0)
    for step, p, start in itertools.product((0, 2**32 - 1), (0, 2**24 - 1), (0, 4, 2**40, 2**50 - 8)):
        use = f"discrete {step} {p} {start}"
        drawn(3.0, 4, step=step, parameter=p, start=start)
        use = f"normal {step} {p} {start}"
        gaussian(5, step=step, parameter=p, start=start // 4 * 8, numel=4, secure=True)
    for stream in (discrete.Stream.SAMPLING, discrete.Stream.WORKERS, discrete.Stream.PARTS):
        use = stream.name
        uniform(5, step=0, stream=stream, numel=9, secure=True)
    assert any(block[3] >> 24 == discrete.Stream.DECISIONS.value for block in seen)


def test_bits_beyond_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """They go on, and differ from block to block."""
    key = chacha.derive_key(5)
    first = discrete._further(torch.tensor([7]), torch.tensor([0]), 2, 0, 1, key)[0]
    bits = list(itertools.islice(discrete._bits(first, 7, 0, 2, 1, key), 24))
    assert bits[:8] == first and len(set(bits)) == 24 and all(0 <= b < 2**64 for b in bits)
    assert bits[8:16] == discrete._further(torch.tensor([7]), torch.tensor([0]), 2, 1, 1, key)[0]


def test_what_is_refused() -> None:
    for s in (0.0, -1.0, math.nan, math.inf, LARGEST * 1.01):
        with pytest.raises(
            PrivacyError, match=r"(?s)discrete noise of standard deviation.*above 0, 2\.2518e\+15 at most"
        ):
            drawn(s, 3)
    assert drawn(LARGEST, 3).numel() == 3
    with pytest.raises(PrivacyError, match=r"start \+ numel .* is not an integer in \[0, 2\*\*50\)"):
        drawn(1.0, 2, start=2**50 - 1)
    with pytest.raises(PrivacyError, match="the seed .not shown. is not an integer"):
        drawn(1.0, 2, seed=2**256)
    for stream in (discrete.Stream.DISCRETE, discrete.Stream.DECISIONS):
        with pytest.raises(PrivacyError, match="uniform numbers cannot come from stream"):
            uniform(5, step=0, stream=stream, numel=1)
        with pytest.raises(PrivacyError, match="normal numbers cannot come from stream"):
            gaussian(5, step=0, parameter=0, numel=1, stream=stream)
