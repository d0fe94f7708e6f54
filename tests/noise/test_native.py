"""The C++ kernel against the torch operations that define the noise, and the fused step against torch's own."""

from __future__ import annotations

import ctypes
import itertools
import warnings
from typing import Any, cast

import pytest
import torch
from fakes import PrivateModel, engine_of
from scipy import stats

from dpcompile.kernels import build
from dpcompile.kernels import gaussian as native
from dpcompile.noise.counter import Stream, counter_tag
from dpcompile.noise.mechanism import privatize_
from dpcompile.noise.normal import add_gaussian_, box_muller, fractions, gaussian
from dpcompile.optim import optimizer as optim
from dpcompile.optim import update
from dpcompile.optim.optimizer import DPOptimizer


def drawn(numel: int, *, parameter=0, step=0, seed=1, start=0, dtype=torch.float64, threads=1) -> torch.Tensor:
    """Standard normal numbers straight from the kernel, from any element on."""
    out = torch.zeros(numel, dtype=dtype)
    library = native._library()
    assert library is not None
    count, memory, _, sizes, tags = native._spans([out], [out], [counter_tag(Stream.GRADIENT, parameter)])
    numbers = native._numbers(out, 1.0, 1.0, seed, step)
    library.dp_mean(count, memory, (ctypes.c_int64 * 1)(start), sizes, tags, *numbers, ctypes.c_int(threads))
    return out


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    kind = torch.int64 if a.dtype == torch.float64 else torch.int32
    return (a.view(kind) - b.view(kind)).abs()


@pytest.fixture
def without_kernel(monkeypatch):
    monkeypatch.setattr(native, "takes", lambda tensors: False)


def test_a_million_values_are_those_of_torch():
    wide = gaussian(7, step=3, parameter=5, numel=1_000_000, dtype=torch.float64)
    got = drawn(1_000_000, seed=7, step=3, parameter=5)
    assert ulps(got, wide).max() <= 4 and (ulps(got, wide) > 2).float().mean() < 0.01
    narrow = drawn(1_000_000, seed=7, step=3, parameter=5, dtype=torch.float32)
    assert ulps(narrow, wide.float()).max() <= 1 and (narrow != wide.float()).sum() <= 3


SEEDS = (0, 2**64 - 1, 2**32, 0xDEADBEEF12345678)


