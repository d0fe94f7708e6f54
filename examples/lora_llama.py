"""Fine-tune a Llama with LoRA and differential privacy, its parameters sharded over the ranks by FSDP2.

    torchrun --nproc-per-node 2 examples/lora_llama.py

Needs ``transformers`` and ``peft``. Nothing is downloaded: a small Llama over bytes is made from a ``LlamaConfig`` and
first trained, without privacy, on text that is public (half of the reference documentation that ships with Python).
Then it is frozen, PEFT puts adapters into it, and these learn privately from the other half, of which every example is
a window of 64 bytes. For a real model take ``AutoModelForCausalLM.from_pretrained`` in place of ``pretrained()``.

On a machine without GPUs the ranks are processes on the CPU and talk through gloo; with GPUs each rank takes one, and
they talk through NCCL.

What is private: the adapters, and what is computed from them and the held-out windows alone. What is not: the loss in
the bar, which is computed from training windows, without noise. See docs/sharp_edges.md.
"""

from __future__ import annotations

import argparse
import os
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found]
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import TensorDataset
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from dpcompile import DPOptimizer, PoissonLoader, PrivacyAccountant, calibrate_noise, dp_compile
from dpcompile.losses import per_example_causal_lm

DELTA = 1e-5
BYTES = 256
CONTEXT = 64
LEARNING_RATE = 5e-3


def windows(names: list[str]) -> Tensor:
    """The text of some topics in windows of bytes, ``[N, 64]``."""
    text = "\n".join(topics[name] for name in names).encode()
    whole = len(text) // CONTEXT
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)[: whole * CONTEXT].view(whole, CONTEXT).long()


def pretrained(options: argparse.Namespace, public: Tensor, device: torch.device) -> Any:
    """A small Llama, trained on public text by every rank alike."""
    torch.manual_seed(0)  # the same weights on every rank: they are no secret
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(options.public_steps):
        ids = public[torch.randint(len(public), (64,))].to(device)
        per_example_causal_lm(model(ids).logits, ids).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


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
    losses = [per_example_causal_lm(model(ids).logits, ids) for ids in held_out.split(64) if len(ids) == 64]
    return torch.cat(losses).mean().item()


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train the adapters to the target."""
    first = dist.get_rank() == 0
    names = sorted(topics)
    public, private = windows(names[::2]), windows(names[1::2])
    chosen = torch.arange(len(private)) % 10 == 0
    held_out, dataset = private[chosen].to(device), TensorDataset(private[~chosen])

    adapters = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    model: Any = get_peft_model(pretrained(options, public, device), adapters)
    if first:
        model.print_trainable_parameters()
    sharding: dict[str, Any] = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),))}
    if options.bfloat16:
        sharding["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **sharding)
    fully_shard(model, **sharding)
    model = dp_compile(model, max_grad_norm=0.5, backend=options.backend)

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
        torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE, weight_decay=0.0),
        model,
        noise_multiplier=noise_multiplier,
        expected_batch_size=options.batch_size,
        seed=options.seed,
        accountant=accountant,
    )
    loader.attach(model, optimizer)
    if first:
        print(f"{dist.get_world_size()} ranks on {device.type}, noise multiplier {noise_multiplier:.3f}")
    before = loss_on(model, held_out)

    bar = tqdm(total=options.steps, unit="step", disable=not first)
    for (ids,) in loader.parts():  # a draw's logits would not fit into memory at once
        ids = ids.to(device)
        loss = per_example_causal_lm(model(ids).logits, ids).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not optimizer.accumulating:  # else a large draw goes on in the next physical batch
            bar.update()
            if optimizer.logical_step % 10 == 0:
                bar.set_postfix({"loss": f"{loss.item():.3f}", "epsilon": f"{accountant.epsilon(DELTA):.2f}"})
    bar.close()
    after = loss_on(model, held_out)
    if first:
        print(f"epsilon {accountant.epsilon(DELTA):.3f} at delta {DELTA:g}, after {accountant.steps} steps")
        print(f"held-out loss {before:.3f} before, {after:.3f} after, nats per byte")


@record
def main() -> None:
    """Read the options, train."""
    parser = argparse.ArgumentParser(description="Fine-tune a small Llama with LoRA under FSDP2, privately.")
    parser.add_argument("--target-epsilon", type=float, default=8.0, help=f"at delta {DELTA:g}; default 8")
    parser.add_argument("--steps", type=int, default=100, help="logical steps; the noise is calibrated to them")
    parser.add_argument("--batch-size", type=int, default=256, help="expected, of all ranks together")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--public-steps", type=int, default=100, help="of the training on public text")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16; norms and sums stay float32")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--seed", type=int, help="to repeat a run; leave it out where the privacy is meant")
    options = parser.parse_args()
    train(options, start())
    dist.destroy_process_group()  # not after an error: it would wait for the other ranks


if __name__ == "__main__":
    main()
