"""The papers' models have the papers' sizes, and their experiments run, compare answers first, and add up."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

from benchmarks import jobs, run
from benchmarks.cases import find_case
from benchmarks.engines.ours import Ours
from benchmarks.experiments import experiment, opacus_models, vision_models
from benchmarks.paper_models import DATASETS, PAPER, VISION

TRAINED = {"opacus_mnist": 26_010, "opacus_cifar": 605_226, "opacus_embedding": 160_098, "opacus_lstm": 1_081_002}
CELL: dict[str, Any] = {
    "batch": 4, "ratio": 0.5, "times": {"minimum": 1e-3, "median": 2e-3}, "compile": {"seconds": 3.0},
    "memory": {"allocated": 2_000_000},
}  # fmt: skip


def test_the_opacus_papers_models_have_its_numbers_of_parameters() -> None:
    assert set(TRAINED) == set(PAPER) == set(DATASETS)
    for name, wanted in TRAINED.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in find_case(name).make().parameters() if p.requires_grad) == wanted, name


def test_an_lstm_of_one_bias_is_one_of_two_that_has_a_zero() -> None:
    model = find_case("opacus_lstm").make()
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert list(frozen) == ["lstm.bias_hh_l0"] and not frozen["lstm.bias_hh_l0"].any()


@pytest.mark.parametrize("name", [*PAPER, *VISION])
def test_each_has_one_loss_per_example(name: str) -> None:
    with torch.device("meta"):
        case = find_case(f"{name}:batch=3")
        inputs, targets = case.data(case.batch)
        assert case.loss(case.make()(inputs), targets).shape == (3,)


def test_vision_models_are_of_the_papers_sizes() -> None:
    """Without the head: millions as the papers have them (ViT: 86, 307, 632 with a head of 1000 classes)."""
    millions = {"vit_base": 86, "vit_large": 303, "vit_huge": 631, "bit_50x1": 24, "bit_152x4": 928}
    for name, wanted in millions.items():
        with torch.device("meta"):
            found = sum(p.numel() for p in find_case(name).make().parameters())
        assert round(found / 1e6) == wanted, name


def test_epochs_add_up() -> None:
    """60,000 images in batches of 4 are 15,000 steps of 2 ms; a batch that divides nothing ends in one more step."""
    assert opacus_models.epoch("opacus_mnist:batch=4", CELL) == pytest.approx(30)
    assert opacus_models.epoch("opacus_mnist:batch=4", {**CELL, "batch": 59_999}) == pytest.approx(2 * 2e-3)
    assert opacus_models.cumulative("opacus_mnist:batch=4", CELL) == pytest.approx(603)
    assert opacus_models.cumulative("opacus_mnist:batch=4", {**CELL, "compile": {"error": "no"}}) == pytest.approx(600)


def test_a_line_through_two_batches_tells_what_fits() -> None:
    found = {"bytes": 1e6, "1": {"peak": 3e6, "plain_peak": 2e6}, "4": {"peak": 9e6, "plain_peak": 5e6}}
    assert vision_models._peak(found, 3) == 7e6 and vision_models._peak(found, 3, "plain_peak") == 4e6
    assert vision_models._largest(found, 14e6, "peak") == 5  # 3 of state, 1 of what is always there, 2 an image
    assert vision_models._largest(found, 3e6, "peak") == 0
    assert vision_models._points("vit_tiny", found, 10e-3) == [f"vit_tiny:batch={b}" for b in (1, 2)]  # 6e6 are left
    assert vision_models._points("vit_tiny:batch=9", found, 0.0) == ["vit_tiny:batch=9"]


def test_sections_say_what_was_found() -> None:
    point = "opacus_mnist:batch=4"
    text = experiment("opacus_models").section({point: {"compiled": CELL, "ours": {**CELL, "error": "not done"}}})
    assert "2.00 ms, 30.0 s, 3.0 s | not done" in text and "603 s (1.00) | not done" in text
    assert "Titan V" in text and "not checked" in text
    one = {"plain": 0.01, "private": 0.02, "plain_peak": 2e9, "peak": 3e9}
    sized = {"parameters": 5e6, "bytes": 2e7, "title": "", "1": one, "4": {**one, "plain_peak": 5e9, "peak": 9e9}}
    data = {"gpu": "a100", "limit_gb": 2.0, "sized": {"vit_tiny": sized, "bit_50x1": {"error": "no"}}, "ran": {}}
    text = experiment("vision_models").section(data)
    assert "| `vit_tiny` | 5.0M | 0.50 | 5.00, 9.00 | 30, 15 | 38, 19 |" in text and "| `bit_50x1` | no |" in text
    text = experiment("vision_models").section({**data, "ran": {"vit_tiny:batch=4": {"ours": CELL}}})
    assert "4000.0/s, 0.50 (1.0 ms), 2 MB, 3 s" in text


@pytest.mark.full  # a run of its own
def test_whole_steps_are_timed_and_answers_come_first(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, updates = str(tmp_path / "truth.pt"), []
    options = {"model": "tiny", "batch": None, "device": "cpu"}
    jobs.oracle(**options, truth=truth)
    plain = Ours.update
    monkeypatch.setattr(Ours, "update", lambda self: (updates.append(1), plain(self)))
    for update in (False, True):
        updates.clear()
        found = jobs.pair(engine="ours", repeats=3, truth=truth, update=update, backend="eager", path=None, **options)
        assert "error" not in found
        assert len(updates) == (found["times"]["count"] + 1 if update else 0) + 3  # those of the sections


def experiments(folder: pathlib.Path, *words: str) -> dict[str, Any]:
    """What the command line measures, small, uncompiled and in this process."""
    common = ["--parts", "none", "--repeats", "2", "--engines", "compiled,ours", "--backend", "eager", "--inline"]
    run.main([*words, *common, "--output", str(folder), "--threads", "1"])
    return json.loads((folder / "results.json").read_text())["experiments"]


@pytest.mark.slow
def test_epochs_are_measured(tmp_path: pathlib.Path) -> None:
    found = experiments(tmp_path, "--models", "opacus_mnist:batch=2", "--experiments", "opacus_models")
    (cells,) = found["opacus_models"].values()
    assert cells["ours"]["answer_error"] < 1e-3 and cells["compiled"]["ratio"] == 1


@pytest.mark.slow
def test_vision_models_are_sized_and_run(tmp_path: pathlib.Path) -> None:
    words = ["--models", "vit_tiny:batch=2,image=32,depth=1", "--experiments", "vision_models"]
    found = experiments(tmp_path, *words)
    (cells,) = found["vision_models"]["ran"].values()
    assert cells["ours"]["answer_error"] < 1e-3 and cells["ours"]["memory"]["allocated"] > 0
    (sized,) = found["vision_models"]["sized"].values()
    assert sized["4"]["peak"] > sized["1"]["peak"] > sized["bytes"]
