"""Checkpoints through ``torch.distributed.checkpoint``: saved on any number of ranks, resumed on any."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dpcompile.data.loader import PoissonLoader
from dpcompile.distributed.ranks import from_first
from dpcompile.errors import DPCompileError, PrivacyError
from dpcompile.module import Engine, engine_of
from dpcompile.optim import checks as optim_checks
from dpcompile.optim.optimizer import DPOptimizer

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]

_WHOLE = ".metadata"  # written last, when all ranks have written


def save_checkpoint(
    directory: str | Path, model: nn.Module, optimizer: DPOptimizer, loader: PoissonLoader | None = None
) -> None:
    """Save model, inner optimizer, logical step, seeds and accountant; every rank must call it.

    Args:
        directory: a path that all ranks see.
        model: the private model.
        optimizer: its optimizer, between two logical steps.
        loader: the loader, if its draws are to go on where they were.

    The checkpoint holds the seeds of noise and draws: keep it as secret as the data.

    Raises:
        PrivacyError: within a logical step: the sums so far would be lost.
        DPCompileError: the directory holds a checkpoint: a run that ends while it is written over has none.
    """
    if (Path(directory) / _WHOLE).exists():
        raise DPCompileError(
            f"{directory} holds a checkpoint already: if the run ended while it is written over, none would be left",
            remedy="save each checkpoint into a directory of its own, and delete old ones afterwards",
        )
    stage = optimizer.engine.stage
    if optimizer.accumulating or optimizer.engine.ledger.deliveries or (stage is not None and stage.waiting):
        raise PrivacyError(
            "a checkpoint within a logical step would lose the clipped sums so far",
            remedy="save after optimizer.step() and optimizer.zero_grad()",
        )
    _refuse_same_names(engine_of(model))
    state = {"private": _private(optimizer, loader), **_tensors(model, optimizer)}
    with _quiet():
        save(state, checkpoint_id=directory)


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest whole checkpoint among the subdirectories of a directory; every rank must call it.

    Args:
        directory: holds one subdirectory for each checkpoint, with names that sort by age (``step_000100``).

    Returns:
        The same path on every rank; None if there is none. A checkpoint whose saving was cut short is passed over.
    """
    whole = sorted(p.parent for p in Path(directory).glob(f"*/{_WHOLE}"))
    return from_first(whole[-1] if whole else None)


def load_checkpoint(
    directory: str | Path, model: nn.Module, optimizer: DPOptimizer, loader: PoissonLoader | None = None
) -> None:
    """Go on where :func:`save_checkpoint` was called, on any number of ranks; every rank must call it.

    Args:
        directory: what was saved.
        model: a private model of the same architecture; its weights are replaced.
        optimizer: made with the same kind of inner optimizer over the same parameters, sigma and batch size.
        loader: made for the same data, if the checkpoint holds one's state.

    Raises:
        PrivacyError: what :meth:`DPOptimizer.load_state_dict` and :meth:`PoissonLoader.load_state_dict` refuse: noise
            or draws that would be used twice, another mechanism; nothing is changed then.
    """
    _refuse_same_names(engine_of(model))
    private = {"private": ""}
    with _quiet():
        load(private, checkpoint_id=directory)
    saved = json.loads(private["private"])
    optim_checks.refuse_state(saved["optimizer"], optimizer.private_state(), optimizer.accountant)
    if (loader is None) != (saved["loader"] is None):
        raise PrivacyError(
            f"the checkpoint {'holds no' if saved['loader'] is None else 'holds the'} state of a loader, and "
            f"{'none' if loader is None else 'one'} was given: draws would be used twice",
            remedy="save and load with the loader, or without it both times",
        )
    if loader is not None:
        loader.load_state_dict(saved["loader"])
    optimizer.fill_state()
    tensors = _tensors(model, optimizer)
    with _quiet():
        load(tensors, checkpoint_id=directory)
    engine_of(model).module.load_state_dict(tensors["model"])
    inner = optimizer.optimizer.state_dict()
    names = _names(optimizer)
    inner["state"] = {position: tensors["state"].get(name, {}) for position, name in names.items()}
    for group, values in zip(inner["param_groups"], saved["groups"], strict=True):
        group.update(values)
    optimizer.load_state_dict({**inner, "dpcompile": saved["optimizer"]})


def _refuse_same_names(engine: Engine) -> None:
    """Stages of a pipeline are parts of one checkpoint: two that hold the same name would write one over the other.

    Raises:
        DPCompileError: on every rank of the pipeline.
    """
    if engine.stage is None:
        return
    everywhere: list[Any] = [None] * engine.stage.ranks
    dist.all_gather_object(everywhere, list(engine.module.state_dict()), group=engine.stage.group)
    count = Counter(name for names in everywhere for name in names)
    twice = [name for name, n in count.items() if n > 1]
    if twice:
        raise DPCompileError(
            f"'{twice[0]}' is in several stages of the pipeline: one would be written over the other",
            remedy="build stages so that names are those of the whole model, such as nn.ModuleDict({'3': block}) in "
            "the place of a ModuleList, of which each stage has some",
        )


def _private(optimizer: DPOptimizer, loader: PoissonLoader | None) -> str:
    """What is no tensor, as text: seeds have more bits than a tensor's numbers."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.optimizer.state_dict()["param_groups"]]
    whole = {
        "optimizer": optimizer.private_state(),
        "loader": None if loader is None else loader.state_dict(),
        "groups": groups,
    }
    return json.dumps(whole, default=lambda x: x.item() if isinstance(x, torch.Tensor) else list(x))


def _tensors(model: nn.Module, optimizer: DPOptimizer) -> dict[str, Any]:
    names, inner = _names(optimizer), optimizer.optimizer.state_dict()
    return {
        "model": engine_of(model).module.state_dict(),
        "state": {names[position]: values for position, values in inner["state"].items()},
    }


def _names(optimizer: DPOptimizer) -> dict[int, str]:
    """Position in the inner optimizer's state dict -> parameter name."""
    known = {id(p): n for n, p in optimizer.engine.parameters().items()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return {position: known[id(p)] for position, p in enumerate(held)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
