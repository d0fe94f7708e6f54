"""The page for the person who must sign: true, whole, and without a secret."""

from __future__ import annotations

import json
import pathlib
import xml.etree.ElementTree
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import labelled, net
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import (
    AdaptiveClip,
    DPCompileError,
    DPOptimizer,
    PoissonLoader,
    PrivacyAccountant,
    PrivacyError,
    dp_compile,
    make_private,
)
from dpcompile.accounting.events import sampled_gaussian
from dpcompile.reporting.report import Report

DELTA = 1e-4


def run(steps: int = 3, **options: Any) -> tuple[Any, DPOptimizer, PoissonLoader]:
    module = net()
    loader = options.pop("loader", None) or DataLoader(TensorDataset(*labelled(83)), batch_size=10)
    options = {"noise_multiplier": 1.5, "seed": 987654321, "backend": "eager", **options}
    model, optimizer, loader = make_private(module, torch.optim.SGD(module.parameters(), lr=0.1), loader, **options)
    for _, (x, y) in zip(range(steps), loader, strict=False):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, loader


def test_what_it_says_is_what_was_done() -> None:
    model, optimizer, loader = run()
    assert optimizer.accountant is not None
    report = optimizer.report(DELTA)
    epsilon = optimizer.accountant.epsilon(DELTA)
    assert (
        report.summary
        == f"The weights of this Sequential are ({epsilon:.4g}, 0.0001)-differentially private for "
        + ("one example, after 3 steps.")
    )
    privacy, data, trained = (report.sections[name] for name in ("Privacy", "Data", "Model"))
    assert privacy["ε"] == f"{epsilon:.4f} at δ = 0.0001, an upper bound"
    assert privacy[f"noise multiplier 1.5, sample rate {10 / 83:g}"] == "3 steps"
    assert privacy["neighbouring datasets"].startswith("zero-out") and privacy["mechanism"] == "Gaussian"
    assert data["examples"] == "83" and data["sampling"].startswith("Poisson, each example with probability 0.12")
    numbers = sum(p.numel() for p in model.parameters())
    assert trained["trained"] == f"{numbers} numbers in {len(list(model.parameters()))} parameters"
    assert trained["C"] == "1" and trained["clipping"] == "flat" and trained["optimizer"] == "SGD, 3 logical steps"
    assert trained["certificate of the last graph"].startswith("SHA-256 ") and report.certificate == str(
        model.certificate
    )
    assert report.sections["Versions"]["torch"] == torch.__version__
    assert dict(report.curve) == {d: optimizer.accountant.epsilon(d) for d, _ in report.curve} and DELTA in dict(
        report.curve
    )
    assert model.report(DELTA) == report
    assert loader.dataset_size == 83


def test_it_holds_no_secret() -> None:
    _, optimizer, _ = run()
    report = optimizer.report(DELTA)
    for text in (report.markdown(), report.json(), report.html(), repr(report)):
        assert "987654321" not in text


def test_a_size_that_is_protected_is_not_told() -> None:
    data = TensorDataset(*labelled(7919))
    loader = PoissonLoader(data, sample_rate=0.001, expected_batch_size=8, physical_batch_size=16, seed=1)
    _, optimizer, _ = run(relation="add_remove", loader=loader)
    report = optimizer.report(0.5)
    assert report.sections["Privacy"]["neighbouring datasets"].startswith("add/remove")
    for text in (report.markdown(), report.json()):
        assert "7919" not in text
    _, optimizer, _ = run(loader=PoissonLoader(data, expected_batch_size=8, physical_batch_size=16, seed=1))
    assert "7919" in optimizer.report(0.5).markdown()


