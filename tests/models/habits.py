"""What published models do besides layers: writes in place, addresses, spectra, messages, locks, asked gradients."""

from __future__ import annotations

import logging
import threading

import torch
from torch import Tensor, nn

from models.case import D, T, register
from models.modules import sequences, vectors


@register(sequences)
class FourierFilter(nn.Module):
    """A filter of complex numbers, held as real ones, on the spectrum of every feature (a GFNet layer)."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(T // 2 + 1, D, 2))
        self.head = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, dim=1) * torch.view_as_complex(self.filter)
        return self.head(torch.fft.irfft(spectrum, n=T, dim=1))


@register(sequences)
class ComplexProducts(nn.Module):
    """Matrix products of complex numbers, of weights that are real."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.imaginary = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D, D))
        self.head = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.complex(x, x.roll(1, 2)) @ torch.complex(self.real, self.imaginary)
        z = z @ self.head.weight.to(torch.complex64)
        return self.head(z.abs()) + z.angle()


@register(sequences, refused="parameter 'filter' is complex", reason="norms and noise are those of real numbers")
class ComplexFilter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(T // 2 + 1, D, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.filter, n=T, dim=1)


@register(vectors, refused="it transforms along the examples", reason="spectrum of the batch")
class FourierOverBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.fft2(x).real)


@register(sequences)
class WeightByAddress(nn.Module):
    """Weights that are read from the memory of others: transposed, and a window of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(D, D)), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.t()
        first = w.as_strided((D, D), (1, D)) / 2
        second = (w * 2).as_strided((D - 1, D), (D, 1), 2)
        return self.head(x @ first) + self.head((x[..., 1:] @ second).tanh())


@register(sequences)
class ScaledInPlace(nn.Module):
    """Keys of shared positions, permuted and scaled in place (DeBERTa)."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.key, self.query = nn.Parameter(torch.randn(4, D)), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.key(self.positions[None]).view(1, 4, 2, -1).permute(0, 2, 1, 3)
        keys /= 1.7
        query = self.query(x).view(len(x), T, 2, -1).permute(0, 2, 1, 3)
        return (query @ keys.mT).softmax(-1)


@register(sequences)
class WritesThroughMask(nn.Module):
    """A learned vector and zeros written through boolean masks (masked pre-training, padding)."""

    def __init__(self) -> None:
        super().__init__()
        self.masked, self.layer, self.edge = nn.Parameter(torch.randn(D)), nn.Linear(D, D), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        h[x[..., 0] > 0.3] = self.masked
        h = h * 0.5
        h[x > 1] = self.edge
        h[(x[..., 1] > 0.7) & (x[..., 2] > 0)] = 0
        return self.layer(h)


@register(sequences, refused="through a boolean mask", reason="as many rows as the mask has")
class WritesRowsThroughMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        mask = torch.tensor([True, False, True]).expand(len(x), T)
        h[mask] = self.layer(x[:, :2].reshape(-1, D))
        return h


@register(vectors)
class AsksForGradient(nn.Module):
    """Sets ``requires_grad`` on what goes into reentrant checkpoints (wav2vec 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None] * 2
        x.requires_grad = True
        return self.second(self.first(x).tanh()).squeeze(1)


@register(vectors, refused=r"requires_grad.*(\n.*)*self.frozen.requires_grad = True", reason="unfreezes in forward")
class Unfreezes(nn.Module):
    """Whether a parameter is trained is known before the call, and stays so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(D, 2), nn.Parameter(torch.randn(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.frozen.requires_grad = True
        return self.layer(x) + self.frozen


_LOGGER = logging.getLogger(__name__)


@register(vectors)
class WritesToLog(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        _LOGGER.info("%d features", x.shape[1])
        return self.layer(x)


_LOCK = threading.Lock()


@register(vectors, refused="the model takes a lock", reason="prepares itself on its first call")
class PreparesOnFirstCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.ready = nn.Linear(D, 2), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            with _LOCK:
                self.ready = True
        return self.layer(x)


@register(vectors, refused="branches on the values of tensors", reason="branches on values")
class BranchesOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum().item() > 1 else self.layer(-x)


@register(vectors, refused="the model fails on these inputs: ValueError: seven features are wanted", reason="fails")
class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 7:
            raise ValueError("seven features are wanted")
        return self.layer(x)
