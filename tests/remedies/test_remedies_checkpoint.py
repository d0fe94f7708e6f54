"""Checkpoints of a run: what their messages say to do, tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from private_steps import backward, parts, steps
from remedies import Right, data, private, refused, stepped, trains

from dpcompile import PoissonLoader
from dpcompile.checkpoint import load_checkpoint, save_checkpoint


@refused("save each checkpoint into a directory of its own, and delete old ones afterwards", slow=True)
def test_a_checkpoint_over_another(told: int, tmp_path: Path) -> Right:
    model, optimizer = parts()
    for i in range(2):
        steps(model, optimizer)
        save_checkpoint(tmp_path / (f"{told}_{i}" if told else "run"), model, optimizer)
    again, resumed = parts()
    load_checkpoint(tmp_path / "1_1", again, resumed)
    return steps(again, resumed)


@refused("save after optimizer.step() and optimizer.zero_grad()")
def test_a_checkpoint_within_a_step(told: int, tmp_path: Path) -> Right:
    model, optimizer = parts()
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    if told:
        optimizer.step()
        optimizer.zero_grad()
    save_checkpoint(tmp_path, model, optimizer)
    return stepped(model, optimizer, before, 1)


@refused("save and load with the loader, or without it both times", ways=2, slow=True)
def test_a_checkpoint_loaded_without_the_loader(told: int, tmp_path: Path) -> Right:
    def made() -> tuple[Any, Any, Any]:
        return private(PoissonLoader(data().dataset, expected_batch_size=8))

    model, optimizer, loader = made()
    trains(model, optimizer, loader)
    save_checkpoint(tmp_path / str(told), model, optimizer, loader if told < 2 else None)
    model, optimizer, loader = made()
    load_checkpoint(tmp_path / str(told), model, optimizer, loader if told == 1 else None)
    return trains(model, optimizer, loader)
