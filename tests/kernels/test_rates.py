"""Rates of the machine: measured, kept, bettered."""

import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from dpcompile import dp_compile
from dpcompile import rates as command
from dpcompile.kernels import paces as pacing
from dpcompile.kernels import rates
from dpcompile.kernels.measured import Stopwatch

CPU = torch.device("cpu")
PACES = {
    "large": 1.0, "each": 1.0, "narrow": 0.5, "each, narrow": 0.5, "each, widened": 1.0,
    "convolution": 1.0, "grouped": 2.0, "filters": 1.0,
    "moved": 3.0, "written": 3.0, "written, fresh": 5.0, "call": 7.0,
}  # fmt: skip


class Clock:
    """Time that passes as it is told to, once for every run."""

    def __init__(self, *times: float) -> None:
        self.times, self.now, self.running = iter(times), 0.0, False

    def __call__(self) -> float:
        """Every second call is the end of a run."""
        self.now += next(self.times) if self.running else 0.0
        self.running = not self.running
        return self.now


def test_the_least_time_of_runs_that_agree() -> None:
    """The first warms up, and six are taken at least."""
    watch = Stopwatch(Clock(9, 0.02, 0.05, 0.011, 0.01, 0.04, 0.0105))
    assert watch.seconds(lambda: None, CPU) == pytest.approx(0.01) and not watch.busy


def test_more_runs_where_few_agree() -> None:
    """Until three do."""
    watch = Stopwatch(Clock(9, *[0.01, 0.02, 0.03, 0.02, 0.03, 0.02], 0.0101, 0.03, 0.0105))
    assert watch.seconds(lambda: None, CPU) == pytest.approx(0.01) and not watch.busy


def test_patience_ends() -> None:
    watch = Stopwatch(Clock(9, *[0.1 * 1.2**n for n in range(7)]))
    assert watch.seconds(lambda: None, CPU) == pytest.approx(0.1) and watch.busy


@pytest.fixture
def place(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """Where they are kept, and nothing known."""
    monkeypatch.setenv(rates.VARIABLE, str(tmp_path / "sub" / "rates.json"))
    rates._rates.cache_clear()
    yield tmp_path / "sub" / "rates.json"
    rates._rates.cache_clear()


class Machine:
    """What it gives, time after time, and whether it was busy; the last for ever."""

    def __init__(self) -> None:
        self.script: list[dict[str, Any]] = [{}]
        self.calls = 0

    def paces(self, _: torch.device, watch: Stopwatch) -> dict[str, float]:
        """In place of what is measured."""
        now = self.script[min(self.calls, len(self.script) - 1)]
        self.calls += 1
        watch.busy = now.get("busy", False)
        return {**PACES, **{name: value for name, value in now.items() if name in PACES}}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that does what it is told."""
    made = Machine()
    monkeypatch.setattr(rates, "paces", made.paces)
    return made


def again() -> rates.Rates:
    """As another process would ask."""
    rates._rates.cache_clear()
    return rates.rates_for(CPU)


def test_rates_are_measured_once_and_kept(place: pathlib.Path, machine: Machine) -> None:
    """A file that says nothing is written anew."""
    known = again()
    assert (known.large, known.narrow, known.grouped, known.traffic, known.fresh, known.call) == (
        1,
        2,
        0.5,
        1 / 3,
        0.5,
        7,
    )
    assert again() == known and machine.calls == 1 and rates.settled(CPU)
    name = next(iter(json.loads(place.read_text())))
    whole = json.loads(place.read_text())[name]
    wrong = [
        {**whole, "format": 1},
        {**whole, "paces": {}},
        {**whole, "paces": {**PACES, "large": -1}},
        {"large": 1},
        3,
    ]
    for i, broken in enumerate(["not json", "[]", *(json.dumps({name: entry}) for entry in wrong)]):
        place.write_text(broken)
        assert again() == known and machine.calls == i + 2


def test_what_a_busy_machine_gave_is_bettered(place: pathlib.Path, machine: Machine) -> None:
    """By the next processes, kind by kind, until one finds it quiet."""
    machine.script = [
        {"busy": True, "large": 8.0, "moved": 4.0},
        {"busy": True, "large": 4.0, "moved": 9.0},
        {"busy": False},
    ]
    found = [again() for _ in range(4)]
    assert [1 / r.large for r in found] == [8, 4, 1, 1] and [1 / r.traffic for r in found] == [4, 4, 3, 3]
    assert machine.calls == 3 and rates.settled(CPU)


def test_a_machine_that_is_always_busy_is_measured_some_times(place: pathlib.Path, machine: Machine) -> None:
    machine.script = [{"busy": True}]
    settled = []
    for _ in range(8):
        again()
        settled.append(rates.settled(CPU))
    assert machine.calls == 5 and settled == [False] * 4 + [True] * 4


@pytest.mark.parametrize(("own", "each", "taken"), [(0.5, 0.5, True), (0.5, 0.95, False), (0.95, 0.5, False)])
def test_another_library_is_taken_where_it_is_quicker_for_both(own: float, each: float, taken: bool) -> None:
    found = rates.rates_from({**PACES, "large, own": own, "each, own": each})
    assert found.own_products is taken and found.batched == (1 / each if taken else 1.0)


@pytest.mark.parametrize(("narrow", "taken"), [(0.5, True), (0.95, False), (None, False)])
def test_narrow_products_are_taken_where_they_are_quicker(narrow: float | None, taken: bool) -> None:
    """Not where the processor only imitates them, or torch has none."""
    known = {name: pace for name, pace in PACES.items() if name != "each, narrow"}
    found = rates.rates_from(known if narrow is None else {**known, "each, narrow": narrow})
    assert found.narrow_products is taken and found.narrow_batched == (2.0 if taken else 1.0) and found.widened == 1.0


def test_the_least_of_every_kind() -> None:
    assert pacing.least({"a": 1.0, "b": 2.0}, {"b": 1.5, "c": 3.0}) == {"a": 1.0, "b": 1.5, "c": 3.0}


def test_the_command(
    place: pathlib.Path,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It prints what is kept, and measures again when asked."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["rates", *arguments])
        rates._rates.cache_clear()
        command.main()
        return capsys.readouterr().out

    machine.script = [{"busy": True, "large": 2e-9}, {"busy": False, "large": 1e-9}]
    assert re.search(r"^large +0.5 GFLOP/s$", run(), re.M) and not rates.settled(CPU)
    text = run("--remeasure")
    assert re.search(r"^large +1 GFLOP/s$", text, re.M) and re.search(r"^call +7e\+06 us$", text, re.M)
    assert "not final" not in text and "not final" not in run() and machine.calls == 2


def test_rates_are_those_of_real_tensors(place: pathlib.Path) -> None:
    """Asked for in the middle of tracing, where tensors are fake and cost nothing."""
    private: Any = dp_compile(nn.Linear(3, 3), backend="eager")
    private.trace(torch.randn(2, 3))
    (entry,) = json.loads(place.read_text()).values()
    found = rates.rates_from(entry["paces"])
    assert 1e7 < found.large < 1e13 and 1e7 < found.batched < 1e13
