"""What every rank of test_sequence_parallel.py runs: ``torchrun tests/workers/sequence_worker.py [CHECK ..]``.

On two ranks sequence parallelism alone, on four with FSDP2, two by two. Each check prints its name once it passed, on
rank 0.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from launching import run_checks
from sharded_worker import made, raises
from tensor_worker import (
    Block,
    communicated,
    gradients_of,
    optimizer_of,
    part,
    same,
    same_on_all_ranks,
    same_weights,
    step,
    whole,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dpcompile
from dpcompile import PoissonLoader, UnsupportedGraphError
from dpcompile.module import engine_of

dp_compile: Any = dpcompile.dp_compile
B, T, D, V, C = 8, 4, 8, 12, 0.5


class GPT(nn.Module):
    """A cut embedding, two blocks whose residuals are cut over tokens, and a head that returns whole logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        h = self.tok(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Routed(nn.Module):
    """A whole linear layer and a whole norm on cut tokens; the norm comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.gate = nn.Embedding(V, D), nn.Linear(D, D)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        h = self.norm(self.tok(x))
        return self.head(self.norm(h + self.gate(h).tanh()))


class Biased(Block):
    """A plain parameter on cut tokens, whose gradient is a sum of cotangents and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return super().forward(x) + self.bias


class BiasedGPT(GPT):
    """Of such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Biased() for _ in range(2))


class Tied(GPT):
    """Its head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.tok.weight


class Lossy(GPT):
    """Returns the loss of each example, of logits that may be cut over the vocabulary."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]  # noqa: D102
        return losses(super().forward(x), y)


class Apart(GPT):
    """Returns logits that are cut over the vocabulary."""


class Contextual(nn.Module):
    """Every layer sees some of the tokens; of the others it gathers keys and values. Causal attention of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.ranks = 0, 1
        self.tok, self.pos, self.norm = nn.Embedding(V, D), nn.Embedding(64, D), nn.LayerNorm(D)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=i != 1) for i in range(4))
        self.up, self.down, self.head = nn.Linear(D, 4 * D), nn.Linear(4 * D, D), nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        length = x.shape[1] // self.ranks
        place = self.rank * length + torch.arange(length).expand(len(x), length)
        h = self.tok(x[:, self.rank * length : (self.rank + 1) * length].contiguous()) + self.pos(place.contiguous())
        z = self.norm(h)
        k, v = gathered(self.k(z)), gathered(self.v(z))
        seen = place[0].unsqueeze(1) >= torch.arange(x.shape[1])
        h = h + self.o(F.scaled_dot_product_attention(local(self.q(z)), k, v, attn_mask=seen))
        return whole(self.head(h + self.down(F.gelu(self.up(h)))))


def local(value: Any) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def gathered(value: Any) -> Tensor:
    """Of all tokens, where every rank uses them for its own: their gradients are to be added up."""
    if not isinstance(value, DTensor):
        return value
    return value.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def context(mesh: DeviceMesh, length: int = T, **options: Any) -> Any:
    """All gradients are sums over the ranks."""

    def make() -> Any:
        model = made(Contextual)
        styles = {n: SequenceParallel() for n, m in model.named_modules() if n}
        parallelize_module(model, mesh if mesh.ndim == 1 else mesh["tp"], styles)  # type: ignore[arg-type]
        model.rank, model.ranks = mesh.get_local_rank(mesh.ndim - 1), 2  # type: ignore[assignment]
        return model if mesh.ndim == 1 else fully_shard(model, mesh=mesh["dp"])

    x = tokens(length)
    wanted, norms = one_by_one(made(Contextual), x)
    model = dp_compile(make(), max_grad_norm=C, backend="eager", **options)
    step(model, part(x, mesh))
    torch.testing.assert_close(engine_of(model).row_norms, part(norms, mesh), rtol=1e-5, atol=1e-6)
    same(gradients_of(model), wanted)
    return model


def losses(logits: Tensor, y: Tensor) -> Tensor:
    each: Any = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    return whole(each).view(y.shape).mean(1)


def block_styles() -> dict[str, Any]:
    """Of a block of tensor_worker.py, whose residuals are cut over tokens."""
    shared: dict[str, Any] = {
        "attention.norm": SequenceParallel(),
        "mlp.norm": SequenceParallel(),
        "mlp.up": ColwiseParallel(input_layouts=Shard(1)),
        "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
        "attention.o": RowwiseParallel(output_layouts=Shard(1)),
    }
    return shared | {f"attention.{n}": ColwiseParallel(input_layouts=Shard(1)) for n in "qkv"}


