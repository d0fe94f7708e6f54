"""Tensor operations as layers: products, Fourier transforms, linear algebra, indexing and moving along positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.case import D, T
from models.parts import net, shaped


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


def weights(**shapes: tuple[int, ...]) -> Callable[[], dict[str, Any]]:
    """A linear layer ``lin`` on D, and parameters of these shapes."""
    return lambda: {"lin": nn.Linear(D, D), **{name: param(*shape) for name, shape in shapes.items()}}


def over(name: str, function: Callable[..., Any], shape: tuple[int, ...] = (T, D), **options: Any) -> None:
    """A function of sequences behind a linear layer."""
    net(name, shaped(*shape), lambda m, x: function(m.lin(x)), weights(), **{"slow": True, **options})


# --- products -------------------------------------------------------------------------------------------------------

net(
    "Baddbmm",
    shaped(T, D),
    lambda m, x: torch.baddbmm(m.c, x, m.w.expand(len(x), -1, -1), beta=0.5, alpha=2),
    weights(c=(4,), w=(D, 4)),
)
net("Addbmm", shaped(T, D), lambda m, x: torch.einsum("bti,bsi,ij->btsj", m.lin(x), x, m.w), weights(w=(D, 2)))
net("Tensordot", shaped(T, D), lambda m, x: torch.tensordot(x, m.w, 2), weights(w=(T, D, 4)))
net("Kron", shaped(D), lambda m, x: F.linear(x, torch.kron(m.a, m.b)), weights(a=(2, 3), b=(2, 2)))
net(
    "KronPerExample",
    shaped(D),
    lambda m, x: torch.einsum("bi,bj->bij", m.lin(x), x @ m.w).flatten(1),
    weights(w=(D, 2)),
    slow=True,
)
net("MatrixVector", shaped(T, D), lambda m, x: x @ m.v + m.lin(x) @ (m.w @ m.v), weights(v=(D,), w=(D, D)))
net(
    "OneVector",
    shaped(D),
    lambda m, x: torch.stack([(m.lin(x) * m.v).sum(-1), m.lin(x) @ m.v]).T,
    weights(v=(D,)),
    slow=True,
)
net(
    "ChainMatmul",
    shaped(T, D),
    lambda m, x: torch.linalg.multi_dot([x.flatten(0, 1), m.a, m.b]).unflatten(0, (-1, T)),
    weights(a=(D, 2), b=(2, 4)),
    slow=True,
)
net("BroadcastProduct", shaped(2, T, D), lambda m, x: x @ m.w @ m.v, weights(w=(2, D, 4), v=(4, 3)))
net("Outer", shaped(D), lambda m, x: torch.einsum("bi,j->bij", m.lin(x), m.v.exp()), weights(v=(3,)), slow=True)
net("CumulatedWeights", shaped(T, D), lambda m, x: x @ m.w.cumsum(0).tril() + m.w.sort(1).values[0], weights(w=(D, D)))
net(
    "LoRAConv",
    shaped(2, 6),
    lambda m, x: F.conv1d(x, m.base + (m.up @ m.down).view(4, 2, 3)),
    lambda: {"base": nn.Buffer(torch.randn(4, 2, 3)), "up": param(4, 2), "down": param(2, 6)},
)

# --- Fourier transforms ---------------------------------------------------------------------------------------------

over("FNet", lambda x: torch.fft.fft2(x).real, slow=False)
over("FourierOverTime", lambda x: torch.view_as_real(torch.fft.rfft(x, dim=1, norm="ortho")))
over("FourierAndBack", lambda x: torch.fft.irfft(torch.fft.rfft(x, n=8, dim=1).abs().log1p(), n=5, dim=1))
over("Spectrogram", lambda x: torch.fft.rfft(x.flatten(1).unfold(1, 6, 3) * torch.hann_window(6)).abs().square())
over("PhaseAndSize", lambda x: (torch.fft.fft(x).angle(), torch.fft.ifft(x).imag))
net(
    "FourierFilter",
    shaped(8, 2),
    lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.view_as_complex(m.w), dim=1),
    lambda: {"w": param(5, 2, 2)},
)
net(
    "FourierNeuralOperator",
    shaped(8, 2),
    lambda m, x: torch.fft.irfft(
        (torch.fft.rfft(x, dim=1)[:, :3, :, None] * torch.view_as_complex(m.w)).sum(2), n=8, dim=1
    ),
    lambda: {"w": param(3, 2, 4, 2)},
)
net(
    "ComplexWeights",
    shaped(8, 2),
    lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * m.w, dim=1),
    lambda: {"w": nn.Parameter(torch.randn(5, 2, dtype=torch.complex64))},
    refused="is complex",
    reason="complex parameters (take [..., 2] and view_as_complex)",
)
net(
    "ComplexLinear",
    shaped(T, D),
    lambda m, x: (torch.complex(x, x.flip(1)) @ torch.complex(m.a, m.b)).abs(),
    weights(a=(D, 3), b=(D, 3)),
)
net(
    "LongConvolution",
    shaped(2, 8),
    lambda m, x: torch.fft.irfft(torch.fft.rfft(x, n=16) * torch.fft.rfft(m.w, n=16), n=16)[..., :8],
    lambda: {"w": param(2, 8)},
)
net(
    "STFT",
    shaped(16),
    lambda m, x: torch.view_as_real(torch.stft(m.lin(x), 8, 4, window=m.window, return_complex=True)),
    lambda: {"lin": nn.Linear(16, 16), "window": nn.Buffer(torch.hann_window(8))},
    slow=True,
)

# --- linear algebra on parameters and on examples -------------------------------------------------------------------


def solved(name: str, weight: Callable[[Any], Tensor], **options: Any) -> None:
    """A square weight made from another by linear algebra."""
    net(
        f"Weight-{name}",
        shaped(D),
        lambda m, x: x @ weight(m),
        weights(w=(D, D), v=(D, 2)),
        **{"slow": True, **options},
    )


EYE = torch.eye(D)
solved("inverse", lambda m: torch.linalg.inv(m.w + 3 * EYE), slow=False)
solved("solve", lambda m: torch.linalg.solve(m.w + 3 * EYE, m.v), slow=False)
solved("solve-vector", lambda m: torch.linalg.solve(m.w + 3 * EYE, m.v[:, 0])[:, None])
solved("cayley", lambda m: torch.linalg.solve(EYE + m.w - m.w.T, EYE - m.w + m.w.T), slow=False)
solved("qr", lambda m: torch.linalg.qr(m.w).Q, slow=False)
solved(
    "svd", lambda m: (lambda u, s, v: u @ torch.diag(s.clamp(max=1.0)) @ v)(*torch.linalg.svd(m.w, full_matrices=False))
)
solved("eigh", lambda m: torch.linalg.eigh(m.w + m.w.T).eigenvectors.abs() * torch.linalg.eigvalsh(m.w @ m.w.T))
solved("cholesky", lambda m: torch.linalg.cholesky(m.w @ m.w.T + EYE))
solved("cholesky-solve", lambda m: torch.cholesky_solve(m.v, torch.linalg.cholesky(m.w @ m.w.T + EYE)))
solved("triangular", lambda m: torch.linalg.solve_triangular(m.w.triu() + 3 * EYE, m.v, upper=True))
solved("determinant", lambda m: m.v * torch.linalg.det(m.w) + torch.linalg.slogdet(m.w).logabsdet)
solved("matrix-power", lambda m: torch.linalg.matrix_power(m.w, 3))
solved("pinv", lambda m: torch.linalg.pinv(m.v).T)
solved("matrix-exp", lambda m: torch.linalg.matrix_exp(m.w - m.w.T), slow=False)
solved("spectral", lambda m: m.w / torch.linalg.matrix_norm(m.w, 2) + torch.linalg.norm(m.v))
solved(
    "householder",
    lambda m: torch.linalg.householder_product(m.w.tril(-1) + EYE, 2 / (1 + m.w.tril(-1).square().sum(0))),
)


def per_example(name: str, function: Callable[[Tensor, Tensor], Any], **options: Any) -> None:
    """Linear algebra on a matrix of each example's own: symmetric, positive; and a vector."""

    def forward(m: Any, x: Tensor) -> Any:
        h = m.lin(x)
        return function(h @ h.mT + torch.eye(T), x @ m.v)

    net(f"Each-{name}", shaped(T, D), forward, weights(v=(D, 2)), **{"slow": True, **options})


