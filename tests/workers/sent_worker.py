"""What every rank of test_sent_experts.py runs: ``torchrun tests/workers/sent_worker.py DIRECTORY [CHECK ..]``.

Experts on ranks that have batches of their own: all ranks hold other ones, and on four ranks also two by two. Each
check prints its name once it passed, on rank 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launching import run_checks
from sharded_worker import Collectives, made, optimizer_of, raises, same
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset

import dpcompile
from dpcompile import PoissonLoader, PrivacyError, UnsupportedGraphError
from dpcompile.checkpoint import load_checkpoint, save_checkpoint
from dpcompile.clipping.groups import group_of
from dpcompile.experts import cut_experts, products_of_experts
from dpcompile.module import engine_of

dp_compile: Any = dpcompile.dp_compile
B, T, D, E, K, V, C = 8, 3, 8, 4, 2, 11, 0.5


class Experts(nn.Module):
    """Two layers of E experts, with biases; which of them are asked for is told."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(E, D, 2 * D) / 3), nn.Parameter(torch.randn(E, 2 * D, D) / 4)
        self.bias = nn.Parameter(torch.randn(E, 1, 2 * D))

    def forward(self, rows: Tensor, chosen: Tensor) -> Tensor:  # noqa: D102
        ones = torch.ones_like(rows[:, :1])
        hidden = products_of_experts(rows, self.up, chosen) + products_of_experts(ones, self.bias, chosen)
        return products_of_experts(hidden.relu(), self.down, chosen)


class Layer(nn.Module):
    """A router that chooses K experts for each row."""

    kind: type[nn.Module] = Experts

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, E), self.kind()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.router(x.flatten(0, 1)).softmax(-1).topk(K, -1)
        return weights, chosen

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        weights, chosen = self.route(x)
        rows = x.flatten(0, 1).repeat_interleave(K, 0)
        out = self.experts(rows, chosen.flatten()) * weights.reshape(-1, 1)
        return x + out.view(*x.shape[:2], K, D).sum(2)