def cut_tokens(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The plan of torchtitan's kind: norms see cut tokens, layers between them gather and scatter."""
    tied = isinstance(model, Tied)
    parallel = isinstance(model, (Lossy, Apart))
    logits = {"output_layouts": Shard(-1), "use_local_output": False} if parallel else {"output_layouts": Replicate()}
    ends: dict[str, Any] = {
        "tok": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "gate": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), **logits),  # type: ignore[arg-type]
    }
    parallelize_module(model, mesh, {n: s for n, s in ends.items() if hasattr(model, n)})
    if tied:
        model.head.weight = model.tok.weight  # type: ignore[union-attr,assignment]
    for block in getattr(model, "blocks", ()):
        parallelize_module(block, mesh, block_styles())
    return model


def placed(make: Callable[[], nn.Module], mesh: DeviceMesh) -> Any:
    """Cut over the mesh, or over its second dimension and sharded over the first."""
    if mesh.ndim == 1:
        return cut_tokens(made(make), mesh)
    model = cut_tokens(made(make), mesh["tp"])
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def tokens(length: int = T, rows: int = B) -> Tensor:
    return torch.randint(0, V, (rows, length))


def one_by_one(model: nn.Module, x: Tensor, clipping: str = "flat") -> tuple[dict[str, Tensor], Tensor]:
    """Clipped sums and norms by one backward per example, in plain torch."""
    model = copy.deepcopy(model)
    named = dict(model.named_parameters())
    group = {n: n.rpartition(".")[0] if clipping == "per_layer" else "" for n in named}
    bound = C / len(set(group.values())) ** 0.5
    sums, norms = {n: torch.zeros_like(p) for n, p in named.items()}, []
    for row in x:
        model.zero_grad()
        step(model, row.unsqueeze(0))
        squared = {n: p.grad.square().sum() for n, p in named.items() if p.grad is not None}
        norms.append(torch.stack(list(squared.values())).sum().sqrt())
        for name, p in named.items():
            norm = torch.stack([s for n, s in squared.items() if group[n] == group[name]]).sum().sqrt()
            assert p.grad is not None
            sums[name] += p.grad * (bound / norm).clamp(max=1)
    return sums, torch.stack(norms)


def gradients(
    make: Callable[[], nn.Module], mesh: DeviceMesh, x: Tensor, backend: str = "eager", **options: Any
) -> Any:
    """Norms and clipped sums against one backward per example."""
    wanted, norms = one_by_one(made(make), x, options.get("clipping", "flat"))
    model = dp_compile(placed(make, mesh), max_grad_norm=C, backend=backend, **options)
    step(model, part(x, mesh))
    torch.testing.assert_close(engine_of(model).row_norms, part(norms, mesh), rtol=1e-5, atol=1e-6)
    same(gradients_of(model), wanted)
    return model


def exchanges(mesh: DeviceMesh) -> None:
    """What is smaller is exchanged: rows and columns of short sequences, gradients of long ones; the plan says so."""
    for length, mode, gathered in (
        (2, "auto", 1),
        (64, "auto", 0),
        (64, "ghost", 1),
        (2, "instantiate", 0),
        (4, "redo", 0),
    ):
        model = gradients(Routed, mesh, tokens(length), norm=mode)
        (line,) = [x for x in str(model.plan).splitlines() if x.startswith("between ranks")]
        assert f"rows and columns of {gathered}, every example's gradients of {4 - gathered}" in line, (mode, line)


def masked(mesh: DeviceMesh) -> None:
    x, mask = tokens(), torch.arange(B) % 4 != 1
    wanted, norms = one_by_one(made(GPT), x[mask])
    model = dp_compile(placed(GPT, mesh), max_grad_norm=C, backend="eager")
    engine_of(model).set_mask(part(mask, mesh))
    step(model, part(x, mesh))
    same(gradients_of(model), wanted)
    torch.testing.assert_close(model.grad_norms, norms if mesh.ndim == 1 else part(norms, mesh), rtol=1e-5, atol=1e-6)


