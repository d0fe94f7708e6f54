"""Layers that pool, resample and move positions of images and signals, behind a layer that has parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts import Function, Sum, behind, layer, net, shaped

# --- pooling, resampling, moving ------------------------------------------------------------------------------------

behind("MaxPool1d", (4, 8), lambda: nn.MaxPool1d(3, stride=2, padding=1, dilation=2, ceil_mode=True))
behind("MaxPool3d", (2, 4, 4, 4), lambda: nn.MaxPool3d(2))
behind("MaxPool-indices", (2, 4, 4), lambda: nn.MaxPool2d(2, return_indices=True))
behind("AvgPool1d", (4, 7), lambda: nn.AvgPool1d(3, padding=1, count_include_pad=False))
behind("AvgPool2d", (4, 5, 4), lambda: nn.AvgPool2d(2, ceil_mode=True, divisor_override=3))
behind("AvgPool3d", (2, 4, 4, 4), lambda: nn.AvgPool3d(2))
behind("AvgPool1d-ceil", (4, 8), lambda: nn.AvgPool1d(3, stride=2, padding=1, ceil_mode=True))
behind("AvgPool2d-ceil", (4, 6, 5), lambda: nn.AvgPool2d(3, stride=2, ceil_mode=True))
behind("AvgPool2d-ceil-unpadded", (4, 6, 5), lambda: nn.AvgPool2d(4, 3, 1, ceil_mode=True, count_include_pad=False))
behind("AvgPool3d-ceil", (2, 4, 5, 4), lambda: nn.AvgPool3d(3, stride=2, padding=1, ceil_mode=True))
behind("LPPool1d", (4, 8), lambda: nn.LPPool1d(2, 3))
behind("LPPool2d", (4, 4, 4), lambda: nn.LPPool2d(2, 2))
behind("AdaptivePools", (2, 7, 5), lambda: Sum([nn.AdaptiveAvgPool2d((3, 2)), nn.AdaptiveMaxPool2d((3, 4))]))
behind("AdaptivePool1d", (2, 7), lambda: Sum([nn.AdaptiveAvgPool1d(3), nn.AdaptiveMaxPool1d(3)]))
behind("AdaptivePool3d", (2, 3, 3, 3), lambda: Sum([nn.AdaptiveAvgPool3d(2), nn.AdaptiveMaxPool3d(2)]))


class Unpool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        pooled, where = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(pooled * 2, where, [2, 2], output_size=x.shape[-2:])


behind("MaxUnpool2d", (2, 4, 4), lambda: Unpool())
for mode in ("nearest", "linear"):
    behind(f"Upsample1d-{mode}", (2, 4), lambda mode=mode: nn.Upsample(scale_factor=1.5, mode=mode))
for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area"):
    behind(
        f"Upsample2d-{mode}", (2, 4, 3), lambda mode=mode: Function(lambda x: F.interpolate(x, size=(6, 4), mode=mode))
    )
behind(
    "Upsample2d-antialias",
    (2, 5, 6),
    lambda: Function(lambda x: F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True)),
)
behind("Upsample3d", (2, 2, 3, 2), lambda: nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True))
behind("PixelShuffle", (4, 3, 3), lambda: nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(3)))
behind("ChannelShuffle", (4, 3), lambda: nn.ChannelShuffle(2))
behind("Unfold", (2, 4, 4), lambda: nn.Unfold(2, stride=2))
behind("Unfold-overlapping", (2, 4, 4), lambda: nn.Unfold(3, padding=1, dilation=1))
behind("Fold", (8, 4), lambda: nn.Fold((4, 4), 2, stride=2))
behind("Fold-overlapping", (8, 9), lambda: nn.Fold((4, 4), 2))
behind(
    "Pads",
    (2, 4, 4),
    lambda: nn.Sequential(
        nn.ZeroPad2d(1),
        nn.ConstantPad2d((1, 0, 2, -1), 0.5),
        nn.ReflectionPad2d(1),
        nn.ReplicationPad2d((0, 1, 1, 0)),
        nn.CircularPad2d(1),
    ),
)
behind(
    "Pads1d",
    (2, 4),
    lambda: nn.Sequential(nn.ReflectionPad1d(2), nn.ReplicationPad1d(1), nn.CircularPad1d((1, 2)), nn.ZeroPad1d(1)),
)
behind(
    "Pads3d", (1, 3, 3, 2), lambda: nn.Sequential(nn.ReflectionPad3d(1), nn.ReplicationPad3d(1), nn.CircularPad3d(1))
)
behind("Flatten", (2, 4, 3), lambda: nn.Sequential(nn.Flatten(1, 2), nn.Unflatten(1, (4, 2)), nn.Flatten()))
behind(
    "Dropouts-eval",
    (4, 6),
    lambda: nn.Sequential(nn.Dropout(0.5), nn.Dropout1d(), nn.AlphaDropout(), nn.FeatureAlphaDropout()).eval(),
)
net(
    "GridSample",
    shaped(2, 5, 5),
    lambda m, x: F.grid_sample(
        x,
        F.affine_grid(m.where(x.flatten(1)).view(-1, 2, 3).tanh(), list(x.shape), align_corners=False),
        align_corners=False,
    ),
    lambda: {"where": nn.Linear(50, 6)},
)
for mode, padding in (("nearest", "border"), ("bicubic", "reflection")):
    net(
        f"GridSample-{mode}",
        shaped(2, 4, 4),
        lambda m, x, mode=mode, padding=padding: F.grid_sample(
            m.conv(x), m.grid.expand(len(x), -1, -1, -1).tanh() * 1.5, mode, padding, True
        ),
        lambda: {"conv": nn.Conv2d(2, 2, 1), "grid": nn.Parameter(torch.randn(1, 3, 3, 2))},
        slow=True,
    )
net(
    "GridSample3d",
    shaped(1, 3, 3, 3),
    lambda m, x: F.grid_sample(m.conv(x), m.grid.expand(len(x), -1, -1, -1, -1).tanh(), align_corners=True),
    lambda: {"conv": nn.Conv3d(1, 2, 1), "grid": nn.Parameter(torch.randn(1, 2, 2, 2, 3))},
    slow=True,
)
net(
    "FractionalMaxPool",
    shaped(2, 6, 6),
    lambda m, x: F.fractional_max_pool2d(m.conv(x), 2, output_size=3, _random_samples=m.samples.expand(len(x), -1, -1)),
    lambda: {"conv": nn.Conv2d(2, 2, 1), "samples": nn.Buffer(torch.full((1, 2, 2), 0.4))},
    slow=True,
)
net(
    "FractionalMaxPool3d",
    shaped(2, 4, 4, 4),
    lambda m, x: F.fractional_max_pool3d(m.conv(x), 2, output_size=2, _random_samples=m.samples.expand(len(x), -1, -1)),
    lambda: {"conv": nn.Conv3d(2, 2, 1), "samples": nn.Buffer(torch.full((1, 2, 3), 0.4))},
    slow=True,
)
net(
    "FractionalMaxPool-channels-last",
    shaped(2, 6, 6),
    lambda m, x: F.fractional_max_pool2d(
        m.conv(x).contiguous(memory_format=torch.channels_last),
        2,
        output_size=3,
        _random_samples=m.samples.expand(len(x), -1, -1),
    ),
    lambda: {"conv": nn.Conv2d(2, 3, 1), "samples": nn.Buffer(torch.full((1, 3, 2), 0.4))},
    slow=True,
)
net(
    "AdaptiveMaxPool3d-channels-last",
    lambda n: ((torch.randn(n, 4, 4, 6, 10).contiguous(memory_format=torch.channels_last_3d),), {}),
    lambda m, x: F.adaptive_max_pool3d(x * m.scale + m.shift, (2, 3, 5)),
    lambda: {"scale": nn.Parameter(torch.rand(4, 1, 1, 1)), "shift": nn.Parameter(torch.randn(4, 1, 1, 1))},
    slow=True,
)
layer(
    "PooledStem",
    shaped(3, 16, 16),
    lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(16 * 64, 4)
    ),
)
layer(
    "TutorialCNN",
    shaped(1, 28, 28),
    lambda: nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, 3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ),
)
