"""A small zoo of handwritten PyTorch models: layers alone and combined, shared and odd uses of parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.case import ALL, B, Call, D, T, V, register


def vectors(n: int) -> Call:
    return (torch.randn(n, D),), {}


def sequences(n: int) -> Call:
    return (torch.randn(n, T, D),), {}


def tokens(n: int) -> Call:
    return (torch.randint(0, V, (n, T)),), {}


def repeated_tokens(n: int) -> Call:
    """Every example holds one token twice, and the padding token."""
    ids = torch.randint(1, V, (n, 4))
    ids[:, 2], ids[:, 3] = ids[:, 0], 0
    return (ids,), {}


def images(n: int, channels: int = 2, size: int = 6) -> Call:
    return (torch.randn(n, channels, size, size),), {}


def signals(n: int) -> Call:
    return (torch.randn(n, 4, 9),), {}


# --- layers ---------------------------------------------------------------------------------------------------------


@register(vectors)
class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(D, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())


@register(sequences)
class MLPOverTime(MLP):
    """The same on three dimensions."""


@register(images)
class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 4, 3, stride=2, padding=2, dilation=2, groups=2, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.first(x)).relu(), 2, stride=1)
        return self.head(F.adaptive_avg_pool2d(self.second(x), 1).flatten(1))


@register(images)
class ConvSame(nn.Module):
    """Asymmetric padding, depthwise filters, circular padding, average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Conv2d(2, 2, 2, padding="same")
        self.depthwise = nn.Conv2d(2, 4, (3, 1), groups=2, padding=(1, 0))
        self.circular = nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.circular(self.depthwise(self.even(x)).tanh()), 3)


@register(signals)
class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, stride=2, groups=2, padding=1)
        self.point = nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.point(self.conv(x).relu()).mean(-1)


@register(lambda n: ((torch.randn(n, 1, 4, 4, 4),), {}))
class Conv3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv3d(1, 3, 2, stride=2), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).tanh().flatten(1))


@register(lambda n: images(n, channels=4, size=3))
class ConvTranspose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.out = nn.ConvTranspose2d(4, 2, 2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(x).relu())


class Block(nn.Module):
    """A transformer block on ``F.scaled_dot_product_attention``."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, D))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, D))
        return x + self.mlp(self.norm2(x))


@register(sequences)
class SDPA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(causal=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@register(sequences)
class EncoderLayer(nn.Module):
    """``nn.TransformerEncoderLayer``, that is ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, 2, dim_feedforward=8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@register(sequences)
class AttentionWithWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x, x, x, need_weights=True)


@register(sequences, in_dims=1, out_dim=1, name="EncoderLayerSequenceFirst")
def sequence_first_encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, dim_feedforward=8, dropout=0.0)


ALL[-1] = dataclasses.replace(ALL[-1], inputs=lambda n: ((torch.randn(T, n, D),), {}))


@register(tokens)
class LanguageModel(nn.Module):
    """Tied embedding and head; a position embedding that is looked up once for the whole batch; two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(8, D)
        self.blocks = nn.ModuleList([Block(causal=True)])
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@register(tokens)
class TiedOnly(nn.Module):
    """Embedding and head in one parameter, with a bias and a scale between them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.bias = nn.Parameter(torch.zeros(V))

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.table(ids) * 1.5, self.table.weight, self.bias)


@register(repeated_tokens)
class PaddedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(V, D, padding_idx=0), nn.Linear(D, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).tanh()).sum(1)


@register(repeated_tokens)
class BagOfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(V, D, mode="mean"), nn.Linear(D, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.bag(ids))


@register(repeated_tokens)
class BagOfWordsSum(BagOfWords):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(V, D, mode="sum")


def _recurrent(kind: str, **options: Any) -> Callable[[], nn.Module]:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(nn, kind)(D, 4, **options)
            self.head = nn.Linear(8 if options.get("bidirectional") else 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            states, _ = self.layer(x)
            return self.head(states[:, -1] if options.get("batch_first") else states)

    Recurrent.__name__ = kind
    return Recurrent


register(sequences)(_recurrent("LSTM", batch_first=True))
register(sequences)(_recurrent("GRU", batch_first=True))
register(sequences, name="BidirectionalRNN")(_recurrent("RNN", batch_first=True, bidirectional=True))
register(lambda n: ((torch.randn(T, n, D),), {}), in_dims=1, out_dim=1, name="GRUSequenceFirst")(_recurrent("GRU"))


@register(sequences)
class CellByHand(nn.Module):
    """An LSTM cell called in a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(D, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 4), x.new_zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0])


# --- parameters used in unusual ways ----------------------------------------------------------------------------------


@register(sequences)
class ThreeTimes(nn.Module):
    """One layer three times, its transpose once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.layer(x).tanh()
        return F.linear(x, self.layer.weight.t())


@register(lambda n: ((torch.randn(n, D), torch.randn(n, D)), {}))
class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.scale = (
            nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 4)),
            nn.Parameter(torch.ones(())),
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.scale * F.cosine_similarity(self.branch(a), self.branch(b), dim=-1)


