"""The proof's labels against what changes when one example does, operation by operation and in whole joint graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CASES, ZOO, Case
from torch import Tensor, fx

from dpcompile import DPCompileError, dp_compile, pipeline
from dpcompile.graph.compile import trace_like
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Examples, Label, Mixed, Shared, Summed
from dpcompile.proof.prove import Proof, prove

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# --- the experiment ---------------------------------------------------------------------------------------------------


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every value; some are given."""

    def __init__(self, module: fx.GraphModule, given: Mapping[fx.Node, Any]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}
        self.given = given

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        value = self.given.get(n, value)
        if isinstance(value, Tensor) and n.op == "call_function" and "empty" in str(n.target):
            value.zero_()  # memory without values would differ from run to run
        self.values[n] = value
        return value


def run(
    module: fx.GraphModule, inputs: Mapping[fx.Node, Any], given: Mapping[fx.Node, Any] | None = None
) -> dict[fx.Node, Any]:
    torch.manual_seed(0)
    recorder = Recorder(module, given or {})
    with torch.no_grad():
        recorder.run(*(inputs[n] for n in module.graph.nodes if n.op == "placeholder"))
    return recorder.values


def rows_of(axis: Examples, example: int, batch: int, size: int) -> list[int]:
    """Positions of one example along its dimension, counted here independently of the package."""
    outer, inner = int(axis.outer), int(axis.inner)
    assert outer * batch * inner == size, f"{axis} on a dimension of size {size}"
    return [(o * batch + example) * inner + i for o in range(outer) for i in range(inner)]


def replaced(value: Tensor, axis: Examples, examples: list[int], batch: int, other: Tensor) -> Tensor:
    """The value with some examples' slices taken from ``other``."""
    rows = [r for e in examples for r in rows_of(axis, e, batch, value.shape[axis.dim])]
    index = torch.tensor(rows, dtype=torch.long)
    return value.clone().index_copy_(axis.dim, index, other.index_select(axis.dim, index))


def turned(value: Any, axis: Examples, batch: int) -> Any:
    """The value with the examples in the opposite order."""
    if isinstance(value, (tuple, list)):
        return tuple(turned(v, axis, batch) for v in value)
    size = value.shape[axis.dim]
    order = [0] * size
    for e in range(batch):
        for to, of in zip(rows_of(axis, e, batch, size), rows_of(axis, batch - 1 - e, batch, size), strict=True):
            order[to] = of
    moved = value.index_select(axis.dim, torch.tensor(order, dtype=torch.long))
    return torch.empty_like(value).copy_(moved)  # views further on rely on how it lies


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-9, equal_nan=True)


class Experiment:
    """Replaces examples one by one, and two at a time, puts them in another order, and looks at every value of a graph.

    Draws of random numbers that the proof gives to the examples go with them.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        axes: Mapping[fx.Node, Examples],
        inputs: dict[fx.Node, Any],
        batch: int,
        proof: Proof | None = None,
    ) -> None:
        self.batch = batch
        generator = torch.Generator().manual_seed(5)
        others = {n: _like(inputs[n], generator) for n in axes}

        def with_replaced(examples: list[int]) -> dict[fx.Node, Any]:
            changed = {n: replaced(inputs[n], a, examples, batch, others[n]) for n, a in axes.items()}
            return run(module, {**inputs, **changed})

        self.base = run(module, inputs)
        self.one = [with_replaced([e]) for e in range(batch)]
        self.two = with_replaced([0, batch - 1])
        drawn = {} if proof is None else drawn_rows(module.graph, proof)
        given = {n: turned(self.base[n], a, batch) for n, a in drawn.items()}
        self.turned = run(module, {**inputs, **{n: turned(inputs[n], a, batch) for n, a in axes.items()}}, given)

    def contradiction(self, node: fx.Node, label: Label, position: int | None = None) -> str | None:
        """What the numbers say against a label, or None."""

        def of(values: Mapping[fx.Node, Any]) -> Any:
            return values[node] if position is None else values[node][position]

        base = of(self.base)
        if not isinstance(base, Tensor):
            return None
        if isinstance(label, Shared):
            if not same(of(self.turned), base):
                return "shared, but the order of the examples changes it"
            for e in range(self.batch):
                if not same(of(self.one[e]), base):
                    return f"shared, but example {e} changes it"
            if label.zero and base.any():
                return "zero, but it is not"
            if label.counts is not None:
                n = base.shape[label.counts]
                ramp = (
                    torch.arange(n).view([-1 if d == label.counts else 1 for d in range(base.ndim)]).expand(base.shape)
                )
                if not torch.equal(base.long(), ramp):
                    return "counts positions, but it does not"
        if isinstance(label, Examples):
            for e in range(self.batch):
                own = set(rows_of(label, e, self.batch, base.shape[label.dim]))
                others = torch.tensor([r for r in range(base.shape[label.dim]) if r not in own], dtype=torch.long)
                if not same(of(self.one[e]).index_select(label.dim, others), base.index_select(label.dim, others)):
                    return f"{label}, but example {e} changes slices that are not its own"
            if not same(of(self.turned), turned(base, label, self.batch)):
                return f"{label}, but in another order the examples get other values"
        if isinstance(label, Summed):
            first, last = of(self.one[0]).double() - base.double(), of(self.one[-1]).double() - base.double()
            both = of(self.two).double() - base.double()
            scale = float(torch.nan_to_num(base.double()).abs().max()) + 1 if base.numel() else 1.0
            if not torch.allclose(first + last, both, rtol=1e-7, atol=1e-7 * scale, equal_nan=True):
                return "summed over the examples, but two examples together do not change it by the sum of both"
            if not torch.allclose(
                of(self.turned).double(), base.double(), rtol=1e-7, atol=1e-7 * scale, equal_nan=True
            ):
                return "summed over the examples, but their order changes it"
        return None

    def changes(self, node: fx.Node) -> bool:
        """Whether any example changes the value."""
        return any(isinstance(v[node], Tensor) and not same(v[node], self.base[node]) for v in self.one)


def drawn_rows(graph: fx.Graph, proof: Proof) -> dict[fx.Node, Examples]:
    """Draws of random numbers that are labelled as the examples'."""
    random = (n for n in graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()))
    return {n: x for n in random if isinstance(x := proof.of(n), Examples)}


