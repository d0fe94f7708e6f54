"""Sizing without content: shapes, memory and collectives are those of the real run; tables and the model on top."""

from __future__ import annotations

import gc
import json
import os
import pathlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import sharded
from benchmarks.scale import __main__ as command
from benchmarks.scale.hollow import Hollow, fake_ranks
from benchmarks.scale.models import CASES
from benchmarks.scale.report import page
from benchmarks.scale.steps import WAYS, size
from benchmarks.scale.throughput import RANKS, Cluster, Load, amdahl, curve, step_seconds
from dpcompile.errors import UnsupportedGraphError

pytestmark = pytest.mark.full  # large models

FLOAT = 4
DOUBLE = 8
PLACE = 48  # bytes of a reduction: step, draw, and sigma and C as a checksum, and all three negated


@pytest.fixture(autouse=True)
def _typical_rates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DPCOMPILE_RATES", "typical")
    yield
    assert not dist.is_initialized()


def test_memory_is_counted_once_and_until_it_is_freed() -> None:
    with Hollow() as hollow:
        x = torch.randn(1000, 1000)
        view = x[10:].t()
        assert hollow.memory.live == x.numel() * FLOAT
        y = torch.mm(x, x).relu_()
        assert hollow.memory.live == 2 * x.numel() * FLOAT == hollow.memory.peak
        del x, y
        assert hollow.memory.live == view.untyped_storage().nbytes()
        hollow.memory.mark()
        del view
        gc.collect()
        assert hollow.memory.live == 0 and hollow.memory.peak == 1000 * 1000 * FLOAT


def test_nothing_is_computed_and_numbers_read_as_nothing() -> None:
    with Hollow() as hollow:
        big = torch.zeros(1 << 31)  # 8 GiB, reserved and not touched
        assert big.add_(1).sum().item() == 1.0 and not big.any().item()
        assert hollow.memory.peak >= 1 << 33
        with pytest.raises(Exception, match="nonzero"):
            big[:5].nonzero()


def test_storages_that_fsdp_resizes_are_seen() -> None:
    with Hollow() as hollow:
        x = torch.empty(100)
        x.untyped_storage().resize_(0)
        assert hollow.memory.live == 0
        x.untyped_storage().resize_(400)
        assert hollow.memory.live == 400


def test_a_backward_without_content_keeps_what_a_real_one_keeps() -> None:
    """Gradients of a plain model, and collectives by name and bytes of the whole tensor."""
    with fake_ranks(4):
        mesh = init_device_mesh("cpu", (4,))
        with Hollow() as hollow:
            model = nn.Linear(8, 6)
            weights = hollow.memory.live
            model(torch.zeros(3, 8)).sum().backward()
            assert hollow.memory.live == 2 * weights == 2 * (8 * 6 + 6) * FLOAT
            shard, whole = torch.empty(5), torch.empty(20)
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            gather(whole, shard, group=mesh.get_group())
            scatter(shard, whole, group=mesh.get_group())
            assert dict(hollow.collectives) == {"allgather_base": 1, "reduce_scatter_base": 1}
            assert dict(hollow.traffic) == {"allgather_base": 80, "reduce_scatter_base": 80}


@pytest.fixture(scope="module")
def sizes() -> dict[str, dict[str, Any]]:
    os.environ["DPCOMPILE_RATES"] = "typical"
    return {way: size("tiny", way, 2) for way in CASES["tiny"].ways}


def test_the_private_step_communicates_what_the_plain_one_does(sizes: dict[str, Any]) -> None:
    assert sizes["ours"]["calls"] == {**sizes["plain"]["calls"], "allreduce": 1}  # where every rank is in training
    assert sizes["ours"]["bytes"] == {**sizes["plain"]["bytes"], "allreduce": PLACE}
    plain, twice = sizes["plain"]["calls"], sizes["twice"]["calls"]
    units = CASES["tiny"].depth + 1
    assert plain == {"allgather_base": 2 * units - 1, "reduce_scatter_base": units}
    for way in ("two_pass", "two_pass_again"):  # gathered twice, reduced once
        assert sizes[way]["calls"] == {"allgather_base": 3 * units - 1, "reduce_scatter_base": units, "allreduce": 1}
        assert sizes[way]["bytes"]["reduce_scatter_base"] == sizes["plain"]["bytes"]["reduce_scatter_base"]
    assert twice == {"allgather_base": 3 * units - 1, "reduce_scatter_base": 2 * units}
    assert all(cell["step_bytes"] == 0 for cell in sizes.values())


