"""The norm operators against float64: on the CPU, on CUDA where there is one, and under Triton's interpreter."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from kernel_cases import CASES, Case, make
from torch import Tensor, nn

from dpcompile import dp_compile, pipeline
from dpcompile.graph.compile import trace_like
from dpcompile.kernels import fused_rates, norms, norms_torch, rounding
from dpcompile.kernels.norms import direct_norm, ghost_norm, ghost_norm_one_hot
from dpcompile.norms.fused import fusible

ROOT = pathlib.Path(__file__).parents[2]
ONE_HOT = [name for name in CASES if name.startswith("index")]


def _no_interpreter() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from importlib.metadata import version

    pair = [tuple(int(n) for n in version(p).split(".")[:2]) for p in ("triton", "numpy")]
    if pair[0] < (3, 7) and pair[1] >= (2, 4):
        return "the interpreter of Triton before 3.7 does not run loops with NumPy from 2.4 on"
    return None


@lru_cache(maxsize=1)
def _interpreted() -> dict[str, dict[str, list[float]]]:
    """One process for all cases."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    script = str(ROOT / "tests/support/kernel_cases.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _got(name: str, rule: str, where: str) -> Tensor:
    if where == "interpreter":
        return torch.tensor(_interpreted()[name][rule], dtype=torch.float64)
    case = make(name)
    rows, cols = case.rows.to(where), case.cols.to(where)
    if case.one_hot:
        return ghost_norm_one_hot(rows, cols).cpu()
    return (direct_norm if rule == "direct" else ghost_norm)(rows, cols).cpu()


WHERE = [
    pytest.param("cpu"),
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
    pytest.param(
        "interpreter",
        marks=[
            pytest.mark.skipif(_no_interpreter() is not None, reason=str(_no_interpreter())),
            pytest.mark.xdist_group("triton"),
            pytest.mark.full,  # a minute in a process of its own
        ],
    ),
]


def _same_place(got: Tensor, truth: Tensor) -> Tensor:
    """Where both are finite; elsewhere neither is."""
    assert torch.equal(got.isfinite(), truth.isfinite())
    return truth.isfinite()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", [n for n in CASES if n not in ONE_HOT])
def test_direct_norms(name: str, where: str) -> None:
    case, got = make(name), _got(name, "direct", where)
    finite = _same_place(got, case.truth())
    assert (got >= case.truth() * (1 - 1e-6))[finite].all()
    assert (got <= case.truth() * 1.002 + _floor(case))[finite].all()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", CASES)
def test_ghost_norms_are_not_below_the_truth_and_close(name: str, where: str) -> None:
    case, got = make(name), _got(name, "ghost", where)
    truth = case.truth()
    finite = _same_place(got, truth)
    assert (got >= truth * (1 - 1e-6))[finite].all()
    assert (got <= truth * 1.002 + _floor(case))[finite].all()


def _floor(case: Case) -> Tensor:
    """Twice what is added where terms cancel to nothing."""
    rows = 1.0 if case.one_hot else case.rows.double().norm(dim=-1)
    return 2.0**-46 * (rows * case.cols.double().norm(dim=-1)).sum(2).square().sum(1)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)])
def test_empty_operands(shape: tuple[int, ...]) -> None:
    b, k, t, p, d = shape
    rows, cols = torch.ones(b, k, t, p), torch.ones(b, k, t, d)
    for operator in (direct_norm, ghost_norm):
        assert torch.equal(operator(rows, cols), torch.zeros(b, dtype=torch.float64))
    index = torch.zeros(b, t, dtype=torch.int64)
    expected = torch.full((b,), float(cols[:1].sum() * t if b else 0), dtype=torch.float64)
    torch.testing.assert_close(ghost_norm_one_hot(index, cols), expected)


def test_float64_stays_float64() -> None:
    rows, cols = torch.randn(3, 2, 70, 5, dtype=torch.float64), torch.randn(3, 2, 70, 9)
    truth = Case(rows, cols).truth()
    for operator in (direct_norm, ghost_norm):
        torch.testing.assert_close(operator(rows, cols), truth, rtol=1e-10, atol=0)
    assert not norms.triton_runs(rows, cols)


def test_products_larger_than_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("blocks")
    for limit in (1, 50, 400, 3000):
        monkeypatch.setattr(norms_torch, "_scratch", lambda _, n=limit: n)
        torch.testing.assert_close(direct_norm(case.rows, case.cols), case.truth(), rtol=1e-3, atol=0)
        torch.testing.assert_close(ghost_norm(case.rows, case.cols), case.truth(), rtol=1e-5, atol=0)


