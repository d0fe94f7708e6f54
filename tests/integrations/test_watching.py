"""What people put into a loop to watch it: torchmetrics, TensorBoard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import make_private

pytestmark = [pytest.mark.filterwarnings("ignore:two DPOptimizers of one seed")]


def private(net: nn.Module, **options: Any) -> Any:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(48, 6), torch.randint(0, 3, (48,)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    return make_private(net, optimizer, DataLoader(data, 8), noise_multiplier=1.0, seed=5, backend="eager", **options)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def expected() -> nn.Module:
    net = network()
    model, optimizer, loader = private(net, physical_batch_size=3)
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_torchmetrics() -> None:
    """Metrics of outputs and losses."""
    torchmetrics = pytest.importorskip("torchmetrics")
    net = network()
    model, optimizer, loader = private(net, physical_batch_size=3)
    accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
    losses = torchmetrics.MeanMetric()
    for x, y in loader:
        out = model(x)
        loss = F.cross_entropy(out, y)
        losses(loss.detach())
        accuracy.update(out, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 <= float(accuracy.compute()) <= 1 and float(losses.compute()) > 0
    assert same(net, expected())


def test_tensorboard(tmp_path) -> None:
    """Scalars, and histograms of weights and gradients."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    net = network()
    model, optimizer, loader = private(net, physical_batch_size=3)
    with SummaryWriter(str(tmp_path)) as writer:
        for step, (x, y) in enumerate(loader):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            writer.add_scalar("loss", loss.item(), step)
            for name, p in model.named_parameters():
                writer.add_histogram(name, p, step)
                writer.add_histogram(name + ".grad", p.grad, step)
            optimizer.step()
            optimizer.zero_grad()
            writer.add_scalar("epsilon", optimizer.accountant.epsilon(1e-3), step)
    assert list(tmp_path.iterdir()) and same(net, expected())
