"""What every rank of test_expert_parallel.py runs: ``torchrun tests/workers/experts_worker.py [CHECK ..]``.

On two ranks expert parallelism alone, on four with FSDP2, two by two. Each check prints its name once it passed, on
rank 0.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from launching import run_checks
from sequence_worker import one_by_one
from sharded_worker import made, raises
from tensor_worker import Block, cut, gradients_of, optimizer_of, part, same, same_weights, step
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import dpcompile
from dpcompile import DPCompileError, UnsupportedGraphError
from dpcompile.module import engine_of

dp_compile: Any = dpcompile.dp_compile
B, T, D, E, K, V, C = 8, 3, 8, 4, 2, 11, 0.5


class Experts(nn.Module):
    """Two layers of E experts, with biases, of which K are chosen for each row; cut over ``mesh`` if there is one."""

    mesh: DeviceMesh | None = None

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.up, self.down = nn.Parameter(torch.randn(E, D, 2 * D)), nn.Parameter(torch.randn(E, 2 * D, D) / 4)
        self.bias = nn.Parameter(torch.randn(E, 2 * D))

    def cut(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        for name in ("up", "down", "bias"):
            whole = getattr(self, name).detach()
            setattr(self, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).softmax(-1).topk(K, -1)
        if self.mesh is None:
            out = self.run(rows, weights, chosen, self.up, self.bias, self.down)
        else:
            rows, weights = self.shared(rows), self.shared(weights)
            count = E // self.mesh.size()
            own = chosen - count * self.mesh.get_local_rank()
            elsewhere = (own < 0) | (own >= count)
            local = (p.to_local() for p in (self.up, self.bias, self.down))  # type: ignore[operator]
            out = self.run(rows, weights.masked_fill(elsewhere, 0.0), own.masked_fill(elsewhere, count), *local)
            out = self.added(out)
        return x + out.view(x.shape)

    def shared(self, value: Tensor) -> Tensor:
        """The same, with gradients that are added up over the ranks."""
        whole = DTensor.from_local(value, self.mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])

    def added(self, out: Tensor) -> Tensor:
        """Added up over the ranks."""
        return DTensor.from_local(out, self.mesh, [Partial()], run_check=False).full_tensor()

    def run(self, rows: Tensor, weights: Tensor, chosen: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
        """What the experts given here make of the rows; a number beyond theirs is that of another rank's."""
        ordered, order = chosen.flatten().sort()
        ends = F.one_hot(ordered.clamp(max=len(up)), len(up) + 1).sum(0)[: len(up)].cumsum(0)
        hidden = torch.ops.transformers.grouped_mm_fallback(rows[order // K], up, ends)
        hidden = (hidden + bias[ordered.clamp(max=len(up) - 1)]).relu()
        out = torch.ops.transformers.grouped_mm_fallback(hidden, down, ends)
        return torch.zeros_like(rows).index_add(0, order // K, out * weights.flatten()[order, None])


class Sparse(nn.Module):
    """Embedding, two blocks of experts, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.head = nn.Embedding(V, D), nn.Linear(D, 12)
        self.blocks = nn.ModuleList(Experts() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        h = self.tok(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def placed(mesh: DeviceMesh, kind: Callable[[], nn.Module] = Sparse) -> Any:
    """Experts cut over the mesh, or over its second dimension, and the rest sharded over the first."""
    model = made(kind)
    for block in model.blocks:  # type: ignore[union-attr]
        block.cut(mesh if mesh.ndim == 1 else mesh["tp"])  # type: ignore[union-attr, operator]
    if mesh.ndim == 2:
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])
    return model


def gradients(mesh: DeviceMesh, backend: str = "eager", **options: Any) -> None:
    x = torch.randint(0, V, (B, T))
    single = made(Sparse)
    private = dp_compile(single, max_grad_norm=C, backend="eager", **{**options, "regions": None})
    model = dp_compile(placed(mesh), max_grad_norm=C, backend=backend, **options)
    mask = torch.arange(B) % 4 != 1
    for masked in (False, True):
        for m in (single, model):
            m.zero_grad()
        if masked:
            engine_of(private).set_mask(mask)
            engine_of(model).set_mask(part(mask, mesh))
        step(private, x)
        step(model, part(x, mesh))
        same(gradients_of(model), gradients_of(single))
        norms, wanted = engine_of(model).row_norms, part(engine_of(private).row_norms, mesh)
        torch.testing.assert_close(norms, wanted, rtol=1e-5, atol=1e-6)
    assert all(len(b.up.to_local()) <= E // 2 for b in model.blocks)


def against_one_backward_each(mesh: DeviceMesh) -> None:
    """Norms and sums are those of one backward for each example, of the plain model on one rank."""
    x, plain = torch.randint(0, V, (B, T)), made(Sparse)
    model = dp_compile(placed(mesh), max_grad_norm=C, backend="eager")
    step(model, part(x, mesh))
    sums = {n: torch.zeros_like(p) for n, p in plain.named_parameters()}
    norms = []
    for row in x.split(1):
        plain.zero_grad()
        step(plain, row)
        each = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        norms.append(torch.stack([g.double().square().sum() for g in each.values()]).sum().sqrt())
        for name, g in each.items():
            sums[name] += g * (C / norms[-1]).clamp(max=1.0)
    same(gradients_of(model), sums)
    wanted = part(torch.stack(norms).float(), mesh)
    torch.testing.assert_close(engine_of(model).row_norms, wanted, rtol=1e-5, atol=1e-6)


def training(mesh: DeviceMesh, few: int = 5) -> None:
    """Weights after steps with noise are those of one process."""
    single = made(Sparse)
    private = dp_compile(single, max_grad_norm=C, backend="eager")
    model = dp_compile(placed(mesh), max_grad_norm=C, backend="eager")
    optimizers = [(private, optimizer_of(private)), (model, optimizer_of(model))]
    for _ in range(few):
        x = torch.randint(0, V, (B, T))
        for trained, optimizer in optimizers:
            step(trained, part(x, mesh) if trained is model else x)
            optimizer.step()
            optimizer.zero_grad()
    same_weights(model, single, 1e-5)


# --- beside tensor parallelism ----------------------------------------------------------------------------------------


class Layered(nn.Module):
    """Attention and a network that are cut over ``tp``, and experts that are cut over ``ep``."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.head = nn.Embedding(V, D), nn.Linear(D, 12)
        self.dense, self.experts = nn.ModuleList(Block() for _ in range(2)), nn.ModuleList(Experts() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        h = self.tok(x)
        for dense, experts in zip(self.dense, self.experts, strict=True):
            h = experts(dense(h))
        return self.head(h)


def beside_tensor_parallelism(**options: Any) -> None:
    """On a mesh of ``ep`` × ``tp``, whose ranks share the batch: one backward each, then weights after noisy steps."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))

    def layered() -> Any:
        model: Any = made(Layered)
        for experts in model.experts:
            experts.cut(mesh["ep"])
        return cut(model, mesh["tp"])

    x = torch.randint(0, V, (B, T))
    wanted, norms = one_by_one(made(Layered), x, options.get("clipping", "flat"))
    model = dp_compile(layered(), max_grad_norm=C, backend="eager", **options)
    step(model, x)
    torch.testing.assert_close(engine_of(model).row_norms, norms, rtol=1e-5, atol=1e-6)
    same(gradients_of(model), wanted)
    single = made(Layered)
    alone, model = (dp_compile(m, max_grad_norm=C, backend="eager", **options) for m in (single, layered()))
    optimizers = [(m, optimizer_of(m)) for m in (alone, model)]
    for _ in range(3):
        x = torch.randint(0, V, (B, T))
        for trained, optimizer in optimizers:
            step(trained, x)
            optimizer.step()
            optimizer.zero_grad()
    same_weights(model, single, 1e-5)


# --- Transformers' own plans ------------------------------------------------------------------------------------------


def of_transformers(mesh: DeviceMesh, architecture: str, implementation: str = "all_reduce", **options: Any) -> None:
    """A model whose experts its own plan cuts."""
    from models.experts import LOCAL, NARROW
    from models.pretrained import build
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    settings: dict[str, Any] = {
        "MixtralForCausalLM": LOCAL | {"num_local_experts": 4},
        "GptOssForCausalLM": LOCAL | {"num_local_experts": 4, "head_dim": 4, "attn_implementation": "eager"},
        "Qwen3MoeForCausalLM": NARROW | {"num_experts": 4, "head_dim": 4},
    }[architecture]
    single: Any = made(lambda: build(architecture, **settings))
    model: Any = made(lambda: build(architecture, **settings))
    names = [n for n, _ in (*model.named_parameters(), *model.named_modules())]
    numbered = {pattern: re.escape(pattern).replace(r"\*", r"\d+") for pattern in model._ep_plan}
    plan = {n: s for p, s in model._ep_plan.items() for n in names if re.fullmatch(numbered[p], n)}
    apply_expert_parallelism(model, mesh, mesh, plan, implementation)
    assert any(isinstance(p, DTensor) for p in model.parameters())
    ids = torch.randint(1, model.config.vocab_size, (4, 5))
    private = dp_compile(single, max_grad_norm=C, backend="eager")
    cut = dp_compile(model, max_grad_norm=C, backend="eager", **options)
    for m in (private, cut):
        step(lambda x, m=m: m(input_ids=x, use_cache=False).logits, ids)
    same(gradients_of(model), gradients_of(single))
    torch.testing.assert_close(cut.grad_norms, private.grad_norms, rtol=1e-5, atol=1e-6)


# --- refused ----------------------------------------------------------------------------------------------------------


class NotShared(Experts):
    """The rows' gradients are each rank's share."""

    def shared(self, value: Tensor) -> Tensor:  # noqa: D102
        return value if value.shape[1] == D else super().shared(value)


class WeightsNotShared(Experts):
    """The router's gradients are each rank's share."""

    def shared(self, value: Tensor) -> Tensor:  # noqa: D102
        return value if value.shape[1] == K else super().shared(value)


class NotAdded(Experts):
    """Every rank goes on with what its own experts made."""

    def added(self, out: Tensor) -> Tensor:  # noqa: D102
        return out


class Moved(Experts):
    """Rows go to the rank that has their expert, and back: equally many to each."""

    def run(self, rows: Tensor, weights: Tensor, chosen: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:  # noqa: D102
        assert self.mesh is not None
        group = self.mesh.get_group()
        there = funcol.wait_tensor(funcol.all_to_all_single_autograd(rows, None, None, group))
        return funcol.wait_tensor(funcol.all_to_all_single_autograd(there @ up[0] @ down[0], None, None, group))


class MovedByNumber(Experts):
    """As many as there are for each rank."""

    def run(self, rows: Tensor, weights: Tensor, chosen: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:  # noqa: D102
        assert self.mesh is not None
        group, order = self.mesh.get_group(), chosen[:, 0].argsort()
        counts = F.one_hot(chosen[:, 0].clamp(max=1), 2).sum(0)
        sent, got = counts.tolist(), funcol.all_to_all_single(counts, None, None, group).tolist()
        there = funcol.wait_tensor(funcol.all_to_all_single_autograd(rows[order], got, sent, group))
        back = funcol.wait_tensor(funcol.all_to_all_single_autograd(there @ up[0] @ down[0], sent, got, group))
        return torch.zeros_like(rows).index_copy(0, order, back)


def refused(mesh: DeviceMesh, *, few: bool = False) -> None:
    """Shares that nobody adds up, and rows that go to other ranks."""
    x = torch.randint(0, V, (B, T))

    def of(kind: type[Experts]) -> Callable[[], None]:
        class Model(Sparse):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList(kind() for _ in range(2))

        return lambda: step(dp_compile(placed(mesh, Model), max_grad_norm=C, backend="eager"), x)

    shares, moved = "its gradient is another one on each", "it hands every rank some of the examples only"
    for kind, text in ((WeightsNotShared, shares), (Moved, moved)):
        raises(DPCompileError, text, of(kind))
    by_number = "hands rows of examples to other ranks"
    for kind, text in () if few else ((NotShared, shares), (NotAdded, shares), (MovedByNumber, by_number)):
        raises(UnsupportedGraphError, text, of(kind))


def main() -> None:
    """Run the checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    alone = dist.get_world_size() == 2
    mesh = init_device_mesh("cpu", (2,)) if alone else init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    checks: dict[str, Callable[[], None]] = {
        "one backward each": lambda: against_one_backward_each(mesh),
        "one graph": lambda: gradients(mesh),
        "by layer": lambda: gradients(mesh, clipping="per_layer"),
        "ghost": lambda: gradients(mesh, norm="ghost"),
        "instantiated": lambda: gradients(mesh, norm="instantiate"),
        "training": lambda: training(mesh),
    }
    if not alone:
        checks["beside tensor parallelism"] = beside_tensor_parallelism
        checks["beside it, by layer"] = lambda: beside_tensor_parallelism(clipping="per_layer")
    if alone:
        checks["regions"] = lambda: gradients(mesh, regions="blocks")
        checks["inductor"] = lambda: gradients(mesh, backend="inductor")
        for name in ("MixtralForCausalLM", "GptOssForCausalLM", "Qwen3MoeForCausalLM"):
            checks[name] = lambda name=name: of_transformers(mesh, name)
        checks["blocks of Mixtral"] = lambda: of_transformers(mesh, "MixtralForCausalLM", regions="blocks")
        checks["few refusals"] = lambda: refused(mesh, few=True)
        checks["all refusals"] = lambda: refused(mesh)
        checks["all to all of Transformers"] = lambda: raises(
            UnsupportedGraphError,
            "cut over ranks: ep_implementation='all_reduce'",
            lambda: of_transformers(mesh, "MixtralForCausalLM", "all_to_all"),
        )
    run_checks(checks, sys.argv[1:])


if __name__ == "__main__":
    import transformers.integrations.moe  # noqa: F401  # its operations

    main()
