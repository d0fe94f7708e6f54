"""Figures of a plan, of epsilon and of gradient norms, each a matplotlib ``Figure``; and the graph as a page.

``pip install "dpcompile[viz]"`` brings matplotlib, which is imported when a figure is made.
"""

from __future__ import annotations

import pathlib
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.accounting.arguments import check_delta
from dpcompile.accounting.composition import composed_epsilon
from dpcompile.errors import DPCompileError, PrivacyError
from dpcompile.module import engine_of
from dpcompile.planning.plan import Plan
from dpcompile.regions.compiled import RegionPlans
from dpcompile.reporting.graph_page import graph_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["NormSummary", "page", "plot_epsilon", "plot_norms", "plot_plan", "summary"]

_POINTS = 24  # of a curve
_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


class NormSummary(NamedTuple):
    """What the norms of some examples are like. Not private."""

    examples: int
    """How many."""
    quantiles: dict[float, float]
    """Share -> the norm that this share does not exceed."""
    clipped: float
    """The share of norms above C."""
    not_finite: int
    """How many are NaN or infinite: such an example has weight 0. They are in nothing else."""


def summary(norms: Tensor, max_grad_norm: float) -> NormSummary:
    """Quantiles, and how many are clipped.

    Args:
        norms: float ``[B]``, as ``model.grad_norms``.
        max_grad_norm: C.

    Raises:
        DPCompileError: there are no finite norms.
    """
    finite = norms.detach().double()[torch.isfinite(norms)]
    if not len(finite):
        raise DPCompileError(
            f"{len(norms)} norms, none of them finite", remedy="take those of a batch with examples: model.grad_norms"
        )
    found = torch.quantile(finite, torch.tensor(_SHARES, dtype=torch.float64, device=finite.device)).tolist()
    clipped = (finite > max_grad_norm).double().mean().item()
    return NormSummary(len(finite), dict(zip(_SHARES, found, strict=True)), clipped, len(norms) - len(finite))


def plot_plan(plan: Plan | RegionPlans) -> Figure:
    """What privacy adds to the backward, by module: FLOPs, and bytes that are held until the clip.

    Args:
        plan: ``model.plan``. Of regions that are equal the first is shown.
    """
    flops: dict[str, float] = defaultdict(float)
    held: dict[str, float] = defaultdict(float)
    for one in plan.plans if isinstance(plan, RegionPlans) else (plan,):
        for choice in one.choices:
            numbers, module = choice.cost.at(one.hints), choice.gradient.name.rpartition(".")[0] or "(the model)"
            flops[module] += max(numbers.flops, 0)
            held[module] += numbers.memory
    modules = list(flops)
    figure = _figure(2, height=1.5 + 0.25 * len(modules), sharey=True)
    for axes, values, title in zip(figure.axes, (flops, held), ("FLOPs", "bytes"), strict=True):
        axes.barh(range(len(modules)), [values[m] for m in modules])
        axes.set(title=f"{title} that privacy adds", yticks=range(len(modules)), yticklabels=modules)
    figure.axes[0].invert_yaxis()
    return figure


def page(model: nn.Module, path: str | pathlib.Path) -> pathlib.Path:
    """The rewritten graph as one HTML file that needs no other, to be explored by module and by line of source.

    Every node with its operands, its shape, how examples lie in it by the proof, and what it is for: norm, clip and
    clipped-sum nodes are marked. Above it the plan, a row for each gradient site; below it the proof. It depends on
    shapes and code alone, as ``model.graph`` does. Of a model in regions it shows the one that was compiled last.

    Args:
        model: a private model that was called, or traced.
        path: of the file; one that is there is written over.

    Returns:
        The path.

    Raises:
        PrivacyError: a model that is not private.
        DPCompileError: nothing is compiled yet.
    """
    transformed = engine_of(model).transformed
    if transformed is None:
        raise DPCompileError(
            "nothing is compiled yet", remedy="call the model once, or model.trace(*example_inputs), then look"
        )
    path = pathlib.Path(path)
    path.write_text(
        graph_page(transformed, transformed.plan.rows(), f"Private graph of {type(model).__name__}"), "utf-8"
    )
    return path


def plot_epsilon(accountant: PrivacyAccountant, delta: float, target: float | None = None) -> Figure:
    """Epsilon at ``delta`` over the steps that were taken, and the target.

    Args:
        accountant: of the run. With "pld" it takes a second or more.
        delta: in (0, 1).
        target: epsilon that was promised; None: no line.

    Raises:
        PrivacyError: a delta outside (0, 1), or an accountant that counts other releases than steps, or no steps.
    """
    check_delta(delta)
    if accountant.releases or not accountant.steps:
        raise PrivacyError(
            "the accountant counts " + ("releases that are no steps" if accountant.releases else "no steps yet"),
            remedy="plot epsilon of an accountant that counts a run's steps alone, when some were taken",
        )
    every = max(accountant.steps // _POINTS, 1)
    taken = sorted({*range(every, accountant.steps, every), accountant.steps})
    spent = [composed_epsilon(_first(accountant.history, n), delta, accountant.method, accountant.relation)
             for n in taken[:-1]]  # fmt: skip
    figure = _figure(1)
    (axes,) = figure.axes
    axes.plot([0, *taken], [0.0, *spent, accountant.epsilon(delta)], marker=".", label="spent")
    if target is not None:
        axes.axhline(target, linestyle="--", color="black", label="target")
        axes.legend()
    axes.set(xlabel="logical steps", ylabel=f"ε at δ = {delta:g}, at most", ylim=(0, None))
    return figure


def plot_norms(norms: Tensor | Sequence[Tensor], max_grad_norm: float) -> Figure:
    """A histogram of one batch's norms, or the quantiles of several batches' over time, and C. Not private.

    Args:
        norms: float ``[B]``, as ``model.grad_norms``; or a sequence of such.
        max_grad_norm: C.

    Raises:
        DPCompileError: there are no finite norms.
    """
    figure = _figure(1)
    (axes,) = figure.axes
    if isinstance(norms, Tensor):
        known = summary(norms, max_grad_norm)
        axes.hist(norms.detach().double()[torch.isfinite(norms)].tolist(), bins=30)
        axes.axvline(max_grad_norm, linestyle="--", color="black")
        axes.set(xlabel="norm before clipping", ylabel="examples", title=f"{100 * known.clipped:.1f} % are clipped")
        return figure
    seen = [summary(batch, max_grad_norm) for batch in norms]
    for share in _SHARES:
        axes.plot([one.quantiles[share] for one in seen], label=f"{100 * share:g} %")
    axes.axhline(max_grad_norm, linestyle="--", color="black", label="C")
    axes.set(xlabel="batch", ylabel="quantiles of norms before clipping", yscale="log")
    axes.legend()
    return figure


def _first(history: Sequence[tuple[float, Any, int]], steps: int) -> list[tuple[float, Any, int]]:
    """The first so many steps of runs of equal ones."""
    found = []
    for sigma, rate, n in history:
        if steps > 0:
            found.append((sigma, rate, min(n, steps)))
        steps -= n
    return found


def _figure(columns: int, *, height: float = 4.0, **options: Any) -> Figure:
    """A figure that no window and no global state knows of, with axes side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DPCompileError("figures need matplotlib", remedy='pip install "dpcompile[viz]"') from None
    figure = Figure(figsize=(6.0 * columns, height), layout="constrained")
    figure.subplots(1, columns, **options)
    return figure
