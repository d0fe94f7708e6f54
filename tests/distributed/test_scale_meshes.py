"""Stages of models on meshes of four dimensions: what is counted, and what the model makes of it."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.scale import __main__ as command
from benchmarks.scale.mesh_model import links, predict
from benchmarks.scale.mesh_report import CLUSTER, carried, exchanged
from benchmarks.scale.meshes import MESHES, MODELS, Mesh, size_stage

TOY = MODELS["toy"]
CELL: dict[str, Any] = {
    "parameters": 1000, "fixed": 0, "forward": 7, "held": 5, "peak": 20, "gathered": 40, "reduced": 40
}  # fmt: skip


def test_bytes_of_each_dimension() -> None:
    assert links(TOY, Mesh(1, 1, 1, 1), CELL, private=True) == {"tp": 0, "cp": 0, "pp": 0, "dp": 0}
    plain, private = (links(TOY, Mesh(2, 2, 2, 1), CELL, private=p) for p in (False, True))
    hidden = 2 * TOY.context * TOY.width
    assert plain == {"tp": 4 * 2 * hidden, "cp": 0, "pp": 2 * hidden, "dp": 40}
    assert private == {**plain, "tp": plain["tp"] + 8 * 10, "pp": plain["pp"] + 8}  # [2, 1] and 8 numbers; [1]
    cut = links(TOY, Mesh(1, 1, 1, 2), CELL, private=True)["cp"]
    keys = 2 * 2 * TOY.context * 2 * 128
    shapes = [(256, 256)] * 4 + [(256, 512)] * 3 + [(256, 1)] * 2
    gathered = [min(4 * p * q, 4 * TOY.context * (p + q) // 2) for p, q in shapes]
    assert cut == 4 * (keys + sum(gathered)) + 8 * 10
    alone, both = (links(TOY, Mesh(1, n, 1, 2), {**CELL}, private=True)["cp"] for n in (1, 2))
    norms = [links(TOY, Mesh(1, 2, 1, n), CELL, private=True)["tp"] * n for n in (1, 2)]
    assert norms[1] - norms[0] == 8 * (2 * 12 - 10) and both < alone  # [4, 1] and 8; [2, 1] and 10


def test_memory_and_bubble_of_a_pipeline() -> None:
    mesh = Mesh(2, 1, 4, 1)
    plain, private = (predict(TOY, mesh, CELL, CLUSTER, 1.0, private=p) for p in (False, True))
    assert plain["memory"] == private["memory"] == 20 + 3 * 7 and private["at_the_step"] == 20 + 31 * 5
    assert plain["bubble"] == 3 / 35 and plain["examples"] == 64
    late = predict(TOY, mesh, {**CELL, "held": 9}, CLUSTER, 1.0, private=True)
    assert late["memory"] == 20 + 3 * 9
    slow = predict(TOY, mesh, CELL, replace(CLUSTER, inside=1.0), 1.0, private=True)
    assert slow["bound"] == "FSDP2's links" and slow["seconds"] > 35 * 40
    half = predict(
        TOY, mesh, CELL, replace(CLUSTER, inside=1e30, traffic=1e30, noise=1e30, latency=0), 0.5, private=True
    )
    whole = predict(TOY, mesh, CELL, replace(CLUSTER, inside=1e30, traffic=1e30), 1.0, private=False)
    assert half["seconds"] == pytest.approx(2 * whole["seconds"])


def test_a_section_takes_the_place_of_its_own() -> None:
    first = exchanged("# Page\n", "<!-- meshes of four dimensions -->\nold\n<!-- /meshes -->\n")
    again = exchanged(first + "rest\n", "<!-- meshes of four dimensions -->\nnew\n<!-- /meshes -->\n")
    assert first.startswith("# Page\n") and again == first.replace("old", "new") + "rest\n"
    assert carried(again, "# Other\n") == again.replace("# Page", "# Other").replace("rest\n", "")
    assert carried("# Page\n", "# Other\n") == "# Other\n"


@pytest.mark.full
def test_a_stage_holds_what_its_shapes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPCOMPILE_RATES", "typical")
    mesh = Mesh(2, 2, 2, 1)
    ours, plain = (size_stage("toy", mesh, way) for way in ("ours", "plain"))
    own = 2 * TOY.block(2) + TOY.vocabulary // 2 * TOY.width
    assert ours["parameters"] == plain["parameters"] == own
    assert ours["gathered"] == plain["gathered"] and ours["reduced"] == plain["reduced"]
    assert abs(ours["fixed"] - 3 * 4 * own / 2) < 4096  # parameters and AdamW's two states of half of it
    assert plain["held"] == 0 and ours["held"] >= 2 * own  # one example's gradients


@pytest.mark.slow
def test_the_command_writes_the_section(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Before\n")
    words = ["--models", "", "--meshes", "toy", "--output", str(tmp_path), "--inline", "--docs", str(page)]
    command.main(words)
    text = page.read_text()
    assert text.startswith("# Before\n") and "A step, modelled" in text and "2 × 1 × 2 × 2" in text
    cells = json.loads((tmp_path / "meshes.json").read_text())["cells"]
    assert len(cells) == 4 + 2 * (len(MESHES["toy"]) - 1) and not any("error" in c for c in cells)
    command.main([*words, "--report-only"])
    assert page.read_text() == text