@pytest.mark.parametrize(
    ("step", "parameter", "start"),
    list(
        itertools.product(
            (0, 2**31, 2**32 - 1), (0, 2**24 - 1), (0, 1, 5, 2**33 - 700, 2**33 - 3, 2**40 + 7, 2**63 - 1501)
        )
    ),
)
def test_the_ends_of_the_counter(step, parameter, start):
    """Odd starts, a carry into the high word of the block's number, the largest step, parameter and element."""
    for seed in SEEDS:
        place: Any = {"step": step, "parameter": parameter, "start": start, "seed": seed}
        got = drawn(1500, **place)
        want = gaussian(seed, step=step, parameter=parameter, start=start, numel=1500, dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


MASK = 2**32 - 1


@pytest.mark.parametrize(
    ("words", "block", "step", "tag", "seed"),
    [
        ("6627e8d5 e169c58d bc57ac4c 9b00dbd8", 0, 0, 0, 0),
        ("408f276d 41c83b0e a20bc7c6 6d5451fd", 2**64 - 1, MASK, MASK, 2**64 - 1),
        ("d16cfe09 94fdcceb 5001e420 24126ea1", 0x85A308D3_243F6A88, 0x13198A2E, 0x03707344, 0x299F31D0_A4093822),
    ],
)
def test_known_answers_of_philox_come_through(words, block, step, tag, seed):
    """Random123's vectors: the kernel's two numbers of a block are those of the known words."""
    out, library = torch.zeros(2, dtype=torch.float64), native._library()
    assert library is not None
    want = box_muller(fractions([torch.tensor([int(w, 16)]) for w in words.split()]))
    found = library.dp_block(ctypes.c_uint64(block), ctypes.c_uint32(step), ctypes.c_uint32(tag), ctypes.c_uint64(seed),
                             ctypes.c_void_p(out.data_ptr()))  # fmt: skip
    assert found == 2
    torch.testing.assert_close(out, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_depends_on_neither_shard_nor_threads(dtype):
    whole = drawn(70_001, start=3, dtype=dtype)
    assert torch.equal(drawn(70_001, start=3, dtype=dtype, threads=3), whole)
    for a, b in itertools.pairwise((0, 1, 2, 17, 511, 512, 513, 1025, 16_384, 33_333, 70_001)):
        assert torch.equal(drawn(b - a, start=3 + a, dtype=dtype), whole[a:b])


def test_the_numbers_are_standard_normal_to_the_tails():
    z = drawn(1_000_000, dtype=torch.float32, seed=11)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert abs(z.double().mean()) < 4e-3 and abs(z.double().var() - 1) < 4 * 2**0.5 * 1e-3
    for bound in (3.0, 4.0):
        expected = 2 * stats.norm.sf(bound) * 1e6
        assert abs((z.abs() > bound).sum() - expected) < 4 * expected**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divisor", [1.0, 8.0, 1437.0])
def test_many_tensors_of_all_sizes_at_once(dtype, divisor, monkeypatch):
    shapes = [(n,) for n in range(1, 120)] + [(0,), (40_001,), (3, 5, 7)]
    totals = [torch.randn(shape, dtype=dtype) for shape in shapes]
    options: Any = {"parameters": range(9, 9 + len(shapes)), "std": 0.7, "seed": 2**63 + 1, "step": 6}
    got, want = [t.clone() for t in totals], [t.clone() for t in totals]
    versions = [t._version for t in got]
    add_gaussian_(got, **options, divisor=divisor)
    assert all(t._version > v for t, v in zip(got, versions, strict=True))  # the ledger sees writes by it
    with monkeypatch.context() as patch:
        patch.setattr(native, "takes", lambda tensors: False)
        add_gaussian_(want, **options, divisor=divisor)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=4e-7 if dtype == torch.float32 else 1e-14, atol=1e-7 / divisor)
    noise = torch.cat([t.flatten() for t in got]) - torch.cat([t.flatten() for t in totals]) / divisor
    assert noise[noise != 0].unique().numel() > 0.99 * noise.numel()  # no number for two elements


def test_other_strides_and_narrow_memory_are_left_to_torch(without_kernel):
    base = [torch.randn(6, 4).t(), torch.randn(4, 6)]
    want = [t.clone() for t in base]
    add_gaussian_(want, parameters=[0, 1], std=1.0, seed=3, step=1, divisor=5.0)
    assert all(t.isfinite().all() for t in want)


def test_strided_and_dense_together_get_their_own_noise(monkeypatch):
    base = [torch.randn(6, 4).t(), torch.randn(4, 6)]
    got = [b.clone(memory_format=torch.preserve_format) for b in base]
    add_gaussian_(got, parameters=[4, 1], std=1.0, seed=3, step=1, divisor=5.0)
    for t, b, p in zip(got, base, (4, 1), strict=True):
        z = gaussian(3, step=1, parameter=p, numel=24).view(4, 6)
        torch.testing.assert_close(t, (b + z) / 5)


def test_no_noise_is_stored():
    """What torch allocates in a step of the mechanism does not grow with the parameters."""
    total = torch.zeros(300_000)
    with torch.profiler.profile(profile_memory=True) as profile:
        privatize_([total], parameters=[0], std=1.0, expected_batch_size=3.0, seed=0, step=0)
    assert max((abs(e.self_cpu_memory_usage) for e in profile.key_averages()), default=0) < 4096


def test_without_a_compiler_one_warning_and_the_same_noise(monkeypatch):
    want = torch.zeros(1001)
    add_gaussian_([want], parameters=[2], std=1.0, seed=5, step=1)

    def fail(source: str, **options: bool) -> None:
        raise RuntimeError("no compiler")

    native._library.cache_clear()
    monkeypatch.setattr(build, "compile_cpp", fail)
    try:
        got = torch.zeros(1001)
        with pytest.warns(
            UserWarning, match=r"could not be compiled \(RuntimeError\): the same noise is drawn by torch"
        ):
            add_gaussian_([got], parameters=[2], std=1.0, seed=5, step=1)
        assert ulps(got, want).max() <= 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            add_gaussian_([got], parameters=[2], std=1.0, seed=5, step=2)
    finally:
        native._library.cache_clear()


# ---- the fused step


def trained(
    monkeypatch, inner, *, fused: bool, sigma=1.0, steps=3, dtype=torch.float32
) -> tuple[PrivateModel, DPOptimizer]:
    monkeypatch.setattr(optim, "engine_of", engine_of)
    generator = torch.Generator().manual_seed(3)
    sizes = (33, 700, 1)
    model = PrivateModel(**cast(Any, {f"p{n}": torch.randn(n, generator=generator, dtype=dtype) for n in sizes}))
    private = DPOptimizer(inner(model), model, noise_multiplier=sigma, expected_batch_size=3.0, seed=0)
    with monkeypatch.context() as patch:
        called = []
        original = update.fused_adam.update_
        if not fused:
            patch.setattr(update.fused_adam, "update_", lambda *_, **__: False)
        else:
            patch.setattr(update.fused_adam, "update_", lambda *a, **k: called.append(original(*a, **k)) or called[-1])
        for _ in range(steps):
            model.engine.deliver(**{f"p{n}": torch.randn(n, generator=generator, dtype=dtype) for n in sizes})
            private.step()
            private.zero_grad()
        assert called == [True] * steps * fused
    return model, private


def _groups(model: PrivateModel) -> list[dict]:
    first, *rest = model.parameters()
    return [{"params": [first], "lr": 0.01, "weight_decay": 0.0}, {"params": rest}]


ADAMS = {
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.1),
    "adam, l2": lambda m: torch.optim.Adam(m.parameters(), lr=0.1, weight_decay=0.3, betas=(0.5, 0.7)),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.2, eps=1e-3),
    "adamw, fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, fused=True),
    "adamw, tensor lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.1, dtype=torch.float64)),
    "adamw, groups": lambda m: torch.optim.AdamW(_groups(m), lr=0.1),
}