per_example("inverse", lambda a, b: torch.linalg.inv(a), slow=False)
per_example("solve", lambda a, b: torch.linalg.solve(a, b))
per_example("solve-vectors", lambda a, b: torch.linalg.solve(a, b[..., 0]))
per_example("shared-matrix", lambda a, b: torch.linalg.solve(torch.eye(T) * 2 + 0.5, b))
per_example("cholesky", lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(a)))
per_example("qr", lambda a, b: torch.linalg.qr(a).R)
per_example("svd", lambda a, b: torch.linalg.svdvals(b))
per_example("eigh", lambda a, b: torch.linalg.eigvalsh(a))
per_example("logdet", lambda a, b: torch.logdet(a))
per_example("triangular", lambda a, b: torch.linalg.solve_triangular(a.triu(), b, upper=True))
per_example("matrix-exp", lambda a, b: torch.linalg.matrix_exp(a / 9), slow=False)
per_example("pinv", lambda a, b: torch.linalg.pinv(b))
per_example(
    "lstsq",
    lambda a, b: torch.linalg.lstsq(a, b).solution,
    refused="Dynamic shape operator",
    reason="Dynamo does not trace it (use linalg.solve or pinv)",
)
per_example("cross", lambda a, b: torch.linalg.cross(a, a.flip(1)))
per_example("trace", lambda a, b: torch.einsum("bii->b", a) + torch.vmap(torch.trace)(a))

