"""Small models of blocks, and the comparison with one backward per example."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn

import dpcompile

dp_compile: Any = dpcompile.dp_compile
B, T, D, V = 4, 5, 8, 11


class Block(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.heads = heads

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.first(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.second(x))))


class GPT(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Parameter(torch.randn(T, D) * 0.1)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        return self.head(self.norm(x))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, D, 4, stride=4), nn.Parameter(torch.randn(1, 1, D))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(D, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.blocks(x)[:, 0])


class MLP(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(D, D), nn.Tanh())))
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x) * 2 + x)


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(D, D), nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.base(x) + self.up(self.down(x)))


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, D).requires_grad_(False)
        self.layers = nn.ModuleList(Adapter() for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x.mean(1)


def frozen(model: nn.Module, *prefixes: str) -> nn.Module:
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(prefixes))
    return model


ids = lambda: torch.randint(0, V, (B, T))  # noqa: E731
rows = lambda: torch.randn(B, D)  # noqa: E731
MODELS: dict[str, tuple[Any, Any]] = {
    "GPT": (GPT, ids),
    "ViT": (ViT, lambda: torch.randn(B, 3, 8, 8)),
    "MLP": (MLP, rows),
    "MLP, first blocks frozen": (lambda: frozen(MLP(), "layers.0", "layers.2"), rows),
    "MLP, middle block frozen": (lambda: frozen(MLP(), "layers.2"), rows),
    "GPT, embeddings frozen": (lambda: frozen(GPT(), "tokens", "positions"), ids),
    "LoRA": (LoRA, ids),
}


def right(model: nn.Module, private: Any, *args: Tensor, mask: Tensor | None = None, C: float = 0.5) -> None:
    loss = PseudoLoss(len(args[0]))
    truth = clip(per_example_gradients(model, args, {}, loss), C, mask=mask)
    private.zero_grad()
    train_step(private, args, {}, loss)
    assert_right(private, truth, 1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """Two equal blocks, and a function of (blocks, x) around them."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.free = nn.Parameter(torch.randn(D))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.blocks, x)
