"""Train a small Llama on a mesh of ranks, with differential privacy or without.

    torchrun --nproc-per-node 4 examples/train_parallel.py --dp 2 --pp 2
    torchrun --nproc-per-node 4 examples/train_parallel.py --pp 2 --tp 2 --schedule 1F1B
    torchrun --nproc-per-node 8 examples/train_parallel.py --dp 2 --pp 2 --cp 2
    torchrun --nproc-per-node 8 examples/train_parallel.py --dp 2 --tp 2 --cp 2
    torchrun --nproc-per-node 4 examples/train_parallel.py --dp 2 --pp 2 --public

``--dp`` shards by FSDP2 over ranks with examples of their own, ``--pp`` divides the layers into stages
(torch.distributed.pipelining), ``--tp`` cuts the layers, ``--cp`` every example's tokens (context parallelism, with
keys and values gathered). On CPUs the ranks talk through gloo, on GPUs through NCCL. The held-out losses that are
printed do not depend on the mesh, but for rounding.

The text is the reference documentation that ships with Python (``pydoc_data.topics``), cut into windows of 32 bytes:
one example is one window, and epsilon is for one window more or less. Every tenth is held out.
"""

from __future__ import annotations

import argparse
import os
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.utils.data import TensorDataset

from dpcompile import DPOptimizer, PoissonLoader, PrivacyAccountant, calibrate_noise, dp_compile

