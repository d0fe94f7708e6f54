"""Noise by the Triton kernels: checks of triton_worker.py."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import triton
import triton.language as tl
from scipy import stats
from torch import Tensor
from triton.runtime import interpreter

from dpcompile.kernels import gaussian as native
from dpcompile.kernels import on_gpu
from dpcompile.kernels.triton import normals, steps, table
from dpcompile.noise.counter import Stream, counter_tag
from dpcompile.noise.normal import add_gaussian_, fractions, gaussian
from dpcompile.noise.philox import philox4x32

MASK = 2**32 - 1
CPU = torch.device("cpu")


@contextmanager
def on_cpu() -> Iterator[None]:
    """Kernels for CPUs inside."""
    on_gpu._DEVICES.discard("cpu")
    try:
        yield
    finally:
        on_gpu._DEVICES.add("cpu")


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """Rounded once, but for rare ties: Dekker's product and Knuth's sum. The interpreter's own rounds twice."""
    a, b, c = (v.data for v in (x, y, z))
    if a.dtype == np.float32:
        value = (a.astype(np.float64) * b + c).astype(np.float32)
    else:
        split = lambda v: (v * 134217729.0) - ((v * 134217729.0) - v)  # noqa: E731
        product, (ah, bh) = a * b, (split(a), split(b))
        lost = ((ah * bh - product) + ah * (b - bh) + (a - ah) * bh) + (a - ah) * (b - bh)
        total = product + c
        part = total - product
        value = total + (lost + ((product - (total - part)) + (c - part)))
    return interpreter.TensorHandle(value, z.dtype.scalar)


@contextmanager
def rounded_once() -> Iterator[None]:
    builder: Any = interpreter.InterpreterBuilder
    own = builder.create_fma
    builder.create_fma = _fma
    try:
        yield
    finally:
        builder.create_fma = own


def drawn(numel: int, *, parameter=0, step=0, seed=1, start=0, dtype=torch.float64) -> Tensor:
    out = torch.zeros(numel, dtype=dtype)
    tags = [counter_tag(Stream.GRADIENT, parameter)]
    native.mean_([out], tags=tags, starts=[start], std=1.0, divisor=1.0, seed=seed, step=step)
    return out


def ulps(a: Tensor, b: Tensor) -> Tensor:
    kind = torch.int64 if a.dtype == torch.float64 else torch.int32
    return (a.view(kind) - b.view(kind)).abs()


