"""Recurrent layers and cells, as users write them: nothing of Dynamo's configuration is touched."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.case import Call, D, T, V
from models.parts import layer, net, shaped


def tokens(n: int) -> Call:
    return (torch.randint(0, V, (n, T)),), {}


def both(m: Any, x: Tensor) -> Any:
    """The outputs at all steps, and the last states with the examples in front."""
    out, state = m.layer(x)
    states = state if isinstance(state, tuple) else (state,)
    return (out, *(s.transpose(0, 1) for s in states))


def rnn(name: str, kind: str, **options: Any) -> None:
    slow = options.pop("slow", True)
    net(name, shaped(T, D), both, lambda: {"layer": getattr(nn, kind)(D, 4, batch_first=True, **options)}, slow=slow)


for kind in ("LSTM", "GRU", "RNN"):
    rnn(f"{kind}-bidirectional", kind, bidirectional=True, slow=kind != "LSTM")
    rnn(f"{kind}-stacked", kind, num_layers=2, slow=kind != "GRU")
    rnn(f"{kind}-no-bias", kind, bias=False)
rnn("RNN-relu", "RNN", nonlinearity="relu", num_layers=2, bidirectional=True)
rnn("LSTM-projected", "LSTM", proj_size=2)
rnn("LSTM-projected-stacked", "LSTM", proj_size=2, num_layers=2, bidirectional=True)
rnn("LSTM-dropout-0", "LSTM", num_layers=2, dropout=0.0)
net(
    "LSTM-dropout-eval",
    shaped(T, D),
    lambda m, x: m.eval().layer(x)[0],
    lambda: {"layer": nn.LSTM(D, 4, 2, dropout=0.5, batch_first=True)},
    slow=True,
)
layer(
    "RNN-sequence-first", lambda n: ((torch.randn(T, n, D),), {}), lambda: nn.RNN(D, 4), in_dims=1, out_dim=1, slow=True
)
layer(
    "LSTM-sequence-first",
    lambda n: ((torch.randn(T, n, D),), {}),
    lambda: nn.LSTM(D, 4, 2),
    in_dims=1,
    out_dim=1,
    slow=True,
)
net(
    "LSTM-initial-states",
    shaped(T, D, more=((4,), (4,))),
    lambda m, x, h, c: m.layer(x, (h[None], c[None]))[0],
    lambda: {"layer": nn.LSTM(D, 4, batch_first=True)},
)
net(
    "GRU-learned-initial-state",
    shaped(T, D),
    lambda m, x: m.layer(x, m.h0.unsqueeze(1).expand(-1, len(x), -1).contiguous())[0],
    lambda: {"layer": nn.GRU(D, 4, 2, batch_first=True), "h0": nn.Parameter(torch.randn(2, 4))},
)
layer(
    "LSTM-states-as-inputs",
    lambda n: ((torch.randn(T, n, D), (torch.randn(1, n, 4), torch.randn(1, n, 4))), {}),
    lambda: nn.LSTM(D, 4),
    in_dims=(1, (1, 1)),
    out_dim=1,
)
net(
    "LSTM-one-step",
    shaped(1, D),
    lambda m, x: m.layer(x)[0],
    lambda: {"layer": nn.LSTM(D, 4, batch_first=True)},
    slow=True,
)
net(
    "LSTM-frozen",
    shaped(T, D),
    lambda m, x: m.head(m.layer(x)[0]),
    lambda: {"layer": nn.LSTM(D, 4, batch_first=True).requires_grad_(False), "head": nn.Linear(4, 2)},
    slow=True,
)
net(
    "LSTM-after-a-layer",
    shaped(T, D),
    lambda m, x: m.layer(m.lin(x))[0],
    lambda: {"lin": nn.Linear(D, D), "layer": nn.LSTM(D, 4, batch_first=True)},
    slow=True,
)
net(
    "LSTM-last-hidden-state",
    shaped(T, D),
    lambda m, x: m.head(m.layer(x)[1][0][-1]),
    lambda: {"layer": nn.LSTM(D, 4, 2, batch_first=True), "head": nn.Linear(4, 2)},
)
net(
    "LSTM-last-cell-state",
    shaped(T, D),
    lambda m, x: m.layer(x)[1][1][0],
    lambda: {"layer": nn.LSTM(D, 4, batch_first=True, bidirectional=True)},
    slow=True,
)
net(
    "LSTM-hidden-state-given",
    shaped(T, D, more=((4,),)),
    lambda m, x, h: m.layer(x, (h[None], torch.zeros_like(h)[None]))[0],
    lambda: {"layer": nn.LSTM(D, 4, batch_first=True)},
)
net(
    "Encoder-decoder",
    shaped(T, D),
    lambda m, x: m.decoder(x, m.encoder(x)[1])[0],
    lambda: {"encoder": nn.LSTM(D, 4, batch_first=True), "decoder": nn.LSTM(D, 4, batch_first=True)},
    slow=True,
)
net(
    "RNN-of-one-example",
    shaped(T, D),
    lambda m, x: torch.vmap(lambda one: torch.tanh(one @ m.w).cumsum(0))(x),
    lambda: {"w": nn.Parameter(torch.randn(D, 4))},
    slow=True,
)


def packed(m: Any, x: Tensor, lengths: Tensor) -> Any:
    """Outputs at each example's own steps, and its states after the last of them."""
    sequence = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    out, state = m.layer(sequence)
    states = state if isinstance(state, tuple) else (state,)
    padded = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=T)[0]
    return (padded, *(s.transpose(0, 1) for s in states))