@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inner", ADAMS.values(), ids=ADAMS)
def test_the_fused_step_is_the_inner_optimizers(monkeypatch, inner, sigma, dtype):
    ours, one = trained(monkeypatch, inner, fused=True, sigma=sigma, dtype=dtype)
    theirs, two = trained(monkeypatch, inner, fused=False, sigma=sigma, dtype=dtype)
    tolerance: Any = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(one.state[a][name], two.state[b][name], **tolerance)


class Other(torch.optim.AdamW):
    pass


def hooked(model: PrivateModel) -> torch.optim.Optimizer:
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    inner.register_step_post_hook(lambda *_: None)
    return inner


def replaced(model: PrivateModel) -> torch.optim.Optimizer:
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    inner.step = inner.step  # as one that was compiled would be
    return inner


@pytest.mark.parametrize(
    "inner",
    [
        lambda m: Other(m.parameters(), lr=0.1),
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, amsgrad=True),
        lambda m: torch.optim.Adam(m.parameters(), lr=0.1, maximize=True),
        lambda m: torch.optim.NAdam(m.parameters(), lr=0.1),
        hooked,
        replaced,
    ],
)
def test_what_is_not_plain_adam_is_stepped_by_itself(monkeypatch, inner):
    calls = []
    original = update.fused_adam.update_
    monkeypatch.setattr(optim, "engine_of", engine_of)
    model = PrivateModel(a=torch.zeros(5))
    private = DPOptimizer(inner(model), model, noise_multiplier=1.0, expected_batch_size=2.0, seed=0)
    monkeypatch.setattr(update.fused_adam, "update_", lambda *a, **k: calls.append(original(*a, **k)) or calls[-1])
    model.engine.deliver()
    private.step()
    assert calls == [False] and model.a.detach().abs().min() > 0


def test_schedulers_on_the_inner_optimizer_see_the_fused_step(monkeypatch):
    monkeypatch.setattr(optim, "engine_of", engine_of)
    model = PrivateModel(a=torch.zeros(5))
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1)
    private = DPOptimizer(inner, model, noise_multiplier=1.0, expected_batch_size=2.0, seed=0)
    model.engine.deliver()
    private.step()
    scheduler.step()  # warns if no step came before
    assert inner.param_groups[0]["lr"] == pytest.approx(0.01)
