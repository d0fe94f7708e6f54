"""Figures, pages and per-example gradients: what their messages say to do, tried."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients as one_by_one
from private_steps import X, Y, backward, parts, steps
from remedies import Right, equals, plain, refused
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dpcompile import PrivacyAccountant, dp_compile, per_example_gradients, viz
from dpcompile.module import engine_of

# --- figures --------------------------------------------------------------------------------------------------------


@refused("take those of a batch with examples: model.grad_norms")
def test_norms_of_no_example(told: int) -> Right:
    model, _ = parts()
    backward(model)
    norms = model.grad_norms if told else model.grad_norms[:0]
    return equals(viz.summary(norms, 1.0).examples, 8)


@refused("call the model once, or model.trace(*example_inputs), then look", ways=2)
def test_a_page_before_a_call(told: int, tmp_path: Path) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    if told == 1:
        model(X)
    elif told == 2:
        model.trace(X)
    return equals("weight" in viz.page(model, tmp_path / "graph.html").read_text(), True)


@refused("plot epsilon of an accountant that counts a run's steps alone, when some were taken")
def test_a_figure_of_releases(told: int) -> Right:
    pytest.importorskip("matplotlib")
    accountant = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.3, method="rdp")
    accountant.step(2)
    if not told:
        accountant.compose(dp_accounting.GaussianDpEvent(2.0))
    axes: Any = viz.plot_epsilon(accountant, 1e-5).axes[0]
    return equals(axes.lines[0].get_ydata()[-1], accountant.epsilon(1e-5))


@refused('pip install "dpcompile[viz]"')
def test_a_figure_without_its_package(told: int, monkeypatch: Any) -> Right:
    pytest.importorskip("matplotlib")
    if not told:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        monkeypatch.undo()
    axes: Any = viz.plot_norms(torch.ones(3), 2.0).axes[0]
    return equals(sum(bar.get_height() for bar in axes.patches), 3)


# --- per-example gradients ------------------------------------------------------------------------------------------


def looked_at(model: Any, targets: Any = Y, loss: Any = F.cross_entropy, x: Tensor = X, **options: Any) -> Right:
    """They are those of one backward per example."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="per-example gradients are not private")
        found = per_example_gradients(model, loss, **options)(x, targets)
    each = lambda out, rows: loss(out, targets[rows] if options.get("target_dims", 0) == 0 else targets)  # noqa: E731
    wanted = one_by_one(copy.deepcopy(engine_of(model).module), (x,), {}, each)
    close = [torch.allclose(g.double(), wanted[n], atol=1e-6) for n, g in found.items()]
    return equals(close, [True] * len(options.get("parameters") or wanted))


@refused("look at them in a copy of the model on one rank")
def test_gradients_of_replicas(told: int, one_rank: None) -> Right:
    model: Any = DistributedDataParallel(dp_compile(plain(), backend="eager"))
    if told:
        model = dp_compile(copy.deepcopy(engine_of(model).module), backend="eager")
    return looked_at(model)


@refused("call dp_compile on a copy of the ordinary model, without examples_per_user")
def test_gradients_of_users(told: int) -> Right:
    ordinary = plain()
    model = dp_compile(ordinary, backend="eager", examples_per_user=2)
    return looked_at(dp_compile(copy.deepcopy(ordinary), backend="eager") if told else model)


@refused("give names of parameters that require a gradient, such as 'weight'")
def test_gradients_of_no_parameter(told: int) -> Right:
    return looked_at(dp_compile(plain(), backend="eager"), parameters=["weight" if told else "wieght"])


@refused(
    "per-example gradients are not private: nothing clips them or adds noise. To look at in research; publish "
    "nothing that was computed from them, and choose nothing by them that is published",
    warns=True,
)
def test_gradients_that_are_not_private(told: int) -> Right:
    model, optimizer = parts()
    if not told:
        per_example_gradients(model, F.cross_entropy)
    return steps(model, optimizer)


@refused("give as many of each; target_dims=None for targets that all examples share", ways=2)
def test_gradients_of_other_targets(told: int) -> Right:
    model = dp_compile(plain(), backend="eager")
    if told == 1:
        return looked_at(model, Y)
    weigh = lambda out, w: (out * w).sum()  # noqa: E731
    options: dict[str, Any] = {"target_dims": None} if told else {}
    return looked_at(model, torch.arange(3.0), weigh, **options)


@refused("give one number, a mean or sum over its positions", ways=2)
def test_gradients_of_a_loss_of_several_numbers(told: int) -> Right:
    losses: Any = (lambda out, y: out, lambda out, y: out.mean(), lambda out, y: out.sum())
    return looked_at(dp_compile(plain(), backend="eager"), loss=losses[told])