def test_kinds_of_steps_are_counted_together() -> None:
    _, optimizer, _ = run(0)
    assert optimizer.accountant is not None
    for sigma in (1.0, 2.0, 1.0, 2.0):
        optimizer.accountant.step(event=sampled_gaussian(sigma, 0.1))
    privacy = optimizer.report(DELTA).sections["Privacy"]
    assert privacy["noise multiplier 1, sample rate 0.1"] == privacy["noise multiplier 2, sample rate 0.1"] == "2 steps"
    for i in range(20):
        optimizer.accountant.step(event=sampled_gaussian(1 + i / 100, 0.1))
    privacy = optimizer.report(DELTA).sections["Privacy"]
    assert privacy["noise multipliers from 1 to 2, sample rates to 0.1"] == "24 steps, of 21 kinds"


def test_a_delta_that_allows_to_publish_an_example() -> None:
    _, optimizer, _ = run()
    assert any("not below 1 / 83" in text for text in optimizer.report(0.1).not_covered)
    assert not any("not below" in text for text in optimizer.report(0.01).not_covered)


def test_steps_without_noise_are_called_so(tmp_path: pathlib.Path) -> None:
    _, optimizer, _ = run(noise_multiplier=0.0)
    report = optimizer.report(DELTA)
    assert report.summary.endswith("are not differentially private: steps were taken without noise.")
    assert {e for _, e in report.curve} == {float("inf")} and json.loads(report.json())["curve"][0]["epsilon"] == "inf"
    assert "<svg" not in report.html()


def test_c_that_moves_and_cryptographic_noise() -> None:
    _, optimizer, _ = run(max_grad_norm=AdaptiveClip(quantile=0.25), secure=True)
    privacy = optimizer.report(DELTA).sections["Privacy"]
    assert privacy["C"] == "follows the 0.25 quantile of the gradients' norms"
    assert privacy["generator of the noise"].startswith("ChaCha20")
    assert privacy["mechanism"] == "Gaussian, with the count of examples within C"


def test_files(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    _, optimizer, _ = run()
    report = optimizer.report(DELTA, audit="0.3 at 95 %: <b>&")
    for name in ("a.md", "a.json", "a.html"):
        report.save(tmp_path / name)
    assert (tmp_path / "a.md").read_text() == str(report) and "| a lower bound, measured | 0.3 at 95" in str(report)
    assert json.loads((tmp_path / "a.json").read_text())["sections"]["Audit"] == {
        "a lower bound, measured": "0.3 at 95 %: <b>&"
    }
    page = (tmp_path / "a.html").read_text()
    assert "0.3 at 95 %: &lt;b&gt;&amp;" in page and page.count("<svg") == 1 and "http-equiv" not in page
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    xml.etree.ElementTree.fromstring(svg)
    assert report._repr_html_().startswith("<!DOCTYPE html>")
    with pytest.raises(DPCompileError, match=r"(?s)cannot be written to 'a.pdf'.*ends in .md, .json or .html"):
        report.save(tmp_path / "a.pdf")


def test_before_anything_is_compiled_or_attached() -> None:
    model: Any = dp_compile(net(), backend="eager")
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    accountant = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1)
    optimizer = DPOptimizer(inner, model, noise_multiplier=1.0, expected_batch_size=8, seed=3, accountant=accountant)
    report = optimizer.report(DELTA)
    assert report.certificate == "" and "rules of the last graph" not in report.sections["Model"]
    assert any(text.startswith("How batches were drawn") for text in report.not_covered)
    assert "by the loop" in report.sections["Data"]["sampling"]
    with pytest.raises(PrivacyError, match=r"(?s)does not know who steps.*optimizer.report\(delta\)"):
        model.report(DELTA)


def test_what_it_cannot_say_is_refused() -> None:
    model = dp_compile(net(), backend="eager")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, noise_multiplier=1.0, expected_batch_size=8, seed=4
    )
    with pytest.raises(PrivacyError, match=r"(?s)without an accountant.*accountant=PrivacyAccountant\(...\)"):
        optimizer.report(DELTA)
    with pytest.raises(PrivacyError, match="delta is 1.0"):
        optimizer.report(1.0)


def test_cells_keep_their_place() -> None:
    report = Report("t", "s", {"a": {"x|y": "1\n2"}}, [(0.1, 2.0)], "", ["n"])
    assert "| x\\|y | 1 2 |" in report.markdown()
