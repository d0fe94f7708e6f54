"""What looks like mixing and is not: the same operations within each example, or with what all share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.case import D, T, V, register
from models.mixing import Mixer, squares
from models.modules import sequences, tokens, vectors


@register(sequences)
class CentredOverTime(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h - h.mean(1, keepdim=True).detach() + h.std(1, keepdim=True)


@register(sequences)
class OrderedOverTime(Mixer):
    """Sorting, ranks, the median, the best, running sums: all along time."""

    def mix(self, h: Tensor) -> Tensor:
        ranks = h.argsort(1).argsort(1)
        return h.sort(1).values * ranks + h.cumsum(1) - h.median(1, keepdim=True).values + h.topk(1, dim=1).values


@register(sequences)
class NeighboursOverTime(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        moved = h.roll(1, 1) + h.flip(1) + h[:, :1] * h[:, -1:]
        return moved + F.pad(h[:, 1:] - h[:, :-1], (0, 0, 0, 1)) + h.unfold(1, 2, 1).mean((-1, 1)).unsqueeze(1)


@register(sequences)
class PermutedOverTime(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h[:, torch.tensor([1, 2, 0])] * h.index_select(1, torch.arange(T).flip(0))


@register(squares)
class SquareInMemory(Mixer):
    """Batch and time of one size, and every operation along time."""

    def mix(self, h: Tensor) -> Tensor:
        pairs = (h @ h.mT).softmax(-1) @ h
        return pairs.transpose(1, 2).cumsum(2).transpose(1, 2) - h.amax(1, keepdim=True)


@register(sequences)
class ContrastiveOverTime(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        z = F.normalize(h, dim=-1)
        return -(torch.einsum("btd,bsd->bts", z, z) / 0.1).log_softmax(-1)[..., 0]


@register(vectors)
class SharedNegatives(Mixer):
    """A contrastive loss against a bank that is the same for all."""

    def __init__(self) -> None:
        super().__init__()
        self.bank: Tensor
        self.register_buffer("bank", F.normalize(torch.randn(7, D), dim=-1))

    def mix(self, h: Tensor) -> Tensor:
        return -(F.normalize(h, dim=-1) @ self.bank.mT).log_softmax(-1)[:, 0]


@register(sequences)
class BatchFirst(Mixer):
    """What is refused without ``batch_first``."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.cell = nn.MultiheadAttention(D, 2, batch_first=True), nn.GRU(D, D, batch_first=True)

    def mix(self, h: Tensor) -> Tensor:
        return self.cell(self.attention(h, h, h, need_weights=False)[0])[0]


@register(lambda n: ((torch.randn(n, 4, 5),), {}))
class NormedWithin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(4, 4, 3, padding=1)
        self.group, self.instance, self.layered = nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layered(self.group(self.layer(x)) + self.instance(x))


@register(vectors)
class FrozenBatchNorm(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D)
        self.norm.running_mean, self.norm.running_var = torch.randn(D), torch.rand(D) + 0.5

    def mix(self, h: Tensor) -> Tensor:
        self.norm.eval()
        return self.norm(h)


@register(sequences)
class ExpertChoiceWithin(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        best = h[..., 0].topk(2, dim=1).indices.unsqueeze(-1).expand(-1, -1, D)
        return torch.zeros_like(h).scatter_add(1, best, h.gather(1, best))


@register(sequences)
class SinkhornWithin(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        for _ in range(2):
            h = h - h.logsumexp(2, keepdim=True)
            h = h - h.logsumexp(1, keepdim=True)
        return h


@register(sequences)
class ChosenWithin(Mixer):
    """any() and all() of an example, and masks written through."""

    def mix(self, h: Tensor) -> Tensor:
        h = torch.where((h > 1).any((1, 2), keepdim=True), h, -h)
        h = h.clone()
        h[h > 2] = 2.0
        h[:, 0] *= (h > 0).all(1)
        return h


@register(sequences)
class CutByShape(Mixer):
    """Branches on sizes, none on values."""

    def mix(self, h: Tensor) -> Tensor:
        h = h[:, :-1] if h.shape[1] > 2 else h
        return h * 2 if len(h) >= 1 else h


@register(lambda n: ((torch.randn(n, T, D), torch.rand(n, T) > 0.3), {}))
class DividedByOwnCount(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return (self.layer(x) * valid.unsqueeze(-1)).sum(1) / valid.sum(1, keepdim=True).clamp_min(1)


@register(tokens)
class OwnMemory(nn.Module):
    """A memory for each example, written and read by token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)

    def forward(self, ids: Tensor) -> Tensor:
        h, places = self.table(ids), ids.unsqueeze(-1).expand(-1, -1, D)
        memory = h.new_zeros(len(ids), V, D).scatter_add(1, places, h)
        return h + memory.gather(1, places)


@register(tokens)
class ConstantFrequencies(nn.Module):
    """Counts of a corpus, not of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.counts = nn.Embedding(V, D), torch.arange(1.0, V + 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) / self.counts[ids].unsqueeze(-1)


@register(vectors)
class Steps(Mixer):
    """A buffer that counts calls, and what is computed from its new value."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros(()))

    def mix(self, h: Tensor) -> Tensor:
        warm = self.steps.clone()
        self.steps.add_(1)
        return h * torch.ones_like(warm).add(warm * 0) * (self.steps - warm).exp()


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h.sign()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (ctx.saved_tensors[0].abs() < 1)


@register(vectors)
class StraightThrough(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        h = _Straight.apply(h)  # type: ignore[assignment]
        h.register_hook(lambda gradient: gradient.cumsum(1))
        return h * 2


@register(vectors)
class ViewsReturned(Mixer):
    """Outputs that share memory with one another and with the input."""

    def mix(self, h: Tensor) -> tuple[Tensor, ...]:
        return h, h[:, :2], h.view(-1, 2, D // 2), h.unsqueeze(1).expand(-1, 2, -1)


@register(vectors)
class InnerGradient(Mixer):
    """A penalty on each example's own input gradient."""

    def forward(self, x: Tensor) -> Any:
        def energy(x: Tensor) -> Tensor:
            return self.layer(x).tanh().sum()

        return torch.func.vmap(lambda x: energy(x) + torch.func.grad(energy)(x).square().sum())(x)


@register(vectors)
class WrittenInPlace(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        h = h.clone()
        h.view(-1, 2, D // 2)[:, 1].mul_(2)
        h[:, 0] = h[:, 1]
        h[:, 1:3].copy_(h[:, 2:4].clone())
        return h


@register(vectors)
class QuantisedLayer(Mixer):
    """Frozen int8 weights, and fake quantisation of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", torch.randint(-9, 9, (D, D), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(D))

    def mix(self, h: Tensor) -> Tensor:
        return F.linear(torch.fake_quantize_per_tensor_affine(h, 0.1, 0, -128, 127), self.weight.float() * self.scale)