def _like(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.bool:
        return torch.rand(value.shape, generator=generator) > 0.5
    if not value.is_floating_point():
        return torch.randint(0, 2, value.shape, generator=generator, dtype=value.dtype)
    numbers = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(numbers)


def contradictions(experiment: Experiment, graph: fx.Graph, proof: Proof) -> list[str]:
    found = []
    for node in graph.nodes:
        labels = proof.labels.get(node)
        if labels is None or node.op == "output":
            continue
        if isinstance(labels, tuple):
            texts = [experiment.contradiction(node, x, i) for i, x in enumerate(labels)]
        else:
            texts = [experiment.contradiction(node, labels)]
        found += [f"{node.format_node()}: {t}" for t in texts if t]
    return found


# --- single operations ------------------------------------------------------------------------------------------------

B, T, D = 3, 4, 5
Function = Callable[..., Any]

# (function, inputs as letters, the result): "b" is the example axis, "B" an axis of the same size without examples,
# letters after ":" give a dtype (l: index below T, m: mask). The result is "e" (examples), "s" (summed), "x" (mixed or
# without a rule) or "0" (shared).
TABLE: list[tuple[Function, str, str]] = [
    # pointwise and broadcasting
    (lambda x, y: x + y, "btd btd", "e"),
    (lambda x, y: x * y, "btd td", "e"),
    (lambda x, y: x + y[:, None], "btd bd", "e"),
    (lambda x, y: x[:, None] - y, "bd bd", "x"),
    (lambda x, y: x - y, "btd Btd", "x"),
    (lambda x, y: x + y, "bd Bd", "x"),
    (lambda x, y: torch.where(x > 0, x, y), "btd btd", "e"),
    (lambda x: x.masked_fill(x > 0, 1.0), "tbd", "e"),
    (lambda x: x.clamp(-1, 1).exp().to(torch.float32), "tdb", "e"),
    (lambda x: torch.lerp(x, x * x, 0.3), "btd", "e"),
    (lambda x: torch.nan_to_num(x / x.round()), "btd", "e"),
    (lambda x: F.gelu(x) + F.silu(x) + F.softplus(x) + F.hardtanh(x) + F.elu(x), "btd", "e"),
    (lambda x, w: F.prelu(x, w), "btd t", "e"),
    (lambda x: torch.polygamma(1, x.abs() + 1), "bd", "e"),
    # views
    (lambda x: x.reshape(B * T, D), "btd", "e"),
    (lambda x: x.reshape(B * T, D), "tbd", "e"),
    (lambda x: x.reshape(B, T * D), "btd", "e"),
    (lambda x: x.reshape(B * T, D).reshape(B, T, D).reshape(-1), "btd", "e"),
    (lambda x: x.reshape(T * D, B).T, "btd", "x"),
    (lambda x: x.permute(2, 0, 1).reshape(D * B, T), "btd", "e"),
    (lambda x: x.permute(2, 0, 1)[None].expand(2, D, B, T).reshape(2 * D * B, T), "btd", "e"),
    (lambda x: x.transpose(0, 1).transpose(1, 2), "btd", "e"),
    (lambda x: x.unsqueeze(1).squeeze(1).unsqueeze(0), "btd", "e"),
    (lambda x: x[:, None].expand(B, 7, T, D), "btd", "e"),
    (lambda x: x.expand(2, B, D), "bd", "e"),
    (lambda x: x.repeat(2, 1), "bd", "e"),
    (lambda x: x.repeat(2, 1)[B:], "bd", "e"),
    (lambda x: x.repeat(2, 1)[1 : B + 1], "bd", "x"),
    (lambda x: x.repeat_interleave(2, 0), "bd", "e?"),
    (lambda x: x.repeat_interleave(2, 1), "bd", "e"),
    (lambda x: x[:, 1:, ::2], "btd", "e"),
    (lambda x: x[1:], "btd", "x"),
    (lambda x: x[:-1], "btd", "x"),
    (lambda x: x[::2], "btd", "x"),
    (lambda x: x[0], "btd", "x"),
    (lambda x: x[-1:], "btd", "x"),
    (lambda x: x[:, 0], "btd", "e"),
    (lambda x: x.reshape(B * T, D)[::T], "btd", "x?"),
    (lambda x: x.reshape(T * B, D)[:B], "tbd", "e"),
    (lambda x: x.reshape(T * B, D)[1 : B + 1], "tbd", "x"),
    (lambda x: torch.stack(x.unbind(1)), "btd", "e"),
    (lambda x: x.unbind(0)[0], "btd", "x"),
    (lambda x: x.chunk(2, 1)[1], "btd", "e"),
    (lambda x: x.split([1, 2], 0)[1], "btd", "x"),
    (lambda x: x.reshape(T * B, D).split(B)[2], "tbd", "e"),
    (lambda x, y: torch.cat([x, y], 1), "btd btd", "e"),
    (lambda x, y: torch.cat([x, y], 0), "btd btd", "e"),
    (lambda x, y: torch.cat([x, y], 1), "btd Btd", "x"),
    (lambda x, y: torch.cat([x, y.expand(B, T, D)], 1), "btd 1td", "e"),
    (lambda x, y: torch.cat([x, y], 0), "btd Btd", "x"),
    (lambda x, y: torch.stack([x, y], 1), "btd btd", "e"),
    (lambda x: x.diagonal(dim1=1, dim2=2), "btd", "e"),
    (lambda x: x.diagonal(dim1=0, dim2=1), "btd", "x"),
    (lambda x: x.unfold(1, 2, 1), "btd", "e"),
    (lambda x: x.unfold(0, 2, 1), "btd", "x"),
    (lambda x: F.pad(x, (1, 1, 0, 2)), "btd", "e"),
    (lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)), "btd", "x"),
    (lambda x: F.pad(x, (1, 1), mode="reflect"), "btd", "e"),
    (lambda x: F.pad(x, (1, 1), mode="circular"), "btd", "e"),
    (lambda x: x.as_strided((B, D), (D, 1)), "bd", "e"),
    (lambda x: x.as_strided((B, D), (0, 1)), "bd", "x"),
    (lambda x: torch.view_as_complex(x[:, :2].contiguous()).imag, "bd", "e"),
    (lambda x: torch.view_as_real(torch.complex(x, x * 2)), "btd", "e"),
    (lambda x: torch.complex(x.sum(0), x.mean(0)).imag, "btd", "s"),
    (lambda x, y: torch.ops.aten.copy(x, y[:, :1]), "btd btd", "e"),
    (lambda x, y: torch.ops.aten.copy(x.sum(0), y.mean(0)), "btd btd", "s"),
    (lambda x: torch.ops.aten.copy(x.sum(0, keepdim=True).expand(B, T, D), x), "btd", "e"),
    (lambda x: torch.tril(x), "btd", "e"),
    (lambda x: torch.tril(x), "bd", "x?"),
    (lambda x: x.flatten().view(B, -1), "btd", "e"),
    (lambda x: x.view(torch.int64) * 0, "bd", "e"),
    # Fourier transforms
    (lambda x: torch.fft.fft2(x).real, "btd", "e"),
    (lambda x: torch.fft.fft(x, dim=0).imag, "bd", "x"),
    (lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=T, dim=1), "btd", "e"),
    (lambda x: torch.fft.rfft(x.sum(0), dim=0).real, "btd", "s"),
    # reductions
    (lambda x: x.sum(1), "btd", "e"),
    (lambda x: x.sum(0), "btd", "s"),
    (lambda x: x.sum(), "btd", "s"),
    (lambda x: x.mean((0, 1)), "btd", "s"),
    (lambda x: x.mean((0, 2), keepdim=True), "tbd", "e"),
    (lambda x: x.mean(1, keepdim=True), "tbd", "s"),
    (lambda x: x.reshape(B * T, D).sum(0), "btd", "s"),
    (lambda x: x.amax(1), "btd", "e"),
    (lambda x: x.amax(0), "btd", "x"),
    (lambda x: x.max(), "btd", "x"),
    (lambda x: x.max(2).values, "btd", "e"),
    (lambda x: x.var(1), "btd", "e"),
    (lambda x: x.var(0), "btd", "x"),
    (lambda x: x.std((1, 2)), "btd", "e"),
    (lambda x: x.prod(1), "btd", "e"),
    (lambda x: x.prod(0), "btd", "x"),
    (lambda x: x.logsumexp(0), "btd", "x"),
    (lambda x: x.logsumexp(2), "btd", "e"),
    (lambda x: x.norm(dim=2), "btd", "e"),
    (lambda x: x.norm(), "btd", "x"),
    (lambda x: x.median(1).values, "btd", "e"),
    (lambda x: x.median(0).values, "btd", "x"),
    (lambda x: (x > 0).any(1), "btd", "e"),
    (lambda x: (x > 0).all(0), "btd", "x"),
    (lambda x: (x > 0).sum(0), "btd", "s"),
    (lambda x: x.argmax(2), "btd", "e"),
    (lambda x: x.argmax(), "btd", "x"),
    # along a dimension
    (lambda x: x.softmax(2), "btd", "e"),
    (lambda x: x.softmax(0), "btd", "x"),
    (lambda x: x.log_softmax(0), "tbd", "e"),
    (lambda x: x.cumsum(1), "btd", "e"),
    (lambda x: x.cumsum(0), "btd", "x"),
    (lambda x: x.cumprod(2), "btd", "e"),
    (lambda x: x.sort(2).values, "btd", "e"),
    (lambda x: x.sort(0).values, "btd", "x"),
    (lambda x: x.topk(2, 1).indices, "btd", "e"),
    (lambda x: x.flip(1), "btd", "e"),
    (lambda x: x.flip(0), "btd", "x"),
    (lambda x: x.roll(1, 1), "btd", "e"),
    (lambda x: x.roll(1, 0), "btd", "x"),
    (lambda x: x.roll(1), "bd", "x"),
    (lambda x: F.glu(x[..., :4], -1), "btd", "e"),
    (lambda x: F.layer_norm(x, (D,)), "btd", "e"),
    (lambda x: F.layer_norm(x, (T, D)), "btd", "e"),
    (lambda x: F.layer_norm(x, (B, T, D)), "btd", "x"),
    (lambda x: F.group_norm(x, 2), "btd", "e"),
    (lambda x: F.batch_norm(x, None, None, training=True), "btd", "x"),
    (lambda x: F.instance_norm(x), "btd", "e"),
    # products
    (lambda x, w: x @ w, "btd dk", "e"),
    (lambda x, w: F.linear(x, w), "bd kd", "e"),
    (lambda x, w: w @ x, "bd kb", "s"),
    (lambda x, w: w @ x, "bd kB", "x"),
    (lambda x, w: w.expand(4, B) @ x, "bd k1", "s"),
    (lambda x, y: x.T @ y, "bd bk", "s"),
    (lambda x, y: x @ y.T, "bd bd", "x"),
    (lambda x, y: x @ y.mT, "btd bsd", "e"),
    (lambda x, y: torch.einsum("btd,bsd->ts", x, y), "btd bsd", "s"),
    (lambda x, y: torch.einsum("btd,csd->bcts", x, y), "btd bsd", "x"),
    (lambda x, w: torch.einsum("tbd,tdk->btk", x, w), "tbd tdk", "e"),
    (lambda x, y: torch.einsum("btd,btk->dk", x, y), "btd btk", "s"),
    (lambda x, v: x @ v, "bd d", "e"),
    (lambda x, v: v @ x, "bd b", "s"),
    (lambda x, v: v @ x, "bd B", "s"),
    (lambda x, y: torch.dot(x, y), "b b", "s"),
    (lambda x, y: torch.outer(x, y), "b b", "x"),
    (lambda x, w: torch.addmm(w, x, w.T @ w), "bd Bd", "e?"),
    (lambda x, w: torch.baddbmm(x, x, w), "btt btt", "e"),
    (lambda x, w, v: F.bilinear(x, x, w, v), "bd kdd k", "e"),
    (lambda x, y: torch.kron(x, y), "bd td", "e?"),
    # what is linear in a sum over the examples
    (lambda x: x.sum(0) * 2 - x.mean(0) / 3, "btd", "s"),
    (lambda x, w: x.sum(0) * w, "btd td", "s"),
    (lambda x, w: w @ x.sum(0), "btd kt", "s"),
    (lambda x: x.sum(0).reshape(-1).view(D, T).T[1:].flip(0).cumsum(1), "btd", "s"),
    (lambda x: F.pad(x.sum(0), (1, 2)), "btd", "s"),
    (lambda x: F.pad(x.sum(0), (1, 2), value=1.0), "btd", "x"),
    (lambda x: torch.cat([x.sum(0), x.mean(0)]), "btd", "s"),
    (lambda x, w: torch.cat([x.sum(0), w]), "btd td", "x"),
    (lambda x: torch.cat([x.sum(0), torch.zeros(1, D, dtype=x.dtype)]), "btd", "s"),
    (lambda x, w: x.sum(0) + w, "btd td", "x"),
    (lambda x: x.sum(0) + 1, "btd", "x"),
    (lambda x: x.sum(0) ** 2, "btd", "x"),
    (lambda x: x.sum(0) * x.sum(0), "btd", "x"),
    (lambda x: 1 / x.sum(0), "btd", "x"),
    (lambda x: x.sum(0).abs(), "btd", "x"),
    (lambda x: x.sum(0).relu(), "btd", "x"),
    (lambda x: x.sum(0).amax(0), "btd", "x"),
    (lambda x: x.sum(0).norm(), "btd", "x"),
    (lambda x: x.sum(0).softmax(0), "btd", "x"),
    (lambda x: x.sum(0).sort(0).values, "btd", "x"),
    (lambda x: x.sum(0).round(), "btd", "x"),
    (lambda x: x.sum(0).to(torch.int64), "btd", "x"),
    (lambda x: x.sum(0).to(torch.bool), "btd", "x"),
    (lambda x: x.sum(0).clamp_min(0), "btd", "x"),
    (lambda x: torch.div(x.sum(0), 2, rounding_mode="floor"), "btd", "x"),
    (lambda x: x.sum(0) % 2, "btd", "x"),
    (lambda x: (x.sum(0) > 0).to(x.dtype), "btd", "x"),
    (lambda x, w: torch.where(w > 0, x.sum(0), 0.0), "btd td", "s"),
    (lambda x, w: torch.where(w > 0, x.sum(0), 1.0), "btd td", "x"),
    (lambda x, w: torch.where(x.sum(0) > 0, w, 0.0), "btd td", "x"),
    (lambda x, w: x.sum(0).masked_fill(w > 0, 0), "btd td", "s"),
    (lambda x: torch.tril(x.sum(0)), "btd", "s"),
    (lambda x: x.sum(0).diagonal(), "btd", "s?"),
    (lambda x: x.sum(0).mean(0).expand(3, D) - 0, "btd", "s"),
    (lambda x: x + x.sum(0), "btd", "x"),
    (lambda x: x * x.sum(0), "btd", "x"),
    (lambda x: x @ x.sum(0).T, "btd", "x"),
    (lambda x: x - x.mean(0), "btd", "x"),
    (lambda x: x.sum(0).exp().log(), "btd", "x"),
    (lambda x: torch.var(x.sum(0), 0), "btd", "x"),
    (lambda x: torch.addcmul(x.sum(0), x.sum(0), x.sum(0)), "btd", "x"),
    (lambda x: torch.lerp(x.sum(0), x.mean(0), 0.5), "btd", "s?"),
    # look-ups
    (lambda i, w: F.embedding(i, w), "bt:l Vd", "e"),
    (lambda i, w: F.embedding(i, w), "tb:l Vd", "e"),
    (lambda i, w: w[i], "b:l td", "e"),
    (lambda i, w: w[:, i], "b:l dt", "e"),
    (lambda x, i: x[:, i], "btd k:l", "e"),
    (lambda x, i: x[i], "btd k:l", "x"),
    (lambda x, i: x[:, i, i[:, None]], "btd b:l", "x"),
    (lambda x, i: x[:, i, i], "btd k:l", "e"),
    (lambda x, m: torch.ops.aten._unsafe_masked_index(x, m, [torch.arange(B)], 0.0), "bd bd:m", "e"),
    (lambda w, m: torch.ops.aten._unsafe_masked_index(w, m, [torch.arange(B)], 0.0), "Bd bd:m", "x"),
    (lambda w, m: torch.ops.aten._unsafe_masked_index(w, m, [torch.zeros(B, dtype=torch.long)], 0.0), "Bd bd:m", "e"),
    (lambda x, m: torch.ops.aten._unsafe_masked_index(x, m, [torch.arange(B)], 0.0), "bd b1d:m", "x"),
    (lambda x, i: x[i], "btd b:l", "x"),
    (lambda x, i: x[:, i], "btd b:l", "x"),
    (lambda x, i: x[torch.arange(B), i], "btd b:l", "e"),
    (lambda x, i: x[torch.arange(B)[:, None], i], "btd bk:l", "e"),
    (lambda x, i: x[torch.arange(B) * 1, i], "btd b:l", "x?"),
    (lambda x, i: x[torch.arange(B).flip(0), i], "btd b:l", "x"),
    (lambda x, i: x[torch.arange(1, B + 1) - 1, i], "btd b:l", "x?"),
    (lambda x, i: x[torch.arange(0, 2 * B, 2) // 2, i], "btd b:l", "x?"),
    (lambda x, i: x[torch.zeros(B, dtype=torch.long), i], "btd b:l", "x"),
    (lambda x, i: x.gather(1, i), "btd btd:l", "e"),
    (lambda x, i: x.gather(0, i % B), "btd btd:l", "x"),
    (lambda x, i: x.gather(1, i), "btd Btd:l", "x"),
    (lambda x, i: x.gather(1, i.expand(B, T, D)), "btd 1td:l", "e"),
    (lambda x, i: x.gather(1, i), "btd 1td:l", "x"),
    (lambda x, i: x.index_select(1, i), "btd k:l", "e"),
    (lambda x, i: x.index_select(0, i % B), "btd k:l", "x"),
    (lambda w, i: w.index_select(0, i), "td b:l", "e"),
    (lambda x, i: torch.take_along_dim(x, i, 1), "btd btd:l", "e"),
    (lambda i: F.one_hot(i, T), "b:l", "e"),
    (lambda x: x.sum(0)[:, torch.tensor([1, 0])], "btd", "s"),
    (lambda x, i: x.sum(0)[i], "btd b:l", "x"),
    # writes
    (lambda x, i: torch.zeros(T, D, dtype=x.dtype).index_put((i,), x, accumulate=True), "bd b:l", "s"),
    (lambda x, i: torch.zeros(T, D, dtype=x.dtype).index_put((i,), x), "bd b:l", "x"),
    (lambda x, i: torch.ops.aten.index_put(x, [None, i, i[:, None]], x[:, :1, :1], True), "btd b:l", "x"),
    (lambda x, m: x.index_put((m,), torch.zeros((), dtype=x.dtype)), "btd bt:m", "e"),
    (lambda x, m: x.index_put((m,), torch.zeros((), dtype=x.dtype)), "btd Bt:m", "x"),
    (lambda x, m: x.index_put((m.expand(B, T),), torch.zeros((), dtype=x.dtype)), "btd 1t:m", "e"),
    (lambda w, m: w.index_put((m,), torch.zeros((), dtype=w.dtype)), "Btd bt:m", "x"),
    (lambda w, m: w.expand(B, T, D).clone().index_put((m,), torch.zeros((), dtype=w.dtype)), "1td bt:m", "e"),
    (lambda x, y, m: x.index_put((m,), y[0, 0]), "btd bt bt:m", "x"),
    (lambda x, i: torch.ones(T, D, dtype=x.dtype).index_put((i,), x, accumulate=True), "bd b:l", "x"),
    (lambda x, i: torch.zeros(T, D, dtype=x.dtype).index_add(0, i, x), "bd b:l", "s"),
    (lambda x, i: torch.zeros(T, D, dtype=x.dtype).index_add(0, i, x), "bd B:l", "x"),
    (lambda x, i: torch.zeros(T, D, dtype=x.dtype).index_add(0, i.expand(B), x), "bd 1:l", "s"),
    (lambda x, i: torch.zeros(T, D, dtype=x.dtype).scatter_add(0, i, x), "bd bd:l", "s"),
    (lambda x, i: torch.zeros(B, T, dtype=x.dtype).scatter(1, i, x[:, :T]), "bd bt:l", "e"),
    (lambda x, i: torch.zeros(B, T, dtype=x.dtype).scatter_add(1, i, x[:, :T]), "bd bt:l", "e"),
    (lambda x, i: x.scatter(1, i, 0.5), "bd bt:l", "e"),
    (lambda x, i: torch.zeros(B, T, D, dtype=x.dtype).index_put((torch.arange(B), i), x), "bd b:l", "e"),
    (lambda x, i: torch.zeros(B, T, D, dtype=x.dtype).index_put((torch.arange(B).flip(0), i), x), "bd b:l", "x"),
    (lambda x, i: x.index_put((torch.arange(B), i), torch.ones((), dtype=x.dtype)), "btd b:l", "e"),
    (lambda x, i: x.index_put((i % B,), torch.ones((), dtype=x.dtype)), "btd b:l", "x"),
    (lambda x, y: torch.slice_scatter(x, y, 1, 0, 2), "btd b2d", "e"),
    (lambda x, y: torch.slice_scatter(x, y, 0, 0, 1), "btd 1td", "x"),
    (lambda x, y: torch.select_scatter(x, y, 1, 0), "btd bd", "e"),
    (lambda x, y: torch.select_scatter(x, y, 0, 0), "btd td", "x"),
    (lambda x, y: torch.select_scatter(x, y, 1, 0), "db d", "x"),
    (lambda x, i: torch.bincount(i, minlength=T), "bd b:l", "x?"),
    # layers
    (lambda x, w: F.conv1d(x, w, padding=1), "btd kt2", "e"),
    (lambda x, w: F.conv1d(x[None], w)[0], "bd kb2", "x"),
    (lambda x, w: F.conv1d(w, x), "btd kt9", "x"),
    (lambda x, w: F.conv_transpose1d(x, w), "btd tk2", "e"),
    (lambda x, w: F.conv2d(x[:, None], w), "btd k122", "e"),
    (lambda x: F.max_pool1d(x, 2), "btd", "e"),
    (lambda x: F.max_pool1d(x, 2), "tdb", "x"),
    (lambda x: F.max_pool2d(x[:, None], 2), "btd", "e"),
    (lambda x: F.avg_pool2d(x[None], 2), "tbd", "x"),
    (lambda x: F.avg_pool1d(x, 2), "btd", "e"),
    (lambda x: F.adaptive_avg_pool1d(x, 2), "btd", "e"),
    (lambda x: F.adaptive_max_pool2d(x[:, None], 2), "btd", "e"),
    (lambda x: F.interpolate(x, scale_factor=2), "btd", "e"),
    (lambda x: F.interpolate(x[:, None], size=(3, 7), mode="bilinear"), "btd", "e"),
    (lambda x: F.interpolate(x[None], size=(7, 7), mode="bilinear"), "tbd", "x"),
    (lambda x: F.pixel_shuffle(x[:, :, None], 2), "btd", "e"),
    (lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]), "btd", "e"),
    (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True), "btd", "e"),
    (lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]), "bd", "x"),
    (lambda x, w: F.scaled_dot_product_attention(x[:, None], *[w.expand(B, 1, 2, D)] * 2), "btd 2d", "e"),
    (lambda x, m: F.scaled_dot_product_attention(*[x[:, None]] * 3, attn_mask=m[:, None]), "btd btt:m", "e"),
    (lambda i, w: F.embedding_bag(i, w, mode="sum"), "bt:l Vd", "e?"),
    (lambda i, w: F.embedding_bag(i, w, mode="mean"), "bt:l Vd", "e?"),
    (lambda x, y: F.cosine_similarity(x, y, dim=-1), "btd btd", "e"),
    (lambda x, y: torch.cdist(x, y), "btd btd", "e"),
    (lambda x, y: torch.cdist(x, y), "bd bd", "x"),
    (lambda x, i: F.cross_entropy(x, i), "bd b:l", "s?"),
    (lambda x, i: F.cross_entropy(x, i, reduction="none"), "bd b:l", "e"),
    (lambda x, i: F.cross_entropy(x, i, ignore_index=1), "bd b:l", "x"),
    (lambda x, y: F.mse_loss(x, y), "bd bd", "s"),
    (lambda x, y: F.kl_div(x, y.exp(), reduction="batchmean"), "bd bd", "s"),
    # nothing of the examples
    (lambda x: torch.zeros_like(x) + torch.arange(D), "btd", "0"),
    (lambda x: x.new_ones(3) * x.shape[1], "btd", "0"),
    (lambda x: torch.randn_like(x), "btd", "0"),
    (lambda x: torch.full_like(x, 2).cumsum(0), "btd", "0"),
    (lambda x: torch.zeros_like(x).sum(0) + torch.zeros_like(x).mean(0) / 3, "btd", "0"),
    (lambda x: torch.cat([torch.zeros_like(x), torch.zeros_like(x) @ torch.ones(D, D, dtype=x.dtype)]), "btd", "0"),
    (lambda x: torch.zeros_like(x) + 1 - torch.zeros_like(x), "btd", "0"),
    (lambda x: torch.add(torch.zeros_like(x), 1), "btd", "0"),
    (lambda x: torch.cat([torch.ones_like(x)[:1], torch.zeros_like(x)[1:]]), "btd", "0"),
    (lambda x: 1 / torch.ones_like(x) + 0 * torch.zeros_like(x), "btd", "0"),
    # the number of a row
    (lambda x: x + torch.arange(B)[:, None], "bd", "x"),
    (lambda x: x + torch.arange(D), "bd", "e"),
    (lambda x: x.reshape(B * T, D) + torch.arange(B)[:, None].expand(B, T).reshape(B * T, 1), "btd", "x"),
    (lambda x: x.reshape(B * T, D) + torch.arange(B * T)[:, None], "btd", "x"),
    (lambda x: x.reshape(B * T, D) + (torch.arange(B * T) % T)[:, None], "btd", "e"),
    (lambda x: x.reshape(B * T, D) + (torch.arange(B * T) // T)[:, None], "btd", "x"),
    (lambda x, p: x.reshape(B * T, D) + p.repeat(B, 1), "btd td", "e"),
    (lambda x, p: x.reshape(T * B, D) + p.repeat(B, 1), "tbd td", "x"),
    (lambda x, p: x.reshape(T * B, D) + p.repeat_interleave(B, 0), "tbd td", "e"),
    (lambda x, p: x + p[:B], "bd Vd", "x"),
    (lambda x, p: x + p[:T], "btd Vd", "e"),
    (lambda x, p: x + p[:T][:, None], "tbd Vd", "e"),
    (lambda x, p: x + p[:B][:, None], "btd Vd", "x"),
    (lambda x: x + torch.ones(100)[:B, None], "bd", "e"),
    (lambda x: x + torch.ones(B).cumsum(0)[:, None], "bd", "x"),
    (lambda x: x * torch.linspace(0, 1, B)[:, None], "bd", "x"),
    (lambda x: torch.where(torch.arange(B)[:, None] < B // 2, x, 0.0), "bd", "x"),
    (lambda x: x.tril(), "bd", "x"),
    (lambda x: x.triu(1), "btd", "e"),
    (lambda x: x + torch.ones(B, D).tril(), "bd", "x"),
    (lambda x: x[:, :, :T] + torch.ones(T, T).tril(), "btd", "e"),
    (lambda x: torch.eye(B, dtype=x.dtype) @ x, "bd", "x"),
    (lambda x: x @ torch.eye(D, dtype=x.dtype), "bd", "e"),
    (lambda x: x + (torch.arange(B)[:, None] % D == torch.arange(D)), "bd", "x"),
    (lambda x: x + torch.cat([torch.ones(1, D), torch.zeros(B - 1, D)]), "bd", "x"),
    (lambda x: x + torch.stack([torch.ones(D)] * B), "bd", "e"),
    (lambda x: x + torch.stack([torch.ones(D) * i for i in range(B)]), "bd", "x"),
    (lambda x: torch.cat([x, torch.arange(B, dtype=x.dtype)[:, None]], 1), "bd", "x"),
    (lambda x: torch.cat([x, torch.zeros(B, 1, dtype=x.dtype)], 1), "bd", "e"),
    (lambda x: torch.stack([x, torch.arange(B, dtype=x.dtype)[:, None].expand(B, D)]), "bd", "x"),
    (lambda x, w: x + w[torch.arange(B)], "bd Vd", "x"),
    (lambda x, w: x + w[torch.zeros(B, dtype=torch.long)], "bd Vd", "e"),
    (lambda i, w: w[torch.arange(B), i], "b:l Bd", "x"),
    (lambda x, w: x + F.embedding(torch.arange(B), w), "bd Vd", "x"),
    (lambda x, w: x + F.embedding(torch.arange(T)[None].expand(B, T), w), "btd Vd", "e"),
    (lambda x: x.gather(1, torch.arange(B)[:, None] % D), "bd", "x"),
    (lambda x: x.scatter(1, torch.arange(B)[:, None] % D, 0.5), "bd", "x"),
    (lambda x: x.cumsum(1) * torch.arange(B)[:, None].flip(1), "bd", "x"),
    (lambda x: x + torch.arange(B * D).reshape(B, D).amax(0), "bd", "e"),
    (lambda x: x + torch.arange(B * D).reshape(B, D).amax(1, keepdim=True), "bd", "x"),
    (lambda x: torch.sum(x * torch.arange(B)[:, None]), "bd", "x"),
    (lambda x, w: torch.addmm(torch.arange(B, dtype=x.dtype)[:, None], x, w), "bd dk", "x"),
    (lambda x, w: torch.addmm(x, torch.arange(B, dtype=x.dtype)[:, None], w), "bd 1d", "x"),
    (lambda x: torch.roll(torch.arange(B), 1)[:, None] + x, "bd", "x"),
    (lambda x: x.as_strided((B, D), (D, 1)) + torch.arange(B).as_strided((B, D), (1, 0)), "bd", "x"),
    (lambda x: x + torch.arange(D).as_strided((B, D), (0, 1)), "bd", "e"),
    (lambda x, w: x + torch.bucketize(torch.arange(B), w)[:, None], "bd V", "x"),
    (lambda x: torch.slice_scatter(x, torch.arange(B, dtype=x.dtype)[:, None], 1, 0, 1), "bd", "x"),
    (lambda x: torch.select_scatter(x, torch.arange(B, dtype=x.dtype), 1, 0), "bd", "x"),
    (lambda x: torch.select_scatter(torch.ones(B, D, dtype=x.dtype).cumsum(0), x[:, 0], 1, 0), "bd", "x"),
    (lambda x, w: F.conv1d(x, w) * torch.arange(B)[:, None, None], "btd kt2", "x"),
    # every example's own position, as far as the dtype counts
    (lambda x: x[torch.arange(B).to(torch.bfloat16).long()], "bd", "e"),
    (lambda x: x[torch.arange(B, dtype=torch.bfloat16).long()], "bd", "x"),
    (lambda x: x[torch.arange(B, dtype=torch.uint8).long()], "bd", "e"),
    (lambda x: x[torch.arange(1).expand(B)], "bd", "x"),
    (lambda x: x[torch.arange(B).view(torch.float64).long()], "bd", "x"),
    (lambda x: x[torch.arange(B).clamp(max=5)], "bd", "x"),
    (lambda x: x[torch.arange(B) % B], "bd", "x"),
    (lambda x: x[torch.arange(1, B + 1) - 1], "bd", "x"),
    (lambda x: x[torch.arange(B).reshape(B, 1).expand(B, T)], "bd", "e"),
    (lambda x: x[torch.arange(B)[None].expand(B, B)], "bd", "e?"),
    # draws of random numbers
    (lambda x: x + torch.rand(B, 1), "bd", "e"),
    (lambda x: x * (torch.rand_like(x) > 0.5), "tbd", "e"),
    (lambda x: x * torch.bernoulli(torch.full((B, 1), 0.5)), "bd", "e"),
    (lambda x: x * torch.bernoulli(torch.arange(B)[:, None] / B), "bd", "x"),
    (lambda x: x + torch.randn(B, D, dtype=x.dtype).cumsum(0), "bd", "x"),
    (lambda x: x + torch.randn(B, D, dtype=x.dtype).sort(0).values, "bd", "x"),
    (lambda x: x + torch.randn(B, D, dtype=x.dtype).sort(1).values, "bd", "e"),
    (lambda x: x + torch.randn(B, D, dtype=x.dtype)[:1], "bd", "e"),
    (lambda x: (x + (n := torch.randn(B, D, dtype=x.dtype))) * (n == n[:1]), "bd", "x"),
    (lambda x: x + (n := torch.randn(B, B, dtype=x.dtype))[:, :1] * n.T[:, :1], "bd", "x"),
    (lambda x: x + torch.randperm(B)[:, None], "bd", "x"),
    (lambda x: x.reshape(B * T, D) + torch.rand(B, 1).expand(B, T).reshape(B * T, 1), "btd", "e"),
    (lambda x: F.dropout(x, 0.5) + F.dropout(torch.ones(B, D, dtype=x.dtype), 0.1), "bd", "e"),
    (lambda x: x + torch.multinomial(torch.ones(B, 3), 1), "bd", "x"),
    # numbers read out of values
    # matrices, images and signals in batches
    (lambda x: torch.linalg.inv(x[..., :4]), "btd", "e"),
    (lambda x: torch.linalg.inv(x[:3, :, :3].movedim(1, 2)), "tbd", "x"),
    (lambda x: torch.linalg.inv(x[:3, :, :3].movedim(0, 1)), "tbd", "e"),
    (lambda x: torch.linalg.qr(x)[0], "btd", "e"),
    (lambda x: torch.linalg.qr(x)[0], "tbd", "x"),
    (lambda x: torch.linalg.svd(x)[1], "btd", "e"),
    (lambda x: torch.linalg.eigvalsh(x @ x.mT), "btd", "e"),
    (lambda x: torch.linalg.matrix_exp(x), "btt", "e"),
    (lambda x: torch.linalg.slogdet(x)[1], "btt", "e"),
    (lambda x: torch.linalg.pinv(x), "btd", "e"),
    (lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(T)), "btd", "e"),
    (lambda a, x: torch.linalg.solve(a, x), "btt btd", "e"),
    (lambda a, x: torch.linalg.solve(a, x), "tt btd", "e"),
    (lambda a, x: torch.linalg.solve(a, x), "btt bt", "e"),
    (lambda a, x: torch.linalg.solve(a, x), "btt td", "e"),
    (lambda a, x: torch.linalg.solve(a, x), "sbtt btd", "e?"),
    (lambda a, x: torch.ops.aten._linalg_solve_ex(a, x)[1], "tt btd", "0"),
    (lambda a, x: torch.ops.aten._linalg_solve_ex(a, x)[1], "btt td", "e"),
    (lambda a, x: torch.linalg.solve(a, x.T), "tt bt", "x?"),
    (lambda a, x: torch.linalg.solve(a, x.sum(0)), "tt btd", "s"),
    (lambda a, x: torch.linalg.solve(x.sum(0), a), "td btt", "x"),
    (lambda a, x: torch.ops.aten._linalg_solve_ex(a, x.sum(0))[1], "tt btd", "0"),
    (lambda a, x: torch.linalg.solve_triangular(a, x, upper=True), "btt btd", "e"),
    (lambda a, x: torch.linalg.solve_triangular(a, x.sum(0), upper=True), "tt btd", "s"),
    (lambda x: torch.linalg.solve_triangular(x.sum(0), x.sum(0), upper=True), "btt", "x"),
    (lambda x: torch.linalg.inv(x.sum(0)), "btt", "x"),
    (lambda a, x: torch.cholesky_solve(x, a), "btt btd", "e"),
    (lambda a, x: torch.ops.dpcompile.matrix_exp_adjoint(a, x.sum(0)), "tt btt", "s"),
    (lambda a, x: torch.ops.dpcompile.matrix_exp_adjoint(a, x), "tt btt", "e"),
    (lambda x: torch.ops.dpcompile.matrix_exp_adjoint(x.sum(0), x.sum(0)), "btt", "x"),
    (lambda a, x: torch.ops.dpcompile.matrix_exp_adjoint(x.sum(0), a), "tt btt", "x"),
    (lambda x, y: torch.linalg.householder_product(x, y), "bdt bt", "e"),
    (lambda x: F.grid_sample(x[:, None], x[:, :, :4].reshape(B, -1, 1, 2).tanh(), align_corners=True), "btd", "e"),
    (lambda x, y: F.grid_sample(y[:, None], x[:, :, :2].tanh()[:, None], align_corners=True), "btd Btd", "x"),
    (lambda x: F.grid_sample(x[None], x[None, :, :, :2].tanh(), align_corners=True), "bt4", "x"),
    (lambda x: F.grid_sample(x[:, None, None], x[:, None, :, :3].tanh()[:, None], align_corners=True), "btd", "e?"),
    (lambda x: F.fractional_max_pool2d(x[:, None], 2, 2, _random_samples=x[:, :1, :2].sigmoid()), "btd", "e"),
    (lambda x: F.max_unpool2d(*F.max_pool2d(x[:, None, :, :4], 2, return_indices=True), [2, 2]), "btd", "e"),
    (lambda x: torch.einsum("bii->bi", x).diag_embed(), "btt", "e"),
    (lambda x, y: torch.diagonal_scatter(x, y, 0, 1, 2), "btt bt", "e"),
    (lambda x, y: torch.diagonal_scatter(x, y, 0, 1, 2), "btt Bt", "x"),
    (lambda x, y: torch.diagonal_scatter(x, y.expand(B, T), 0, 1, 2), "btt t", "e"),
    (lambda x, y: torch.diagonal_scatter(x, y, 0, 0, 2), "BtB tb", "x"),
    (lambda x, y: torch.diagonal_scatter(x, y, 0, 0, 1), "bBt tB", "x?"),
    (lambda x: torch.diagonal_scatter(torch.zeros(T, T, dtype=x.dtype), x.sum(0), 0, 0, 1), "bt", "s"),
    (lambda x, y: torch.cdist(x, y, 1.0), "btd sd", "e"),
    (lambda x, y: torch.cdist(x, y), "bd sd", "e"),
    (lambda x: torch.fft.rfft(x, dim=1).abs(), "btd", "e"),
    (lambda x: torch.fft.fft2(x.sum(0)).real, "btd", "s"),
    (lambda x: torch.fft.irfft(torch.fft.rfft(x.sum(0)) * 1j), "btd", "s"),
    (lambda x: torch.fft.irfft(torch.fft.rfft(x), n=7), "btd", "e"),
    (lambda x: torch.fft.fft(x.sum(0)).abs(), "btd", "x"),
    (lambda x: torch.view_as_real(torch.view_as_complex(x)).flatten(1), "bt2", "e"),
    (lambda x: torch.complex(x.sum(0), x.mean(0)).imag, "btd", "s"),
    (lambda x, y: torch.complex(x.sum(0), y).real, "btd td", "x"),
    (lambda x: torch.complex(x, x).sum(0).view(torch.float64).view(torch.complex128).real, "btd", "s"),
    (lambda x: x.sum(0).view(torch.int64), "btd", "x"),
    (lambda x: torch.polar(x, x).conj().imag, "btd", "e"),
    (lambda x, y: torch.searchsorted(y.sort().values, x), "btd btd", "e"),
    (lambda x, y: torch.searchsorted(y.sort().values, x), "bd s", "e"),
    (lambda x, y: torch.searchsorted(x[0].sort().values, y), "bd s", "x"),
    (lambda i, w: F.embedding(i, w, scale_grad_by_freq=True), "bt:l Vd", "x"),
    (lambda x: torch.histc(x, 3), "bd", "x"),
    (lambda x: torch.corrcoef(x), "bd", "x"),
    (lambda x: torch.fft.fft(x, dim=1).real, "btd", "e"),
    (lambda x: torch.fft.fft(x, dim=0).real, "btd", "x"),
    (lambda x: torch.searchsorted(torch.arange(4, dtype=x.dtype), x), "btd", "e"),
    (lambda x: torch.bucketize(x, torch.arange(4, dtype=x.dtype)), "btd", "e"),
]  # fmt: skip

SIZES = {"different": {"b": 3, "B": 3, "t": 4, "d": 5, "s": 6, "k": 4, "V": 7}, "equal": dict.fromkeys("bBtdskV", 4)}


def inputs_of(spec: str, sizes: Mapping[str, int]) -> tuple[list[Tensor], list[int | None]]:
    generator = torch.Generator().manual_seed(1)
    values: list[Tensor] = []
    dims: list[int | None] = []
    for part in spec.split():
        letters, _, kind = part.partition(":")
        shape = [sizes[c] if c in sizes else int(c) for c in letters]
        if kind == "l":
            values.append(torch.randint(0, sizes["t"], shape, generator=generator))
        elif kind == "m":
            values.append(torch.rand(shape, generator=generator) > 0.4)
        else:
            values.append(torch.randn(shape, generator=generator, dtype=torch.float64))
        dims.append(letters.index("b") if "b" in letters else None)
    return values, dims


def proved(
    function: Function, values: list[Tensor], dims: list[int | None], batch: int
) -> tuple[fx.GraphModule, Proof, Any]:
    traced = trace_like(function, *values)
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    axes = {n: Examples(d) for n, d in zip(placeholders, dims, strict=True) if d is not None}
    joint = JointGraph(traced, axes, tangent_of={}, outputs=(), mask=placeholders[0], batch=batch)
    return traced, prove(joint), axes


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("index", range(len(TABLE)))
def test_operation(index: int, sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The label of every value on the way is what the numbers say, and the result's is the expected one."""
    function, spec, expected = TABLE[index]
    numbers = SIZES[sizes]
    for name, size in (("B", "b"), ("T", "t"), ("D", "d")):
        monkeypatch.setitem(globals(), name, numbers[size])
    values, dims = inputs_of(spec, numbers)
    try:
        function(*values)
    except RuntimeError:
        assert sizes == "equal"
        pytest.skip("the sizes do not fit")
    try:
        traced, proof, axes = proved(function, values, dims, numbers["b"])
    except (RuntimeError, AssertionError) as error:
        assert "value out of a tracing tensor" in str(error) or "in-place operations" in str(error)
        pytest.skip("not traceable without Dynamo")
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    experiment = Experiment(traced, axes, dict(zip(placeholders, values, strict=True)), numbers["b"], proof)
    found = contradictions(experiment, traced.graph, proof)
    assert not found, "\n".join(found)
    result = traced.graph.output_node().args[0]
    if isinstance(result, (tuple, list)):
        result = result[0]
    assert isinstance(result, fx.Node)
    label = proof.of(result)
    got = {Examples: "e", Summed: "s", Shared: "0", Mixed: "x"}[type(label)]
    if sizes == "different" and not expected.endswith("?"):
        assert got == expected, str(label)
    if got == "0" and expected != "0":
        assert not experiment.changes(result)


def test_the_experiment_notices_wrong_labels() -> None:
    """Every wrong claim is contradicted."""
    for function, claim in (
        (lambda x: x.flip(0), Examples(0)),
        (lambda x: x + x[:1], Examples(0)),
        (lambda x: x - x.mean(0), Examples(0)),
        (lambda x: x.T, Examples(0)),
        (lambda x: x.sum(0) ** 2, Summed()),
        (lambda x: x.amax(0), Summed()),
        (lambda x: x[0], Shared()),
        (lambda x: x.sum(0), Shared()),
    ):
        values = [torch.randn(4, 4, dtype=torch.float64)]
        traced, _, axes = proved(function, values, [0], 4)
        (placeholder,) = axes
        experiment = Experiment(traced, axes, {placeholder: values[0]}, 4)
        result = traced.graph.output_node().args[0]
        assert isinstance(result, fx.Node) and experiment.contradiction(result, claim) is not None, claim


# --- whole joint graphs -----------------------------------------------------------------------------------------------


class _Enough(Exception):
    """Stops a compilation when the joint graph has been looked at."""


def joint_of(case: Case, monkeypatch: pytest.MonkeyPatch, batch: int) -> tuple[JointGraph, Proof]:
    """The joint graph of a model before it is rewritten, and its proof."""
    seen: list[tuple[JointGraph, Proof]] = []

    def spy(joint: JointGraph) -> Proof:
        seen.append((joint, prove(joint)))
        raise _Enough

    monkeypatch.setattr(pipeline, "prove", spy)
    torch.manual_seed(1)
    args, kwargs = case.call(batch, torch.float64)
    private = dp_compile(case.make().double(), backend="eager", in_dims=case.in_dims, dynamic=False)
    with pytest.raises((_Enough, DPCompileError)):
        private(*args, **kwargs)
    return seen[0]


@pytest.mark.parametrize(
    "case", [c for c in ZOO if c.name not in ("BidirectionalRNN", "GRUSequenceFirst")], ids=lambda c: c.name
)
def test_joint_graph(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of every model: each value's label against what one example changes, its cotangent too."""
    batch = 5 if case.static_only else 3
    joint, proof = joint_of(case, monkeypatch, batch)
    generator = torch.Generator().manual_seed(2)
    inputs: dict[fx.Node, Any] = {}
    axes: dict[fx.Node, Examples] = dict(joint.example_axes)
    for node in joint.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            inputs[node] = _like(value, generator)
            label = proof.of(node)
            if node in joint.tangent_of and isinstance(label, Examples):
                axes[node] = label
    experiment = Experiment(joint.module, axes, inputs, batch, proof)
    found = contradictions(experiment, joint.graph, proof)
    assert not found, "\n".join(found)
    for name, gradient in joint.gradients.items():
        if gradient is not None and experiment.changes(gradient):
            assert isinstance(proof.of(gradient), Summed), name


def test_most_values_are_checked_with_strong_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the language model is called mixed, and its values are mostly single examples'."""
    _, proof = joint_of(CASES["LanguageModel"], monkeypatch, 3)
    kinds = [type(x) for label in proof.labels.values() for x in (label if isinstance(label, tuple) else (label,))]
    assert kinds.count(Mixed) == 0 and kinds.count(Examples) > kinds.count(Shared)