class Sparse(nn.Module):
    """Embedding, two layers of experts, and a head."""

    kind: type[nn.Module] = Layer

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.head = nn.Embedding(V, D), nn.Linear(D, 12)
        self.blocks = nn.ModuleList(self.kind() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        h = self.tok(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def of(layer: type[nn.Module]) -> type[nn.Module]:
    """The model with layers of this kind."""
    return type("Sparse", (Sparse,), {"kind": layer})


def with_experts(experts: type[nn.Module]) -> type[nn.Module]:
    """The model with experts of this kind."""
    return of(type("Layer", (Layer,), {"kind": experts}))


def placed(mesh: DeviceMesh, kind: Callable[[], nn.Module] = Sparse, **options: Any) -> Any:
    """Experts cut over the second dimension of the mesh, and over the first by FSDP; the rest by FSDP over all."""
    model: Any = made(kind)
    everywhere = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        cut_experts(block.experts, mesh["ep"])
        fully_shard(block.experts, mesh=mesh["edp"], **options)
        fully_shard(block, mesh=everywhere, **options)
    return fully_shard(model, mesh=everywhere, **options)


def part(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def step(model: Any, x: Tensor) -> None:
    model(x).float().square().flatten(1).sum(1).mean().backward()


def full(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}  # type: ignore[union-attr]


def one_backward_each(
    plain: nn.Module, x: Tensor, groups: Callable[[str], str] = lambda name: "", weight: Any = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Clipped sums, and norms ``[B]``, of one backward for each example, on one rank."""
    sums = {n: torch.zeros_like(p) for n, p in plain.named_parameters() if p.requires_grad}
    bound = C / len({groups(n) for n in sums}) ** 0.5
    norms = []
    for i, row in enumerate(x.split(1)):
        plain.zero_grad()
        step(plain, row)
        each = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        squared: dict[str, Tensor] = {}
        for name, g in each.items():
            squared[groups(name)] = squared.get(groups(name), torch.zeros(())) + g.double().square().sum()
        norms.append(torch.stack(list(squared.values())).sum().sqrt())
        for name, g in each.items():
            if weight is None or weight[i]:
                sums[name] += g * (bound / squared[groups(name)].sqrt()).clamp(max=1.0)
    return sums, torch.stack(norms).float()


def gradients(
    mesh: DeviceMesh, kind: Callable[[], nn.Module] = Sparse, x: Tensor | None = None, **options: Any
) -> None:
    """Norms and sums, with and without padding, are those of one backward for each example."""
    x = torch.randint(0, V, (B, T)) if x is None else x
    groups = partial(group_of, options.get("clipping", "flat"))
    model = dp_compile(placed(mesh, kind), max_grad_norm=C, **{"backend": "eager", **options})
    mask = torch.arange(B) % 4 != 1
    for masked in (False, True):
        wanted, norms = one_backward_each(made(kind), x, groups, mask if masked else None)
        model.zero_grad()
        if masked:
            engine_of(model).set_mask(part(mask))
        step(model, part(x))
        same(full(model), wanted)
        own = part(mask) if masked else slice(None)
        torch.testing.assert_close(engine_of(model).row_norms[own], part(norms)[own], rtol=1e-5, atol=1e-6)
    assert model.blocks[0].experts.up.to_local().shape[0] == E // mesh.size()


def training(mesh: DeviceMesh) -> None:
    """Weights after steps with noise are those of one process."""
    single = made(Sparse)
    private = dp_compile(single, max_grad_norm=C, backend="eager")
    model = dp_compile(placed(mesh), max_grad_norm=C, backend="eager")
    optimizers = [(private, optimizer_of(private)), (model, optimizer_of(model))]
    for _ in range(5):
        x = torch.randint(0, V, (B, T))
        for trained, optimizer in optimizers:
            step(trained, part(x) if trained is model else x)
            optimizer.step()
            optimizer.zero_grad()
    same_weights(model, single)


def same_weights(model: nn.Module, single: nn.Module) -> None:
    wanted = dict(single.named_parameters())
    for name, p in model.named_parameters():
        value = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(value.detach(), wanted[name].detach(), rtol=1e-5, atol=1e-5, msg=name)


def loading(mesh: DeviceMesh) -> None:
    """Draws of 3 examples on average in physical batches of two: ranks are left without any, or take turns."""
    data = TensorDataset(torch.randint(0, V, (24, T)))

    def run(model: Any, rank: int, world: int, directory: Path | None = None, at: int = -1) -> Any:
        private = dp_compile(model, max_grad_norm=C, backend="eager")
        optimizer = optimizer_of(private)
        given: Any = {"expected_batch_size": 3, "physical_batch_size": 2, "steps": 4, "seed": 3}
        optimizer.expected_batch_size = 3
        loader = PoissonLoader(data, rank=rank, world_size=world, **given).attach(private, optimizer)
        for (x,) in loader:
            step(private, x)
            optimizer.step()
            optimizer.zero_grad()
        return model

    single = run(made(Sparse), 0, 1)
    same_weights(run(placed(mesh), dist.get_rank(), dist.get_world_size()), single)


def resumed(mesh: DeviceMesh, directory: Path) -> None:
    """A checkpoint of experts on several ranks goes on with all of them on each, and the other way round."""
    batches = [torch.randint(0, V, (B, T)) for _ in range(4)]
    path = directory / f"experts_{dist.get_world_size()}_{mesh.size(0)}"

    def whole() -> Any:
        everywhere = init_device_mesh("cpu", (dist.get_world_size(),))
        return fully_shard(made(Sparse), mesh=everywhere)

    def run(make: Callable[[], Any], batches: list[Tensor], load: str = "", save: str = "") -> Any:
        model = make()
        private = dp_compile(model, max_grad_norm=C, backend="eager")
        optimizer = optimizer_of(private)
        if load:
            load_checkpoint(path / load, private, optimizer)
        for x in batches:
            step(private, part(x))
            optimizer.step()
            optimizer.zero_grad()
        if save:
            save_checkpoint(path / save, private, optimizer)
        return model

    def values(model: Any) -> dict[str, Tensor]:
        return {n: p.full_tensor().detach() for n, p in model.named_parameters()}

    wanted = values(run(lambda: placed(mesh), batches))
    run(lambda: placed(mesh), batches[:2], save="cut")
    run(whole, batches[:2], save="whole")
    same(values(run(whole, batches[2:], load="cut")), wanted)
    same(values(run(lambda: placed(mesh), batches[2:], load="whole")), wanted)


# --- routings ---------------------------------------------------------------------------------------------------------


class OneExpert(Layer):
    """All rows go to the last expert."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        weights, chosen = super().route(x)
        return weights, chosen * 0 + E - 1


class SomeNowhere(Layer):
    """Some examples' rows go to no expert, and one expert gets none."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        weights, chosen = super().route(x)
        nowhere = (x.sum((1, 2), keepdim=True) > 0).expand(-1, T, K).flatten(0, 1)
        return weights, chosen.clamp(max=E - 2).masked_fill(nowhere, E + 3)


class CapacityOfExample(Layer):
    """Of an example's rows each expert takes the first two."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        weights, chosen = super().route(x)
        own = nn.functional.one_hot(chosen.view(-1, T * K), E)
        before = (own.cumsum(1) * own).sum(-1).view(-1, K)
        return weights, chosen.masked_fill(before > 2, E)


class CapacityOfBatch(Layer):
    """Each expert takes the first five rows of the batch."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        weights, chosen = super().route(x)
        own = nn.functional.one_hot(chosen.flatten(), E)
        before = (own.cumsum(0) * own).sum(-1).view(-1, K)
        return weights, chosen.masked_fill(before > 5, E)


class Balanced(Layer):
    """Weights are divided by how often an expert is chosen in the batch."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        weights, chosen = super().route(x)
        return weights / (1 + nn.functional.one_hot(chosen.flatten(), E).sum(0))[chosen], chosen


# --- experts ----------------------------------------------------------------------------------------------------------


class Twice(Experts):
    """Matrices that are used twice in one graph."""

    def forward(self, rows: Tensor, chosen: Tensor) -> Tensor:  # noqa: D102
        return super().forward(super().forward(rows, chosen).tanh(), chosen)


class Transposed(Experts):
    """Matrices that lie the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(self.down.detach().mT.contiguous())

    def forward(self, rows: Tensor, chosen: Tensor) -> Tensor:  # noqa: D102
        hidden = products_of_experts(rows, self.up, chosen).relu()
        return products_of_experts(hidden, self.down.transpose(1, 2), chosen)


class BothWays(Experts):
    """Matrices that are used as they are, and transposed."""

    def forward(self, rows: Tensor, chosen: Tensor) -> Tensor:  # noqa: D102
        hidden = products_of_experts(rows, self.up, chosen).relu()
        return products_of_experts(hidden, self.up.transpose(1, 2), chosen) + super().forward(rows, chosen)


class Sorted(Experts):
    """Rows sorted by expert before they are sent."""

    def forward(self, rows: Tensor, chosen: Tensor) -> Tensor:  # noqa: D102
        ordered, order = chosen.sort()
        return super().forward(rows[order], ordered)[order.argsort()]


class Frozen(Experts):
    """The first layer is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.up.requires_grad_(False)


class Joined(Experts):
    """Two matrices in one product."""

    def forward(self, rows: Tensor, chosen: Tensor) -> Tensor:  # noqa: D102
        ones = torch.ones_like(rows[:, :1])
        hidden = products_of_experts(torch.cat([rows, ones], 1), torch.cat([self.up, self.bias], 1), chosen)
        return products_of_experts(hidden.relu(), self.down, chosen)


class Scaled(Experts):
    """A matrix that is computed."""

    def forward(self, rows: Tensor, chosen: Tensor) -> Tensor:  # noqa: D102
        return products_of_experts(products_of_experts(rows, self.up * 2, chosen), self.down, chosen)


class Otherwise(Experts):
    """What lies here of the experts is used for this rank's examples alone."""

    def forward(self, rows: Tensor, chosen: Tensor) -> Tensor:  # noqa: D102
        local = self.bias.to_local() if isinstance(self.bias, DTensor) else self.bias
        hidden = products_of_experts(rows, self.up, chosen) + local[0]
        return products_of_experts(hidden, self.down, chosen)


def outliers(mesh: DeviceMesh) -> None:
    """An example that is not finite has weight 0, and leaves no trace with the others, on any rank."""

    class Deep(Sparse):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x % V) * torch.where(x >= V, torch.inf, 1.0).amax(1)[:, None, None]

    x = torch.randint(0, V, (B, T))
    wanted, _ = one_backward_each(made(Sparse), x, weight=torch.arange(B) != 3)
    x[3] += V
    model = dp_compile(placed(mesh, Deep), max_grad_norm=C, backend="eager")
    try:
        step(model, part(x))
    except dpcompile.PrivacyWarning:
        assert dist.get_rank() == 3 // (B // dist.get_world_size())
    same(full(model), wanted)


def users(mesh: DeviceMesh) -> None:
    """An example of two rows."""
    x, single = torch.randint(0, V, (2 * B, T)), made(Sparse)
    private = dp_compile(single, max_grad_norm=C, backend="eager", examples_per_user=2)
    model = dp_compile(placed(mesh), max_grad_norm=C, backend="eager", examples_per_user=2)
    step(private, x)
    step(model, part(x))
    same(full(model), {n: p.grad for n, p in single.named_parameters() if p.grad is not None})


def narrow(mesh: DeviceMesh) -> None:
    """Parameters are gathered and used in bfloat16."""
    x = torch.randint(0, V, (B, T))
    wanted, _ = one_backward_each(made(Sparse), x)
    model = placed(mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    step(dp_compile(model, max_grad_norm=C, backend="eager"), part(x))
    same(full(model), wanted, 0.1)


def checkpointed(mesh: DeviceMesh) -> None:
    """Blocks whose forward runs again in the backward send their rows again."""

    class Kept(Sparse):
        def __init__(self) -> None:
            super().__init__()
            for block in self.blocks:
                block.experts = checkpoint_wrapper(block.experts)  # type: ignore[union-attr]

    x = torch.randint(0, V, (B, T))
    wanted, norms = one_backward_each(made(Sparse), x)
    model: Any = made(Kept)
    everywhere = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        cut_experts(block.experts._checkpoint_wrapped_module, mesh["ep"])
        fully_shard(block.experts, mesh=mesh["edp"])
    private = dp_compile(fully_shard(model, mesh=everywhere), max_grad_norm=C, backend="eager")
    step(private, part(x))
    found = {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in full(model).items()}
    same(found, wanted)
    torch.testing.assert_close(engine_of(private).row_norms, part(norms), rtol=1e-5, atol=1e-6)


def plain(mesh: DeviceMesh) -> None:
    """Without ``dp_compile``, compiled or not, gradients are those of one rank."""
    x, single = torch.randint(0, V, (B, T)), made(Sparse)
    step(single, x)
    for compiled in (False, True):
        model = placed(mesh)
        step(torch.compile(model, backend="aot_eager") if compiled else model, part(x))
        for name, p in model.named_parameters():  # means over the ranks of FSDP, sums over those of the experts
            found = p.grad.full_tensor() / (mesh.size(1) if "experts" in name else 1)
            torch.testing.assert_close(found, dict(single.named_parameters())[name].grad, rtol=1e-4, atol=1e-5)


def communication(mesh: DeviceMesh) -> None:
    """What is sent is what the plain step sends: rows and products, forward and backward, and both once more."""
    x, found = torch.randint(0, V, (B, T)), []
    for private in (False, True):
        model = placed(mesh)
        trained = dp_compile(model, max_grad_norm=C, backend="eager") if private else model
        if private:
            optimizer_of(trained)
        step(trained, part(x))
        model.zero_grad()
        with Collectives() as counter, Sent() as sent:
            step(trained, part(x))
        seen = {k: n for k, n in counter.seen.items() if "wait_tensor" not in k and "wrap_tensor" not in k}
        whole = torch.tensor(sent.bytes)
        dist.all_reduce(whole)
        found.append((seen, sent.calls, int(whole)))
    (plainly, *sent_plainly), (privately, *sent_privately) = found
    assert sent_plainly == sent_privately, found
    more = {k: n - plainly.get(k, 0) for k, n in privately.items() if n != plainly.get(k)}
    place = [more.pop(f"c10d.allreduce_.default{what}") for what in ("", " bytes")]
    assert place[0] == 1 and place[1] <= 64 and not more, (place, more)
    products = [(D, 2 * D), (1, 2 * D), (2 * D, D)]  # of each layer; the ones that the bias is given need no gradient
    numbers = sum(3 * (p + d) for p, d in products) - (1 + 2 * D)
    assert sent_privately == [2 * (3 * 3 + 2 * 3 + 3 * 2), 2 * x.numel() * K * numbers * 4], sent_privately


class Sent:
    """Counts the all-to-alls of rows and of their numbers, and the bytes of rows given to them."""

    def __init__(self) -> None:
        self.calls, self.bytes, self._real = 0, 0, dist.all_to_all_single

    def __enter__(self) -> Sent:
        def counted(taken: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.bytes += given.numel() if given.dtype == torch.uint8 else 0
            return self._real(taken, given, *args, **kwargs)

        dist.all_to_all_single = counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single = self._real


# --- refused ----------------------------------------------------------------------------------------------------------


def refused(mesh: DeviceMesh, *, few: bool = False) -> None:
    """What would mix examples, or leave a part of a gradient out."""
    x = torch.randint(0, V, (B, T))

    def private(kind: Callable[[], nn.Module], **options: Any) -> Callable[[], None]:
        return lambda: step(dp_compile(placed(mesh, kind), max_grad_norm=C, backend="eager", **options), part(x))

    cases: dict[str, Mapping[str, type[nn.Module]]] = {
        "mixed by cumsum": {"batch": of(CapacityOfBatch)},
        "mixes examples": {"sorted": with_experts(Sorted), "balanced": of(Balanced)},
        "is needed example by example": {
            "joined": with_experts(Joined),
            "scaled": with_experts(Scaled),
            "both ways": with_experts(BothWays),
        },
        "as one of its experts, and is used otherwise": {"otherwise": with_experts(Otherwise)},
    }
    for text, kinds in cases.items():
        for kind in list(kinds.values())[: 1 if few else None]:
            raises(dpcompile.DPCompileError, text, private(kind))
    one = torch.randint(0, V, (dist.get_world_size(), T))
    model = dp_compile(placed(mesh), max_grad_norm=C, backend="eager")
    raises(UnsupportedGraphError, "a batch of one example", lambda: step(model, part(one)))
    if few:
        return
    raises(UnsupportedGraphError, "two backward passes", private(Sparse, norm="two_pass"))
    raises(UnsupportedGraphError, "under expert parallelism", private(Sparse, regions="breaks"))
    raises(UnsupportedGraphError, "FSDP holds them in parts", private(Sparse, check=True))


class Repeated(Sparse):
    """A layer of experts that is called twice."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        first, second = self.blocks
        return self.head(second(first(first(self.tok(x)))))


def misplaced(mesh: DeviceMesh) -> None:
    """Experts that FSDP does not hold as it should, and the rest of the model where it should not be."""
    x, ranks = torch.randint(0, V, (B, T)), dist.get_world_size()
    everywhere = init_device_mesh("cpu", (ranks,))

    def run(model: Any) -> None:
        step(dp_compile(model, max_grad_norm=C, backend="eager"), part(x))

    def without_fsdp() -> None:
        model: Any = made(Sparse)
        for block in model.blocks:
            cut_experts(block.experts, mesh["ep"])
        run(model)

    def ignored() -> None:
        model: Any = made(Sparse)
        for block in model.blocks:
            cut_experts(block.experts, mesh["ep"])
        own = {p for block in model.blocks for p in block.experts.parameters()}
        run(fully_shard(model, mesh=everywhere, ignored_params=own))

    def router_too() -> None:
        model: Any = made(Sparse)
        for block in model.blocks:
            cut_experts(block.experts, mesh["ep"])
            fully_shard(block, mesh=mesh["edp"])  # and the router with them
        run(fully_shard(model, mesh=everywhere))

    def not_cut() -> None:
        model: Any = made(Sparse)
        fully_shard(model.blocks[0], mesh=mesh["edp"])
        run(fully_shard(model, mesh=everywhere))

    raises(UnsupportedGraphError, "rows are sent to experts on ranks of which", without_fsdp)
    raises(UnsupportedGraphError, "without ignored_params", ignored)
    raises(UnsupportedGraphError, "FSDP shards 'blocks.0.router.weight' over", router_too)
    raises(UnsupportedGraphError, "FSDP shards 'blocks.0.router.weight' over", not_cut)
    raises(UnsupportedGraphError, "are used in several places", lambda: run(placed(mesh, Repeated)))
    raises(UnsupportedGraphError, "does not divide", lambda: cut_experts(nn.Linear(3, 3), mesh["ep"]))


def at_other_products(mesh: DeviceMesh) -> None:
    """All ranks raise where one of them is at another product, or asks for an expert below the first."""
    model: Any = placed(mesh)
    experts, group = model.blocks[0].experts, mesh["ep"].get_group().group_name
    experts.unshard()
    rows, chosen = torch.randn(6, D), torch.zeros(6, dtype=torch.int64)
    with torch.no_grad():
        first = mesh.get_local_rank("ep") == 0
        raises(
            PrivacyError,
            "not at the same product",
            lambda: products_of_experts(
                *((rows, experts.up) if first else (torch.randn(6, 2 * D), experts.down)), chosen
            ),
        )
        sent, local = torch.ops.dpcompile.sent_sums, experts.up.to_local()
        raises(
            PrivacyError,
            "not at the same product",
            lambda: (
                sent(rows, torch.randn(6, 2 * D), chosen, len(local), group)
                if first
                else products_of_experts(rows, experts.up, chosen)
            ),
        )
        raises(IndexError, "below 0", lambda: products_of_experts(rows, experts.up, chosen - int(first)))
    raises(ValueError, "do not belong together", lambda: products_of_experts(rows, experts.down, chosen))


def main() -> None:
    """Run the checks."""
    directory, *wanted = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    names = ("edp", "ep")
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=names)
    kinds = {
        "one backward each": Sparse, "one expert": of(OneExpert), "some nowhere": of(SomeNowhere),
        "capacity of an example": of(CapacityOfExample), 
        "twice": with_experts(Twice), "transposed": with_experts(Transposed), "frozen": with_experts(Frozen),
    }  # fmt: skip
    checks: dict[str, Callable[[], None]] = {n: lambda kind=kind: gradients(mesh, kind) for n, kind in kinds.items()}
    checks |= {
        "by layer": lambda: gradients(mesh, clipping="per_layer"),
        "forced ghost": lambda: gradients(mesh, norm="ghost"),
        "forced instantiation": lambda: gradients(mesh, norm="instantiate"),
        "inductor": lambda: gradients(mesh, backend="inductor"),
        "outliers": lambda: outliers(mesh),
        "users": lambda: users(mesh),
        "narrow": lambda: narrow(mesh),
        "checkpointed": lambda: checkpointed(mesh),
        "training": lambda: training(mesh),
        "loading": lambda: loading(mesh),
        "resumed": lambda: resumed(mesh, Path(directory)),
        "plain": lambda: plain(mesh),
        "communication": lambda: communication(mesh),
        "few refusals": lambda: refused(mesh, few=True),
        "all refusals": lambda: refused(mesh),
        "misplaced": lambda: misplaced(mesh),
        "at other products": lambda: at_other_products(mesh),
    }
    if ranks == 4:
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        checks |= {
            "two by two": lambda: gradients(both),
            "training, two by two": lambda: training(both),
            "resumed, two by two": lambda: resumed(both, Path(directory)),
        }
    run_checks(checks, wanted)


if __name__ == "__main__":
    main()