@triton.jit
def _words(first, second, blocks, step, tag, key0, key1, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = normals.philox(tl.load(blocks + at), *(tl.load(x).to(tl.uint32) for x in (step, tag, key0, key1)))  # type: ignore
    tl.store(first + at, a.to(tl.int64))
    tl.store(second + at, b.to(tl.int64))


def check_the_bits_of_the_counter_are_those_of_torch() -> None:
    """The ends of all four words, odd numbers of blocks among them, and seeds of both halves."""
    blocks = torch.tensor([0, 1, 3, MASK - 1, MASK, 2**32, 2**32 + 5, 2**62 - 1])
    for step, tag, seed in itertools.product((0, 7, MASK), (0, 5, MASK), (0, 2**64 - 1, 0xDEADBEEF12345678)):
        out = torch.zeros(2, 8, dtype=torch.int64)
        words = [torch.tensor([x]) for x in (step, tag, seed & MASK, seed >> 32)]
        cast(Any, _words)[(1,)](out[0], out[1], blocks, *words, N=8)
        counter = [blocks & MASK, blocks >> 32, words[0], words[1]]
        want = fractions(philox4x32(counter, (seed & MASK, seed >> 32)))
        assert torch.equal(out.T, want), (step, tag, seed)


def check_known_answers_of_philox() -> None:
    """Random123's vectors."""
    for known, block, step, tag, seed in (
        ("6627e8d5 e169c58d bc57ac4c 9b00dbd8", 0, 0, 0, 0),
        ("408f276d 41c83b0e a20bc7c6 6d5451fd", -1, MASK, MASK, 2**64 - 1),
    ):
        out = torch.zeros(2, 2, dtype=torch.int64)
        words = [torch.tensor([x]) for x in (step, tag, seed & MASK, seed >> 32)]
        cast(Any, _words)[(1,)](out[0], out[1], torch.tensor([block, block]), *words, N=2)
        assert torch.equal(out.T[:1], fractions([torch.tensor([int(w, 16)]) for w in known.split()]))


def check_the_numbers_are_those_of_the_cpu_kernel() -> None:
    """With sums and products rounded once, as processors do it, bit for bit; else but for the last bits."""
    with on_cpu():
        wide, narrow = (drawn(20_001, parameter=5, step=3, seed=7, dtype=t) for t in (torch.float64, torch.float32))
    got = drawn(20_001, parameter=5, step=3, seed=7)
    assert (got - wide).abs().max() <= 4e-15
    got = drawn(20_001, parameter=5, step=3, seed=7, dtype=torch.float32)
    assert ulps(got, narrow).max() <= 1 and (got != narrow).sum() <= 1
    with rounded_once():
        got = drawn(20_001, parameter=5, step=3, seed=7)
        assert (got != wide).sum() <= 20 and ulps(got, wide).max() <= 1, "ties are rare"


def check_the_ends_of_the_counter() -> None:
    ends = itertools.product((0, MASK), (0, 2**24 - 1), (1, 2**33 - 3, 2**40 + 7, 2**63 - 1501))
    for (step, parameter, start), seed in zip(ends, itertools.cycle((0, 2**64 - 1, 2**32)), strict=False):
        got = drawn(1500, step=step, parameter=parameter, start=start, seed=seed)
        want = gaussian(seed, step=step, parameter=parameter, start=start, numel=1500, dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=0, atol=4e-15)


def check_a_value_does_not_depend_on_its_shard() -> None:
    for dtype in (torch.float32, torch.float64):
        whole = drawn(5_001, start=3, dtype=dtype)
        for a, b in itertools.pairwise((0, 1, 2, 17, 1023, 1024, 1025, 3_333, 5_001)):
            assert torch.equal(drawn(b - a, start=3 + a, dtype=dtype), whole[a:b]), (a, b)


def check_many_tensors_of_all_sizes_at_once() -> None:
    """Sizes that fill no block, that fill one or more, and nothing at all; odd places; division."""
    shapes = [(0,), *((n,) for n in (1, 2, 3, 31, 1023, 1024, 1025, 2048, 2049)), (0, 3), (3, 5, 7), (0,)]
    for dtype, divisor in ((torch.float32, 1437.0), (torch.float64, 1.0)):
        totals = [torch.randn(shape, dtype=dtype) for shape in shapes]
        options: Any = {"parameters": range(9, 9 + len(shapes)), "std": 0.7, "seed": 2**63 + 1, "step": 6}
        options |= {"divisor": divisor, "starts": [n % 3 for n in range(len(shapes))]}
        got, want = [t.clone() for t in totals], [t.clone() for t in totals]
        versions = [t._version for t in got]
        add_gaussian_(got, **options)
        assert all(t._version > v for t, v in zip(got, versions, strict=True))
        with on_cpu():
            add_gaussian_(want, **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-7 if dtype == torch.float32 else 1e-14, atol=1e-7 / divisor)
        noise = torch.cat([t.flatten() for t in got]) - torch.cat([t.flatten() for t in totals]) / divisor
        assert noise.unique().numel() > 0.99 * noise.numel() and (noise != 0).all()


def check_memory_beyond_two_to_the_31() -> None:
    """An address so far before the memory that its elements begin where 2**31 of them would lie."""
    far, values = 2**31, torch.zeros(700)  # where a program begins
    size, address = far + len(values), values.data_ptr() - 4 * far
    begin = -(far // 1024)  # of the tensor's programs: the first that runs is the one of the elements that exist
    head, reals = [3, 7, 0], [1.0, 1.0]
    rows = [[begin, 2], [0, size], [0, 0], [0, 5], [0, address]]
    whole = table.numbers_table(head, reals, rows, CPU)
    options: Any = {"KIND": "mean", "DRAW": True, "GIVEN": 0, "DTYPE": tl.float32, "BLOCK": 1024}
    cast(Any, steps.step_kernel)[(2,)](whole, 2, **options)
    want = gaussian(7, step=3, parameter=5, start=far, numel=700)
    torch.testing.assert_close(values, want, rtol=2e-7, atol=1e-7)


def check_values_that_are_not_finite_stay_in_their_place() -> None:
    got = torch.zeros(5)
    got[1], got[3] = torch.nan, torch.inf
    add_gaussian_([got], parameters=[0], std=1.0, seed=3, step=1, divisor=2.0)
    assert got[1].isnan() and got[3].isinf() and got[[0, 2, 4]].isfinite().all() and (got[[0, 2, 4]] != 0).all()


def check_the_numbers_are_standard_normal_and_independent() -> None:
    """Mean, variance, tails; neighbours, pairs, parameters and steps, and their squares, are not correlated."""
    n = 60_000
    z = torch.stack([drawn(n, parameter=p, step=s, seed=11, dtype=torch.float32) for p, s in ((0, 0), (1, 0), (0, 1))])
    first = z[0]
    assert stats.kstest(first.numpy(), "norm").pvalue > 1e-3
    z = z.double()
    assert (z.mean(1).abs() < 5 / math.sqrt(n)).all() and ((z.var(1) - 1).abs() < 5 * math.sqrt(2 / n)).all()
    for bound in (2.0, 3.0):
        expected = 2 * float(stats.norm.sf(bound)) * n
        assert (((z.abs() > bound).sum(1) - expected).abs() < 5 * math.sqrt(expected)).all()
    near = n - 1024
    rows = torch.stack([*(row[:near] for row in z), *(z[0, lag : near + lag] for lag in (1, 2, 1024))])
    for values in (rows, rows.square()):
        off = torch.corrcoef(values) - torch.eye(len(rows), dtype=torch.float64)
        assert off.abs().max() < 5 / math.sqrt(n), off
    pairs = torch.corrcoef(torch.stack([z[0, ::2], z[0, 1::2]]).square())[0, 1]
    assert abs(pairs) < 5 / math.sqrt(n / 2)


def check_rows_of_correlated_noise_are_those_of_the_cpu_kernel() -> None:
    """More rows than the ring keeps, from one on that is not the first; odd sizes and starts; many factors."""
    for dtype, kept, made, more in ((torch.float32, 3, 2, 5), (torch.float64, 1, 0, 3), (torch.float64, 70, 69, 2)):
        factors = [1.3, *(0.5 / (k + 1) for k in range(kept))]
        rings = [torch.randn(kept, n, dtype=dtype) for n in (1, 1500, 0, 7)]
        options: Any = {"tags": [5, 6, 7, 8], "starts": [0, 3, 0, 2**40 + 1], "factors": factors, "seed": 2**63 + 5}
        options |= {"first": 4, "made": made, "more": more}
        got, want = [r.clone() for r in rings], [r.clone() for r in rings]
        native.rows_(got, **options)
        with on_cpu():
            native.rows_(want, **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=1e-6)


def check_what_the_kernel_does_not_take_gets_the_same_noise() -> None:
    base = [torch.randn(6, 4).t(), torch.randn(4, 6)]
    got = [b.clone(memory_format=torch.preserve_format) for b in base]
    add_gaussian_(got, parameters=[4, 1], std=1.0, seed=3, step=1, divisor=5.0)
    for t, b, p in zip(got, base, (4, 1), strict=True):
        torch.testing.assert_close(t, (b + gaussian(3, step=1, parameter=p, numel=24).view(4, 6)) / 5)
    assert not native.takes([torch.zeros(3, dtype=torch.bfloat16)])
    assert not native.takes([torch.zeros(3), torch.zeros(3, dtype=torch.float64)])


def _told(name: str, replacement: Any, message: str) -> None:
    """With the kernel broken: one warning, and the same noise."""
    want = torch.zeros(1001)
    add_gaussian_([want], parameters=[2], std=1.0, seed=5, step=1)
    own, tried = getattr(steps, name), native._draws_on.tried
    setattr(steps, name, replacement)
    tried.cache_clear()
    try:
        got = torch.zeros(1001)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            add_gaussian_([got], parameters=[2], std=1.0, seed=5, step=1)
            add_gaussian_([torch.zeros(5)], parameters=[2], std=1.0, seed=5, step=2)
        assert [message in str(w.message) for w in caught] == [True], [str(w.message) for w in caught]
        assert ulps(got, want).max() <= 1
    finally:
        setattr(steps, name, own)
        tried.cache_clear()


def check_a_kernel_that_does_not_start_is_left_out() -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no C compiler")

    _told(
        "step_", fail, "do not run on cpu (RuntimeError): the same noise is drawn by torch operations, which is slower"
    )


def check_a_kernel_that_gives_wrong_numbers_is_left_out() -> None:
    own = steps.step_

    def wrong(*arguments: Any, **options: Any) -> None:
        own(*arguments, **{**options, "seed": options["seed"] ^ 1})

    _told("step_", wrong, "give wrong numbers on cpu, so they are not used: the same noise is drawn by torch")