def packed_rnn(name: str, kind: str, **options: Any) -> None:
    net(
        f"Packed{name}",
        lambda n: ((torch.randn(n, T, D), torch.randint(1, T + 1, (n,))), {}),
        packed,
        lambda: {"layer": getattr(nn, kind)(D, 4, batch_first=True, **options)},
        slow=kind != "LSTM",
    )


packed_rnn("LSTM-bidirectional", "LSTM", bidirectional=True)
packed_rnn("LSTM-projected-stacked", "LSTM", proj_size=2, num_layers=2, bidirectional=True)
packed_rnn("GRU", "GRU", bidirectional=True)
net(
    "PackedLSTM-last-hidden-state",
    lambda n: ((torch.randn(n, T, D), torch.randint(1, T + 1, (n,))), {}),
    lambda m, x, lengths: m.head(
        m.layer(nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False))[1][0][-1]
    ),
    lambda: {"layer": nn.LSTM(D, 4, 2, batch_first=True, dropout=0.0), "head": nn.Linear(4, 2)},
)
packed_rnn("RNN-stacked", "RNN", num_layers=2, nonlinearity="relu", bias=False)
net(
    "LastOwnStep",
    lambda n: ((torch.randn(n, T, D), torch.randint(1, T + 1, (n,))), {}),
    lambda m, x, lengths: m.head(m.layer(x)[0][torch.arange(len(x)), lengths - 1]),
    lambda: {"layer": nn.GRU(D, 4, batch_first=True), "head": nn.Linear(4, 2)},
)


def steps(m: Any, x: Tensor) -> Tensor:
    """Cells called in a loop."""
    h = c = x.new_zeros(len(x), 4)
    out = []
    for t in range(x.shape[1]):
        state = m.cell(x[:, t], (h, c) if isinstance(m.cell, nn.LSTMCell) else h)
        h, c = state if isinstance(state, tuple) else (state, c)
        out.append(h)
    return torch.stack(out, 1)


for cell in (nn.GRUCell, nn.RNNCell):
    net(cell.__name__, shaped(T, D), steps, lambda cell=cell: {"cell": cell(D, 4)}, slow=True)
net("RNNCell-relu", shaped(T, D), steps, lambda: {"cell": nn.RNNCell(D, 4, bias=False, nonlinearity="relu")}, slow=True)
net(
    "TwoCells",
    shaped(T, D),
    lambda m, x: m.second(steps(m, x)[:, -1], m.first(x[:, 0])),
    lambda: {"cell": nn.LSTMCell(D, 4), "first": nn.Linear(D, 4), "second": nn.GRUCell(4, 4)},
    slow=True,
)


class Attended(nn.Module):
    """Attention over the outputs of an encoder at every step of a decoder (Bahdanau et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.encoder, self.decoder = nn.GRU(D, 4, batch_first=True, bidirectional=True), nn.GRUCell(D + 8, 8)
        self.score, self.head = nn.Linear(16, 1), nn.Linear(8, V)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, h = self.encoder(self.table(source))
        h = h.transpose(0, 1).flatten(1)
        logits = []
        for t in range(target.shape[1]):
            each = torch.cat([memory, h[:, None].expand_as(memory)], -1)
            context = (self.score(each).softmax(1) * memory).sum(1)
            h = self.decoder(torch.cat([self.table(target[:, t]), context], -1), h)
            logits.append(self.head(h))
        return torch.stack(logits, 1)


layer("Seq2SeqAttention", lambda n: ((torch.randint(0, V, (n, T)), torch.randint(0, V, (n, 2))), {}), Attended)
net(
    "CharRNN-tied",
    tokens,
    lambda m, ids: F.linear(m.down(m.layer(m.table(ids))[0]), m.table.weight),
    lambda: {"table": nn.Embedding(V, D), "layer": nn.LSTM(D, 4, batch_first=True), "down": nn.Linear(4, D)},
)
net(
    "Autoregressive",
    tokens,
    lambda m, ids: _greedy(m, ids),
    lambda: {"table": nn.Embedding(V, D), "cell": nn.GRUCell(D, D), "head": nn.Linear(D, V)},
)


def _greedy(m: Any, ids: Tensor) -> Tensor:
    """Feeds its own most likely token back."""
    h, token, out = m.table(ids).mean(1), ids[:, -1], []
    for _ in range(2):
        h = m.cell(m.table(token), h)
        logits = m.head(h)
        out.append(logits)
        token = logits.argmax(-1)
    return torch.stack(out, 1)
