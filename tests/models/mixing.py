"""Models in which examples meet, each in another way: all must be refused, with the line where it happens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.case import B, Call, D, T, V, register
from models.modules import repeated_tokens, sequences, tokens, vectors


def squares(n: int) -> Call:
    """As many positions as examples."""
    return (torch.randn(n, n, D),), {}


class Mixer(nn.Module):
    """A linear layer, and then what the subclass does with its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.mix(self.layer(x))

    def mix(self, h: Tensor) -> Any:
        raise NotImplementedError


# --- statistics of the batch ----------------------------------------------------------------------------------------


@register(vectors, refused="BatchNorm1d in training mode", reason="BatchNorm normalises by the batch")
class BatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(D, D), nn.BatchNorm1d(D, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


@register(vectors, refused="`sub` mixes examples", reason="the batch mean is subtracted")
class Centred(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


@register(vectors, refused="`sub` mixes examples", reason="detaching the batch mean does not hide it")
class CentredDetached(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            mean = h.mean(0)
        return h - mean


@register(vectors, refused="`(max|amax)`", reason="the largest value of the batch")
class ScaledByMaximum(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h / h.abs().max()


@register(vectors, refused="`median`", reason="median over the batch")
class Median(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h - h.median(0).values


@register(vectors, refused="`(sort|any)`", reason="quantile over the batch")
class Quantile(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h.clamp(max=h.quantile(0.9, dim=0).detach())


@register(vectors, refused="`(linalg_cholesky_ex|mm|addmm|add)`", reason="whitening by the batch")
class WhitenedByCholesky(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        covariance = h.mT @ h / len(h) + torch.eye(D)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), h.mT, upper=False).mT


@register(vectors, refused="`[a-z_]*(eigh|mul|mm|add|sub)`", reason="whitening by the batch's eigenvectors")
class WhitenedByEigenvectors(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(torch.einsum("bi,bj->ij", h, h).detach() + torch.eye(D))
        return h @ vectors * values.rsqrt()


@register(vectors, refused="`[a-z_]*(svd|mul|mm|add|sub)`", reason="the batch's singular vectors")
class Principal(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h @ torch.linalg.svd(h.detach(), full_matrices=False).Vh.mT


@register(
    lambda n: ((torch.randn(n, T, D), torch.rand(n, T) > 0.3), {}),
    refused="`(div|mul|reciprocal)`", reason="divided by the number of valid positions in the batch",
)  # fmt: skip
class DividedByCount(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        h = self.layer(x) * valid.unsqueeze(-1)
        return h.sum(1) / valid.sum()


@register(vectors, refused="`histc`", reason="a histogram of the batch")
class Histogram(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        counts = torch.histc(h.detach(), bins=4, min=-2, max=2)
        return h * counts.max()


@register(tokens, refused="`(bincount|index_put|scatter_add|index|div|mul|gather)`", reason="token counts of the batch")
class WeightedByFrequency(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)

    def forward(self, ids: Tensor) -> Tensor:
        counts = torch.zeros(V).index_add(0, ids.flatten(), torch.ones(ids.numel()))
        return self.table(ids) / counts[ids].unsqueeze(-1)


@register(repeated_tokens, refused="`[a-z_]+`", reason="gradients divided by token counts of the batch")
class ScaledGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D, scale_grad_by_freq=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


@register(
    tokens,
    refused="(`embedding_renorm`|writes to 'table.weight')",
    reason="max_norm rewrites the rows that the batch looks up",
)  # fmt: skip
class RenormedTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D, max_norm=0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


@register(vectors, refused="output 0 of the model is a sum or mean over the examples", reason="a vector of sums")
class Prototype(Mixer):
    """A loss of the batch's mean makes every example's gradient depend on all others."""

    def mix(self, h: Tensor) -> Tensor:
        return h.mean(0)


@register(vectors, refused="buffer 'running' is written", reason="running statistics in a buffer")
class RunningMean(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.running: Tensor
        self.register_buffer("running", torch.zeros(D))

    def mix(self, h: Tensor) -> Tensor:
        self.running.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return h


@register(vectors, refused="buffer 'running' is written", reason="running statistics through .data")
class RunningMeanByData(RunningMean):
    def mix(self, h: Tensor) -> Tensor:
        self.running.data = h.detach().mean(0) * 1
        return h


@register(vectors, refused="buffer 'codes' is written", reason="a codebook follows the examples it is used by")
class MovingCodebook(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.codes: Tensor
        self.register_buffer("codes", torch.randn(4, D))

    def mix(self, h: Tensor) -> Tensor:
        nearest = (h.detach() @ self.codes.mT).argmax(-1)
        used = F.one_hot(nearest, 4).float()
        code = F.embedding(nearest, self.codes.clone())
        self.codes.mul_(0.9).add_(used.mT @ h.detach(), alpha=0.1)
        return h + code


# --- order, position and neighbours in the batch --------------------------------------------------------------------


@register(vectors, refused="`cumsum`", reason="a running sum over the batch")
class Cumulated(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h.cumsum(0)


@register(vectors, refused="`sort`", reason="sorted over the batch")
class Sorted(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h.sort(dim=0).values


@register(vectors, refused="`(sort|argsort|gather)`", reason="ranks over the batch")
class Ranked(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h * h.argsort(0).argsort(0)


@register(sequences, refused="`topk`", reason="expert choice: each expert takes the best tokens of the batch")
class ExpertChoice(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        flat = h.flatten(0, 1)
        best = flat[:, 0].topk(4).indices
        return torch.zeros_like(flat).index_add(0, best, flat[best]).view_as(h)


@register(sequences, refused="`(cumsum|sub|mul)`", reason="a place in an expert's queue depends on earlier examples")
class QueueForExpert(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        wants = (h[..., 0] > 0).flatten().long()
        fits = (wants.cumsum(0) * wants <= 8).view(h.shape[:-1])
        return h * fits.unsqueeze(-1)


@register(vectors, refused="`index_select`|`index`", reason="examples in another order")
class Permuted(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h + h.index_select(0, torch.arange(len(h)).roll(1))


@register(vectors, refused="`index`", reason="a random partner for every example")
class Mixup(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return 0.7 * h + 0.3 * h[torch.randperm(len(h))]


@register(vectors, refused="`(flip|prims.rev|rev)`", reason="flipped over the batch")
class Flipped(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h + h.flip(0)


@register(vectors, refused="`(roll|slice|index)`", reason="rolled over the batch")
class Rolled(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h + h.roll(1, 0)


@register(vectors, refused="`select`", reason="the first example for everyone")
class FirstForEveryone(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h + h[0]


@register(vectors, refused="`slice`", reason="differences of neighbours")
class Neighbours(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return F.pad(h[1:] - h[:-1], (0, 0, 0, 1))


@register(vectors, refused="`select`", reason="one example written into another in place")
class Overwritten(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        h = h.clone()
        h[0] = h[1]
        return h


@register(vectors, refused="`(slice|select)[a-z_]*`", reason="written through a flat view")
class OverwrittenThroughView(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        h = h.clone()
        flat = h.view(-1)
        flat[D : D + 2] = flat[:2]
        return h


@register(vectors, refused="`scatter`", reason="scattered across the batch")
class Scattered(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h.scatter(0, torch.arange(len(h)).flip(0).unsqueeze(1).expand_as(h), h)


@register(vectors, refused="`(slice|gather|sort|argsort)`", reason="gathered by another example's indices")
class GatheredByAnother(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h.gather(1, h[:1].argsort(1).expand_as(h))


@register(
    lambda n: ((torch.randn(n, D, D), torch.randint(0, D, (n,))), {}),
    refused="`index` mixes examples: it pairs", reason="every example is looked up by the indices of all pairs",
)  # fmt: skip
class LookedUpByPairs(nn.Module):
    """Both indices are the examples' own, along different dimensions of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.layer(x)[:, : len(ids), : len(ids)] * x[:, ids, ids.unsqueeze(1)]


@register(squares, refused="`[a-z_]*(view|reshape|clone|bmm|sub|add|mul)[a-z_]*`", reason="batch and time exchanged")
class Exchanged(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h + h.transpose(0, 1)


@register(sequences, refused="`(_unsafe_view|view|reshape)`", reason="a reshape reads time as examples")
class Reread(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h.transpose(0, 1).reshape(len(h), -1)


@register(vectors, refused="`as_strided`", reason="addresses in memory")
class Strided(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h + h.as_strided(h.shape, (0, 1))


@register(vectors, refused="`select` mixes examples.*output 1", reason="an output that is a view of one example")
class OneExampleReturned(Mixer):
    """AOTAutograd would take the view itself, behind the graph."""

    def mix(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return h, h[0].expand_as(h)


@register(vectors, refused="through 'offsets'", reason="a parameter with a row per example")
class RowsOfItsOwn(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.randn(B, D))

    def mix(self, h: Tensor) -> Tensor:
        return h * self.offsets


# --- windows and filters over the batch -----------------------------------------------------------------------------


@register(vectors, refused="`convolution`", reason="a convolution over the batch")
class Convolved(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv1d(D, D, 3, padding=1)

    def mix(self, h: Tensor) -> Tensor:
        return self.filters(h.mT.unsqueeze(0))[0].mT


@register(vectors, refused="`(var_mean|view|mean|sub)`", reason="GroupNorm with the batch for channels")
class NormedOverBatch(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return F.group_norm(h.unsqueeze(0), 1)[0]


@register(vectors, refused="`unfold`", reason="a window over the batch")
class Windowed(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return F.pad(h.unfold(0, 2, 1).mean(-1), (0, 0, 0, 1))


@register(vectors, refused="`[a-z_]+`", reason="interpolated between examples")
class Interpolated(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        doubled = F.interpolate(h.mT.unsqueeze(0), scale_factor=2, mode="linear")
        return doubled[0, :, : len(h)].mT


@register(vectors, refused="`[a-z_]*pad[a-z_0-9]*`", reason="shifted by padding")
class Padded(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h + F.pad(h, (0, 0, 1, -1))


@register(
    lambda n: ((torch.randn(n, n, 2, D),), {}),
    refused="`[a-z_]+`", reason="pixel shuffle with the batch for channels", static_only=True,
)  # fmt: skip
class PixelShuffled(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        channels = h.transpose(0, 1)[:, :4]
        return h + F.pixel_shuffle(channels, 2).mean()


@register(vectors, refused="`_fft_[cr2]+`", reason="a Fourier transform over the batch")
class Transformed(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(h, dim=0) * torch.arange(1, len(h) + 1).unsqueeze(1), dim=0).real


# --- pairs of examples ----------------------------------------------------------------------------------------------


@register(vectors, refused="`mm`", reason="inner products between examples")
class Gram(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return (h @ h.mT).sum(1)


@register(vectors, refused="`mm`", reason="contrastive logits")
class Contrastive(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        z = F.normalize(h, dim=-1)
        return -(z @ z.mT / 0.1).log_softmax(-1).diagonal()


@register(vectors, refused="`(bmm|mm)`", reason="an einsum with the batch twice")
class Einsum(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return torch.einsum("bd,cd->bc", h, h).tanh().sum(1)


@register(vectors, refused="`[a-z_]*(cdist_forward|sub|bmm)`", reason="distances between examples")
class Distances(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return torch.cdist(h, h).sum(1)


@register(vectors, refused="`(softmax|_softmax|amax|prepare_softmax_online)`", reason="softmax over the batch")
class Softmax(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h.softmax(0)


@register(vectors, refused="`(_log_softmax|amax|prepare_softmax_online)`", reason="log_softmax over the batch")
class LogSoftmax(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h.log_softmax(0)


@register(vectors, refused="`[a-z_]*(attention[a-z_]*|bmm|mm)`", reason="attention between examples")
class Attention(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        q = h[None, None]
        return F.scaled_dot_product_attention(q, q, q)[0, 0]


@register(sequences, refused="`[a-z_]+` mixes examples", reason="batch_first forgotten: attention over the batch")
class SequenceFirstAttention(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2)

    def mix(self, h: Tensor) -> Tensor:
        return self.attention(h, h, h, need_weights=False)[0]


@register(sequences, refused="`[a-z_]+` mixes examples", reason="batch_first forgotten: recurrent over the batch")
class SequenceFirstRecurrent(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(D, D)

    def mix(self, h: Tensor) -> Tensor:
        return self.cell(h)[0]


@register(vectors, refused="`(logsumexp|amax|sub|add|exp)`", reason="Sinkhorn normalises over the batch too")
class Sinkhorn(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        for _ in range(2):
            h = h - h.logsumexp(1, keepdim=True)
            h = h - h.logsumexp(0, keepdim=True)
        return h


@register(vectors, refused="`(pow|mul|sub|div|add)`", reason="decorrelation of features over the batch")
class Decorrelated(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h.sum(1) + (h.mT @ h / len(h)).triu(1).square().sum()


@register(vectors, refused="`(mul|pow|square)`", reason="a load-balancing loss of mean gate values")
class LoadBalanced(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h.sum(1) + h.softmax(1).mean(0).square().sum()


# --- values that decide for all -------------------------------------------------------------------------------------


@register(vectors, refused="(the values of examples|`[a-z_]+`)", reason="a number read out of the batch")
class ReadOut(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return torch.full_like(h, h.detach().abs().max().item()) + h


@register(vectors, refused="branches on the values of tensors", reason="a branch on the batch")
class Branch(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        if h.sum() > 0:
            return h * 2
        return h


@register(vectors, refused="`any`", reason="a choice by any() of the batch")
class AnyOfBatch(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return torch.where((h > 1.5).any(), h, -h)


@register(vectors, refused="boolean mask", reason="pooled over what a mask leaves of the batch")
class MaskedPool(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h * h[h > 0].mean()


@register(vectors, refused="(unique|Dynamic shape|dynamic shape)", reason="distinct values of the batch")
class Distinct(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h * len((h * 2).long().unique())


@register(tokens, refused="(on the values of tensors|`[a-z_]+`)", reason="cut to the longest of the batch")
class CutToLongest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)

    def forward(self, ids: Tensor) -> Tensor:
        longest = (ids > 8).sum(1).max()
        return self.table(ids)[:, : longest.item() + 1].mean(1)


@register(vectors, refused="`slice`", reason="the mask of one example for all")
class MaskOfFirst(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h * (h[:1] > 0)


@register(vectors, refused="`multinomial`|`amax`|`[a-z_]*softmax`", reason="examples drawn by their scores")
class DrawnByScore(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h + h[torch.multinomial(h[:, 0].softmax(0), len(h), replacement=True)]


@register(tokens, refused="`(index|embedding|gather|add|[a-z_]+)`", reason="a memory shared by token")
class SharedMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        memory = torch.zeros(V, D).index_add(0, ids.flatten(), h.flatten(0, 1))
        return h + memory[ids]


@register(vectors, refused="`bucketize`|`searchsorted`|`sort`", reason="boundaries that come from the batch")
class Bucketed(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        return h * torch.bucketize(h.detach(), h.detach()[:, 0].sort().values)


# --- in the backward alone ------------------------------------------------------------------------------------------


@register(vectors, refused="`sub` mixes examples.*gradient of parameter", reason="a backward of its own that mixes")
class CentredGradient(Mixer):
    class Centre(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return h * 1

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] - gradients[0].mean(0)

    def mix(self, h: Tensor) -> Any:
        return self.Centre.apply(h)


@register(vectors, refused="gradient of parameter", reason="a hook that divides by the norm of the batch")
class HookedGradient(Mixer):
    def mix(self, h: Tensor) -> Tensor:
        h.register_hook(lambda gradient: gradient / gradient.norm())
        return h * 1


@register(sequences, refused="`sub` mixes examples", reason="recomputing does not hide it")
class Checkpointed(Mixer):
    def mix(self, h: Tensor) -> Any:
        return checkpoint(lambda h: (h - h.mean(0)).tanh(), h, use_reentrant=False)


@register(vectors, refused="`mul`|`(bmm|mm)`", reason="vmap over both of a pair")
class VmapOverPairs(Mixer):
    def mix(self, h: Tensor) -> Any:
        every = torch.func.vmap(torch.func.vmap(lambda a, b: (a * b).sum(), (None, 0)), (0, None))
        return every(h, h).tanh().sum(1)
