"""Train a small byte-level GPT with differential privacy, its parameters sharded over the ranks by FSDP2.

    torchrun --nproc-per-node 2 examples/train_fsdp.py

On a machine without GPUs the ranks are processes on the CPU and talk through gloo; with GPUs each rank takes one, and
they talk through NCCL. The result does not depend on the number of ranks: a run saved by two goes on with any number
(``--resume``).

The text is the reference documentation that ships with Python (``pydoc_data.topics``), cut into windows of 64 bytes:
one example is one window, and epsilon is for one window more or less. Every tenth is held out.

What is private: the weights, and what is computed from them and the held-out windows alone. What is not: the loss in
the bar (it is computed from training windows, without noise), and the checkpoints (they hold the seed: whoever has that
can subtract the noise). See docs/sharp_edges.md.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import TensorDataset
from tqdm import tqdm

from dpcompile import DPOptimizer, PoissonLoader, PrivacyAccountant, calibrate_noise, dp_compile
from dpcompile.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from dpcompile.losses import per_example_cross_entropy

DELTA = 1e-5
BYTES = 256
CONTEXT = 64
LEARNING_RATE = 2e-3


class Block(nn.Module):
    """Causal attention and a two-layer network, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm_1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """A transformer over bytes."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(BYTES, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to logits ``[B, T, 256]`` of the next byte."""
        x = self.bytes(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def windows() -> tuple[TensorDataset, Tensor]:
    """Training set of ``(ids, targets)``, ``[64]`` each, and held-out windows ``[N, 65]``."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    whole = len(text) // (CONTEXT + 1)
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: whole * (CONTEXT + 1)].view(whole, -1).long()
    held_out = torch.arange(whole) % 10 == 0
    train = ids[~held_out]
    return TensorDataset(train[:, :-1], train[:, 1:]), ids[held_out]


def start() -> torch.device:
    """Join the other ranks; the device of this one."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


@torch.no_grad()
def loss_on(model: nn.Module, held_out: Tensor) -> float:
    """Mean loss per byte, in nats. Every rank computes the same: each forward gathers weights from all of them."""
    losses = [per_example_cross_entropy(model(x[:, :-1]), x[:, 1:]) for x in held_out.split(64) if len(x) == 64]
    return torch.cat(losses).mean().item()


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train to the target, with a checkpoint now and then."""
    first = dist.get_rank() == 0
    dataset, held_out = windows()
    held_out = held_out.to(device)

    torch.manual_seed(0)  # the same first weights on every rank: they are no secret
    model: Any = GPT(options.layers, options.width, heads=4).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    sharding: dict[str, Any] = {"mesh": mesh}
    if options.bfloat16:
        sharding["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, **sharding)
    fully_shard(model, **sharding)
    model = dp_compile(model, max_grad_norm=1.0, backend=options.backend)

    loader = PoissonLoader(
        dataset,
        expected_batch_size=options.batch_size,
        steps=options.steps,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        seed=options.seed,
    )
    noise_multiplier = calibrate_noise(
        target_epsilon=options.target_epsilon,
        target_delta=DELTA,
        sample_rate=loader.sample_rate,
        steps=options.steps,
    )
    accountant = PrivacyAccountant(noise_multiplier=noise_multiplier, sample_rate=loader.sample_rate)
    optimizer = DPOptimizer(
        torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE),
        model,
        noise_multiplier=noise_multiplier,
        expected_batch_size=options.batch_size,
        seed=options.seed,
        accountant=accountant,
    )
    loader.attach(model, optimizer)

    saved = latest_checkpoint(options.output_dir) if options.resume else None
    if saved is not None:
        load_checkpoint(saved, model, optimizer, loader)
    if first:
        print(f"{dist.get_world_size()} ranks on {device.type}, noise multiplier {noise_multiplier:.3f}")
        print("from the start" if saved is None else f"from {saved}")
    before = loss_on(model, held_out)

    bar = tqdm(total=options.steps, initial=optimizer.logical_step, unit="step", disable=not first)
    if optimizer.logical_step < options.steps:
        for ids, targets in loader.parts():  # a draw's logits would not fit into memory at once
            loss = per_example_cross_entropy(model(ids.to(device)), targets.to(device)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if optimizer.accumulating:  # else a large draw goes on in the next physical batch
                continue
            bar.update()
            step = optimizer.logical_step
            if step % options.checkpoint_every == 0 or step == options.steps:
                save_checkpoint(options.output_dir / f"step_{step:06}", model, optimizer, loader)
                bar.set_postfix({"loss": f"{loss.item():.3f}", "epsilon": f"{accountant.epsilon(DELTA):.2f}"})
            if step == options.stop_after:
                break
    bar.close()
    after = loss_on(model, held_out)
    if first:
        print(f"epsilon {accountant.epsilon(DELTA):.3f} at delta {DELTA:g}, after {accountant.steps} steps")
        print(f"held-out loss {before:.3f} before, {after:.3f} after, nats per byte")
        print(f"checkpoints: {options.output_dir} (secret: they hold the seed of the noise)")


@record
def main() -> None:
    """Read the options, train."""
    parser = argparse.ArgumentParser(description="Train a small byte-level GPT under FSDP2, privately.")
    parser.add_argument("--target-epsilon", type=float, default=8.0, help=f"at delta {DELTA:g}; default 8")
    parser.add_argument("--steps", type=int, default=200, help="logical steps; the noise is calibrated to them")
    parser.add_argument("--batch-size", type=int, default=256, help="expected, of all ranks together")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16; norms and sums stay float32")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--seed", type=int, help="to repeat a run; leave it out where the privacy is meant")
    parser.add_argument("--output-dir", type=Path, default=Path("fsdp_run"), help="for checkpoints; all ranks see it")
    parser.add_argument("--checkpoint-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--stop-after", type=int, metavar="STEPS", help="stop early; --resume goes on")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    options = parser.parse_args()
    train(options, start())
    dist.destroy_process_group()  # not after an error: it would wait for the other ranks


if __name__ == "__main__":
    main()
