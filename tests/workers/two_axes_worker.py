"""What every rank of test_tensor_and_context.py runs: ``torchrun tests/workers/two_axes_worker.py [CHECK ..]``.

On four ranks a mesh of ``cp`` × ``tp``: weights are cut over ``tp``, every example's tokens over ``cp``. On eight with
FSDP2, two by two by two. Each check prints its name once it passed, on rank 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from context_worker import Cut, attention
from launching import run_checks
from sequence_worker import one_by_one
from sharded_worker import made, raises
from tensor_worker import communicated, gradients_of, optimizer_of, same, same_on_all_ranks, same_weights, step
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

import dpcompile
from dpcompile import PrivacyError, UnsupportedGraphError
from dpcompile.module import engine_of

dp_compile: Any = dpcompile.dp_compile
B, T, D, V, C, HEADS = 8, 4, 8, 12, 0.5, 2


class Placed(Cut):
    """A part of a model on a mesh of ``cp`` × ``tp``; on one rank if there is none."""

    both: DeviceMesh | None = None
    tp: DeviceMesh | None = None
    cut_over_tokens = False  # whether whole weights see tokens that are cut over `tp` too (sequence parallelism)

    def whole(self, parameter: Any) -> Tensor:
        """Of which each rank's gradient is a share along ``cp``, and the same along ``tp``."""
        over_tp = Partial() if self.cut_over_tokens else Replicate()
        return parameter.to_local(grad_placements=[Partial(), over_tp]) if self.both is not None else parameter

    def cut(self, parameter: Any) -> Tensor:
        """What of it lies here; a share along ``cp``."""
        if self.both is None or self.tp is None:
            return parameter
        return parameter.to_local(grad_placements=[Partial(), parameter.placements[1]])

    def spread(self, x: Tensor) -> Tensor:
        """Before weights that are cut over ``tp``: gradients are added up there, and tokens gathered."""
        if self.both is None or self.tp is None:
            return x
        if self.cut_over_tokens:
            gathered: Any = DTensor.from_local(x, self.tp, [Shard(1)]).redistribute(placements=[Replicate()])
        else:
            gathered = DTensor.from_local(x, self.tp, [Replicate()])
        return gathered.to_local(grad_placements=[Partial()])

    def summed(self, x: Tensor) -> Tensor:
        """Behind them."""
        if self.both is None or self.tp is None:
            return x
        after = Shard(1) if self.cut_over_tokens else Replicate()
        return DTensor.from_local(x, self.tp, [Partial()]).redistribute(placements=[after]).to_local()


class Block(Placed):
    """A block of a Llama: RMS norms, causal attention of two heads, a gated network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.Parameter(1 + torch.randn(D) / 3) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.randn(D, D) / 3) for _ in range(4))
        self.gate, self.up = (nn.Parameter(torch.randn(2 * D, D) / 3) for _ in range(2))
        self.down = nn.Parameter(torch.randn(D, 2 * D) / 3)

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        x = self.spread(F.rms_norm(h, (D,), self.whole(self.norm_1)))
        q, k, v = (F.linear(x, self.cut(p)).unflatten(-1, (-1, D // HEADS)) for p in (self.q, self.k, self.v))
        places = self.places(q)
        k, v = (self.everywhere(t) for t in (k, v))
        y = attention(q, k, v, places[:, None] >= torch.arange(k.shape[1]))
        h = h + self.summed(F.linear(y.flatten(2), self.cut(self.o)))
        x = self.spread(F.rms_norm(h, (D,), self.whole(self.norm_2)))
        return h + self.summed(
            F.linear(F.silu(F.linear(x, self.cut(self.gate))) * F.linear(x, self.cut(self.up)), self.cut(self.down))
        )

    def everywhere(self, x: Tensor) -> Tensor:
        """Keys or values of the tokens of all ranks."""
        if self.mesh is None:
            return x
        gathered = DTensor.from_local(x, self.mesh, [Shard(1)]).redistribute(placements=[Replicate()])
        return gathered.to_local(grad_placements=[Partial()])


class Llama(Placed):
    """An embedding, two blocks, a norm and a head, whose logits are those of all tokens."""

    tied = False

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Parameter(torch.randn(V, D))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.Parameter(1 + torch.randn(D) / 3), nn.Parameter(torch.randn(V, D))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        h = self.embedded(x)
        for block in self.blocks:
            h = block(h)
        return self.logits(h)

    def embedded(self, x: Tensor) -> Tensor:
        """Of this rank's tokens."""
        h = F.embedding(self.own(x), self.cut(self.tok))  # which is whole
        if self.tp is None or not self.cut_over_tokens:
            return h
        return DTensor.from_local(h, self.tp, [Replicate()]).redistribute(placements=[Shard(1)]).to_local()

    def logits(self, h: Tensor) -> Tensor:
        """Of all tokens and the whole vocabulary."""
        h = self.spread(F.rms_norm(h, (D,), self.whole(self.norm)))
        logits = F.linear(h, self.cut(self.head))
        if self.both is None or self.tp is None:
            return logits
        logits = DTensor.from_local(logits, self.both, [Shard(1), Shard(2)])
        return logits.redistribute(placements=[Replicate(), Replicate()]).to_local()


