"""What both ranks of test_context_parallel.py run: ``torchrun tests/workers/context_worker.py [CHECK ..]``.

Every rank has half of each example's tokens in every layer; each way of attention is compared with one backward per
example on one rank. Each check prints its name once it passed, on rank 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from launching import run_checks
from sequence_worker import B, C, D, V, one_by_one
from sharded_worker import raises
from tensor_worker import communicated, gradients_of, same, step
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

import dpcompile
from dpcompile import ExampleMixingError, UnsupportedGraphError
from dpcompile.losses import per_example_linear_cross_entropy
from dpcompile.module import engine_of

dp_compile: Any = dpcompile.dp_compile
HEADS, T = 2, 4


def local(parameter: Any) -> Tensor:
    """Of which each rank's gradient is a share."""
    return parameter.to_local(grad_placements=[Partial()]) if isinstance(parameter, DTensor) else parameter


class Cut(nn.Module):
    """Tokens of a batch, of which a rank of ``mesh`` has half; None: all are here."""

    mesh: DeviceMesh | None = None

    @property
    def ranks(self) -> int:  # noqa: D102
        return 1 if self.mesh is None else self.mesh.size()

    def own(self, x: Tensor) -> Tensor:
        if self.mesh is None:
            return x
        return DTensor.from_local(x, self.mesh, [Replicate()]).redistribute(placements=[Shard(1)]).to_local()

    def added(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.mesh is None:
            return x
        return DTensor.from_local(x, self.mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()

    def places(self, x: Tensor) -> Tensor:
        rank = 0 if self.mesh is None else self.mesh.get_local_rank()
        return rank * x.shape[1] + torch.arange(x.shape[1])


class Model(Cut):
    """An embedding, causal attention of two heads by ``attend``, and a head that is the embedding or one of its own."""

    def __init__(self, attend: Callable[..., Tensor], *, tied: bool = True) -> None:
        super().__init__()
        self.attend = attend
        self.tok, self.pos = nn.Parameter(torch.randn(V, D)), nn.Parameter(torch.randn(64, D))
        self.qkv, self.o = nn.Parameter(torch.randn(3 * D, D) / 3), nn.Parameter(torch.randn(D, D) / 3)
        self.head = None if tied else nn.Parameter(torch.randn(V, D))

    def hidden(self, x: Tensor) -> Tensor:
        places, tok = self.places(x), local(self.tok)
        h = F.embedding(x, tok) + F.embedding(places.expand(len(x), -1), local(self.pos))
        q, k, v = F.linear(h, local(self.qkv)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        return h + F.linear(self.attend(self, q, k, v).flatten(2), local(self.o))

    def logits(self, h: Tensor) -> Tensor:
        return F.linear(h, local(self.tok if self.head is None else self.head))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        target, x = self.own(x.roll(1, 1)), self.own(x)
        logits = self.logits(self.hidden(x))
        each: Any = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        return self.added(each.view(x.shape).sum(1)).unsqueeze(1)


class WithoutLogits(Model):
    """Its loss is dpcompile's own, of head and targets."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        target, length, x = self.own(x.roll(1, 1)), float(x.shape[1]), self.own(x)
        head = local(self.tok if self.head is None else self.head)
        each = per_example_linear_cross_entropy(self.hidden(x), head, target, divide_by=length)
        return self.added(each).unsqueeze(1)


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Of ``[B, T, heads, size]``."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def gathered(model: Cut, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values of all ranks."""
    places = model.places(q)
    if model.mesh is not None:
        k, v = (
            DTensor.from_local(t, model.mesh, [Shard(1)])
            .redistribute(placements=[Replicate()])
            .to_local(grad_placements=[Partial()])
            for t in (k, v)
        )
    return attention(q, k, v, places[:, None] >= torch.arange(k.shape[1]))


def by_heads(model: Cut, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All tokens of some heads (Ulysses, Jacobs et al. 2023), by an all-to-all there and one back."""
    group, n = (None, 1) if model.mesh is None else (model.mesh.get_group(), model.ranks)

    def there(x: Tensor) -> Tensor:  # [B, T / n, heads, size] to [B, T, heads / n, size]
        if group is None:
            return x
        sent = x.unflatten(2, (n, -1)).movedim(2, 0).contiguous()
        return funcol.all_to_all_single(sent, None, None, group).movedim(0, 1).flatten(1, 2)

    def back(x: Tensor) -> Tensor:
        if group is None:
            return x
        sent = x.unflatten(1, (n, -1)).movedim(1, 0).contiguous()
        return funcol.all_to_all_single(sent, None, None, group).movedim(0, 2).flatten(2, 3)

    q, k, v = there(q), there(k), there(v)
    every = torch.arange(q.shape[1])
    return back(attention(q, k, v, every[:, None] >= every))


def by_dtensor(model: Cut, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by DTensor, which gathers and cuts on CPUs and has an operation of its own on GPUs."""

    def turned(x: Tensor, before: int, after: int) -> Tensor:
        if model.mesh is None:
            return x
        return DTensor.from_local(x, model.mesh, [Shard(before)]).redistribute(placements=[Shard(after)]).to_local()

    q, k, v = (turned(t, 1, 2) for t in (q, k, v))
    every = torch.arange(q.shape[1])
    return turned(attention(q, k, v, every[:, None] >= every), 2, 1)


def in_a_ring(model: Cut, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values go round, and the softmax is put together of its parts (Liu et al. 2023)."""
    n, rank = model.ranks, 0 if model.mesh is None else model.mesh.get_local_rank()
    places = model.places(q)
    total, sums = torch.zeros(()), torch.zeros(())
    for turn in range(n):
        if turn:
            assert model.mesh is not None
            round_trip = [(i + 1) % n for i in range(n)]
            both = torch.stack([k, v])
            both = funcol.permute_tensor(both.flatten(), round_trip, model.mesh.get_group()).view(both.shape)
            k, v = both.unbind(0)
        theirs = (rank - turn) % n * q.shape[1] + torch.arange(q.shape[1])
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        weights = torch.where(places[:, None] >= theirs, scores.exp(), 0.0)
        total = total + torch.einsum("bhqk,bkhd->bqhd", weights, v)
        sums = sums + weights.sum(-1).transpose(1, 2).unsqueeze(-1)
    return total / sums


def placed(make: Callable[[], Any], mesh: DeviceMesh) -> Any:
    torch.manual_seed(3)
    model = make()
    model.mesh = mesh
    for name, p in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(distribute_tensor(p.data, mesh, [Replicate()])))
    return model


def compared(make: Callable[[], Any], mesh: DeviceMesh, length: int = T, **options: Any) -> Any:
    """Norms and clipped sums against one backward per example on one rank; and bytes against the plan's."""
    x = torch.randint(0, V, (B, length))
    torch.manual_seed(3)
    wanted, norms = one_by_one(make(), x)
    model = dp_compile(placed(make, mesh), max_grad_norm=C, **{"backend": "eager", **options})
    step(model, x)
    torch.testing.assert_close(engine_of(model).row_norms, norms, rtol=1e-5, atol=1e-6)
    same(gradients_of(model), wanted)
    return model


def communication(mesh: DeviceMesh) -> None:
    """The plain step's collectives, what the plan says with its bytes, and one of norms."""
    x = torch.randint(0, V, (B, T))
    plain = placed(partial(Model, by_heads), mesh)
    private = dp_compile(placed(partial(Model, by_heads), mesh), max_grad_norm=C, backend="eager")
    found = [communicated(model, x) for model in (plain, private)]
    more = {k: n - found[0].get(k, 0) for k, n in found[1].items() if n != found[0].get(k, 0)}
    plans: Any = engine_of(private).plans  # type: ignore[attr-defined]
    gathered = more["_c10d_functional.all_gather_into_tensor.default bytes"]
    assert gathered == sum(plan.exchanged() for plan in plans), (more, private.plan)
    sums = 4 * (
        2 * V * D + 64 * D
    )  # of two uses of `tok` and of `pos`; the plain step leaves them to whoever reads them
    assert more["_c10d_functional.all_reduce.default bytes"] == sums, (more, private.plan)
    assert more["c10d.allreduce_.default"] == 1 and more["c10d.allreduce_.default bytes"] == 8 * (2 * B + 8)


def apart(model: Cut, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Hands the other rank half of the examples."""
    assert model.mesh is not None
    return funcol.all_to_all_single(q.contiguous(), None, None, model.mesh.get_group()) + k + v


def refused(mesh: DeviceMesh) -> None:
    model = dp_compile(placed(partial(Model, apart), mesh), max_grad_norm=C, backend="eager")
    x = torch.zeros(B, T, dtype=torch.int64)
    raises(ExampleMixingError, "hands every rank some of the examples only", lambda: step(model, x))


def two_meshes(mesh: DeviceMesh) -> None:
    """Of two that are alike torch takes the groups of the first: right all the same, or refused with what to do."""
    make = partial(Model, gathered)
    compared(make, mesh)
    second = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))["cp"]
    try:
        compared(make, second)
    except UnsupportedGraphError as error:
        assert "make one DeviceMesh of all dimensions in a process" in str(error), error


def main() -> None:
    """Run the checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    checks: dict[str, Callable[[], Any]] = {
        f"attention {f.__name__}": partial(compared, partial(Model, f), mesh)
        for f in (gathered, by_heads, by_dtensor, in_a_ring)
    }
    for tied in (True, False):
        for length in (4, 32):
            make = partial(WithoutLogits, gathered, tied=tied)
            checks[f"without logits, {'tied' if tied else 'own'}, {length}"] = partial(compared, make, mesh, length)
    checks |= {
        "inductor": lambda: compared(partial(WithoutLogits, by_heads), mesh, backend="inductor"),
        "ghost": lambda: compared(partial(Model, in_a_ring), mesh, 8, norm="ghost"),
        "communication": lambda: communication(mesh),
        "refusals": lambda: refused(mesh),
        "two meshes": lambda: two_meshes(mesh),
    }
    run_checks(checks, sys.argv[1:])


if __name__ == "__main__":
    main()