def test_parameters_gradients_and_states_are_what_stays(sizes: dict[str, Any]) -> None:
    whole = FLOAT * sizes["ours_whole"]["parameters"]
    small = 8 * FLOAT * 100  # AdamW counts steps in a tensor a parameter; inputs and targets
    for way, cell in sizes.items():
        unit = whole / 2 if WAYS[way].sharded else whole
        assert abs(cell["init"] - unit) < small, way
        assert abs(cell["backward"] - 4 * unit) < small, way
    large = CASES["tiny"]
    more = sizes["ours"]["backward"] - sizes["plain"]["backward"]
    assert 0 < more <= DOUBLE * large.batch + 64  # model.grad_norms


def test_two_passes_keep_less(sizes: dict[str, Any]) -> None:
    """Nothing for the clipped sums; with checkpoints no activations within blocks."""
    ours, two, again = (sizes[way] for way in ("ours", "two_pass", "two_pass_again"))
    assert ours["backward_peak"] > two["backward_peak"] > again["backward_peak"]
    assert again["forward"] < min(ours["forward"], two["forward"])


def test_a_tied_head_is_one_parameter_gathered_and_reduced_once() -> None:
    plain, ours, large = size("tiny-tied", "plain", 2), size("tiny-tied", "ours", 2), CASES["tiny-tied"]
    assert ours["calls"] == {**plain["calls"], "allreduce": 1}
    assert ours["bytes"] == {**plain["bytes"], "allreduce": PLACE}
    assert ours["bytes"]["reduce_scatter_base"] == FLOAT * ours["parameters"]
    assert ours["parameters"] == sum(p.numel() for p in large.make(large.depth).parameters())
    with pytest.raises(UnsupportedGraphError, match="'tokens.weight' is used in two regions"):
        size("tiny-tied", "two_pass", 2)


def test_memory_grows_linearly_with_depth() -> None:
    found = [size("tiny", "ours", 2, depth)["forward"] for depth in (2, 3, 4)]
    assert found[2] - found[1] == found[1] - found[0] > 0


def test_adapters_alone_are_reduced() -> None:
    cell = size("tiny-lora", "ours", 2)
    assert cell["bytes"]["reduce_scatter_base"] == FLOAT * cell["trainable"]
    assert cell["trainable"] < cell["parameters"] / 5


LOAD = Load(0.05, 0.8, 4, 4096, 10**9, 49, 6e9, 6e9)


def test_one_rank_waits_for_nobody() -> None:
    fast = Cluster(traffic=1e30, noise=1e30)
    passes = LOAD.logical * LOAD.seconds
    assert step_seconds(LOAD, fast, 1, "plain") == pytest.approx(passes)
    assert step_seconds(LOAD, fast, 1, "ours") == pytest.approx(passes / LOAD.ratio)
    assert step_seconds(LOAD, fast, 1, "twice") == pytest.approx(passes * 5 / 3)


def test_links_bound_what_many_ranks_reach() -> None:
    """With links that take no time the speedup is the number of ranks; with slow ones it is less, for all."""
    ideal = Cluster(inside=1e30, outside=1e30, latency=0)
    for way in ("plain", "ours", "twice"):
        assert amdahl(curve(LOAD, ideal, way)) == pytest.approx(0, abs=1e-9)
        slow = curve(LOAD, Cluster(outside=1e9), way)
        assert amdahl(slow) > 1e-3 and slow[RANKS[-1]] < curve(LOAD, ideal, way)[RANKS[-1]] / 2


def test_amdahl_gives_back_the_serial_part() -> None:
    assert amdahl({n: 1 / (0.03 + 0.97 / n) for n in RANKS}) == pytest.approx(0.03)


def test_the_command_writes_tables_and_keeps_cells(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "tiny", replace(CASES["tiny"], ways=("plain", "ours", "ours_whole")))
    words = ["--models", "tiny", "--meshes", "", "--output", str(tmp_path), "--inline"]
    words += ["--docs", str(tmp_path / "page.md")]
    command.main(words)
    data = json.loads((tmp_path / "scale.json").read_text())
    assert [c["way"] for c in data["cells"]] == ["plain", "ours", "ours_whole"]
    text = (tmp_path / "page.md").read_text()
    assert "Communication of a step" in text and "Amdahl fraction" in text and text == page(data, "page.svg")
    monkeypatch.setattr("benchmarks.scale.steps.size", None)  # what is there is not sized again
    command.main(words)
    assert json.loads((tmp_path / "scale.json").read_text())["cells"] == data["cells"]


def test_two_ranks_take_turns(tmp_path: pathlib.Path) -> None:
    words = ["--model", "gpt:width=64,context=16,depth=2,vocabulary=32", "--backend", "eager", "--repeats", "1"]
    sharded.main([*words, "--batch", "2", "--engines", "plain,ours", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "sharded.json").read_text())
    for cell in found["engines"].values():
        assert cell["answer_error"] < 1e-5 and cell["step"]["minimum"] > 0
    assert "the goal is 0.85" in (tmp_path / "sharded.md").read_text()
