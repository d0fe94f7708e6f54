"""The layers of ``torch.nn``, one by one, as they are or behind a layer that has parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from models.case import Call, D, T, V
from models.parts import Function, Sum, behind, layer, net, shaped

# --- linear ---------------------------------------------------------------------------------------------------------

layer("LinearOnScalars", lambda n: ((torch.randn(n, 1),), {}), lambda: nn.Linear(1, 1))
layer("LinearOnFourDims", shaped(2, T, D), lambda: nn.Linear(D, 4))
layer("LinearOnFiveDims", shaped(2, T, 2, D), lambda: nn.Linear(D, 4))
layer("LinearOnSixDims", shaped(2, T, 1, 2, D), lambda: nn.Linear(D, 4, bias=False), slow=True)
layer("BilinearOverTime", shaped(T, D, more=((T, 4),)), lambda: nn.Bilinear(D, 4, 3), slow=True)


def _lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyConv1d(4, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(1, 2, 5))
    return model


layer("Lazy", shaped(2, 5), _lazy, slow=True)

# --- convolutions ---------------------------------------------------------------------------------------------------

for mode in ("reflect", "replicate", "circular"):
    layer(f"Conv1d-{mode}", shaped(2, 6), lambda mode=mode: nn.Conv1d(2, 3, 3, padding=2, padding_mode=mode), slow=True)
    layer(
        f"Conv2d-{mode}-same",
        shaped(2, 5, 4),
        lambda mode=mode: nn.Conv2d(2, 4, (3, 2), padding="same", padding_mode=mode, groups=2),
        slow=True,
    )
layer(
    "Conv3d-replicate", shaped(2, 3, 3, 3), lambda: nn.Conv3d(2, 2, 2, padding=1, padding_mode="replicate"), slow=True
)
layer("Conv1d-valid", shaped(2, 7), lambda: nn.Conv1d(2, 3, 3, padding="valid", dilation=2), slow=True)
layer("Conv1d-depthwise", shaped(4, 7), lambda: nn.Conv1d(4, 8, 3, groups=4, stride=2, padding=1))
layer("Conv2d-depthwise", shaped(3, 6, 6), lambda: nn.Conv2d(3, 3, 3, groups=3, padding="same", dilation=2))
layer("Conv2d-uneven", shaped(2, 7, 8), lambda: nn.Conv2d(2, 3, (2, 3), stride=(3, 2), padding=(0, 2), dilation=(2, 1)))
layer(
    "Conv3d-groups",
    shaped(4, 4, 4, 3),
    lambda: nn.Conv3d(4, 6, (2, 3, 1), groups=2, stride=(2, 1, 1), dilation=(1, 1, 2)),
)
layer("ConvTranspose1d", shaped(4, 5), lambda: nn.ConvTranspose1d(4, 6, 3, stride=3, output_padding=2, groups=2))
layer(
    "ConvTranspose2d-dilation",
    shaped(2, 3, 4),
    lambda: nn.ConvTranspose2d(2, 3, (2, 3), dilation=(2, 1), stride=(1, 2), padding=1),
)
layer(
    "ConvTranspose2d-depthwise",
    shaped(3, 3, 3),
    lambda: nn.ConvTranspose2d(3, 3, 2, groups=3, stride=2, bias=False),
    slow=True,
)
layer(
    "ConvTranspose3d",
    shaped(2, 2, 3, 2),
    lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, groups=2, output_padding=1),
    slow=True,
)
net(
    "ConvOverFrames",
    shaped(T, 2, 5, 5),
    lambda m, x: m.conv(x.flatten(0, 1)).unflatten(0, (-1, T)).mean(1),
    lambda: {"conv": nn.Conv2d(2, 3, 3)},
)
net("UnbatchedConv", shaped(1, 2, 7), lambda m, x: m.conv(x[:, 0]), lambda: {"conv": nn.Conv1d(2, 3, 3)}, slow=True)
net(
    "ConvOfFunctional",
    shaped(2, 7),
    lambda m, x: F.conv1d(x, m.w.tanh(), m.b * 2, padding=1) + F.conv1d(x.flip(-1), m.w, padding=1),
    lambda: {"w": nn.Parameter(torch.randn(3, 2, 3)), "b": nn.Parameter(torch.randn(3))},
)

# --- embeddings -----------------------------------------------------------------------------------------------------


def ids(*shape: int) -> Callable[[int], Call]:
    return lambda n: ((torch.randint(0, V, (n, *shape)),), {})


def weighted_ids(n: int) -> Call:
    return (torch.randint(0, V, (n, 4)),), {"per_sample_weights": torch.rand(n, 4)}


layer("Embedding-1d", ids(), lambda: nn.Embedding(V, D))
layer("Embedding-3d", ids(T, 2), lambda: nn.Embedding(V, D, padding_idx=3))
layer(
    "Embedding-scaled-by-frequency",
    ids(T),
    lambda: nn.Embedding(V, D, scale_grad_by_freq=True),
    refused="scale_grad_by_freq",
    reason="scales by how often a token occurs in the batch",
)
layer(
    "Embedding-max-norm",
    ids(T),
    lambda: nn.Embedding(V, D, max_norm=1.0),
    refused="max_norm",
    reason="writes the rows that occur in the batch",
)
net(
    "Embedding-frozen",
    ids(T),
    lambda m, x: m.head(m.frozen(x) + m.table(x)),
    lambda: {
        "frozen": nn.Embedding.from_pretrained(torch.randn(V, D), freeze=True),
        "table": nn.Embedding.from_pretrained(torch.randn(V, D), freeze=False, padding_idx=0),
        "head": nn.Linear(D, 2),
    },
    slow=True,
)
net("OneHot", ids(T), lambda m, x: m.layer(F.one_hot(x, V).float()), lambda: {"layer": nn.Linear(V, 3)}, slow=True)
layer("EmbeddingBag-max", ids(4), lambda: nn.EmbeddingBag(V, D, mode="max"))
layer("EmbeddingBag-mean-padding", ids(4), lambda: nn.EmbeddingBag(V, D, mode="mean", padding_idx=1), slow=True)
layer("EmbeddingBag-weighted", weighted_ids, lambda: nn.EmbeddingBag(V, D, mode="sum"))
layer(
    "EmbeddingBag-offsets",
    lambda n: ((torch.randint(0, V, (3 * n,)), torch.arange(0, 3 * n, 3)), {}),
    lambda: nn.EmbeddingBag(V, D, mode="sum"),
    in_dims=(None, 0),
    refused="bags given by offsets",
    reason="ragged bags: which rows belong to an example is in the offsets' values",
)
layer(
    "EmbeddingBag-last-offset",
    lambda n: ((torch.randint(0, V, (3 * n,)), torch.arange(0, 3 * n + 1, 3)), {}),
    lambda: nn.EmbeddingBag(V, D, mode="mean", include_last_offset=True),
    in_dims=(None, 0),
    refused="bags given by offsets",
    reason="ragged bags: which rows belong to an example is in the offsets' values",
)

# --- normalisation --------------------------------------------------------------------------------------------------


behind("LayerNorm-plain", (4, 6), lambda: nn.LayerNorm(6, elementwise_affine=False))
behind("LayerNorm-no-bias", (4, 6), lambda: nn.LayerNorm([4, 6], bias=False), slow=False)
behind("GroupNorm-1", (4, 6), lambda: nn.GroupNorm(1, 4), slow=False)
behind("GroupNorm-plain", (4, 3, 2, 2), lambda: nn.GroupNorm(2, 4, affine=False))
behind("InstanceNorm1d", (4, 6), lambda: nn.InstanceNorm1d(4, affine=True))
behind("InstanceNorm2d", (4, 3, 3), lambda: nn.InstanceNorm2d(4, affine=True), slow=False)
behind("InstanceNorm3d", (2, 2, 3, 2), lambda: nn.InstanceNorm3d(2, affine=True))
behind(
    "InstanceNorm-tracking", (4, 6), lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    refused="track_running_stats=False", reason="writes statistics of the batch into its buffers",
)  # fmt: skip
behind("InstanceNorm-eval", (4, 6), lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval())
behind("RMSNorm-2d", (4, 6), lambda: nn.RMSNorm([4, 6], eps=1e-3))
behind("LocalResponseNorm", (4, 6), lambda: nn.LocalResponseNorm(3))
behind("BatchNorm1d-eval", (4, 6), lambda: nn.BatchNorm1d(4).eval())
behind("BatchNorm3d-eval", (4, 2, 2, 2), lambda: nn.BatchNorm3d(4).eval())
behind("SyncBatchNorm-eval", (4, 6), lambda: nn.SyncBatchNorm(4).eval())
behind("SyncBatchNorm", (4, 6), lambda: nn.SyncBatchNorm(4), refused="SyncBatchNorm", reason="statistics of the batch")
behind("Normalize", (4, 6), lambda: Function(lambda x: F.normalize(x, dim=1) + F.normalize(x, p=1, dim=-1)))


# --- activations ----------------------------------------------------------------------------------------------------

ACTIVATIONS = [
    nn.ELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardtanh, nn.Hardswish, nn.LeakyReLU, nn.LogSigmoid, nn.PReLU, nn.ReLU,
    nn.ReLU6, nn.SELU, nn.CELU, nn.GELU, nn.Sigmoid, nn.SiLU, nn.Mish, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh,
    nn.Tanhshrink, nn.Softmin, nn.Softmax, nn.LogSoftmax, nn.GLU, nn.Identity,
]  # fmt: skip
ALONG = {nn.Softmin: {"dim": 1}, nn.Softmax: {"dim": -1}, nn.LogSoftmax: {"dim": 1}}


def _activations() -> nn.Module:
    return Sum(
        [kind(**ALONG.get(kind, {})) for kind in ACTIVATIONS] + [nn.Threshold(0.1, 2.0), nn.GELU("tanh"), nn.PReLU(4)]
    )


behind("Activations", (4, 6), _activations, slow=False)
behind("Softmax2d", (4, 3, 3), lambda: nn.Softmax2d())
behind("RReLU-eval", (4, 6), lambda: nn.RReLU().eval())
behind("PReLU-shared", (4, 6), lambda: nn.PReLU(), slow=False)
behind("PReLU-channels", (4, 3, 2), lambda: nn.PReLU(4), slow=False)
layer("PReLU-vectors", shaped(D), lambda: nn.PReLU(D), slow=True)

# --- distances, losses with parameters, containers ------------------------------------------------------------------

net(
    "Distances",
    shaped(T, D, more=((T, D),)),
    lambda m, x, y: (
        nn.CosineSimilarity(-1)(m.layer(x), y),
        nn.PairwiseDistance(p=2.0)(m.layer(x), y),
        torch.cdist(m.layer(x), y),
        torch.cdist(m.layer(x), m.prototypes),
    ),
    lambda: {"layer": nn.Linear(D, D), "prototypes": nn.Parameter(torch.randn(4, D))},
)
net(
    "DistancesOfManyKinds",
    shaped(T, D, more=((T, D),)),
    lambda m, x, y: [
        torch.cdist(m.layer(x), z, p) for p in (0.5, 1.0, 1.5, 3.0, float("inf")) for z in (y, m.prototypes)
    ],
    lambda: {"layer": nn.Linear(D, D), "prototypes": nn.Parameter(torch.randn(4, D))},
)
net(
    "DistancesByProducts",
    shaped(2, D),
    lambda m, x: torch.cdist(m.layer(x), m.prototypes),
    lambda: {"layer": nn.Linear(D, D), "prototypes": nn.Parameter(torch.randn(30, D))},
    slow=True,
)
net(
    "CdistOfPrototypes",
    shaped(D),
    lambda m, x: torch.cdist(m.layer(x), m.prototypes),
    lambda: {"layer": nn.Linear(D, D), "prototypes": nn.Parameter(torch.randn(4, D))},
    slow=True,
)
net(
    "AdaptiveLogSoftmax-loss",
    lambda n: ((torch.randn(n, D), torch.randint(0, V, (n,))), {}),
    lambda m, x, y: m.head(x, y).output,
    lambda: {"head": nn.AdaptiveLogSoftmaxWithLoss(D, V, [4, 8], div_value=2, head_bias=True)},
    refused="values of tensors",
    reason="takes the examples apart by their targets (use log_prob)",
)
net(
    "AdaptiveLogSoftmax",
    shaped(D),
    lambda m, x: m.head.log_prob(x),
    lambda: {"head": nn.AdaptiveLogSoftmaxWithLoss(D, V, [4, 8], div_value=2)},
    slow=True,
)
net(
    "ParameterContainers",
    shaped(D),
    lambda m, x: sum((F.linear(x, w) for w in m.rows), torch.zeros(())) * m.named["scale"] + m.named["shift"],
    lambda: {
        "rows": nn.ParameterList([torch.randn(3, D) for _ in range(3)]),
        "named": nn.ParameterDict({"scale": torch.rand(3), "shift": torch.randn(())}),
    },
    slow=True,
)
layer(
    "ModuleOfModules",
    shaped(D),
    lambda: nn.Sequential(nn.Linear(D, 4), nn.ModuleDict({"a": nn.Linear(4, 2)})["a"]),
    slow=True,
)
