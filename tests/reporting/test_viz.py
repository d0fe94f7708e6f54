"""Figures: what they show is what was computed."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dpcompile import DPCompileError, PrivacyAccountant, PrivacyError, dp_compile, viz

pytest.importorskip("matplotlib")


def drawn(figure: Any) -> Any:
    figure.savefig(io.BytesIO(), format="svg")
    return figure.axes


@pytest.mark.parametrize("regions", [None, "blocks"])
def test_a_plan_by_module(regions: str | None) -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model: Any = dp_compile(net, backend="eager", regions=regions, norm="ghost")
    model.trace(torch.randn(8, 5))
    flops, held = drawn(viz.plot_plan(model.plan))
    plans = [model.plan] if regions is None else model.plan.plans
    wanted = sum(c.cost.at(p.hints).memory for p in plans for c in p.choices)
    assert sum(bar.get_width() for bar in held.patches) == pytest.approx(wanted) and wanted > 0
    assert {label.get_text() for label in flops.get_yticklabels()} == {"0", "2"}


def test_epsilon_over_steps() -> None:
    accountant = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.05, method="rdp")
    with pytest.raises(PrivacyError, match="counts no steps yet"):
        viz.plot_epsilon(accountant, 1e-5)
    seen = {0: 0.0}
    for _ in range(60):
        accountant.step(1)
        seen[accountant.steps] = accountant.epsilon(1e-5)
    (axes,) = drawn(viz.plot_epsilon(accountant, 1e-5, target=3.0))
    curve, target = axes.lines
    for steps, epsilon in zip(*curve.get_data(), strict=True):
        assert epsilon == pytest.approx(seen[int(steps)], rel=1e-6)
    assert curve.get_xdata()[-1] == 60 and set(target.get_ydata()) == {3.0}


def test_norms() -> None:
    norms = torch.tensor([*np.linspace(0.0, 2.0, 101), float("nan")])
    known = viz.summary(norms, 1.5)
    assert (known.examples, known.not_finite) == (101, 1)
    assert known.quantiles[0.5] == pytest.approx(1.0) and known.quantiles[0.95] == pytest.approx(1.9)
    assert known.clipped == pytest.approx(25 / 101)
    (axes,) = drawn(viz.plot_norms(norms, 1.5))
    assert sum(bar.get_height() for bar in axes.patches) == 101 and axes.get_title() == "24.8 % are clipped"
    (axes,) = drawn(viz.plot_norms([norms, 2 * norms], 1.5))
    assert len(axes.lines) == 6 and list(axes.lines[2].get_ydata()) == pytest.approx([1.0, 2.0])
    with pytest.raises(DPCompileError, match="1 norms, none of them finite"):
        viz.summary(torch.tensor([float("inf")]), 1.0)


def test_without_matplotlib(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DPCompileError, match=r'figures need matplotlib\n.*pip install "dpcompile\[viz\]"'):
        viz.plot_norms(torch.ones(3), 1.0)