DELTA = 1e-5
BYTES = 256
CONTEXT = 32
HEAD = 16  # dimensions of an attention head
EVALUATED = 256  # held-out windows
CUT = {"q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "out": 1, "down": 1}  # along which dimension, over --tp


class Ranks:
    """Ranks that share a batch: along ``cp`` each has a run of every example's tokens, along ``tp`` a part of layers.

    Without a mesh along one of them all of that is here.
    """

    def __init__(self, cp: DeviceMesh | None = None, tp: DeviceMesh | None = None) -> None:
        self.mesh, self.tp = cp, tp
        self.rank = 0 if cp is None else cp.get_local_rank()

    def here(self, parameter: Any, over_tp: Placement) -> Tensor:
        """What of a parameter lies here, of whose gradient each rank along ``cp`` has a share."""
        shares: list[Placement] = [Partial()] * (self.mesh is not None)
        shares = shares + [over_tp] * (self.tp is not None)
        return parameter.to_local(grad_placements=shares) if shares else parameter

    def columns(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """A layer of whose outputs each rank along ``tp`` has some: the gradients of its input are added up."""
        if self.tp is not None:
            x = DTensor.from_local(x, self.tp, [Replicate()]).to_local(grad_placements=[Partial()])
        return F.linear(x, self.here(layer.weight, Shard(0)))

    def rows(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """A layer of whose inputs each rank along ``tp`` has some: its outputs are added up."""
        y = F.linear(x, self.here(layer.weight, Shard(1)))
        if self.tp is None:
            return y
        return DTensor.from_local(y, self.tp, [Partial()]).redistribute(placements=[Replicate()]).to_local()

    def normed(self, layer: nn.RMSNorm, x: Tensor) -> Tensor:
        """A norm, whole along ``tp``."""
        return F.rms_norm(x, x.shape[-1:], self.here(layer.weight, Replicate()), layer.eps)

    def own(self, x: Tensor) -> Tensor:
        """Of ``[B, T, ..]`` what lies here."""
        if self.mesh is None:
            return x
        return DTensor.from_local(x, self.mesh, [Replicate()]).redistribute(placements=[Shard(1)]).to_local()

    def whole(self, x: Tensor) -> Tensor:
        """The other way round."""
        return x if self.mesh is None else DTensor.from_local(x, self.mesh, [Shard(1)]).full_tensor()

    def gathered(self, x: Tensor) -> Tensor:
        """The same, of keys and values: each rank uses them for tokens of its own, so their gradients are added up."""
        if self.mesh is None:
            return x
        everywhere = DTensor.from_local(x, self.mesh, [Shard(1)]).redistribute(placements=[Replicate()])
        return everywhere.to_local(grad_placements=[Partial()])

    def places(self, x: Tensor) -> Tensor:
        """Positions of what lies here."""
        return self.rank * x.shape[1] + torch.arange(x.shape[1], device=x.device)


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions, of ``[B, heads, T, 16]``."""
    angles = places[:, None] / 10_000 ** (torch.arange(0, HEAD, 2, device=x.device) / HEAD)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Block(nn.Module):
    """Causal attention and a gated network, each added to its input."""

    def __init__(self, width: int, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same, where T counts the tokens that lie here."""
        ranks = self.ranks
        h, places = ranks.normed(self.norm_1, x), ranks.places(x)
        q, k, v = (ranks.columns(layer, h) for layer in (self.q, self.k, self.v))
        q, k, v = (y.unflatten(-1, (-1, HEAD)).transpose(1, 2) for y in (q, ranks.gathered(k), ranks.gathered(v)))
        everywhere = torch.arange(k.shape[2], device=x.device)
        seen = places[:, None] >= everywhere
        attended = F.scaled_dot_product_attention(rotated(q, places), rotated(k, everywhere), v, attn_mask=seen)
        x = x + ranks.rows(self.out, attended.transpose(1, 2).flatten(2))
        h = ranks.normed(self.norm_2, x)
        return x + ranks.rows(self.down, F.silu(ranks.columns(self.gate, h)) * ranks.columns(self.up, h))


class Llama(nn.Module):
    """The layers ``[first, end)`` of a transformer over bytes, by the names that they have in the whole."""

    def __init__(self, layers: int, width: int, first: int, end: int, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self.bytes = nn.Embedding(BYTES, width)
        # All of them: random numbers are those of the whole model.
        blocks = {str(i): Block(width, ranks) for i in range(layers)}
        self.blocks = nn.ModuleDict({name: block for name, block in blocks.items() if first <= int(name) < end})
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, BYTES, bias=False)
        self.ends = first == 0, end == layers
        if not self.ends[0]:
            del self.bytes
        if not self.ends[1]:
            del self.norm, self.head

    def forward(self, x: Tensor) -> Tensor:
        """Bytes ``[B, T]``, or what the stage before returns, to logits, or what the next stage is given."""
        ranks, whole = self.ranks, Replicate()
        x = ranks.own(x)
        h = F.embedding(x, ranks.here(self.bytes.weight, whole)) if self.ends[0] else x
        for block in self.blocks.values():
            h = block(h)
        if self.ends[1]:
            h = F.linear(ranks.normed(self.norm, h), ranks.here(self.head.weight, whole))
        return ranks.whole(h)


def windows() -> tuple[TensorDataset, TensorDataset]:
    """Training and held-out sets of ``(ids, targets)``, ``[32]`` each."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    whole = len(text) // (CONTEXT + 1)
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: whole * (CONTEXT + 1)].view(whole, -1).long()
    held_out = torch.arange(whole) % 10 == 0
    train, test = (TensorDataset(part[:, :-1], part[:, 1:]) for part in (ids[~held_out], ids[held_out]))
    return train, test


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over a micro-batch of one loss for each example."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def start(options: argparse.Namespace) -> DeviceMesh:
    """Join the other ranks."""
    shape, names = (options.dp, options.pp, options.cp, options.tp), ("dp", "pp", "cp", "tp")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    return init_device_mesh("cuda" if cuda else "cpu", shape, mesh_dim_names=names)


def placed(options: argparse.Namespace, mesh: DeviceMesh) -> nn.Module:
    """What of the model lies on this rank."""
    torch.manual_seed(0)  # the same first weights on every mesh: they are no secret
    stage, each = mesh.get_local_rank("pp"), options.layers // options.pp
    shared = tuple(name for name in ("cp", "tp") if getattr(options, name) > 1)
    ranks = Ranks(*(mesh[name] if name in shared else None for name in ("cp", "tp")))
    model = Llama(options.layers, options.width, stage * each, (stage + 1) * each, ranks).to(mesh.device_type)
    for name, module in model.named_modules() if shared else ():
        cut = CUT.get(name.rpartition(".")[2])
        lies = {"cp": Replicate(), "tp": Replicate() if cut is None else Shard(cut)}
        for own, p in list(module.named_parameters(recurse=False)):
            laid = distribute_tensor(p.data, mesh[shared], [lies[dimension] for dimension in shared])
            setattr(module, own, nn.Parameter(laid))
    for block in model.blocks.values():
        if options.dp > 1:
            fully_shard(block, mesh=mesh["dp"])
    if options.dp > 1:
        fully_shard(model, mesh=mesh["dp"])
    return model


class Trainer:
    """A stage, its schedule, and what goes through it."""

    def __init__(self, options: argparse.Namespace, mesh: DeviceMesh) -> None:
        self.options, self.mesh = options, mesh
        self.train_set, self.test_set = windows()
        model, self.rank = placed(options, mesh), mesh.get_local_rank("pp")
        self.model: Any = model if options.public else dp_compile(model, backend=options.backend, pipeline=mesh["pp"])
        device, group = torch.device(mesh.device_type), mesh["pp"].get_group()
        stage = PipelineStage(self.model, self.rank, options.pp, device, group=group)
        kind = getattr(schedules, f"Schedule{options.schedule}")
        self.schedule = kind(stage, options.micro_batches, loss_fn=mean_loss)
        self.device = device

    def run(self, batch: tuple[Tensor, ...], call: Any) -> list[Tensor]:
        """A batch through the schedule; the losses, on the last stage."""
        (ids, targets), losses = batch, list[Tensor]()
        given = (ids.to(self.device),) if self.rank == 0 else ()
        last = self.rank == self.options.pp - 1
        call(*given, **({"target": targets.to(self.device), "losses": losses} if last else {}))
        return losses

    @torch.no_grad()
    def held_out(self) -> float:
        """Mean loss in nats per byte, of held-out windows; the same on all ranks."""
        total = torch.zeros((), device=self.device)
        rows = torch.arange(EVALUATED).chunk(EVALUATED // self.options.physical)
        for chunk in rows:
            losses = self.run(self.test_set[chunk], self.schedule.eval)
            total += sum(losses, torch.zeros((), device=self.device)) / self.options.micro_batches / len(rows)
        dist.all_reduce(total, group=self.mesh["pp"].get_group())
        return total.item()

    def privately(self) -> None:
        """Poisson draws, clipped over all stages, and noise once."""
        options, dp = self.options, self.mesh.get_local_rank("dp")
        loader = PoissonLoader(
            self.train_set, expected_batch_size=options.batch_size, physical_batch_size=options.physical,
            steps=options.steps, rank=dp, world_size=options.dp, seed=options.seed,
        )  # fmt: skip
        sigma = calibrate_noise(
            target_epsilon=options.target_epsilon, target_delta=DELTA, sample_rate=loader.sample_rate,
            steps=options.steps,
        )  # fmt: skip
        accountant = PrivacyAccountant(noise_multiplier=sigma, sample_rate=loader.sample_rate)
        inner = torch.optim.AdamW(self.model.parameters(), lr=options.learning_rate)
        optimizer = DPOptimizer(
            inner, self.model, noise_multiplier=sigma, expected_batch_size=options.batch_size, seed=options.seed,
            accountant=accountant,
        )  # fmt: skip
        for ids, targets in loader.attach(self.model, optimizer).parts():
            self.run((ids, targets), self.schedule.step)
            optimizer.step()
            optimizer.zero_grad()
            if not optimizer.accumulating:
                self.report(optimizer.logical_step)
        if dist.get_rank() == 0:
            print(f"epsilon {accountant.epsilon(DELTA):.3f} at delta {DELTA:g}, after {accountant.steps} steps")

    def publicly(self) -> None:
        """The plain loop, on batches of one size."""
        options, dp = self.options, self.mesh.get_local_rank("dp")
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.learning_rate)
        drawn = torch.Generator().manual_seed(options.seed or 0)
        for step in range(options.steps):
            rows = torch.randperm(len(self.train_set), generator=drawn)[: options.batch_size].chunk(options.dp)[dp]
            self.run(self.train_set[rows], self.schedule.step)
            optimizer.step()
            optimizer.zero_grad()
            self.report(step + 1)

    def report(self, step: int) -> None:
        """Now and then, the held-out loss."""
        if step % self.options.report_every == 0 or step == self.options.steps:
            loss = self.held_out()
            if dist.get_rank() == 0:
                print(f"step {step}: held-out loss {loss:.6f}", flush=True)


@record
def main() -> None:
    """Read the options, train."""
    parser = argparse.ArgumentParser(description="Train a small Llama on a mesh, with privacy or without.")
    parser.add_argument("--dp", type=int, default=1, help="ranks with examples of their own (FSDP2)")
    parser.add_argument("--pp", type=int, default=1, help="stages of the pipeline")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each layer")
    parser.add_argument("--cp", type=int, default=1, help="ranks that share each example's tokens")
    parser.add_argument("--public", action="store_true", help="train without privacy")
    parser.add_argument("--schedule", choices=("GPipe", "1F1B"), default="GPipe")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--physical", type=int, default=64, help="rows of a rank's batch, of all its micro-batches")
    parser.add_argument("--batch-size", type=int, default=128, help="expected, of all ranks together")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--report-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--target-epsilon", type=float, default=8.0, help=f"at delta {DELTA:g}; default 8")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--seed", type=int, help="to repeat a run; leave it out where the privacy is meant")
    options = parser.parse_args()
    trainer = Trainer(options, start(options))
    trainer.publicly() if options.public else trainer.privately()
    dist.destroy_process_group()  # not after an error: it would wait for the other ranks


if __name__ == "__main__":
    main()
