"""The line that says what a wait is for."""

from __future__ import annotations

import inspect
import sys
import time
from typing import Any

import pytest

from dpcompile import progress
from dpcompile.accounting.calibration import calibrate_noise
from dpcompile.progress import working

pytest.importorskip("tqdm")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_DELAY", 0.05)
    monkeypatch.setattr(progress, "_EVERY", 0.02)
    monkeypatch.setenv("DPCOMPILE_PROGRESS", "1")


def test_a_long_wait_is_told_and_cleared(capsys: Any) -> None:
    with working("counting sheep"):
        time.sleep(0.4)
    told = capsys.readouterr().err
    assert "dpcompile: counting sheep, 00:00 so far" in told and told.endswith("\r")


def test_a_short_one_is_not(capsys: Any) -> None:
    with working("counting sheep"):
        pass
    assert capsys.readouterr().err == ""


def test_of_one_within_another_the_outer_is_told(capsys: Any) -> None:
    with working("counting sheep"), working("counting one sheep"):
        time.sleep(0.3)
    told = capsys.readouterr().err
    assert "counting sheep" in told and "one sheep" not in told


def test_an_error_passes_and_the_next_is_told(capsys: Any) -> None:
    with pytest.raises(ZeroDivisionError), working("dividing"):
        raise ZeroDivisionError
    with working("counting sheep"):
        time.sleep(0.3)
    assert "counting sheep" in capsys.readouterr().err


@pytest.mark.parametrize("said", ["0", None])
def test_not_where_nobody_looks(said: str | None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("DPCOMPILE_PROGRESS")
    if said is not None:
        monkeypatch.setenv("DPCOMPILE_PROGRESS", said)
    with working("counting sheep"):
        time.sleep(0.3)
    monkeypatch.setattr(sys, "stderr", None)
    with working("counting sheep"):
        pass
    assert capsys.readouterr().err == ""


def test_without_tqdm_nothing_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with working("counting sheep"):
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_what_is_told_of_is_called_as_before() -> None:
    assert list(inspect.signature(calibrate_noise).parameters)[:2] == ["target_epsilon", "target_delta"]
