"""What every rank of tests/distributed/test_exact_ranks.py runs: exact noise of replicas."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from block_models import MLP, D
from launching import run_checks
from replicated_worker import agree, replicated
from sharded_worker import BATCH, C, dp_compile, made, part, shard, step
from tensor_worker import GPT, cut
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from dpcompile import DPOptimizer, PoissonLoader, PrivacyError, make_private
from dpcompile.checkpoint import load_checkpoint, save_checkpoint
from dpcompile.module import engine_of
from dpcompile.noise.counter import Span
from dpcompile.noise.discrete import discrete_gaussian
from dpcompile.noise.exact import ExactMechanism
from dpcompile.noise.grid import spacing, to_grid
from dpcompile.runtime.reductions import add_up_exactly

SEED = 2**150 + 3


def optimizer_of(model: Any, **options: Any) -> DPOptimizer:
    numbers: dict[str, Any] = {"noise_multiplier": 0.5, "expected_batch_size": BATCH, "seed": SEED, "exact": True}
    return DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, **{**numbers, **options})


def raises(text: str, call: Any) -> None:
    try:
        call()
    except PrivacyError as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"nothing was raised: {text}")


def sums_of(x: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Of one rank's examples, by a model of its own."""
    twin = made(MLP)
    twin.load_state_dict(model.state_dict())
    private = dp_compile(twin, max_grad_norm=C, backend="eager")
    optimizer_of(private)  # so that nothing warns
    step(private, x)
    return {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}


def a_step() -> None:
    """Weights after a step are those of integers: of each rank's sum, rounded, added up, and of one noise."""
    x, model = torch.randn(BATCH, D), replicated(MLP)
    optimizer, grid = optimizer_of(model), spacing(C, 40)
    own = optimizer.mechanism
    assert isinstance(own, ExactMechanism) and own.grid == grid
    for number in range(2):
        before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
        of_ranks = [sums_of(rows, model.module) for rows in x.chunk(dist.get_world_size())]
        step(model, part(x))
        s = float(own.units(sum(p.numel() for p in before.values())))
        for i, (name, p) in enumerate(model.module.named_parameters()):
            units = torch.stack([to_grid(sums[name], grid).long() for sums in of_ranks]).sum(0)
            total = engine_of(model).ledger.total(name)
            assert total is not None and total.dtype == torch.float64 and torch.equal(total, units.double() * grid), (
                name
            )
            (noise,) = discrete_gaussian(SEED, step=number, spans=[Span(i, p.numel())], s=s)
            before[name] -= 0.1 * ((units + noise.view_as(units)).double() * grid / BATCH).float()
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.module.named_parameters():
            torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=1e-7, msg=name)
    agree(model)


def order() -> None:
    """Sums are the same whichever rank has which; of floats they would not be."""
    torch.manual_seed(0)
    world, rank, grid = dist.get_world_size(), dist.get_rank(), 2.0**-40
    values = torch.randn(world, 3, 1000) * 10.0 ** torch.arange(-6, 3, 3).float()[:, None]
    wanted = to_grid(values, grid).long().sum(0)
    for shift in range(world):
        mine = values[(rank + shift) % world]
        first, second = add_up_exactly([mine[:1], mine[1:].double()], dist.group.WORLD, grid)
        assert torch.equal(torch.cat([first, second]), wanted.double() * grid) and first.dtype == torch.float64
    whole = float(2**52 // world) * grid
    (found,) = add_up_exactly([torch.full((2,), whole, dtype=torch.float64)], dist.group.WORLD, grid)
    assert found.tolist() == [whole * world] * 2


def what_does_not_fit() -> None:
    """One rank's sum that is too large, or no number: all ranks are told, and none hangs."""
    for value in (float("nan"), float("inf"), -1e4):
        mine = torch.tensor([1.0, value if dist.get_rank() == 1 else 0.0])
        raises("is not finite, or larger than", lambda m=mine: add_up_exactly([m], dist.group.WORLD, 2.0**-40))
    add_up_exactly([torch.tensor([1e4])], dist.group.WORLD, 2.0**-32)


def micro_batches() -> None:
    """Under no_sync() sums wait and are rounded once; a second reduction within a step is refused."""
    x, model = torch.randn(BATCH, D), replicated(MLP)
    optimizer = optimizer_of(model)
    optimizer.accumulating = True
    mine = part(x)
    with model.no_sync():
        step(model, mine[:1])
        optimizer.step()
    optimizer.accumulating = False
    step(model, mine[1:])
    optimizer.step()
    optimizer.zero_grad()
    agree(model)
    optimizer.accumulating = True
    step(model, mine[:1])
    optimizer.step()
    raises("a second time within a logical step, with exact noise", lambda: step(model, mine[1:]))
    optimizer.accumulating = False
    raises("were not added to those of the others", optimizer.step)
    optimizer.discard()
    step(model, mine)
    optimizer.step()


def loaded(model: Any, **options: Any) -> Any:
    torch.manual_seed(4)
    data = TensorDataset(torch.randn(60, D))
    loader = PoissonLoader(
        data, expected_batch_size=6, physical_batch_size=4, steps=6, seed=3,
        rank=dist.get_rank(), world_size=dist.get_world_size(),
    )  # fmt: skip
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    return make_private(model, inner, loader, noise_multiplier=0.5, seed=SEED, exact=True, **options)


def resuming(directory: Path) -> None:
    """Draws of several forwards, and a run that was saved and resumed."""

    def train(model: Any, optimizer: Any, loader: Any, stop: int = 6) -> list[Tensor]:
        for n, (x,) in enumerate(loader, 1):
            step(model, x)
            optimizer.step()
            optimizer.zero_grad()
            if n == stop:
                break
        agree(model)
        return [p.detach().clone() for p in model.parameters()]

    wanted = train(*loaded(replicated(MLP)))
    given = loaded(replicated(MLP))
    train(*given, stop=3)
    given[1].discard()
    save_checkpoint(directory / "saved", *given)
    again = loaded(replicated(MLP))
    load_checkpoint(directory / "saved", *again)
    assert again[1].logical_step == 3
    for p, q in zip(train(*again), wanted, strict=True):
        assert torch.equal(p, q)


def apart() -> None:
    """Ranks of other grids are told at the first step."""
    model = replicated(MLP)
    own = ExactMechanism(0.5, C, BATCH, SEED, bits=40 - dist.get_rank())
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, mechanism=own)
    step(model, part(torch.randn(BATCH, D)))
    raises("grid_bits", optimizer.step)


def refused() -> None:
    """Parameters that are cut over ranks, by FSDP2 and by tensor parallelism."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for plain in (shard(made(MLP), mesh), cut(made(GPT), mesh)):
        model = dp_compile(plain, max_grad_norm=C, backend="eager")
        raises("whose parameters are cut over ranks (FSDP2, tensor parallelism)", lambda m=model: optimizer_of(m))
    remedy = DistributedDataParallel(dp_compile(made(MLP), max_grad_norm=C, backend="eager"))
    optimizer = optimizer_of(remedy)
    step(remedy, part(torch.randn(BATCH, D)))
    optimizer.step()


def main() -> None:
    """Run the checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    checks = {
        "a step": a_step,
        "order": order,
        "what does not fit": what_does_not_fit,
        "micro-batches": micro_batches,
        "resuming": lambda: resuming(Path(sys.argv[1])),
        "grids apart": apart,
        "refused": refused,
    }
    run_checks(checks, sys.argv[2:])


if __name__ == "__main__":
    main()
