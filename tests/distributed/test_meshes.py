"""One small Llama on meshes of four kinds of parallelism: launches of tests/workers/mesh_worker.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch, passed

RUNS = [
    (4, "--dp 2 --cp 2", [(4, "--dp 2 --pp 2"), (1, "")]),
    (8, "--dp 2 --tp 2 --pp 2 --schedule 1F1B", [(2, "--cp 2"), (8, "--dp 2 --cp 4")]),
    (8, "--dp 2 --cp 4", [(4, "--cp 2 --pp 2"), (4, "--dp 2 --tp 2")]),
    (8, "--dp 2 --tp 2 --cp 2", [(8, "--pp 2 --tp 2 --cp 2 --schedule 1F1B"), (4, "--tp 2 --cp 2"), (1, "")]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "mesh", "resumed"), RUNS)
def test_noisy_steps_are_those_of_one_rank_and_go_on_anywhere(
    ranks: int, mesh: str, resumed: list[tuple[int, str]], tmp_path: Path
) -> None:
    """Weights of five noisy steps; the checkpoint after two of them, resumed on other meshes and on one rank."""

    def run(ranks: int, task: str, mesh: str) -> None:
        assert passed(launch(ranks, "mesh_worker.py", str(tmp_path), task, *mesh.split())) == {task}

    run(1, "begin", "")
    run(ranks, "train", mesh)
    for other, words in resumed:
        run(other, "resume", words)