@register(sequences)
class RawParameters(nn.Module):
    """A scalar, a vector, a broadcast class token, positions, a matrix by ``@`` and one by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.vector = nn.Parameter(torch.randn(D))
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.positions = nn.Parameter(torch.randn(1, T + 1, D))
        self.matrix = nn.Parameter(torch.randn(D, D) / 2)
        self.heads = nn.Parameter(torch.randn(2, D, 3) / 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = self.scalar * x * self.vector.sigmoid() @ self.matrix
        return torch.einsum("btd,hdk->bhtk", x, self.heads)


@register(sequences)
class Einsums(nn.Module):
    """Weights that mix positions, features and both; a bilinear form; a table contracted with another."""

    def __init__(self) -> None:
        super().__init__()
        self.over_time = nn.Parameter(torch.randn(T, T))
        self.full = nn.Parameter(torch.randn(T, D, 4) / 3)
        self.form = nn.Parameter(torch.randn(D, D) / 3)
        self.left, self.right = nn.Parameter(torch.randn(D, 2)), nn.Parameter(torch.randn(2, D))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("btd,ts->bsd", x, self.over_time) @ (self.left @ self.right)
        scores = torch.einsum("btd,de,bse->bts", x, self.form, x)
        return torch.einsum("btd,tdk->bk", x, self.full) + scores.sum((1, 2))[:, None]


@register(lambda n: ((torch.randn(n, D), torch.randn(n, 9)), {}))
class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.slope = nn.Bilinear(D, 9, 4), nn.PReLU(4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.slope(self.layer(a, b))


@register(images)
class WeightNorm(nn.Module):
    """The gradient goes on through a normalisation of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(48, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().flatten(1))


@register(images)
class StandardizedConv(nn.Module):
    """Weight standardisation by hand, as in BiT."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain = nn.Conv2d(2, 3, 3), nn.Parameter(torch.ones(3, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return F.conv2d(x, w * self.gain, self.conv.bias).mean((2, 3))


@register(vectors)
class LoRA(nn.Module):
    """A frozen layer with a trainable low-rank update, and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, 5).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(5, 2))
        self.unused = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.base(x) + F.linear(F.linear(x, self.down), self.up) * 0.5).relu())


@register(sequences)
class FrozenBody(nn.Module):
    """Only a bias in the middle and a norm layer are trained (BitFit)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.block.requires_grad_(False)
        self.block.qkv.bias.requires_grad_(True)
        self.block.norm2.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@register(images)
class Norms(nn.Module):
    """Instance norm, layer norm over an image, local response norm, batch norm in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.instance = nn.InstanceNorm2d(2, affine=True)
        self.layer = nn.LayerNorm([2, 6, 6])
        self.batch = nn.BatchNorm2d(2).eval()
        self.local = nn.LocalResponseNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.local(self.batch(self.layer(self.instance(x)) + x)).mean((2, 3))


