"""Pipelines whose stages are cut over tokens: launches of tests/workers/token_stages_worker.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launching import launch, passed

from dpcompile import PrivacyError, UnsupportedGraphError
from dpcompile.distributed.borders import Borders
from dpcompile.distributed.messages import Messages
from dpcompile.distributed.tensor_parallel import Axis, TensorParallel
from dpcompile.regions.rank_parts import RankParts
from dpcompile.runtime.stages import Stage

FEW = {"gradients, cut", "gradients, whole"}
REST = {"GPipe", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV", "regions", "inductor", "users", "automatic"}
ON_EIGHT = {"FSDP2", "FSDP2, noise", "tensor and context", "tensor, sequence and context"}


@pytest.mark.full
def test_stages_hand_on_tokens_or_whole_values() -> None:
    assert passed(launch(4, "token_stages_worker.py", *FEW)) == FEW


@pytest.mark.slow
def test_whole_weights_on_tokens_from_another_stage_are_refused() -> None:
    done = launch(4, "token_stages_worker.py", "forgotten")
    told = "parameter 'before.weight' whole, and its gradient is another one on each (x is not the same on all)"
    assert done.returncode != 0 and told in done.stderr and "passed" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "checks"), [(4, REST), (8, ON_EIGHT)])
def test_schedules_and_other_meshes(ranks: int, checks: set[str]) -> None:
    assert passed(launch(ranks, "token_stages_worker.py", *checks)) == checks


@pytest.fixture
def borders(tmp_path: Path) -> Iterator[Borders]:
    """Of one rank, in this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield Borders(Messages(dist.group.WORLD, torch.device("cpu")))
    dist.destroy_process_group()


def test_what_stages_of_one_rank_tell_each_other(borders: Borders) -> None:
    """Each stage by itself, and batch after batch; of a batch that was dropped nothing is left."""
    cpu = torch.device("cpu")
    borders.tell(1, 1, 0, (("tp",),), cpu)
    borders.tell(1, 3, 0, ((), ("cp", "tp")), cpu)
    assert borders.told(1, 3, 0, cpu) == ((), ("cp", "tp")) and borders.told(1, 1, 0, cpu) == (("tp",),)
    borders.tell(2, 1, 0, (("tp",),), cpu)  # its stage never came to it
    borders.tell(3, 1, 0, ((),), cpu)
    assert borders.told(3, 1, 0, cpu) == ((),)
    borders.tell(5, 1, 0, ((),), cpu)
    with pytest.raises(PrivacyError, match="is handed values of batch 5, and is at batch 4"):
        borders.told(4, 1, 0, cpu)


def test_micro_batches_of_a_batch_are_handed_on_alike(borders: Borders) -> None:
    this: Any = SimpleNamespace(_sums=SimpleNamespace(borders=borders), _border_behind=(("tp",),))
    call: Any = SimpleNamespace(stage=SimpleNamespace(is_last=False, stage_index=0))
    Stage._hand_on(this, call, (("tp",),), first=False)
    with pytest.raises(UnsupportedGraphError, match="stage 0 hands on tensors .* in some micro-batches of a batch"):
        Stage._hand_on(this, call, ((),), first=False)


def test_parts_along_ranks_that_a_stage_does_not_lie_on() -> None:
    parts = RankParts(None)
    assert parts.labels_of(((), ())) == ((), ())
    with pytest.raises(UnsupportedGraphError, match="each rank has its own part, and no parameter of this stage"):
        parts.labels_of(((), ("0,1",)))


def test_dimensions_are_told_by_their_ranks(borders: Borders) -> None:
    """Whatever they are called; one along other ranks is not taken for them."""

    def parts(*axes: tuple[str, list[int]]) -> RankParts:
        found = [Axis(SimpleNamespace(ranks=ranks), label, len(ranks), label, frozenset()) for label, ranks in axes]
        return RankParts(TensorParallel(tuple(found), frozenset(), 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_process_group_ranks", lambda group: group.ranks)
        border = parts(("cp", [0, 2]), ("tp", [0, 1])).places_of((("tp",), ("cp", "tp"), ()))
        assert border == (("0,1",), ("0,2", "0,1"), ())
        assert parts(("a", [0, 1]), ("b", [0, 2])).labels_of(border) == (("a",), ("b", "a"), ())
        assert parts(("", [0, 1])).labels_of(border[:1]) == (("",),)
        with pytest.raises(UnsupportedGraphError, match="no parameter of this stage lies along those ranks"):
            parts(("tp", [0, 2])).labels_of(border[:1])