def users(mesh: DeviceMesh) -> None:
    """A user's gradient is that of both of the user's rows."""
    x = tokens()
    single = made(GPT)
    private = dp_compile(single, max_grad_norm=C, backend="eager", examples_per_user=2)
    model = dp_compile(placed(GPT, mesh), max_grad_norm=C, backend="eager", examples_per_user=2)
    for m, own in ((private, x), (model, part(x, mesh))):
        step(m, own)
    same(gradients_of(model), gradients_of(single))


def frozen(mesh: DeviceMesh) -> None:
    def freeze(model: Any) -> Any:  # after SequenceParallel, which makes parameters anew
        for name, p in model.named_parameters():
            p.requires_grad_("norm.weight" in name or "up.bias" in name)
        return model

    x = tokens()
    single = freeze(made(GPT))
    step(dp_compile(single, max_grad_norm=C, backend="eager"), x)
    model = dp_compile(freeze(placed(GPT, mesh)), max_grad_norm=C, backend="eager")
    step(model, part(x, mesh))
    same(gradients_of(model), gradients_of(single))


def training(mesh: DeviceMesh) -> None:
    """Weights after five steps with noise are those of one process; copies stay copies bit by bit."""
    single = made(GPT)
    private = dp_compile(single, max_grad_norm=C, backend="eager")
    model = dp_compile(placed(GPT, mesh), max_grad_norm=C, backend="eager")
    both = [(private, optimizer_of(private)), (model, optimizer_of(model))]
    for _ in range(5):
        x = tokens()
        for trained, optimizer in both:
            step(trained, part(x, mesh) if trained is model else x)
            optimizer.step()
            optimizer.zero_grad()
    same_weights(model, single, 1e-5)
    same_on_all_ranks(model)


def communication(mesh: DeviceMesh) -> None:
    """The collectives of the plain step, those that the plan says, with its bytes, and one of norms."""
    x = part(tokens(), mesh)
    plain, private = placed(GPT, mesh), dp_compile(placed(GPT, mesh), max_grad_norm=C, backend="eager")
    found = [communicated(model, x) for model in (plain, private)]
    plans: Any = engine_of(private).plans  # type: ignore[attr-defined]
    more = {k: n - found[0].get(k, 0) for k, n in found[1].items() if n > found[0].get(k, 0)}
    assert more == {
        "_c10d_functional.all_reduce.default": 10,  # which the plain step leaves to whoever reads the gradients
        "_c10d_functional.all_reduce.default bytes": sum(plan.exchanged() for plan in plans),
        "c10d.allreduce_.default": 1,
        "c10d.allreduce_.default bytes": 8 * (2 * len(x) + 8),
    }, (more, private.plan)


def vocabulary(mesh: DeviceMesh, make: type[GPT], reduction: str = "none", **options: Any) -> None:
    """A cross entropy of logits that are cut over the vocabulary, outside of the model or in it."""
    x, y = tokens(), tokens()
    single = made(GPT)
    private = dp_compile(single, max_grad_norm=C, backend="eager")
    losses(private(x), y).mean().backward()
    model = dp_compile(placed(make, mesh), max_grad_norm=C, backend="eager", **options)
    own = part(x, mesh), part(y, mesh)
    with loss_parallel():
        if make is Lossy:
            loss = model(*own).mean()
        else:
            logits = model(own[0])
            assert isinstance(logits, DTensor) and tuple(logits.placements) == (Shard(2),)
            flat = logits.flatten(0, 1), own[1].flatten()
            loss = losses(logits, own[1]).mean() if reduction == "none" else F.cross_entropy(*flat)
        loss.backward()
    same(gradients_of(model), gradients_of(single))
    torch.testing.assert_close(model.grad_norms, part(private.grad_norms, mesh), rtol=1e-5, atol=1e-6)


def replicas() -> None:
    """HSDP with tensor parallelism: weights after steps with noise are those of one process."""
    shards = dist.get_world_size() // 4
    mesh = init_device_mesh("cpu", (2, shards, 2), mesh_dim_names=("replicas", "shards", "tp"))
    data = mesh["replicas", "shards"]
    number = mesh.get_local_rank(0) * shards + mesh.get_local_rank(1)
    single, model = made(GPT), cut_tokens(made(GPT), mesh["tp"])
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=data)
    fully_shard(model, mesh=data)
    x = tokens()
    wanted, norms = one_by_one(single, x)
    private = dp_compile(single, max_grad_norm=C, backend="eager")
    trained = dp_compile(model, max_grad_norm=C, backend="eager")
    both = [(private, optimizer_of(private)), (trained, optimizer_of(trained))]
    for i in range(3):
        for m, optimizer in both:
            step(m, x.chunk(2 * shards)[number] if m is trained else x)
            if i == 0 and m is trained:
                same(gradients_of(m), wanted)
                torch.testing.assert_close(m.grad_norms, norms.chunk(2 * shards)[number], rtol=1e-5, atol=1e-6)
            optimizer.step()
            optimizer.zero_grad()
    same_weights(trained, single, 1e-5)