@register(sequences)
class RMS(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = nn.RMSNorm(D), nn.Linear(D, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.gate(self.norm(x)))


@register(sequences)
class MixtureOfExperts(nn.Module):
    """Soft gates: every expert sees every position."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 3)
        self.experts = nn.Parameter(torch.randn(3, D, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        each = torch.einsum("btd,edk->btek", x, self.experts).relu()
        return (self.gate(x).softmax(-1).unsqueeze(-1) * each).sum(2)


@register(vectors)
class GeneratedWeights(nn.Module):
    """Weights that are a function of other parameters: softmax over tables, an outer product, an exponential."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.bank = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, 4, D))
        self.u, self.v = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("e,epd->pd", self.logits.softmax(0), self.bank)
        return F.linear(F.linear(x, mixed).tanh(), torch.outer(self.u.exp(), self.v))


@register(sequences)
class SlicedParameters(nn.Module):
    """One matrix, whose rows serve different purposes, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Parameter(torch.randn(3 * D, D) / 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.all.chunk(3)
        x = F.linear(x, a).tanh() + F.linear(x, b)
        return F.linear(x, c) + F.linear(x.flip(1), self.all[:D]) + self.all[2, :3].sum()


# --- calls ----------------------------------------------------------------------------------------------------------


@register(lambda n: ((torch.randn(n, D),), {"scale": torch.rand(n) + 0.5, "flag": True}))
class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 4), nn.Linear(D, 4)

    def forward(self, x: Tensor, *, scale: Tensor, flag: bool = False, power: int = 2) -> Tensor:
        layer = self.b if flag else self.a
        return layer(x).pow(power) * scale[:, None]


@dataclasses.dataclass
class Outputs:
    """What :class:`Several` returns."""

    logits: Tensor
    hidden: dict[str, Tensor]


@register(lambda n: (({"left": torch.randn(n, D), "right": [torch.randn(n, T, D)]},), {}))
class Several(nn.Module):
    """Nested inputs, a dataclass with a dict in it as output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 4), nn.Linear(D, 4)

    def forward(self, batch: dict[str, Any]) -> Outputs:
        left, right = self.a(batch["left"]), self.b(batch["right"][0])
        return Outputs(left * right.sum(1), {"right": right, "left": left.tanh()})


@register(lambda n: ((torch.randn(n, T, D), torch.randn(T, D), torch.randn(D, n)), {}), in_dims=(0, None, 1))
class SharedInput(nn.Module):
    """An input that is the same for all examples, and one whose examples are columns."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor, context: Tensor, columns: Tensor) -> Tensor:
        weights = (self.query(x) @ self.query(context).T).softmax(-1)
        return weights @ self.value(context) + self.value(columns.T)[:, None]


@register(sequences)
class BuffersAndDropout(nn.Module):
    """Constants in buffers; dropout that is switched off; a branch on a Python value."""

    mean: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(D))
        self.register_buffer("mask", torch.tril(torch.ones(T, T)).bool(), persistent=False)
        self.layer, self.dropout, self.depth = nn.Linear(D, D), nn.Dropout(0.5), 2
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.mean
        for i in range(self.depth):
            x = self.dropout(self.layer(x)) if i % 2 == 0 else F.relu(self.layer(x))
        scores = (x @ x.mT / math.sqrt(D)).masked_fill(~self.mask, -torch.inf)
        return scores.softmax(-1) @ x


@register(lambda n: ((torch.randn(n, T, D),), {}), name="Functional")
class Functional(nn.Module):
    """``torch.func.functional_call`` of an inner module on parameters made on the fly."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.temperature = nn.Linear(D, 4), nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        changed = {"weight": self.inner.weight * self.temperature, "bias": self.inner.bias}
        return torch.func.functional_call(self.inner, changed, (x,))


@register(lambda n: ((torch.randn(n, 2, 4, 4),), {}))
class Windows(nn.Module):
    """Windows folded into the batch (Swin): the example axis becomes B times windows, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.across = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        w = x.unfold(2, 2, 2).unfold(3, 2, 2)  # n, 2, 2, 2, 2, 2
        w = w.permute(0, 2, 3, 4, 5, 1).reshape(n * 4, 4, 2)
        h = self.inside(w)
        h = (h @ h.mT).softmax(-1) @ h
        return self.across(h.view(n, 4, 4, 4).mean(2))


@register(lambda n: ((torch.randint(0, V, (n, T)), torch.randint(0, T, (n,))), {}))
class PickOwnPosition(nn.Module):
    """Each example's hidden state at a position of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(V, D), nn.Linear(D, 2)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        x = self.table(ids).tanh()
        return self.head(x[torch.arange(len(ids)), position])


@register(lambda n: ((torch.randn(n, n), torch.randn(n, n, n)), {}), name="AllSizesEqual", static_only=True)
class AllSizesEqual(nn.Module):
    """T, d and the number of classes equal the batch size."""

    def __init__(self, size: int = B) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(size, size), nn.Linear(size, size)
        self.positions = nn.Parameter(torch.randn(size, size))
        self.over_time = nn.Parameter(torch.randn(size, size))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.b(y.transpose(1, 2)) + self.positions
        y = torch.einsum("btd,ts->bsd", y, self.over_time)
        return y.softmax(1).mean(2) * self.a(x) + y.permute(2, 0, 1).sum(0)
