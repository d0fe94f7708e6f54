"""``replace_batchnorm``, and BatchNorm told of before the first batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

import dpcompile
from dpcompile import ExampleMixingError, UnsupportedGraphError, make_private, replace_batchnorm


class Block(nn.Module):
    """Residual, with a layer that is used twice, one in a list and one that has no affine parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = self.again = nn.BatchNorm2d(channels, eps=1e-3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels, affine=False), nn.SyncBatchNorm(channels)])

    def forward(self, x):
        x = x + self.norm(self.conv(x)).relu()
        return self.norms[0](self.again(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(Block(32), Block(32))
        self.head = nn.Sequential(nn.Linear(32, 48), nn.BatchNorm1d(48), nn.Linear(48, 3))

    def forward(self, x):
        return self.head(self.blocks(self.norm(self.stem(x))).mean((2, 3)))


def images(count: int = 8) -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(count, 3, 8, 8), torch.randint(0, 3, (count,))), 4)


def test_make_private_says_it_at_once_and_the_remedy_works():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ExampleMixingError, match="8 BatchNorm layers in training mode") as refused:
        make_private(model, optimizer, images(), noise_multiplier=1.0)
    assert "blocks.0.norm" in str(refused.value)
    remedy = str(refused.value).split("call ")[1].split(", which")[0]
    namespace = {"dpcompile": dpcompile, "model": model}
    exec(remedy, namespace)
    private, optimizer, loader = make_private(
        namespace["model"], optimizer, images(), noise_multiplier=1.0, backend="eager"
    )
    before = [p.clone() for p in model.parameters()]
    for x, y in loader:
        nn.functional.cross_entropy(private(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(changed) and any("norm.weight" in n for n, _ in model.named_parameters())


def test_the_other_remedy_works():
    model = Net()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), images(), noise_multiplier=1.0)
    unfrozen = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(ExampleMixingError, match="1 BatchNorm layer in"):
        make_private(unfrozen, torch.optim.SGD(unfrozen.parameters(), lr=0.1), images(), noise_multiplier=1.0)


def test_what_is_kept():
    """Parameters themselves, their order, sharing, eps, dtype, mode; what it computes is torch's group_norm."""
    model = Net().double().eval()
    model.norm.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    assert replace_batchnorm(model) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[n] is before[n] for n in after)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    block = model.blocks[0]
    assert isinstance(block, Block) and block.norm is block.again and block.norm.eps == 1e-3
    assert block.norms[0].weight is None and not block.norms[0].affine
    assert not model.norm.training and not model.norm.weight.requires_grad
    x = torch.randn(2, 32, 5, dtype=torch.float64)
    expected = nn.functional.group_norm(x, 2, model.norm.weight, model.norm.bias, 1e-5)
    assert torch.equal(model.norm(x), expected)


@pytest.mark.parametrize(
    "channels, groups", [(1, 1), (15, 1), (24, 1), (32, 2), (96, 6), (100, 5), (512, 32), (2048, 32), (97, 1)]
)
def test_groups(channels, groups):
    new = replace_batchnorm(nn.BatchNorm3d(channels))
    assert isinstance(new, nn.GroupNorm) and new.num_groups == groups


def test_groups_that_are_asked_for():
    assert replace_batchnorm(nn.BatchNorm2d(64), channels_per_group=2).num_groups == 32
    with pytest.raises(UnsupportedGraphError, match="channels_per_group is 0"):
        replace_batchnorm(nn.BatchNorm2d(64), channels_per_group=0)


class WithActivation(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


def odd(kind: str) -> nn.Module:
    layer = WithActivation(4) if kind == "class" else nn.BatchNorm2d(4)
    if kind == "hooks":
        layer.register_forward_hook(lambda *_: None)
    if kind == "parametrizations":
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    return nn.LazyBatchNorm2d() if kind == "size" else layer


@pytest.mark.parametrize("kind", ["class", "hooks", "parametrizations", "size"])
def test_what_would_be_lost_is_refused(kind):
    """And nothing is replaced before."""
    model = nn.Sequential(nn.BatchNorm2d(4), odd(kind))
    with pytest.raises(UnsupportedGraphError, match=f"'1' cannot be replaced: it .*{kind}"):
        replace_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    if kind == "parametrizations":
        parametrize.remove_parametrizations(model[1], "weight")
    elif kind == "size":
        with torch.no_grad():
            model(torch.randn(2, 4, 3, 3))
    else:
        model[1] = nn.BatchNorm2d(4)
    assert [type(m) for m in replace_batchnorm(model)] == [nn.GroupNorm, nn.GroupNorm]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121"])
def test_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    model = replace_batchnorm(getattr(models, name)(num_classes=3))
    assert dpcompile.validate(model, torch.randn(2, 3, 64, 64)) == []


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002"])
def test_timm(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=3)
    plain = all(type(m) is nn.BatchNorm2d for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    if not plain:
        with pytest.raises(UnsupportedGraphError, match="is of a class of its own"):
            replace_batchnorm(model)
        return
    assert dpcompile.validate(replace_batchnorm(model), torch.randn(2, 3, 64, 64)) == []