# --- along positions ------------------------------------------------------------------------------------------------

over(
    "MovedAlongTime",
    lambda x: x.roll((1, 2), (1, 2)) + x.flip(1) * x.cumsum(1) - x.rot90(1, (1, 2)).rot90(-1, (1, 2)),
    slow=False,
)
over(
    "SortedOverTime",
    lambda x: (
        x.sort(1, descending=True).values,
        x.topk(2, 1).values,
        x.median(1).values,
        x.kthvalue(2, 1).values,
        x.mode(1).values,
    ),
)
over("RepeatedSteps", lambda x: x.repeat_interleave(2, 1) + x.repeat(1, 2, 1) + torch.tile(x, (1, 2, 1)))
over("RepeatedByCounts", lambda x: x.repeat_interleave(torch.tensor([1, 0, 2]), 1, output_size=3))
over(
    "Cumulated",
    lambda x: (
        x.cumprod(1),
        x.cummax(1).values,
        x.diff(dim=1),
        torch.cumulative_trapezoid(x, dim=1),
    ),
)
over(
    "LogCumSumExp",
    lambda x: x.logcumsumexp(1),
    refused="does not grow in proportion to the cotangents",
    reason="its backward takes logarithms of cotangents: right, but not seen to be linear (loss_reduction='sum')",
)
over("PickedOverTime", lambda x: x[:, [0, 2]] + x.index_select(1, torch.tensor([2, 1])))
over(
    "MaskedOverTime",
    lambda x: x[:, torch.tensor([True, False, True])],
    refused="boolean mask",
    reason="a mask that cuts (use indices, or where)",
)
over(
    "GatheredOverTime", lambda x: x.gather(1, x.argsort(1)) + torch.take_along_dim(x, x.argmax(2, keepdim=True) % T, 1)
)
over(
    "ScatteredOverTime",
    lambda x: x.new_zeros(x.shape).scatter_add(1, x.argsort(1), x) + x.scatter(2, x.argmax(2, keepdim=True), 0.5),
)
over(
    "ScatterReduced",
    lambda x: (
        x.new_zeros(x.shape).scatter_reduce(1, x.argsort(1) // 2, x, "amax")
        + x.index_add(1, torch.tensor([0, 0]), x[:, 1:], alpha=2)
    ),
)
over("WrittenInPlace", lambda x: _written(x.clone()), slow=False)
over(
    "Bucketized",
    lambda x: x * torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])) + torch.searchsorted(torch.tensor([-0.5, 0.5]), x),
)
over("Blocks", lambda x: (torch.diag_embed(x), torch.diagonal(x[..., :T], dim1=1, dim2=2), x.tril(-1)))
over(
    "MaskedFills",
    lambda x: (
        x.masked_fill(x < 0, 1.0) + torch.where(x > 0.5, x.exp(), 0.2) + x.clamp(-0.5, 0.7) + torch.nan_to_num(x.log())
    ),
)
over(
    "Meshes",
    lambda x: (
        torch.cartesian_prod(torch.arange(2.0), torch.arange(3.0)) @ x[:, :2]
        + torch.stack(torch.meshgrid(torch.arange(2.0), torch.arange(3.0), indexing="ij")).sum()
    ),
)
over(
    "Statistics",
    lambda x: (
        x.std(1),
        x.var((1, 2)),
        x.norm(p=3, dim=2),
        x.logsumexp(1),
        x.amax((1, 2)),
        x.nanmean(1),
    ),
)
over(
    "ByColumns",
    lambda x: (
        torch.hstack([x[:, 0], x[:, 1]])
        + torch.cat(torch.tensor_split(x, 2, 2)[::-1], 2).flatten(1)[:, :12]
        + torch.movedim(x, 1, 2).flatten(1)[:, 3:15]
    ),
)
over("OverlappingWindows", lambda x: F.pad(x, (0, 0, 1, 0)).unfold(1, 2, 1).movedim(-1, 2).flatten(2))
over("ByVmap", lambda x: torch.vmap(lambda a: a @ a.T + a.sum())(x), slow=False)
over("ByAssociativeScan", lambda x: _scan(x))


def _written(x: Tensor) -> Tensor:
    """Writes into an activation: a slice, a position, where a mask says, at indices."""
    source = x.clone()
    x[:, 0] = source[:, 1] * 2
    x[:, :, 1:3] += 1
    x[..., -1].mul_(source[..., 0])
    x[:, torch.tensor([0, 2])] = source[:, 1:].tanh()
    x[:, :, 0].add_(0.5)
    return x.masked_fill_(source > 1, 0.3)


def _scan(x: Tensor) -> Tensor:
    """A scan by doubling."""
    step = 1
    while step < x.shape[1]:
        x = x + F.pad(x, (0, 0, step, 0))[:, : x.shape[1]].sigmoid()
        step *= 2
    return x
