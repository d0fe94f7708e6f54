"""The models that are sized: name -> how to make them, and a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import Block, cross_entropy, token_cross_entropy

__all__ = ["CASES", "Classifier", "LanguageModel", "Llama", "LlamaBlock", "Large", "Lora"]

_TWO_PASSES = ("two_pass", "two_pass_again")
_ALONE = ("plain", "ours", *_TWO_PASSES, "twice")
_REPLICATED = ("plain_whole", "ours_whole")


@dataclass(frozen=True, slots=True)
class Large:
    """A model to size.

    Attributes:
        title: what the tables call it.
        make: the model with this many blocks, in ``blocks``.
        depth: blocks of the whole model.
        batch: examples of one rank in one step.
        context: tokens of an example.
        ranks: on how many it is sized.
        data: inputs and targets of a batch.
        loss: one value per example.
        ways: of training, on the first number of ranks; on further ones those of them that are in ``further``.
        further: see ``ways``.
        modelled: whether its throughput is modelled.
    """

    title: str
    make: Callable[[int], nn.Module]
    depth: int
    batch: int
    context: int
    ranks: tuple[int, ...]
    data: Callable[[int, int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    ways: tuple[str, ...] = (*_ALONE, *_REPLICATED)
    further: tuple[str, ...] = _ALONE
    modelled: bool = True


class Classifier(nn.Module):
    """GPT-2 with a head of eight classes on the last token."""

    def __init__(self, width: int, depth: int, heads: int, context: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 8)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, 8]``."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x))[:, -1])


class LanguageModel(Classifier):
    """GPT-2 itself: the head is the embedding of tokens, transposed, on every token."""

    def __init__(self, width: int, depth: int, heads: int, context: int, vocabulary: int) -> None:
        super().__init__(width, depth, heads, context, vocabulary)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, T, vocabulary]``."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


class Lora(nn.Module):
    """A frozen linear layer with a trained one of low rank beside it (Hu et al. 2021)."""

    def __init__(self, inside: int, outside: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(inside, outside, bias=False, dtype=dtype).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.zeros(rank, inside)), nn.Parameter(torch.zeros(outside, rank))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inside]`` to ``[..., outside]``; the adapters' parameters are cast to the dtype of ``x``."""
        return self.base(x) + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class LlamaBlock(nn.Module):
    """Attention with grouped keys and rotary positions, and a gated MLP.

    With adapters on the four projections, which alone are trained; or, with ``rank`` 0, without, and all is trained.
    """

    def __init__(self, width: int, heads: int, groups: int, inside: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm1, self.norm2 = (nn.RMSNorm(width, dtype=dtype).requires_grad_(not rank) for _ in range(2))
        self.q, self.o = (_projection(width, width, rank, dtype) for _ in range(2))
        self.k, self.v = (_projection(width, groups * self.size, rank, dtype) for _ in range(2))
        self.gate, self.up = (_linear(width, inside, dtype).requires_grad_(not rank) for _ in range(2))
        self.down = _linear(inside, width, dtype).requires_grad_(not rank)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (_rotated(k), v))
        mixed = F.scaled_dot_product_attention(_rotated(q), k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _linear(inside: int, outside: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(inside, outside, bias=False, dtype=dtype)


def _projection(inside: int, outside: int, rank: int, dtype: torch.dtype) -> nn.Module:
    return Lora(inside, outside, rank, dtype) if rank else _linear(inside, outside, dtype)


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions on ``[B, heads, T, size]``."""
    length, size = x.shape[-2:]
    angles = torch.arange(length, device=x.device)[:, None] * 5e5 ** (-torch.arange(0, size, 2, device=x.device) / size)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Llama(nn.Module):
    """Llama 3: frozen in ``dtype``, adapters in float32."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        groups: int,
        inside: int,
        vocabulary: int,
        rank: int = 16,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, dtype=dtype).requires_grad_(False)
        self.blocks = nn.Sequential(*(LlamaBlock(width, heads, groups, inside, rank, dtype) for _ in range(depth)))
        self.norm = nn.RMSNorm(width, dtype=dtype).requires_grad_(False)
        self.head = nn.Linear(width, vocabulary, bias=False, dtype=dtype).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, T, vocabulary]``."""
        return self.head(self.norm(self.blocks(self.tokens(ids))))


def _labelled(batch: int, context: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, context, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)


def _tokens(batch: int, context: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(batch, context, dtype=torch.int64)
    return ids, ids.clone()


CASES = {
    "gpt2-xl": Large(
        "GPT-2 XL",
        lambda depth: LanguageModel(1600, depth, 25, 1024, 50257),
        48, 4, 1024, (8,), _tokens, token_cross_entropy,
        ways=("plain", "ours", "ours_auto", "twice", "opacus", *_REPLICATED, "opacus_whole"),
    ),
    "gpt2-xl-classes": Large(
        "GPT-2 XL with a head of eight classes",
        lambda depth: Classifier(1600, depth, 25, 1024, 50257),
        48, 4, 1024, (8,), _labelled, cross_entropy, ways=_ALONE, modelled=False,
    ),
    "llama3-8b-lora": Large(
        "Llama-3-8B with LoRA",
        lambda depth: Llama(4096, depth, 32, 8, 14336, 128256),
        32, 2, 2048, (8, 64, 256), _tokens, token_cross_entropy,
    ),
    "tiny": Large(
        "a toy GPT", lambda depth: Classifier(16, depth, 2, 8, 24), 2, 4, 8, (2,), _labelled, cross_entropy
    ),
    "tiny-tied": Large(
        "a toy GPT, tied", lambda depth: LanguageModel(16, depth, 2, 8, 24), 2, 4, 8, (2,), _tokens, token_cross_entropy
    ),
    "tiny-lora": Large(
        "a toy Llama",
        lambda depth: Llama(16, depth, 4, 2, 32, 24, rank=2),
        2, 2, 8, (2,), _tokens, token_cross_entropy,
    ),
}  # fmt: skip
