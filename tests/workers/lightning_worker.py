"""Lightning on gloo ranks, by replicas and by FSDP2: ``torchrun tests/workers/lightning_worker.py``."""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from integrations.test_lightning import (
    OPTIONS,
    ByTheEpoch,
    ByTheStep,
    InOneChild,
    InTwoChildren,
    Manual,
    OwnParameter,
    SeveralOptimizers,
    examples,
    loader,
    plain_loop,
)
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, DistributedSampler, WeightedRandomSampler

import dpcompile
from dpcompile.integrations.lightning import DPDDPStrategy, DPModelParallelStrategy, DPStrategy

PER_RANK = 4  # on two ranks: draws of 8, as one process has them in test_lightning


def trainer(strategy: Any, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 2, "max_epochs": 3}
    return L.Trainer(strategy=strategy, **{**quiet, **options})


def whole(p: Any) -> Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    expected = dict(b.named_parameters())
    for name, p in a.named_parameters():
        torch.testing.assert_close(whole(p), whole(expected[name]), rtol=1e-5, atol=1e-6)


def folder() -> Path:
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    return Path(made[0])


def replicas() -> None:
    """Each kind of module, with validation in between: the weights of one process."""
    for kind in (InOneChild, InTwoChildren, OwnParameter, ByTheStep, ByTheEpoch, Manual, SeveralOptimizers):
        strategy, module = DPDDPStrategy(**OPTIONS, physical_batch_size=3), kind()
        if dist.is_initialized() and dist.get_rank() == 1:  # as on the first rank, once training begins
            with torch.no_grad():
                next(module.parameters()).add_(1.0)
        trainer(strategy, val_check_interval=2).fit(module, loader(batch_size=PER_RANK), loader(batch_size=10))
        assert strategy.private_optimizer.accountant.steps == 18
        assert_same(module, plain_loop(kind, physical_batch_size=3))
        assert type(module) is kind


def resumed_replicas() -> None:
    """From within an epoch; another seed is given, and that of the checkpoint taken."""
    path = folder()
    saves = ModelCheckpoint(path, save_top_k=-1, every_n_train_steps=4, filename="{step}")
    stops = EarlyStopping("val", patience=100)
    whole_run, strategy = ByTheStep(), DPDDPStrategy(**OPTIONS)
    run = trainer(strategy, callbacks=[saves, stops], enable_checkpointing=True)
    run.fit(whole_run, loader(batch_size=PER_RANK), loader(batch_size=10))
    assert strategy._delta is None and run.global_step == 18
    again, strategy = ByTheStep(), DPDDPStrategy(**{**OPTIONS, "seed": None})
    trainer(strategy).fit(
        again, loader(batch_size=PER_RANK), loader(batch_size=10), ckpt_path=path / "step=8.ckpt", weights_only=False
    )
    assert strategy.private_optimizer.accountant.steps == 18
    assert_same(again, whole_run)
    alone = ByTheStep()  # a checkpoint goes on with another number of ranks
    on_one = DPStrategy(**{**OPTIONS, "seed": None})
    trainer(on_one, devices=1).fit(alone, loader(batch_size=8), ckpt_path=path / "step=8.ckpt", weights_only=False)
    assert_same(alone, whole_run)


def epsilon_stops() -> None:
    """Epsilon is the same on every rank, and so is where it stops."""
    strategy = DPDDPStrategy(**OPTIONS, delta=1e-3)
    stops = EarlyStopping("epsilon", stopping_threshold=4.0, mode="max", check_on_train_epoch_end=True)
    run = trainer(strategy, callbacks=[stops], max_epochs=20)
    run.fit(InOneChild(), loader(batch_size=PER_RANK))
    steps = [0, 0]
    dist.all_gather_object(steps, run.global_step)
    assert steps[0] == steps[1] < 120 and strategy.private_optimizer.accountant.epsilon(1e-3) > 4.0


class Sharded(InOneChild):
    """A stack of units; one is the whole."""

    def configure_model(self) -> None:
        if isinstance(self.net, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[0], mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class ShardedWhole(InTwoChildren):
    def configure_model(self) -> None:
        if not isinstance(self, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.body, mesh=mesh)
            fully_shard(self, mesh=mesh)


def shards() -> None:
    for kind, plain in ((Sharded, InOneChild), (ShardedWhole, InTwoChildren)):
        strategy, module = DPModelParallelStrategy(**OPTIONS, physical_batch_size=3), kind()
        trainer(strategy, val_check_interval=2).fit(module, loader(batch_size=PER_RANK), loader(batch_size=10))
        assert strategy.private_optimizer.accountant.steps == 18
        assert_same(module, plain_loop(plain, physical_batch_size=3))


def resumed_shards() -> None:
    expected = plain_loop(InOneChild)
    for apart in (True, False):
        path = folder()
        saves = ModelCheckpoint(path, save_top_k=-1, every_n_train_steps=4, filename="{step}")
        first = DPModelParallelStrategy(**OPTIONS, save_distributed_checkpoint=apart)
        trainer(first, callbacks=[saves], enable_checkpointing=True, max_steps=8, max_epochs=-1).fit(
            Sharded(), loader(batch_size=PER_RANK)
        )
        again = Sharded()
        second = DPModelParallelStrategy(**{**OPTIONS, "seed": None}, save_distributed_checkpoint=apart)
        trainer(second).fit(again, loader(batch_size=PER_RANK), ckpt_path=path / "step=8.ckpt", weights_only=False)
        assert second.private_optimizer.accountant.steps == 18
        assert_same(again, expected)


class SeveralSharded(Sharded, SeveralOptimizers):
    pass


def refused() -> None:
    odd = DataLoader(examples(), PER_RANK, sampler=WeightedRandomSampler([1.0] * 48, 48))
    with pytest.raises(dpcompile.PrivacyError, match="sampler is DistributedSamplerWrapper"):
        trainer(DPDDPStrategy(**OPTIONS)).fit(InOneChild(), odd)
    with pytest.raises(dpcompile.PrivacyError, match="2 optimizers in a DPModelParallelStrategy"):
        trainer(DPModelParallelStrategy(**OPTIONS)).fit(SeveralSharded(), loader(batch_size=PER_RANK))
    for options, message in (
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches is 2"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val is 1.0"),
    ):
        with pytest.raises(dpcompile.PrivacyError, match=message):
            trainer(DPDDPStrategy(**OPTIONS), **options).fit(InOneChild(), loader(batch_size=PER_RANK))
    own = DataLoader(examples(), PER_RANK, sampler=DistributedSampler(examples(), 2, dist.get_rank()))
    with pytest.raises(dpcompile.PrivacyError, match="sampler is DistributedSampler"):  # of another dataset
        trainer(DPDDPStrategy(**OPTIONS)).fit(InOneChild(), own)
    same = dpcompile.PoissonLoader(examples(), expected_batch_size=8, seed=5)
    with pytest.raises(dpcompile.PrivacyError, match="same examples"):
        trainer(DPDDPStrategy(**OPTIONS)).fit(InOneChild(), same)


CHECKS = {
    "replicas": replicas,
    "resumed_replicas": resumed_replicas,
    "epsilon_stops": epsilon_stops,
    "shards": shards,
    "resumed_shards": resumed_shards,
    "refused": refused,
}

if __name__ == "__main__":
    from launching import run_checks

    warnings.filterwarnings("ignore", category=FutureWarning)
    dist.init_process_group("gloo")
    run_checks(CHECKS, sys.argv[1:])
