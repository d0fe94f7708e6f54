"""Small versions of architectures for images and signals."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.case import D, T
from models.parts import layer, net, shaped

# --- images ---------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """ResNet with GroupNorm: a strided block, squeeze and excitation, stochastic depth off."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.short = nn.GroupNorm(2, 4), nn.GroupNorm(2, 4), nn.Conv2d(2, 4, 1, stride=2)
        self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.b(self.norm1(self.a(x)).relu()))
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return (y + self.short(x)).relu().mean((2, 3))


class Dense(nn.Module):
    """DenseNet with GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, 2 + 2 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(2 + 2 * i, 2, 3, padding=1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        return F.avg_pool2d(x, 2)


class UNet(nn.Module):
    """Down, up by transposed convolution and by interpolation, skips, a time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.up, self.mix, self.out = (
            nn.ConvTranspose2d(4, 3, 2, stride=2),
            nn.Conv2d(6, 3, 3, padding=1),
            nn.Conv2d(5, 1, 1),
        )
        self.time = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(2) * math.log(10.0))
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        a = F.silu(self.down1(x))
        b = F.silu(self.down2(F.max_pool2d(a, 2)) + time[:, :, None, None])
        y = F.silu(self.mix(torch.cat([self.up(b), a], 1)))
        return self.out(torch.cat([y, F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)], 1))


class Mixer(nn.Module):
    """MLP-Mixer: patches, an MLP over them, an MLP over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 2, stride=2), nn.LayerNorm(4)
        self.tokens = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
        self.channels = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        x = x + self.tokens(self.norm(x).mT).mT
        return x + self.channels(self.norm(x))


layer("ResNet", shaped(2, 6, 6), Residual)
layer("DenseNet", shaped(2, 4, 4), Dense)
layer("UNet", shaped(2, 4, 4, more=((),)), UNet)
layer("Mixer", shaped(2, 4, 4), Mixer)
net(
    "ConvNeXt",
    shaped(4, 5, 5),
    lambda m, x: x + (m.gamma * m.up(F.gelu(m.down(m.norm(m.conv(x).permute(0, 2, 3, 1)))))).permute(0, 3, 1, 2),
    lambda: {
        "conv": nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "norm": nn.LayerNorm(4),
        "down": nn.Linear(4, 8),
        "up": nn.Linear(8, 4),
        "gamma": nn.Parameter(torch.rand(4)),
    },
)
net(
    "ViT",
    shaped(2, 4, 4),
    lambda m, x: m.head(m.block(torch.cat([m.token.expand(len(x), -1, -1), m.stem(x).flatten(2).mT], 1) + m.at)[:, 0]),
    lambda: {
        "stem": nn.Conv2d(2, D, 2, stride=2),
        "token": nn.Parameter(torch.randn(1, 1, D)),
        "at": nn.Parameter(torch.randn(5, D)),
        "block": nn.TransformerEncoderLayer(D, 2, 8, 0.0, batch_first=True, norm_first=True),
        "head": nn.Linear(D, 2),
    },
)

# --- signals --------------------------------------------------------------------------------------------------------


class WaveNet(nn.Module):
    """Causal dilated convolutions with gates, residuals and skips; weight normalisation on one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(2, 4, 2, dilation=2**i) for i in range(3))
        self.convs[1] = nn.utils.parametrizations.weight_norm(self.convs[1])
        self.residual, self.skip = nn.Conv1d(2, 2, 1), nn.Conv1d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for i, conv in enumerate(self.convs):
            gate, value = conv(F.pad(x, (2**i, 0))).chunk(2, 1)
            h = gate.sigmoid() * value.tanh()
            x, total = x + self.residual(h), total + self.skip(h)
        return total


class StateSpace(nn.Module):
    """S4D: a diagonal state space as a long convolution by FFT, complex poles."""

    def __init__(self) -> None:
        super().__init__()
        self.log_real, self.imaginary = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2, 3))
        self.c, self.log_step, self.skip = (
            nn.Parameter(torch.randn(2, 3, 2)),
            nn.Parameter(-torch.rand(2)),
            nn.Parameter(torch.randn(2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        a = torch.complex(-self.log_real.exp(), self.imaginary) * self.log_step.exp()[:, None]
        powers = torch.exp(a[..., None] * torch.arange(length))
        kernel = 2 * torch.einsum("cn,cnl->cl", torch.view_as_complex(self.c) * (a.exp() - 1) / a, powers).real
        y = torch.fft.irfft(torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(kernel, n=2 * length), n=2 * length)
        return F.gelu(y[..., :length] + self.skip[:, None] * x)


class Selective(nn.Module):
    """Mamba's selective scan, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.conv = nn.Linear(D, 8), nn.Conv1d(4, 4, 2, padding=1, groups=4)
        self.parameters_of = nn.Linear(4, 1 + 2 * 3)
        self.step, self.log_a, self.out = nn.Linear(1, 4), nn.Parameter(torch.rand(4, 3)), nn.Linear(4, D)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.inner(x).chunk(2, -1)
        x = F.silu(self.conv(x.mT)[..., :-1].mT)
        dt, b, c = self.parameters_of(x).split([1, 3, 3], -1)
        dt = F.softplus(self.step(dt))
        decay = torch.exp(dt[..., None] * -self.log_a.exp())
        h, out = x.new_zeros(x.shape[0], 4, 3), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + (dt * x)[:, t, :, None] * b[:, t, None]
            out.append((h * c[:, t, None]).sum(-1))
        return self.out(torch.stack(out, 1) * F.silu(gate))


layer("WaveNet", shaped(2, 7), WaveNet)
layer("S4D", shaped(2, 6), StateSpace)
layer("Mamba", shaped(T, D), Selective)
net(
    "TCN",
    shaped(2, 7),
    lambda m, x: m.b(F.pad(m.a(F.pad(x, (2, 0))).relu(), (4, 0))) + m.c(x),
    lambda: {"a": nn.Conv1d(2, 3, 3), "b": nn.Conv1d(3, 3, 3, dilation=2), "c": nn.Conv1d(2, 3, 1)},
    slow=True,
)
