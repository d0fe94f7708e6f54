"""Lightning: under ``DPStrategy`` a module gets the weights of the plain loop, and goes on from a checkpoint."""

from __future__ import annotations

import functools
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launching import launch, passed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import DPCompileError, PoissonLoader, PrivacyError, make_private

L = pytest.importorskip("lightning")

from dpcompile.integrations.lightning import DPStrategy  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:two DPOptimizers of one seed"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]

OPTIONS: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "seed": 5, "backend": "eager"}


def examples(count: int = 48) -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(count, 6), torch.randint(0, 3, (count,)))


def loader(**options: Any) -> DataLoader:
    return DataLoader(examples(), **{"batch_size": 8, **options})


class InOneChild(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class CallsTheChild(InOneChild):
    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none").mean()


class InTwoChildren(InOneChild):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = self.net[0], self.net[2]
        del self.net

    def forward(self, x):
        return self.head(self.body(x).tanh())


class OwnParameter(InOneChild):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.net(x) * self.scale


class ByTheStep(InOneChild):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ByTheEpoch(InOneChild):
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Manual(InOneChild):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class SeveralOptimizers(Manual):
    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.manual_backward(self.loss(batch))
        first.step()
        first.zero_grad()
        second.step()
        second.zero_grad()

    def configure_optimizers(self):
        matrices, rest = ([p for p in self.parameters() if (p.ndim == 2) == m] for m in (True, False))
        return torch.optim.SGD(matrices, lr=0.5, momentum=0.9), torch.optim.Adam(rest, lr=0.1)


def trainer(strategy: Any = None, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 3}
    return L.Trainer(strategy=DPStrategy(**OPTIONS) if strategy is None else strategy, **{**quiet, **options})


def _plain_loop(kind: type[InOneChild], epochs: int = 3, **options: Any) -> nn.Module:
    """The ordinary loop on the same network; schedulers by hand."""
    if kind in (CallsTheChild, Manual):
        return plain_loop(InOneChild, epochs, **options)
    module: Any = kind()
    if kind is SeveralOptimizers:
        inner: Any = list(module.configure_optimizers())
    elif kind is ByTheStep:
        inner = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    else:
        inner = torch.optim.Adam(module.parameters(), lr=0.05)
    scheduler: Any = None
    if kind is ByTheStep:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(inner, 0.5, 6 * epochs)
    if kind is ByTheEpoch:
        scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
    whole = kind in (InTwoChildren, OwnParameter)
    model, optimizer, batches = make_private(module if whole else module.net, inner, loader(), **{**OPTIONS, **options})
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if kind is ByTheStep:
                scheduler.step()
        if kind is ByTheEpoch:
            scheduler.step()
    return module


plain_loop: Any = functools.cache(_plain_loop)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


KINDS = [InOneChild, CallsTheChild, InTwoChildren, OwnParameter, ByTheStep, ByTheEpoch, Manual, SeveralOptimizers]


@pytest.mark.parametrize("kind, physical", [(InOneChild, 24), *((kind, 3) for kind in KINDS)])
def test_weights_are_those_of_the_plain_loop(kind, physical):
    """Whatever is drawn, in one forward or several, with validation in between: every planned step, bit for bit."""
    module, strategy = kind(), DPStrategy(**OPTIONS, physical_batch_size=physical)
    trainer(strategy, val_check_interval=2).fit(module, loader(), loader(batch_size=10))
    assert strategy.private_optimizer.accountant.steps == 18
    assert same(module, plain_loop(kind, physical_batch_size=physical))
    assert type(module) is kind and type(getattr(module, "net", None)) in (nn.Sequential, type(None))


@pytest.mark.parametrize(
    "kind, options", [(ByTheEpoch, {}), (ByTheEpoch, {"limit_train_batches": 4}), (SeveralOptimizers, {})]
)
def test_a_checkpoint_goes_on_exactly(kind, options, tmp_path):
    """Noise, draws, accountant, schedulers: from within an epoch, from the end of one, from one that was cut short."""
    saves = L.pytorch.callbacks.ModelCheckpoint(
        tmp_path / "saved", save_top_k=-1, every_n_train_steps=1, filename="{step}"
    )
    given: dict[str, Any] = {"physical_batch_size": 7, "backend": "eager", "accountant": "rdp"}
    target = {"target_epsilon": 3.0, "target_delta": 1e-3}
    given |= {"noise_multiplier": 1.0} if options else target
    whole, steps, per_batch = kind(), 12 if options else 18, 2 if kind is SeveralOptimizers else 1
    trainer(DPStrategy(**given, seed=5), callbacks=[saves], enable_checkpointing=True, **options).fit(whole, loader())
    for step in (3, steps // 3):
        module, strategy = kind(), DPStrategy(**given)
        trainer(strategy, **options).fit(module, loader(), ckpt_path=tmp_path / f"saved/step={step * per_batch}.ckpt")
        assert same(module, whole), step
        assert strategy.private_optimizer.accountant.steps == steps


def test_model_checkpoint_early_stopping_and_loggers(tmp_path):
    """Callbacks see what they always see; epsilon is logged, and can be watched."""
    saves = L.pytorch.callbacks.ModelCheckpoint(
        tmp_path / "saved", save_top_k=-1, every_n_train_steps=3, filename="{step}"
    )
    stops = L.pytorch.callbacks.EarlyStopping(
        "epsilon", stopping_threshold=0.0, mode="max", check_on_train_epoch_end=True
    )
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    strategy = DPStrategy(**OPTIONS, delta=1e-3)
    run = trainer(strategy, callbacks=[saves, stops], logger=logger, enable_checkpointing=True, log_every_n_steps=2)
    run.fit(InOneChild(), loader())
    assert run.current_epoch == 1 and run.callback_metrics["epsilon"] > 1
    assert sorted(p.name for p in (tmp_path / "saved").glob("*.ckpt")) == ["step=3.ckpt", "step=6.ckpt"]
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("epsilon")
    assert len([row for row in rows[1:] if row.split(",")[column]]) == 4  # steps 2, 4, 6, and the epoch
    assert "steps" in str(strategy.private_optimizer.report(1e-3))
    module, resumed = InOneChild(), DPStrategy(**OPTIONS)
    trainer(resumed).fit(module, loader(), ckpt_path=tmp_path / "saved/step=3.ckpt")
    assert resumed.private_optimizer.accountant.steps == 18 and same(module, plain_loop(InOneChild))


def test_steps_are_planned_by_the_trainer():
    """And one more is refused."""
    target = {"target_epsilon": 3.0, "target_delta": 1e-3, "backend": "eager", "accountant": "rdp"}
    for options, steps in [({"max_epochs": -1, "max_steps": 5}, 5), ({"limit_train_batches": 0.5}, 9)]:
        strategy = DPStrategy(**target)
        trainer(strategy, **options).fit(InOneChild(), loader())
        assert strategy.private_optimizer.accountant.steps == steps
        assert 2.9 < strategy.private_optimizer.accountant.epsilon(1e-3) <= 3.0
    with pytest.raises(PrivacyError, match="noise is calibrated for 4"):
        trainer(DPStrategy(**target, steps=4)).fit(InOneChild(), loader())
    with pytest.raises(PrivacyError, match="without an end"):
        trainer(DPStrategy(**target), max_epochs=-1).fit(InOneChild(), loader())


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_precisions(precision):
    module, strategy = InOneChild(), DPStrategy(**OPTIONS)
    data = examples()
    if precision == "bf16-true":
        data = TensorDataset(data.tensors[0].bfloat16(), data.tensors[1])
    before = [p.clone() for p in module.parameters()]
    trainer(strategy, precision=precision, max_epochs=1).fit(module, DataLoader(data, 8))
    assert strategy.private_optimizer.accountant.steps == 6
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_evaluation_is_not_touched():
    module = InOneChild()
    run = trainer(max_epochs=1)
    run.fit(module, loader())
    (tested,) = run.test(module, loader(), verbose=False)
    expected = F.cross_entropy(module.net(examples().tensors[0]), examples().tensors[1])
    assert tested["val"] == pytest.approx(expected.item(), rel=1e-5)
    inputs: Any = examples().tensors[0]
    assert sum(len(y) for y in run.predict(module, DataLoader(inputs, 10))) == 48
    assert trainer().validate(module, loader(), verbose=False)[0]["val"] == pytest.approx(tested["val"])


class Skips(InOneChild):
    def training_step(self, batch, batch_idx):
        return None


class CallsParts(InTwoChildren):
    def loss(self, batch):
        return F.cross_entropy(self.head(self.body(batch[0]).tanh()), batch[1])


class StepsOne(SeveralOptimizers):
    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        self.optimizers()[0].step()


class StepsInTurn(SeveralOptimizers):
    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


class Clips(Manual):
    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        self.clip_gradients(self.optimizers(), gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        self.optimizers().step()


class FrozenBatchNorm(InOneChild):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm1d(6).requires_grad_(False)

    def loss(self, batch):
        return F.cross_entropy(self.net(self.frozen(batch[0])), batch[1])


class PrivateAlready(InOneChild):
    def configure_optimizers(self):
        return make_private(InOneChild().net, torch.optim.SGD(self.net.parameters(), lr=0.1), loader(), **OPTIONS)[1]


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (InOneChild, {"accumulate_grad_batches": 2}, "accumulate_grad_batches is 2: a step is one draw"),
        (InOneChild, {"gradient_clip_val": 1.0}, "gradient_clip_val is 1.0"),
        (InOneChild, {"overfit_batches": 2}, "overfit_batches takes the same batches"),
        (InOneChild, {"limit_train_batches": 0}, "there is no batch to train on"),
        (InOneChild, {"reload_dataloaders_every_n_epochs": 1}, "it was to be loaded anew"),
        (Skips, {}, "training_step returned None"),
        (CallsParts, {}, "has not called what is private, self\\(\\.\\.\\.\\)"),
        (StepsOne, {}, "Adam was not stepped on the last batch"),
        (StepsInTurn, {}, "second backward on one batch"),
        (Clips, {}, "did not come out of the clipped backward alone"),
        (FrozenBatchNorm, {}, "BatchNorm 'frozen' is outside of what is private"),
    ],
)
def test_what_is_refused(kind, options, message):
    module = kind()
    with pytest.raises(DPCompileError, match=message):
        trainer(**options).fit(module, loader())
    assert type(getattr(module, "net", nn.Sequential())) is nn.Sequential


def test_accumulation_in_physical_batches():
    """The remedy for ``accumulate_grad_batches``: the same draws, in parts."""
    module, strategy = InOneChild(), DPStrategy(**OPTIONS, physical_batch_size=4)
    trainer(strategy, max_epochs=1).fit(module, loader(batch_size=16))
    assert strategy.private_optimizer.accountant.steps == 3


class FrozenBatchNormInEval(FrozenBatchNorm):
    def training_step(self, batch, batch_idx):
        self.frozen.eval()
        return super().training_step(batch, batch_idx)

    def on_train_epoch_start(self):
        self.frozen.eval()


def test_frozen_batchnorm_in_eval_mode():
    strategy = DPStrategy(**OPTIONS)
    trainer(strategy, max_epochs=1).fit(FrozenBatchNormInEval(), loader())
    assert strategy.private_optimizer.accountant.steps == 6


def test_a_second_fit_is_refused():
    run, module = trainer(max_epochs=1), InOneChild()
    run.fit(module, loader())
    with pytest.raises(PrivacyError, match="a second fit with one DPStrategy"):
        run.fit(module, loader())


def test_other_loaders_and_devices():
    with pytest.raises(PrivacyError, match="more than one loader to train on"):
        trainer().fit(InOneChild(), [loader(), loader()])
    with pytest.raises(PrivacyError, match="a Tensor to train on"):
        trainer().fit(InOneChild(), [torch.zeros(8, 6)])
    with pytest.raises(PrivacyError, match=r"2 devices\n.*DPDDPStrategy or DPModelParallelStrategy"):
        trainer(devices=2)
    with pytest.raises(PrivacyError, match="2 nodes: each would train a model of its own"):
        trainer(num_nodes=2)
    with pytest.raises(PrivacyError, match="does not hold all that is trained: net.2.weight"):
        trainer(DPStrategy(**OPTIONS, submodule="net.0")).fit(InOneChild(), loader())


def test_a_poisson_loader_of_ones_own():
    module = InOneChild()
    own = PoissonLoader.from_dataloader(loader(), seed=5, physical_batch_size=3)
    trainer().fit(module, own)
    assert same(module, plain_loop(InOneChild, physical_batch_size=3))


@pytest.mark.full  # a launch of two ranks
def test_two_ranks():
    """By replicas and by FSDP2: weights, also resumed, are those of one process."""
    names = {"replicas", "resumed_replicas", "epsilon_stops", "shards", "resumed_shards", "refused"}
    assert passed(launch(2, "lightning_worker.py")) == names


def test_a_checkpoint_of_a_run_that_was_not_private(tmp_path):
    plain = trainer("auto", max_epochs=1)
    plain.fit(InOneChild(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(PrivacyError, match="the checkpoint is not of a private run"):
        trainer().fit(InOneChild(), loader(), ckpt_path=tmp_path / "plain.ckpt")
    module = InOneChild()
    module.load_state_dict(torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"])
    trainer(max_epochs=1).fit(module, loader())


@pytest.mark.slow
def test_the_other_package():
    """``pytorch_lightning`` holds the same classes a second time."""
    pytest.importorskip("pytorch_lightning")
    program = """
import torch, pytorch_lightning as pl
from dpcompile.integrations.lightning import DPStrategy
class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
strategy = DPStrategy(noise_multiplier=1.0, backend="eager")
data = torch.utils.data.TensorDataset(torch.randn(20, 4))
pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, strategy=strategy).fit(
    Lit(), torch.utils.data.DataLoader(data, 5))
print(strategy.private_optimizer.accountant.steps)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["8"], done.stderr


class OwnData(InOneChild):
    def train_dataloader(self):
        return loader()


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(batch_size=10)


class TwoNames(InOneChild):
    def __init__(self) -> None:
        super().__init__()
        self.same, self.listed = self.net, [self.net]

    def forward(self, x):
        return self.listed[0](x)


def test_where_data_come_from_and_the_network_is_held():
    """A hook of the module, a datamodule; under two names, and called through a list that is no submodule."""
    expected = plain_loop(InOneChild, epochs=2)
    for kind, data in ((OwnData, None), (InOneChild, Data()), (TwoNames, Data())):
        module = kind()
        trainer(max_epochs=2).fit(module, datamodule=data)
        assert same(module, expected), kind


class BreaksOff(InOneChild):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


def test_an_epoch_that_is_broken_off():
    """The draw at hand is given up, and is no step; the next epoch goes on with the draws behind it."""
    module, strategy = BreaksOff(), DPStrategy(**OPTIONS)
    trainer(strategy, max_epochs=2).fit(module, loader())
    assert strategy.private_optimizer.accountant.steps == 4
    assert strategy.private_loader is not None and strategy.private_loader.step == 6


class Grows(InOneChild):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.late = nn.Parameter(torch.ones(3))
            self.trainer.optimizers[0].add_param_group({"params": [self.late]})


class StepsTheInner(Manual):
    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        self.optimizers().optimizer.optimizer.step()


@pytest.mark.parametrize(
    "kind, message", [(Grows, "the model does not hold"), (StepsTheInner, "its update would have no noise")]
)
def test_ways_around_are_refused(kind, message):
    """A parameter that comes later, beside what is private; the optimizer inside."""
    with pytest.raises(PrivacyError, match=message):
        trainer().fit(kind(), loader())


def test_the_page():
    """What the page says runs."""
    page = (pathlib.Path(__file__).parents[2] / "docs/frameworks.md").read_text()
    block, *_ = re.findall(r"```py\n(.*?)```", page.partition("## Lightning")[2].partition("\n## ")[0], re.DOTALL)
    block = block.replace("DPStrategy(", "DPStrategy(backend='eager', ").replace(
        "max_epochs=20", "max_epochs=2, accelerator='cpu', logger=False, enable_checkpointing=False"
    )
    exec(block, {"module": InOneChild(), "DataLoader": DataLoader, "dataset": examples(300)})