def test_wrong_operands() -> None:
    side, index = torch.ones(2, 1, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"direct_norm takes \[B, K, T, P\] and \[B, K, T, D\], not \[2, 1, 3, 4\] and"
    ):
        direct_norm(side, side[:, :, 1:])
    with pytest.raises(ValueError, match=r"ghost_norm takes \[B, K, T, P\] .* not \[2, 3, 4\]"):
        ghost_norm(side[:, 0], side)
    with pytest.raises(ValueError, match=r"takes an index \[B, T\] and \[B, K, T, D\], not \[2, 2\]"):
        ghost_norm_one_hot(index[:, 1:], side)
    with pytest.raises(ValueError, match="an index of integers, not of torch.float32"):
        ghost_norm_one_hot(index.float(), side)
    with pytest.raises(ValueError, match="real floating-point numbers, not torch.complex64"):
        direct_norm(side, side.to(torch.complex64))
    with pytest.raises(ValueError, match="on one device, not on cpu and meta"):
        torch_device = side.to("meta")
        norms._check_floating("ghost_norm", side, torch_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_registration(dtype: torch.dtype) -> None:
    """Schema, fake implementation and real one agree; symbolic shapes too."""
    rows, cols = torch.randn(3, 2, 5, 4).to(dtype).transpose(0, 1), torch.randn(2, 3, 5, 6).to(dtype)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, first in ((direct_norm, rows), (ghost_norm, rows), (ghost_norm_one_hot, torch.ones(2, 5).long())):
        torch.library.opcheck(operator, (first, cols), test_utils=tests)


def test_a_graph_holds_them_whole() -> None:
    traced = trace_like(
        lambda r, c: direct_norm(r, c) + ghost_norm(r, c), torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 3)
    )
    names = [str(n.target) for n in traced.graph.nodes if n.op == "call_function"]
    assert names == ["dpcompile.direct_norm.default", "dpcompile.ghost_norm.default", "aten.add.Tensor"]


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(9, 6), nn.Linear(6, 5)

    def forward(self, index: Tensor) -> Tensor:
        return self.body(self.embed(index)).tanh()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("rule", ["direct", "ghost"])
def test_rewritten_graphs(rule: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan whose choices say ``fused`` gives the norms of one that does not."""
    plain_plan = pipeline.make_plan

    def fused_plan(*args: Any, **options: Any) -> Any:
        plan = plain_plan(*args, **options)
        return replace(plan, choices=tuple(replace(c, fused=True) for c in plan.choices))

    model, index, results = _Model(), torch.randint(0, 9, (4, 7)), []
    for make_plan in (plain_plan, fused_plan):
        monkeypatch.setattr(pipeline, "make_plan", make_plan)
        private = dp_compile(copy.deepcopy(model), max_grad_norm=0.1, norm=rule, backend=backend)
        private(index).square().flatten(1).mean(1).mean().backward()
        results.append([private.grad_norms, *(p.grad for p in private.parameters())])
    rewritten: Any = private.graph
    used = {str(n.target) for n in rewritten.graph.nodes if "dpcompile" in str(n.target)}
    both = {"dpcompile.ghost_norm.default", "dpcompile.ghost_norm_one_hot.default"}
    used -= {"dpcompile.norms_of_rows.default", "dpcompile.product_with_norms.default"}  # of what is kept in both
    used -= {"dpcompile.clipped_sums_by_index.default", "dpcompile.product.default"}
    used -= {"dpcompile.norms_by_index.default"}  # of the table under "direct"
    assert used == ({"dpcompile.direct_norm.default"} if rule == "direct" else both)
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-7)


def test_what_is_fusible() -> None:
    assert fusible("direct", [None, None]) and not fusible("direct", ["rows"])
    assert fusible("ghost", ["cols"]) and not fusible("ghost", ["cols", None])
    assert not fusible("keep", [None])


@pytest.mark.full
def test_the_package_does_not_need_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import dpcompile.kernels.norms\n"
        "assert not [m for m in sys.modules if m.startswith('dpcompile.kernels.triton')]"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_the_unit_knows_what_torch_may_do(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = {
        p: rounding.gram_unit(1024, torch.float32, p) for p in ("ieee", "tf32x3", rounding.TENSOR_CORE, "tf32", "bf16")
    }
    assert sorted(unit, key=unit.__getitem__) == ["ieee", rounding.TENSOR_CORE, "tf32x3", "tf32", "bf16"]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    before = torch.get_float32_matmul_precision()
    try:
        for precision, expected in (
            ("highest", ("ieee", "ieee")),
            ("high", ("tf32", "tf32")),
            ("medium", ("bf16", "tf32")),
        ):
            torch.set_float32_matmul_precision(precision)
            assert (rounding.products_on(cpu), rounding.products_on(cuda)) == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_rates_are_measured_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fused_rates, "_SHAPES", [(2, 4, 8, 8), (2, 16, 8, 8)])
    timed = []

    def seconds(_: Any, call: Any, *__: object) -> float:
        timed.append(call())
        return 1.0 if len(timed) in (1, 3, 6, 8) else 2.0  # float32: at T = 4 both operators win, at T = 16 they lose

    monkeypatch.setattr(fused_rates.Stopwatch, "seconds", seconds)
    rates = fused_rates.measure_fused_rates("cpu")
    assert len(timed) == 16 and fused_rates.measure_fused_rates("cpu") == rates and len(timed) == 16
    for rule in ("direct", "ghost"):
        assert rates.faster(rule, 3, 9, 9, torch.float32) and not rates.faster(rule, 100, 8, 8, torch.float32)
    assert not rates.faster("direct", 3, 9, 9, torch.float64)
    (path,) = (tmp_path / "dpcompile").iterdir()
    path.write_text("{")
    fused_rates.measure_fused_rates("cpu")
    assert len(timed) == 32