CUT = {"q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "head": 0, "o": 1, "down": 1}


def placed(mesh: DeviceMesh, make: Callable[[], Any] = Llama) -> Any:
    """On the mesh, or on its last two dimensions and sharded over the first."""
    model = laid(made(make), mesh["cp", "tp"])
    if mesh.ndim == 2:
        return model
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def laid(model: Any, both: DeviceMesh) -> Any:
    """On a mesh of ``cp`` × ``tp``."""
    for module in model.modules():
        if isinstance(module, Placed):
            module.mesh, module.tp, module.both = both["cp"], both["tp"], both
            for name, p in list(module._parameters.items()):
                over_tp = Shard(CUT[name]) if name in CUT else Replicate()
                lies = distribute_tensor(p.data, both, [Replicate(), over_tp])  # type: ignore[union-attr]
                setattr(module, name, nn.Parameter(lies))
    return model


def share(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return x if mesh.ndim == 2 else x.chunk(mesh.size(0))[mesh.get_local_rank(0)]


def gradients(mesh: DeviceMesh, make: Callable[[], Any] = Llama, length: int = T, **options: Any) -> Any:
    """Norms and clipped sums against one backward per example on one rank."""
    x = torch.randint(0, V, (B, length))
    wanted, norms = one_by_one(made(make), x, options.get("clipping", "flat"))
    model = dp_compile(placed(mesh, make), max_grad_norm=C, **{"backend": "eager", **options})
    step(model, share(x, mesh))
    torch.testing.assert_close(engine_of(model).row_norms, share(norms, mesh), rtol=1e-5, atol=1e-6)
    same(gradients_of(model), wanted)
    return model


class OverTokens(Llama):
    """Whole weights see tokens that are cut over ``tp`` too: their gradients are sums over both dimensions."""

    def __init__(self) -> None:
        super().__init__()
        for module in self.modules():
            if isinstance(module, Placed):
                module.cut_over_tokens = True


class Forgotten(Llama):
    """A norm whose gradient is not added up along ``cp``."""

    def whole(self, parameter: Any) -> Tensor:  # noqa: D102
        return parameter if self.both is None else parameter.to_local()


class Unspread(Llama):
    """A head whose gradient of its inputs is not added up along ``tp``."""

    def spread(self, x: Tensor) -> Tensor:  # noqa: D102
        return x


class Apart(Llama):
    """Logits of this rank's tokens."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        logits = super().forward(x)
        return logits if self.both is None else self.own(logits)


class CutOver(Llama):
    """The same, as a ``DTensor`` that says so of ``tp`` alone."""

    def forward(self, x: Tensor) -> Any:  # noqa: D102
        logits = super().forward(x)
        return logits if self.tp is None else DTensor.from_local(self.own(logits), self.tp, [Replicate()])


def training(mesh: DeviceMesh) -> None:
    """Weights after five steps with noise are those of one process; copies stay copies bit by bit."""
    single = made(Llama)
    private = dp_compile(single, max_grad_norm=C, backend="eager")
    model = dp_compile(placed(mesh), max_grad_norm=C, backend="eager")
    both = [(private, optimizer_of(private)), (model, optimizer_of(model))]
    for _ in range(5):
        x = torch.randint(0, V, (B, T))
        for trained, optimizer in both:
            step(trained, share(x, mesh) if trained is model else x)
            optimizer.step()
            optimizer.zero_grad()
    same_weights(model, single, 1e-5)
    same_on_all_ranks(model)


def communication(mesh: DeviceMesh) -> None:
    """The collectives of the plain step, those that the plan says, with its bytes, and two of norms."""
    x = share(torch.randint(0, V, (B, T)), mesh)
    plain, private = placed(mesh), dp_compile(placed(mesh), max_grad_norm=C, backend="eager")
    found = [communicated(model, x) for model in (plain, private)]
    more = {k: n - found[0].get(k, 0) for k, n in found[1].items() if n != found[0].get(k, 0)}
    plans: Any = engine_of(private).plans  # type: ignore[attr-defined]
    sent = sum(n for k, n in more.items() if k.startswith("_c10d_functional") and k.endswith("bytes"))
    again = 2 * 3 * 4 * x.numel() // 2 * D  # of each block what q, k and v see, and gate and up, is gathered once
    sums = 4 * V * D  # of `tok`, which the plain step leaves to whoever reads it
    assert sent == sum(plan.exchanged() for plan in plans) - again + sums, more
    norms = 8 * (4 * len(x) + 8), 8 * (2 * len(x) + 8 + 2)  # along `cp`, then along `tp`, with what the first found
    assert more["c10d.allreduce_.default"] == 2 and more["c10d.allreduce_.default bytes"] == sum(norms), more


def refused(mesh: DeviceMesh) -> None:
    def refuses(make: Callable[[], Any], message: str, error: Any = UnsupportedGraphError, **options: Any) -> None:
        model = dp_compile(make(), max_grad_norm=C, backend="eager", **options)
        raises(error, message, lambda: step(model, torch.zeros(B, T, dtype=torch.int64)))

    refuses(lambda: placed(mesh, Forgotten), "whole, and its gradient is another one on each, along cp")
    refuses(lambda: placed(mesh, Unspread), "whole, and its gradient is another one on each, along tp")
    refuses(
        lambda: placed(mesh, Apart), "output 0 of the model is another one on each rank of tensor parallelism, along cp"
    )
    refuses(
        lambda: placed(mesh, CutOver),
        "output 0 of the model is another one on each rank of tensor parallelism, along cp",
    )
    for axis in ("cp", "tp"):  # along one of them alone
        model = dp_compile(placed(mesh), max_grad_norm=C, backend="eager")
        other, same_on_all = torch.full((B, T), mesh.get_local_rank(axis)), torch.zeros(B, T, dtype=torch.int64)
        raises(PrivacyError, "were given different examples", lambda m=model, x=other: step(m, x))
        moved = placed(mesh)
        with torch.no_grad():
            moved.blocks[1].q.to_local().mul_(1 + mesh.get_local_rank(axis))
        model = dp_compile(moved, max_grad_norm=C, backend="eager")
        if axis == "cp":  # along which every rank holds a copy; along `tp` each has a part
            told = "hold other values of parameter 'blocks.1.q'"
            raises(PrivacyError, told, lambda m=model, x=same_on_all: step(m, x))
        else:
            step(model, same_on_all)
    raises(UnsupportedGraphError, "which are not the dimensions of one mesh", lambda: dp_compile(crossed(mesh)))


def crossed(mesh: DeviceMesh) -> Any:
    """Parameters over groups that overlap, and are no dimensions of one mesh."""
    model = placed(mesh)
    everyone = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    model.norm = nn.Parameter(distribute_tensor(torch.ones(D), everyone, [Replicate()]))
    return model


def main() -> None:
    """Run the checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shape, names = ((2, 2), ("cp", "tp")) if dist.get_world_size() == 4 else ((2, 2, 2), ("dp", "cp", "tp"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    checks: dict[str, Callable[[], Any]] = {
        "gradients": lambda: gradients(mesh),
        "tokens over both": lambda: gradients(mesh, OverTokens),
        "training": lambda: training(mesh),
    }
    if mesh.ndim == 2:
        checks |= {
            "refusals": lambda: refused(mesh),
            "communication": lambda: communication(mesh),
            "by layer": lambda: gradients(mesh, clipping="per_layer"),
            "ghost": lambda: gradients(mesh, OverTokens, norm="ghost"),
            "regions": lambda: gradients(mesh, OverTokens, regions="blocks"),
            "inductor": lambda: gradients(mesh, backend="inductor"),
        }
    run_checks(checks, sys.argv[1:])


if __name__ == "__main__":
    main()
