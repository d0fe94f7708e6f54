"""Attention: ``nn.MultiheadAttention`` with all its options, transformers of ``torch.nn``, and attention by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.case import Call, D, T
from models.parts import layer, net, shaped

H = 2  # heads


def mha(name: str, call: Any = None, shape: tuple[int, ...] = (T, D), **options: Any) -> None:
    """Self attention unless ``call(attention, x)`` says otherwise."""
    call = call or (lambda attention, x: attention(x, x, x, need_weights=False)[0])
    case = {k: options.pop(k) for k in ("slow", "in_dims", "refused", "reason") if k in options}
    net(
        f"MHA-{name}",
        shaped(*shape),
        lambda m, x: call(m.attention, x),
        lambda: {"attention": nn.MultiheadAttention(D, H, batch_first=True, **options)},
        **case,
    )


def padding(x: Tensor) -> Tensor:
    """The last positions are padding, of each example by itself."""
    return torch.arange(x.shape[1]) > (x[:, :1, 0] > 0) + 1


mha("plain")
mha("weights", lambda a, x: a(x, x, x))
mha("each-head", lambda a, x: a(x, x, x, average_attn_weights=False), slow=True)
mha("no-bias", bias=False, slow=True)
mha("bias-kv", add_bias_kv=True)
mha("bias-kv-zero", lambda a, x: a(x, x, x), add_bias_kv=True, add_zero_attn=True)
mha("zero", add_zero_attn=True, slow=True)
mha("padding", lambda a, x: a(x, x, x, key_padding_mask=padding(x))[0])
mha("mask", lambda a, x: a(x, x, x, attn_mask=torch.ones(T, T).triu(1).bool(), need_weights=False)[0])
mha("float-mask", lambda a, x: a(x, x, x, attn_mask=torch.linspace(-1, 1, T * T).view(T, T))[0], slow=True)
mha("both-masks", lambda a, x: a(x, x, x, key_padding_mask=padding(x), attn_mask=torch.ones(T, T).triu(1).bool())[0])
mha("mask-per-head", lambda a, x: a(x, x, x, attn_mask=(x @ x.mT > 4).repeat_interleave(H, 0))[0])
mha("causal", lambda a, x: a(x, x, x, attn_mask=torch.ones(T, T).triu(1).bool(), is_causal=True, need_weights=False)[0])
mha("kdim-vdim", lambda a, x: a(x, x[..., :4], x[..., 1:4])[0], kdim=4, vdim=3)
mha("dropout-eval", lambda a, x: a.eval()(x, x, x, need_weights=False)[0], dropout=0.5, slow=True)
net(
    "MHA-sequence-first",
    shaped(T, D),
    lambda m, x: m.attention(x.mT.permute(2, 0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].transpose(0, 1),
    lambda: {"attention": nn.MultiheadAttention(D, H)},
)
net(
    "MHA-learned-queries",
    shaped(T, D),
    lambda m, x: m.attention(m.queries.expand(len(x), -1, -1), x, x)[0],
    lambda: {"attention": nn.MultiheadAttention(D, H, batch_first=True), "queries": nn.Parameter(torch.randn(1, 2, D))},
)

# --- transformers of torch.nn ---------------------------------------------------------------------------------------


def encoder(name: str, layers: int = 1, call: Any = None, slow: bool = True, **options: Any) -> None:
    net(
        f"Encoder-{name}",
        shaped(T, D),
        call or (lambda m, x: m.encoder(x)),
        lambda: {
            "encoder": nn.TransformerEncoder(
                nn.TransformerEncoderLayer(D, H, 8, **{"dropout": 0.0, "batch_first": True, **options}),
                layers,
                norm=nn.LayerNorm(D),
                enable_nested_tensor=False,
            )
        },
        slow=slow,
    )


encoder("two", 2)
encoder("norm-first", norm_first=True, activation="gelu", slow=False)
encoder("no-bias", bias=False)
encoder("padding", 2, lambda m, x: m.encoder(x, src_key_padding_mask=padding(x)))
encoder("causal", 1, lambda m, x: m.encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(T), is_causal=True))
encoder("eval", 1, lambda m, x: m.eval().encoder(x, src_key_padding_mask=padding(x)))


def _nested() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H, 8, dropout=0.0, batch_first=True), 2)


layer("Encoder-nested", lambda n: ((x := torch.randn(n, T, D),), {"src_key_padding_mask": padding(x)}), _nested)
layer(
    "Encoder-nested-eval",
    lambda n: ((x := torch.randn(n, T, D),), {"src_key_padding_mask": padding(x)}),
    lambda: _nested().eval(),
)


def two_sequences(n: int) -> Call:
    return (torch.randn(n, T, D), torch.randn(n, 2, D)), {}


for norm_first in (False, True):
    net(
        f"Decoder-{'norm-first' if norm_first else 'norm-last'}",
        two_sequences,
        lambda m, x, y: m.decoder(x, y, tgt_mask=m.mask, tgt_is_causal=True, memory_key_padding_mask=y[..., 0] > 1),
        lambda norm_first=norm_first: {
            "decoder": nn.TransformerDecoder(
                nn.TransformerDecoderLayer(D, H, 8, dropout=0.0, batch_first=True, norm_first=norm_first), 1
            ),
            "mask": nn.Buffer(nn.Transformer.generate_square_subsequent_mask(T)),
        },
        slow=True,
    )
layer("Transformer", two_sequences, lambda: nn.Transformer(D, H, 1, 1, 8, dropout=0.0, batch_first=True), slow=True)

# --- scaled dot products --------------------------------------------------------------------------------------------


def qkv(m: Any, x: Tensor) -> list[Tensor]:
    """Queries with two heads, keys and values with two or (grouped) one."""
    q, k, v = m.q(x), m.k(x), m.v(x)
    return [z.unflatten(-1, (-1, 3)).transpose(1, 2) for z in (q, k, v)]


def sdpa(name: str, heads: int = H, bias: Any = lambda m, x: None, slow: bool = True, **options: Any) -> None:
    net(
        f"SDPA-{name}",
        shaped(T, 3 * H),
        lambda m, x: F.scaled_dot_product_attention(*qkv(m, x), attn_mask=bias(m, x), **options),
        lambda: {
            "q": nn.Linear(3 * H, 3 * H), "k": nn.Linear(3 * H, 3 * heads), "v": nn.Linear(3 * H, 3 * heads),
            "bias": nn.Parameter(torch.randn(H, T, T)), "slopes": nn.Parameter(torch.rand(H)),
        },
        slow=slow,
    )  # fmt: skip


sdpa("scale", scale=0.3)
sdpa("grouped", 1, enable_gqa=True, slow=False)
sdpa("grouped-causal", 1, enable_gqa=True, is_causal=True)
sdpa("bool-mask", bias=lambda m, x: (torch.arange(T) <= (x[:, :1, 0] > 0) + 1)[:, None, None])
sdpa("learned-bias", bias=lambda m, x: m.bias)
sdpa("learned-bias-per-example", bias=lambda m, x: m.bias * x[:, :1, None, :1], slow=False)
sdpa("alibi", bias=lambda m, x: -m.slopes.view(-1, 1, 1) * (torch.arange(T)[:, None] - torch.arange(T)).abs())


def rotary(x: Tensor) -> Tensor:
    """Rotary position embedding in complex numbers, as in Llama."""
    turns = torch.polar(torch.ones(T, 2), torch.outer(torch.arange(T).float(), torch.tensor([1.0, 0.1])))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (2, 2))) * turns[:, None]).flatten(-2)


net(
    "RotaryComplex",
    shaped(T, 8),
    lambda m, x: torch.einsum("bthd,bshd->bhts", *(rotary(f(x).unflatten(-1, (2, 4))) for f in (m.q, m.k))).softmax(-1),
    lambda: {"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)},
)
net(
    "RelativePositions",
    shaped(T, D),
    lambda m, x: (
        (m.q(x) @ m.k(x).mT + m.table[:, torch.arange(T)[:, None] - torch.arange(T) + T - 1].sum(0)).softmax(-1) @ x
    ),
    lambda: {"q": nn.Linear(D, D), "k": nn.Linear(D, D), "table": nn.Parameter(torch.randn(2, 2 * T - 1))},
)
net(
    "LinearAttention",
    shaped(T, D),
    lambda m, x: torch.einsum(
        "btd,btde->bte", F.elu(m.q(x)) + 1, torch.einsum("btd,bte->btde", m.k(x), m.v(x)).cumsum(1)
    ),
    lambda: {"q": nn.Linear(D, 3), "k": nn.Linear(D, 3), "v": nn.Linear(D, 4)},
)


class SlotAttention(nn.Module):
    """Learned slots compete for positions, three rounds with a recurrent cell (Locatello et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(2, D))
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.cell = nn.GRUCell(D, D)

    def forward(self, x: Tensor) -> Tensor:
        slots = self.slots.expand(len(x), -1, -1)
        k, v = self.k(x), self.v(x)
        for _ in range(2):
            weights = (self.q(slots) @ k.mT).softmax(1)
            updates = weights / weights.sum(-1, keepdim=True) @ v
            slots = self.cell(updates.flatten(0, 1), slots.flatten(0, 1)).unflatten(0, (-1, 2))
        return slots


layer("SlotAttention", shaped(T, D), SlotAttention)
