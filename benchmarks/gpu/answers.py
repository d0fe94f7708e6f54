"""Right answers on the device: kernels against float64, models against one backward per example, and noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.engines import make_engine
from benchmarks.oracle import find_truth, how_wrong
from benchmarks.problem import build
from dpcompile.kernels.norms import direct_norm, ghost_norm, ghost_norm_one_hot
from dpcompile.kernels.precision import full_precision
from dpcompile.kernels.product_op import product_norms, product_with_norms
from dpcompile.noise.normal import gaussian

__all__ = ["kernels", "models", "noise", "suite"]

Steps = dict[str, Callable[[], Mapping[str, Any]]]


def kernels(device: str) -> Steps:
    """Every norm operator on every case of the tests (tests/support/kernel_cases.py), against float64 on the CPU."""
    from kernel_cases import CASES, make  # type: ignore[import-not-found]

    def one(name: str, rule: str) -> Callable[[], Mapping[str, Any]]:
        def take() -> Mapping[str, Any]:
            case = make(name)
            rows, cols = case.rows.to(device), case.cols.to(device)
            found = _OPERATORS[rule](rows, cols).double().cpu()
            return _compared(found, case.truth())

        return take

    steps: Steps = {}
    for name in CASES:
        hot = make(name).one_hot
        for rule in _OPERATORS:
            if hot == (rule == "one_hot") and not (rule.startswith("product") and "mixed" in name):
                steps[f"{rule}, {name}"] = one(name, rule)
    return steps


def _compared(found: Tensor, truth: Tensor) -> Mapping[str, Any]:
    """Never below the true norm but by rounding; above it by little; not finite where it is not."""
    finite = truth.isfinite()
    same = bool((found.isfinite() == finite).all())
    ratio = (found[finite] / truth[finite].clamp_min(1e-30)).where(truth[finite] > 0, 1.0)
    low, high = (float(f(ratio)) if len(ratio) else 1.0 for f in (torch.min, torch.max))
    return {"lowest": low, "highest": high, "right": same and low >= 1 - 1e-5}


_OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "direct": direct_norm,
    "ghost": ghost_norm,
    "one_hot": ghost_norm_one_hot,
    "product_norms": product_norms,
    "product_with_norms": lambda rows, cols: product_with_norms(rows, cols, False)[1],
}


def models(device: str, names: list[str], batch: int, backend: str) -> Steps:
    """The benchmarks' models: clipped sums against one backward per example."""

    def one(name: str) -> Callable[[], Mapping[str, Any]]:
        def take() -> Mapping[str, Any]:
            torch.compiler.reset()
            problem = build(name, batch=batch, device=device)
            truth = find_truth(problem)
            problem = build(name, batch=batch, device=device, max_grad_norm=truth.max_grad_norm)
            engine = make_engine("ours", problem, model=name, backend=backend, dynamic=False)
            engine.step()
            error = how_wrong(engine.gradients(), truth, private=True)
            return {"error of the sums": error, "right": error <= truth.tolerance}

        return _exactly(take)

    return {name: one(name) for name in names}


def suite(device: str, count: int, backend: str) -> Steps:
    """The first ``count`` models of the test suite (tests/models), against one backward per example."""
    import oracle  # type: ignore[import-not-found]
    from models import ZOO  # type: ignore[import-not-found]

    from dpcompile import dp_compile

    def one(case: Any) -> Callable[[], Mapping[str, Any]]:
        def take() -> Mapping[str, Any]:
            torch.compiler.reset()
            torch.manual_seed(1)
            model = case.make().to(device)
            args, kwargs = pytree.tree_map(_to(device), case.call(5, torch.float32))
            loss = oracle.PseudoLoss(5, case.out_dim)
            gradients = oracle.per_example_gradients(model, args, kwargs, loss, in_dims=case.in_dims)
            gradients = {n: g.cpu() for n, g in gradients.items()}
            bound = 1.01 * float(oracle.clip(gradients, 1.0).norms.median())
            truth = oracle.clip(gradients, bound)
            truth = oracle.Truth(truth.norms.to(device), {n: g.to(device) for n, g in truth.sums.items()}, truth.scale)
            private: Any = dp_compile(
                copy.deepcopy(model), max_grad_norm=bound, in_dims=case.in_dims, backend=backend, dynamic=False
            )
            oracle.train_step(private, args, kwargs, loss, reduction="mean")
            oracle.assert_right(private, truth, 1e-3)
            return {"right": True}

        return _exactly(take)

    return {case.name: one(case) for case in ZOO[:count]}


def _exactly(take: Callable[[], Mapping[str, Any]]) -> Callable[[], Mapping[str, Any]]:
    """Without TF32, which torch allows convolutions by default: its digits are not enough to compare."""

    def exact() -> Mapping[str, Any]:
        with full_precision():
            return take()

    return exact


def _to(device: str) -> Callable[[Any], Any]:
    return lambda value: value.to(device) if isinstance(value, Tensor) else value


def noise(device: str, numel: int) -> Steps:
    """Moments and tails of the noise, its agreement with the CPU's, and that no two draws are related."""

    def moments() -> Mapping[str, Any]:
        x = gaussian(1, step=0, parameter=0, numel=numel, device=device).double()
        mean, var = float(x.mean()) * math.sqrt(numel), float(x.var() - 1) * math.sqrt(numel / 2)
        third = float((x**3).mean()) * math.sqrt(numel / 15)
        fourth = float((x**4).mean() - 3) * math.sqrt(numel / 96)
        sigmas = [mean, var, third, fourth]
        return {"sigmas off": ", ".join(f"{s:.2f}" for s in sigmas), "right": all(abs(s) < 5 for s in sigmas)}

    def tails() -> Mapping[str, Any]:
        x = gaussian(2, step=0, parameter=0, numel=numel, device=device).abs()
        worst = 0.0
        for bound in (1.0, 2.0, 3.0):
            p = math.erfc(bound / math.sqrt(2))
            worst = max(worst, abs(float((x > bound).double().mean()) - p) / math.sqrt(p * (1 - p) / numel))
        return {"sigmas off": f"{worst:.2f}", "right": worst < 5}

    def same() -> Mapping[str, Any]:
        there = gaussian(3, step=5, parameter=2, numel=4097, start=11, device=device).cpu()
        here = gaussian(3, step=5, parameter=2, numel=4097, start=11)
        gap = float((there - here).abs().max())
        return {"largest difference from the CPU's": gap, "right": gap < 1e-5}

    def unrelated() -> Mapping[str, Any]:
        draws = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]
        x = torch.stack([gaussian(s, step=t, parameter=p, numel=numel, device=device) for s, t, p in draws]).double()
        worst = float((x @ x.mT / numel - torch.eye(4, device=device, dtype=x.dtype)).triu(1).abs().max())
        return {"sigmas off": f"{worst * math.sqrt(numel):.2f}", "right": worst * math.sqrt(numel) < 6}

    return {"moments": moments, "tails": tails, "as on the CPU": same, "seeds, steps and parameters": unrelated}
