"""The benchmark's harness on a tiny model, uncompiled and in this process; other libraries need not be there."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

from benchmarks import engines, jobs, layer_models, measure, more_models, oracle, problem, processes, run, worker
from benchmarks.cases import find_case
from benchmarks.engines.ours import Ours
from benchmarks.experiments import EXPERIMENTS, experiment
from benchmarks.experiments.max_batch import largest
from benchmarks.models import CASES
from benchmarks.report import page, summary
from benchmarks.results import Results

pytestmark = pytest.mark.full  # processes of their own

OPTIONS = {"model": "tiny", "batch": None, "device": "cpu", "backend": "eager", "path": None}


@pytest.fixture
def truth(tmp_path: pathlib.Path) -> str:
    path = str(tmp_path / "truth.pt")
    jobs.oracle(model="tiny", batch=None, device="cpu", truth=path)
    return path


class Unclipped(Ours):
    """Wrong: the sums are not clipped."""

    def clip(self) -> None:
        with torch.enable_grad():
            loss = self.problem.case.loss(self.problem.model(self.problem.inputs), self.problem.targets).sum()
            found = torch.autograd.grad(loss, list(self.parameters.values()))
        for p, g in zip(self.parameters.values(), found, strict=True):
            p.grad = g


class Forgetful(Ours):
    """Wrong: one parameter gets nothing."""

    def clip(self) -> None:
        next(iter(self.parameters.values())).grad = None


class Silent(Ours):
    """Wrong: not a number."""

    def clip(self) -> None:
        for p in self.parameters.values():
            p.grad = torch.full_like(p, float("nan"))


@pytest.mark.parametrize("name", ["eager", "compiled", "ours", "ours_budget", "ours_ghost", "ours_instantiate", "vmap"])
def test_engines_give_the_oracles_answer(name: str, truth: str) -> None:
    found = jobs.pair(engine=name, repeats=2, truth=truth, **OPTIONS)
    assert found["answer_error"] < 1e-5
    assert found["times"]["count"] >= 2 and found["ratio"] > 0
    assert found["sections"]["backward"] > 0


@pytest.mark.parametrize("wrong", [Unclipped, Forgetful, Silent])
def test_a_wrong_engine_gets_no_time(wrong: type, truth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "make_engine", lambda name, p, **o: wrong(p, backend="eager"))
    monkeypatch.setattr(jobs, "make_engine", engines.make_engine)
    found = jobs.pair(engine="ours", repeats=2, truth=truth, **OPTIONS)
    assert found["error"].startswith("wrong answer") and "times" not in found


def test_about_half_of_the_examples_are_clipped(truth: str) -> None:
    right = oracle.Truth.load(truth)
    assert 0.3 <= (right.norms > right.max_grad_norm).float().mean() <= 0.5
    assert not torch.allclose(right.clipped["0.weight"], right.plain["0.weight"])


def test_the_oracle_agrees_with_vmap() -> None:
    p = problem.build("tiny")
    truth = oracle.find_truth(p)
    names = list(problem.trainable(p.model))

    def loss(weights: dict[str, Any], x: Any, y: Any) -> Any:
        return p.case.loss(torch.func.functional_call(p.model, weights, (x[None],)), y[None]).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(dict(p.model.named_parameters()), p.inputs, p.targets)
    norms = torch.stack([each[n].flatten(1).square().sum(1) for n in names]).sum(0).sqrt()
    torch.testing.assert_close(truth.norms, norms.detach())
    weights = (truth.max_grad_norm / norms).clamp(max=1)
    for n in names:
        torch.testing.assert_close(truth.clipped[n], torch.einsum("b,b...->...", weights, each[n]).detach())


def test_the_same_seed_makes_the_same_problem() -> None:
    a, b = problem.build("tiny"), problem.build("tiny")
    assert torch.equal(a.inputs, b.inputs)
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_the_peak_is_what_was_allocated() -> None:
    def step() -> None:
        a = torch.ones(1000)
        b = a + 1
        del a
        b.sum()

    assert 8000 <= measure.peak_allocated(step) < 9000
    assert measure.peak_allocated(step) == measure.peak_allocated(step)


def test_steps_take_turns() -> None:
    order: list[str] = []
    times = measure.interleaved([lambda: order.append("a"), lambda: order.append("b")], repeats=3, seconds=0)
    assert order == ["a", "b"] * 3 and [len(t) for t in times] == [3, 3]
    assert len(measure.interleaved([lambda: None], repeats=9, seconds=0, patience=0)[0]) == 3
    assert len(measure.interleaved([lambda: None], repeats=2, most=20)[0]) == 20


def test_memory_of_an_engine(truth: str) -> None:
    found = jobs.memory(engine="ours", truth=truth, **OPTIONS)
    assert found["allocated"] > 0


def test_a_library_that_is_not_there_is_a_cell() -> None:
    job = {
        "call": "benchmarks.jobs:memory",
        "arguments": {"engine": "fastdp", "truth": "", **OPTIONS},
        "threads": torch.get_num_threads(),
    }
    missing = {**job, "call": "benchmarks.no_such_module:f"}
    assert worker.do(missing)["error"].startswith("not installed (No module named")
    assert worker.do(job)["error"].startswith("FileNotFoundError: ")
    assert worker.describe(ImportError("no source path given (--fastdp)")).startswith("not installed (no source path")
    assert worker.describe(ValueError("a  b\n" * 60)) == "ValueError: " + ("a b " * 60)[:77] + "..."


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no model 'mpl'"):
        find_case("mpl")
    with pytest.raises(ValueError, match="gpt:length=3"):
        find_case("gpt:length=3")
    with pytest.raises(ValueError, match="there is no engine 'our'"):
        engines.make_engine("our", problem.build("tiny"), "tiny")
    with pytest.raises(ValueError, match="there is no experiment 'x'"):
        experiment("x")


def test_a_family_takes_sizes() -> None:
    case = find_case("gpt:width=64,context=8,vocabulary=16,depth=1,batch=2")
    inputs, targets = case.data(case.batch)
    assert case.make()(inputs).shape == (2, 8, 16) and targets.shape == (2, 8)


@pytest.mark.parametrize("name", [*CASES, *more_models.MORE_CASES])
def test_models_have_one_loss_per_example(name: str) -> None:
    case = {**CASES, **more_models.MORE_CASES}[name]
    with torch.device("meta"):
        model = case.make()
        inputs, targets = case.data(2)
        if name == "lora":  # makes a tensor from a list on the way
            return
        assert case.loss(model(inputs), targets).shape == (2,)


@pytest.mark.parametrize("name", list(layer_models.LAYERS))
def test_layers_have_one_loss_per_example(name: str) -> None:
    case = find_case(f"{name}:batch=2")
    inputs, targets = case.data(2)
    assert case.loss(case.make()(inputs), targets).shape == (2,)


def test_the_largest_batch_is_below_the_limit() -> None:
    found = largest(engine="eager", limit_gb=2e-6, **OPTIONS)
    used = dict(found["probes"])
    assert used[found["batch"]] <= 2000 and any(b > found["batch"] for b in used)


def test_a_run_from_the_command_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--models", "tiny", "--engines", "ours,opacus_ghost,fastdp", "--backend", "eager", "--inline"]
    words += ["--repeats", "2", "--parts", "time,memory", "--output", str(tmp_path), "--threads", "1"]
    docs = tmp_path / "page.md"
    run.main([*words, "--docs", str(docs)])
    data = json.loads((tmp_path / "results.json").read_text())
    cells = data["models"]["tiny"]["engines"]
    assert cells["compiled"]["ratio"] == 1 and cells["ours"]["answer_error"] < 1e-5
    assert cells["fastdp"]["error"].startswith("not installed")
    assert str(tmp_path) not in docs.read_text()
    first = docs.read_text()
    run.main(["--output", str(tmp_path), "--report-only", "--docs", str(docs)])  # again, from what is stored
    assert docs.read_text() == first and "| dpcompile |" in first
    assert "(page.svg)" in first and (tmp_path / "page.svg").exists() and (tmp_path / "ratios.png").exists()
    with pytest.raises(SystemExit):
        run.main([*words[:-1], "2"])  # another number of threads
    assert "measured under other conditions" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--report-only", "--output", str(tmp_path / "nothing")])
    assert "there are no results" in capsys.readouterr().err


def test_a_worker_process(tmp_path: pathlib.Path) -> None:
    shop = processes.Workshop(tmp_path / "work", threads=1, timeout=120)
    found = shop.run("benchmarks.machine:describe_machine", {"threads": 1}, cold=True)
    assert found["versions"]["torch"] == torch.__version__
    found = shop.run("os:_exit", {"status": 3})
    assert found == {"error": "the process ended with 3"}


STORED: dict[str, Any] = {
    "machine": {
        "cpu": "a CPU", "cores": 2, "memory_gb": 8.0, "gpu": None, "system": "Linux x86_64", "python": "3.11",
        "threads": 2, "versions": {"torch": "2.13.0"},
    },
    "commands": ["python -m benchmarks.run"],
    "models": {
        "mlp": {
            "title": "MLP", "batch": 4, "parameters": 10, "trainable": 10, "clipped": 0.5, "tolerance": 1e-3,
            "engines": {
                "compiled": {
                    "ratio": 1.0, "ratio_median": 1.0,
                    "memory": {"allocated": 100, "parameters": 100, "resident": 4096},
                    "compile": {"seconds": 2.0},
                },
                "ours": {
                    "ratio": 0.95, "ratio_median": 0.94,
                    "memory": {"allocated": 110, "parameters": 100, "resident": 8192},
                    "compile": {"seconds": 3.0},
                },
                "opacus_ew": {"error": "ValueError: a | b"},
            },
        },
        "broken": {"engines": {}, "error": "ValueError: no"},
    },
    "experiments": {
        "recompiles": {
            "steps": 200, "graphs_first": 1, "graphs_last": 1, "first_seconds": 2.0, "slowest_later_seconds": 0.01,
        },
        "ceilings": {
            "mlp": {
                "plain": 0.01, "free": {"extra": 0.0025, "parts": 1},
                "budget": {"extra": 0.01, "parts": 2, "peak": 1.2, "allowed": 1.25},
            },
            "cnn": {"error": "no"},
        },
        "prediction": {
            "mlp": {"plain": 0.01, "private": 0.02, "plain_predicted": 0.0092, "private_predicted": 0.021},
            "cnn": {"error": "no"},
        },
    },
}  # fmt: skip


def test_the_report_of_stored_results(tmp_path: pathlib.Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(STORED))
    text = page(Results(tmp_path / "results.json").data)
    assert "| dpcompile | 0.95 (0.94) |" in text
    assert "| dpcompile | 1.10× (1.05×) |" in text
    assert "| dpcompile | 1.50× (3.0 s) |" in text
    assert "ValueError: a \\| b" in text
    assert "200 physical batches" in text
    assert "| `mlp` | 9.2 | 10.0 | -8% | 21.0 | 20.0 | +5% |" in text
    assert summary({**STORED, "models": {}, "experiments": {}}) == ""


def test_experiments_say_what_they_found() -> None:
    cell = {
        "batch": 4, "ratio": 0.5, "times": {"minimum": 0.002, "median": 0.002},
        "baseline": {"minimum": 1e-3, "median": 1e-3},
        "memory": {"allocated": 2_000_000}, "compile": {"seconds": 3.0}, "answer_error": 1e-6,
    }  # fmt: skip
    points = {"point": {"compiled": cell, "ours": {**cell, "error": "not done"}, "vmap": cell}}
    stored: dict[str, Any] = {
        "curves": {"batch": points},
        "throughput": points,
        "max_batch": {
            "limit_gb": 2.0,
            "device": "cpu",
            "models": {"gpt": {"ours": {"batch": 7}, "vmap": {"error": "no"}}},
        },
        "compile_curves": points,
        "precision": points,
        "overhead": points,
        "layers": points,
        **STORED["experiments"],
    }
    wanted = {
        "curves": "0.50 (2.0 ms), 2 MB | not done", "throughput": "2000/s (0.50)", "max_batch": "| dpcompile | 7 |",
        "compile_curves": "3.0 s", "precision": "error 1e-06", "overhead": "| 2.000 | 1.000 | 1.000 |",
        "layers": "2.00×, 1.00×", "recompiles": "1 in all", "prediction": "-8%",
        "ceilings": "| 10.0 | 2.5 | 0.80 | 10.0 | 0.50 | 1.20× of 1.25× | 2 |",
    }  # fmt: skip
    for name in EXPERIMENTS:
        if name in wanted:
            assert wanted[name] in experiment(name).section(stored[name]), name


def test_an_experiment_runs(tmp_path: pathlib.Path) -> None:
    words = [
        "--models",
        "tiny",
        "--parts",
        "none",
        "--experiments",
        "overhead,recompiles,prediction,ceilings",
        "--quick",
    ]
    run.main([*words, "--backend", "eager", "--inline", "--output", str(tmp_path), "--threads", "1", "--repeats", "2"])
    found = json.loads((tmp_path / "results.json").read_text())["experiments"]
    assert found["recompiles"]["graphs_last"] == found["recompiles"]["graphs_first"]
    assert "error" not in found["overhead"]["tiny"]["ours"] and found["prediction"]["tiny"]["private_predicted"]
    assert found["ceilings"]["tiny"]["budget"]["parts"] >= 1
