"""Counter-based noise: the generators, the counters, the distribution, the shards."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpcompile.errors import PrivacyError
from dpcompile.noise import normal as noise
from dpcompile.noise import philox
from dpcompile.noise.chacha import chacha20, derive_key
from dpcompile.noise.counter import Span, Stream, fresh_seed
from dpcompile.noise.normal import add_gaussian_, gaussian, gaussians, uniform
from dpcompile.noise.philox import philox4x32

MASK = 0xFFFFFFFF


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor([v]) for v in values]


def hexes(block: list[torch.Tensor]) -> str:
    return " ".join(f"{int(w.item()):08x}" for w in block)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([MASK] * 4, [MASK] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert hexes(philox4x32(words(*counter), key)) == expected


@pytest.mark.parametrize("few", [0, 64], ids=["torch", "NumPy"])
def test_philox_equals_its_definition_in_python_integers(few, monkeypatch):
    monkeypatch.setattr(philox, "_FEW", few)
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (4, 64), generator=generator)
    counters[:, 0], counters[:, 1] = 0x80000000, 0x7FFFFFFF
    key = (0xDEADBEEF, 0x12345678)

    def reference(c0: int, c1: int, c2: int, c3: int) -> list[int]:
        k0, k1 = key
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
            c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
            k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
        return [c0, c1, c2, c3]

    got = torch.stack(philox4x32(list(counters), key), dim=1).tolist()
    assert got == [reference(*column) for column in counters.T.tolist()]


def test_chacha20_gives_the_block_of_rfc_8439_section_2_3_2():
    key = [int.from_bytes(bytes(range(i, i + 4)), "little") for i in range(0, 32, 4)]
    block = chacha20(words(1, 0x09000000, 0x4A000000, 0), key)
    assert hexes(block) == (
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2"
    )


def test_chacha_keys_differ_and_use_the_whole_seed():
    keys = {derive_key(seed) for seed in (0, 1, 2**63, 2**255, 2**255 + 1)}
    assert len(keys) == 5 and all(0 <= w <= MASK for key in keys for w in key)


def test_every_use_has_a_counter_of_its_own(monkeypatch):
    """Record the counters handed to the generator: none is shared by two uses, up to the ends of the ranges."""
    seen: list[tuple[int, ...]] = []

    def recording(counter, key):
        seen.extend(zip(*(c.tolist() for c in torch.broadcast_tensors(*counter)), strict=True))
        return philox4x32(counter, key)

    monkeypatch.setattr(noise.philox, "philox4x32", recording)
    starts = [0, 2, 2**33, 2**40, 2**63 - 4]
    uses = list(itertools.product((0, 1, 2**32 - 1), (0, 1, 2**24 - 1), starts))
    for step, parameter, start in uses:
        gaussian(3, step=step, parameter=parameter, start=start, numel=2)
    for step, stream, start in itertools.product((0, 1, 2**32 - 1), (Stream.SAMPLING, Stream.WORKERS), starts):
        uniform(3, step=step, stream=stream, start=start, numel=2)
    assert len(seen) == len(set(seen)) == len(uses) + 30
    assert (0, 2**7, 1, 2**24 - 1) in seen  # element 2**40: block low and high word, step, parameter
    assert all(0 <= w <= MASK for counter in seen for w in counter)


@pytest.mark.parametrize("secure", [False, True])
def test_noise_is_standard_normal(secure):
    n = 200_000
    z = gaussian(11, step=4, parameter=2, numel=n, dtype=torch.float64, secure=secure)
    assert abs(z.mean().item()) < 4 / math.sqrt(n)
    assert abs(z.var().item() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**4).mean().item() - 3) < 4 * math.sqrt(96 / n)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    pairs = z.view(-1, 2)  # the two halves of one Box-Muller pair, and neighbours across blocks
    for a, b in ((pairs[:, 0], pairs[:, 1]), (pairs[:-1, 1], pairs[1:, 0])):
        for f in (lambda x: x, torch.square, torch.abs):
            assert abs(torch.corrcoef(torch.stack([f(a), f(b)]))[0, 1].item()) < 4 / math.sqrt(a.numel())


@pytest.mark.parametrize("secure", [False, True])
def test_noise_is_independent_across_parameters_steps_and_seeds(secure):
    n = 20_000
    draws = [
        gaussian(seed, step=step, parameter=parameter, numel=n, secure=secure)
        for seed, step, parameter in itertools.product((0, 1), (0, 1), (0, 1, 255))
    ]
    draws.append(gaussian(0, step=0, parameter=0, numel=n, secure=not secure))
    matrix = torch.stack(draws)
    off_diagonal = torch.corrcoef(matrix) - torch.eye(len(draws))
    squares = torch.corrcoef(matrix.square()) - torch.eye(len(draws))
    assert max(off_diagonal.abs().max().item(), squares.abs().max().item()) < 4.5 / math.sqrt(n)
    assert matrix.flatten().unique().numel() > 0.98 * matrix.numel()


def test_noise_is_a_pure_function_with_frozen_values():
    """The values are part of the definition: a run that resumes under another version draws the same noise."""
    first = gaussian(2**63 + 5, step=7, parameter=3, numel=4)
    torch.manual_seed(0)
    torch.randn(3)
    assert torch.equal(first, gaussian(2**63 + 5, step=7, parameter=3, numel=4))
    torch.testing.assert_close(first, torch.tensor(PHILOX_VALUES))
    torch.testing.assert_close(gaussian(2**255, step=7, parameter=3, numel=4, secure=True), torch.tensor(CHACHA_VALUES))


PHILOX_VALUES = [-1.112153, 1.105566, 0.717505, -0.777196]
CHACHA_VALUES = [-0.117713, 0.190144, -0.464311, -1.523881]


@given(
    cuts=st.lists(st.integers(0, 3000), max_size=6),
    start=st.integers(0, 40),
    secure=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=40, deadline=None)
def test_shards_drawn_separately_equal_the_whole_bit_for_bit(cuts, start, secure, dtype):
    whole = gaussian(9, step=1, parameter=5, start=start, numel=3000, secure=secure, dtype=dtype)
    edges = sorted({0, 3000, *cuts})
    shards = [
        gaussian(9, step=1, parameter=5, start=start + a, numel=b - a, secure=secure, dtype=dtype)
        for a, b in itertools.pairwise(edges)
    ]
    assert torch.equal(torch.cat(shards), whole)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("scratch", [1, 7, 64, 1000])
def test_the_size_of_the_scratch_changes_nothing(monkeypatch, secure, scratch):
    spans = [Span(0, 301), Span(1, 0), Span(2, 33, start=5), Span(0, 10, start=301), Span(7, 1)]
    whole = gaussians(1, step=0, spans=spans, secure=secure)
    u = uniform(1, step=0, stream=Stream.SAMPLING, numel=301, start=3, secure=secure)
    monkeypatch.setattr(noise, "_SCRATCH_CPU", scratch)
    assert all(map(torch.equal, gaussians(1, step=0, spans=spans, secure=secure), whole))
    assert torch.equal(uniform(1, step=0, stream=Stream.SAMPLING, numel=301, start=3, secure=secure), u)


def test_spans_drawn_together_equal_spans_drawn_alone():
    spans = [Span(3, 5), Span(1, 1001, start=7), Span(0, 2)]
    alone = [gaussian(1, step=2, parameter=s.parameter, numel=s.numel, start=s.start) for s in spans]
    assert all(map(torch.equal, gaussians(1, step=2, spans=spans), alone))


def test_added_noise_follows_row_major_order_whatever_the_strides():
    dense, empty = torch.randn(3, 5), torch.zeros(0)
    strided = torch.randn(5, 4).t()
    channels_last = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    tensors = [dense, strided, empty, channels_last]
    expected = [
        t + 0.5 * gaussian(8, step=3, parameter=p, numel=t.numel()).view(t.shape)
        for p, t in zip((4, 1, 2, 9), tensors, strict=True)
    ]
    add_gaussian_(tensors, parameters=(4, 1, 2, 9), std=0.5, seed=8, step=3)
    for got, want in zip(tensors, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_uniform_numbers_are_uniform_and_not_the_noise():
    u = uniform(5, step=2, stream=Stream.SAMPLING, numel=50_000)
    assert u.dtype == torch.float64 and 0 <= u.min().item() and u.max().item() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    others = [
        uniform(5, step=2, stream=Stream.WORKERS, numel=50_000),
        uniform(5, step=3, stream=Stream.SAMPLING, numel=50_000),
        gaussian(5, step=2, parameter=0, numel=50_000, dtype=torch.float64),
    ]
    assert torch.corrcoef(torch.stack([u, *others]))[0, 1:].abs().max().item() < 4 / math.sqrt(50_000)
    assert torch.equal(uniform(5, step=2, stream=Stream.SAMPLING, numel=7, start=11), u[11:18])


def test_nothing_waits_for_the_device():
    """On the meta device there are no values: anything that asked for one would raise."""
    assert gaussian(0, step=0, parameter=0, numel=70_001, device="meta").shape == (70_001,)
    assert gaussian(0, step=0, parameter=0, numel=9, device="meta", secure=True).shape == (9,)
    add_gaussian_([torch.empty(3, 2, device="meta")], parameters=[0], std=1.0, seed=0, step=0)


def test_it_is_traced_without_a_graph_break_and_without_a_recompile_per_step():
    def draw(like: torch.Tensor, step: int) -> torch.Tensor:
        out = torch.zeros_like(like)
        add_gaussian_([out], parameters=[1], std=1.0, seed=2**64 - 3, step=step)
        return out

    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(draw, backend=backend, fullgraph=True)
    like = torch.empty(10, 3)
    for step in range(1, 6):
        assert torch.equal(compiled(like, step), draw(like, step))
    assert len(graphs) == 2  # the first step, then any step


GOOD: dict[str, Any] = {"step": 0, "parameter": 0, "numel": 4, "start": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, r"the seed \(not shown\) is not an integer in \[0, 2\*\*64\)"),
        ({"seed": 2**64}, r"seed"),
        ({"seed": 1.5}, r"seed"),
        ({"seed": True}, r"seed"),
        ({"seed": 2**256, "secure": True}, r"seed .* \[0, 2\*\*256\)"),
        ({"step": -1}, r"logical step -1 is not an integer in \[0, 2\*\*32\)"),
        ({"step": 2**32}, r"logical step 4294967296"),
        ({"parameter": 2**24}, r"parameter index 16777216 is not an integer in \[0, 2\*\*24\)"),
        ({"parameter": -1}, r"parameter index -1"),
        ({"numel": -1}, r"number of elements -1"),
        ({"start": -2}, r"start -2"),
        ({"start": 2**63 - 2, "numel": 3}, r"start \+ numel .* \[0, 2\*\*63\)"),
        ({"dtype": torch.float16}, r"noise in torch.float16: .*\n.*draw float32"),
    ],
)
def test_out_of_range_is_refused_not_wrapped(change, message):
    with pytest.raises(PrivacyError, match=message):
        gaussian(**{"seed": 0, **GOOD, **change})


@pytest.mark.parametrize("stream", [Stream.GRADIENT, 1, "SAMPLING"])
def test_uniform_numbers_of_another_stream_are_refused(stream):
    with pytest.raises(PrivacyError, match="uniform numbers cannot come from stream"):
        uniform(0, step=0, stream=stream, numel=1)


def test_the_same_noise_for_two_tensors_is_refused():
    with pytest.raises(PrivacyError, match=r"a parameter index occurs twice among \[1, 1\]"):
        add_gaussian_([torch.zeros(2), torch.zeros(2)], parameters=[1, 1], std=1.0, seed=0, step=0)


def test_refusing_a_seed_does_not_print_it():
    with pytest.raises(PrivacyError) as caught:
        gaussian(2**64 + 987654321, **GOOD)
    assert str(2**64 + 987654321) not in str(caught.value)


def test_fresh_seeds_differ_and_are_accepted():
    seeds = {fresh_seed() for _ in range(50)} | {fresh_seed(secure=True) for _ in range(50)}
    assert len(seeds) == 100 and max(seeds) >= 2**64
    gaussian(fresh_seed(), **GOOD)
    gaussian(fresh_seed(secure=True), **GOOD, secure=True)


def test_largest_magnitude_is_finite(monkeypatch):
    """The smallest uniform is 2**-53, not 0, so that its logarithm is finite."""
    for word, bound in ((0, math.sqrt(2 * 53 * math.log(2))), (MASK, 0.0)):
        monkeypatch.setattr(noise.philox, "philox4x32", lambda counter, key, w=word: [torch.full((1,), w)] * 4)
        z = gaussian(0, step=0, parameter=0, numel=2, dtype=torch.float64)
        assert z.isfinite().all() and math.isclose(z.norm().item(), bound, abs_tol=1e-12)
