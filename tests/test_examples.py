"""The example runs as the README says, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import functools
import importlib
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from launching import launch

from dpcompile import calibrate_noise

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
OPTIONS = ["--backend", "eager", "--epochs", "2", "--seed", "0"]
calibrate_once = functools.cache(calibrate_noise)


def digits(monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    """The example, in this process; the module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("train_digits")
    monkeypatch.setattr(sys, "argv", ["train_digits.py", *OPTIONS, *options])
    monkeypatch.setattr("dpcompile.data.calibrated.calibrate_noise", calibrate_once)
    module.main()
    return module


def checkpoint(folder: pathlib.Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt")


def test_the_example_as_a_command(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, str(EXAMPLES / "train_digits.py"), *OPTIONS, "--output-dir", str(tmp_path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].split() == "parameter operation B T p d rule FLOPs bytes why".split()
    assert any(line.startswith("features.3.weight  convolution_backward  288") for line in lines)
    assert any(line.startswith("epsilon 3.000 at delta 0.0001, after 12 steps") for line in lines)
    assert any(line.startswith("test accuracy 0.") for line in lines)
    assert "12/12" in done.stderr and "epsilon=3.00" in done.stderr and "WARNING" not in done.stderr
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    digits(monkeypatch, "--output-dir", str(whole))
    digits(monkeypatch, "--output-dir", str(parts), "--stop-after", "1")
    assert len(checkpoint(parts)["history"]) == 1
    digits(monkeypatch, "--output-dir", str(parts), "--resume", str(parts / "checkpoint.pt"))
    expected, resumed = checkpoint(whole), checkpoint(parts)
    assert resumed["history"] == expected["history"] and len(expected["history"]) == 2
    assert resumed["optimizer"]["dpcompile"] == expected["optimizer"]["dpcompile"]
    assert resumed["loader"] == expected["loader"]
    for part in ("model", "average"):
        for name, value in expected[part].items():
            assert torch.equal(resumed[part][name], value), name


def losses(printed: str) -> tuple[float, float]:
    """Held-out loss before and after."""
    found = re.search(r"held-out loss ([\d.]+) before, ([\d.]+) after", printed)
    assert found, printed
    return float(found[1]), float(found[2])


SMALL = ["--backend", "eager", "--steps", "8", "--layers", "1", "--width", "32", "--seed", "0"]


@pytest.mark.full  # processes of several ranks
def test_the_sharded_example_learns(tmp_path: pathlib.Path) -> None:
    done = launch(2, str(EXAMPLES / "train_fsdp.py"), *SMALL, "--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "2 ranks on cpu" in done.stdout
    assert re.search(r"epsilon (7\.99\d|8\.000) at delta 1e-05, after 8 steps", done.stdout), done.stdout
    before, after = losses(done.stdout)
    assert after < before - 0.3


@pytest.mark.slow
def test_the_sharded_example_stops_on_two_ranks_and_goes_on_on_one(tmp_path: pathlib.Path) -> None:
    script = str(EXAMPLES / "train_fsdp.py")
    small = [*SMALL, "--checkpoint-every", "4", "--output-dir", str(tmp_path)]
    first = launch(2, script, *small, "--stop-after", "4")
    assert first.returncode == 0, first.stderr
    assert "after 4 steps" in first.stdout
    before, between = losses(first.stdout)
    second = launch(1, script, *small, "--resume")
    assert second.returncode == 0, second.stderr
    assert f"from {tmp_path / 'step_000004'}" in second.stdout and "after 8 steps" in second.stdout
    start, after = losses(second.stdout)
    assert abs(start - between) < 2e-3 and after < between < before


@pytest.mark.full  # a model of its own
def test_the_lora_example_learns() -> None:
    pytest.importorskip("peft")
    done = launch(2, str(EXAMPLES / "lora_llama.py"), *SMALL, "--public-steps", "20")
    assert done.returncode == 0, done.stderr
    assert re.search(r"epsilon (7\.99\d|8\.000) at delta 1e-05, after 8 steps", done.stdout), done.stdout
    before, after = losses(done.stdout)
    assert after < before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_accuracy_that_the_readme_promises(
    seed: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits(monkeypatch, "--seed", str(seed), "--epochs", "20", "--output-dir", str(tmp_path))
    last = checkpoint(tmp_path)["history"][-1]
    assert last["accuracy"] >= 0.85 and 2.99 < last["epsilon"] <= 3.0


@pytest.mark.slow
@pytest.mark.parametrize("public", [[], ["--public"]])
def test_losses_do_not_depend_on_the_mesh(public: list[str]) -> None:
    sizes = ["--steps", "2", "--report-every", "1", "--width", "32", "--batch-size", "32", "--physical", "16"]
    meshes: list[list[str]] = [
        [],
        ["--pp", "2"],
        ["--dp", "2", "--pp", "2", "--schedule", "1F1B"],
        ["--dp", "2", "--cp", "2"],
        ["--pp", "2", "--cp", "2"],
    ]
    curves = []
    for ranks, mesh in zip((1, 2, 4, 4, 4), meshes, strict=True):
        command = str(EXAMPLES / "train_parallel.py")
        done = launch(ranks, command, "--backend", "eager", "--seed", "3", *sizes, *mesh, *public)
        assert done.returncode == 0, done.stderr[-3000:]
        curves.append([float(x) for x in re.findall(r"held-out loss ([\d.]+)", done.stdout)])
    assert len(curves[0]) == 2 and curves[0][1] < curves[0][0]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-4)