def refused(mesh: DeviceMesh) -> None:
    def refuses(make: Callable[[], Any], message: str, given: Tensor | None = None, **options: Any) -> None:
        model = dp_compile(make(), max_grad_norm=C, backend="eager", **options)
        raises(UnsupportedGraphError, message, lambda: step(model, tokens() if given is None else given))

    def plain_norm() -> nn.Module:
        model = cut_tokens(made(GPT), mesh)
        model.norm = nn.LayerNorm(D)
        return model

    def unprepared() -> nn.Module:
        model = made(GPT)
        parallelize_module(model, mesh, {"tok": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))})
        return model

    def whole_output() -> nn.Module:
        model = made(Routed)
        styles: dict[str, Any] = {
            "tok": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "gate": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1)),
        }
        return parallelize_module(model, mesh, styles)

    refuses(plain_norm, "whole, and its gradient is another one on each")
    refuses(unprepared, "whole, and its gradient is another one on each")
    for regions in (None, "blocks"):
        biased = lambda: cut_tokens(made(BiasedGPT), mesh)  # noqa: E731
        refuses(biased, "bias' whole, and its gradient is another one on each", regions=regions)
    refuses(whole_output, "output 0 of the model is another one on each rank")
    turned = dp_compile(cut_tokens(made(Apart), mesh), max_grad_norm=C, backend="eager")
    loader = PoissonLoader(TensorDataset(tokens(rows=40)), expected_batch_size=B, physical_batch_size=2, seed=3)
    (batch,) = next(iter(loader.attach(turned, optimizer_of(turned))))
    raises(UnsupportedGraphError, "the draw is larger than the physical batch", lambda: turned(batch))
    given = tokens()
    with context_parallel(mesh, buffers=[given], buffer_seq_dims=[1]):
        refuses(lambda: made(GPT), "called within torch's context_parallel", given)
    refuses(lambda: cut_tokens(made(GPT), mesh), "do not compile the same graph", tokens(5))


def main() -> None:
    """Run the checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    alone = dist.get_world_size() == 2
    mesh = init_device_mesh("cpu", (2,)) if alone else init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    checks: dict[str, Callable[[], Any]] = {
        "GPT": lambda: gradients(GPT, mesh, tokens()),
        "by layer": lambda: gradients(GPT, mesh, tokens(), clipping="per_layer"),
        "a norm twice": lambda: gradients(Routed, mesh, tokens()),
        "masked": lambda: masked(mesh),
        "users": lambda: users(mesh),
        "frozen": lambda: frozen(mesh),
        "training": lambda: training(mesh),
        "loss parallel": lambda: vocabulary(mesh, Apart),
        "context": lambda: context(mesh),
    }
    if not alone:
        checks["replicas"] = replicas
    else:
        checks |= {
            "by Gram matrices in context": lambda: context(mesh, norm="ghost"),
            "regions": lambda: gradients(GPT, mesh, tokens(), regions="blocks"),
            "tied": lambda: gradients(Tied, mesh, tokens()),
            "tied in blocks": lambda: gradients(Tied, mesh, tokens(), regions="blocks"),
            "one example": lambda: gradients(GPT, mesh, tokens(rows=1)),
            "inductor": lambda: gradients(Routed, mesh, tokens(), backend="inductor"),
            "loss in the model": lambda: vocabulary(mesh, Lossy),
            "loss parallel, a mean": lambda: vocabulary(mesh, Apart, "mean"),
            "loss parallel in blocks": lambda: vocabulary(mesh, Apart, regions="blocks"),
            "communication": lambda: communication(mesh),
            "exchanges": lambda: exchanges(mesh),
            "refusals": lambda: refused(mesh),
        }
    run_checks(checks, sys.argv[1:])


if __name__ == "__main__":
    main()
