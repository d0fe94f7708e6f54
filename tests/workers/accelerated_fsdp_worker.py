"""FSDP2 by Accelerate on gloo ranks: ``torchrun tests/workers/accelerated_fsdp_worker.py``.

Accelerate knows FSDP on accelerators alone; on CPUs it takes DistributedDataParallel, whatever plugin it is given. So
it is told that it shards, which is all that it goes by.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from launching import run_checks
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, TensorDataset

import dpcompile
from dpcompile.integrations.accelerate import make_private
from dpcompile.losses import per_example_causal_lm

OPTIONS: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "seed": 5, "backend": "eager"}
PHYSICAL = {"physical_batch_size": 4}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    """Named as models of Transformers are, with a last norm beside the head."""

    base_model_prefix = ""

    def __init__(self, checkpoints: bool = False) -> None:
        super().__init__()
        self.enter, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        blocks = [Block(), Block()]
        self.blocks = nn.ModuleList([checkpoint_wrapper(b) for b in blocks] if checkpoints else blocks)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def parts(**options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(1)
    net = Net(**options)
    data = TensorDataset(torch.randn(48, 6), torch.randint(0, 3, (48,)))
    return net, torch.optim.Adam(net.parameters(), lr=0.05), DataLoader(data, 8, shuffle=True)


def train(model: Any, optimizer: Any, loader: Any, accelerator: Any, batches: int) -> None:
    taken = 0
    while taken < batches:
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            loss.backward() if accelerator is None else accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            taken += 1
            if taken == batches:
                break


def alone() -> dict[str, Tensor]:
    """One process, on the draws of all."""
    net, optimizer, loader = parts()
    draws = dpcompile.PoissonLoader.from_dataloader(loader, **PHYSICAL, seed=5, rank=0, world_size=1)
    train(*dpcompile.make_private(net, optimizer, draws, **OPTIONS), None, 8)
    return {name: p.detach() for name, p in net.named_parameters()}


def assert_same(net: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, p in net.named_parameters():
        whole: Any = p
        name = name.replace("._checkpoint_wrapped_module", "")
        torch.testing.assert_close(whole.full_tensor().detach(), expected[name], rtol=1e-5, atol=1e-6)


def accelerator(**options: Any) -> Any:
    wanted: dict[str, Any] = {"auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False}
    wanted |= {"transformer_cls_names_to_wrap": ["Block"], "fsdp_version": 2}
    ACCELERATOR.free_memory()
    ACCELERATOR._custom_objects.clear()
    ACCELERATOR.state.fsdp_plugin = FullyShardedDataParallelPlugin(**wanted | options)
    return ACCELERATOR


ACCELERATOR: Any = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
assert ACCELERATOR.distributed_type is DistributedType.MULTI_CPU and not ACCELERATOR.is_fsdp2
PartialState._shared_state["distributed_type"] = ACCELERATOR.state.distributed_type = DistributedType.FSDP


def weights() -> None:
    expected = alone()
    for checkpoints, by_plugin in ((False, False), (True, False), (False, True)):
        own = accelerator(activation_checkpointing=by_plugin)
        net, optimizer, loader = parts(checkpoints=checkpoints)
        model, optimizer, loader = make_private(own, net, optimizer, loader, **OPTIONS, **PHYSICAL)
        units = [name for name, m in net.named_modules() if isinstance(m, FSDPModule)]
        assert units == ["", "blocks.0", "blocks.1"], units
        assert own.unwrap_model(model) is model
        train(model, optimizer, loader, own, 8)
        assert optimizer.optimizer.accountant.steps == 8
        assert_same(net, expected)


def states() -> None:
    """Saved by Accelerate after half of the steps, and resumed with another seed."""
    expected = alone()
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(folder)
        path = str(Path(folder[0]) / "state")
        own = accelerator(state_dict_type=kind)
        train(*make_private(own, *parts(), **OPTIONS, **PHYSICAL), own, 4)
        own.save_state(path)
        dist.barrier()
        own = accelerator(state_dict_type=kind)
        net, optimizer, loader = parts()
        model, optimizer, loader = make_private(own, net, optimizer, loader, **{**OPTIONS, "seed": 6}, **PHYSICAL)
        own.load_state(path)
        train(model, optimizer, loader, own, 4)
        assert optimizer.optimizer.accountant.steps == 8
        assert_same(net, expected)


def transformers() -> None:
    """A Llama whose head is its embedding, by the units that the class names itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = torch.randint(0, 20, (24, 6), generator=torch.Generator().manual_seed(0))
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}

    def run(own: Any) -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=16, tie_word_embeddings=True, **heads)
        net = LlamaForCausalLM(config)
        optimizer: Any = torch.optim.AdamW(net.parameters(), lr=0.01)
        loader: Any = DataLoader(TensorDataset(ids), 8)
        if own is None:
            loader = dpcompile.PoissonLoader.from_dataloader(loader, **PHYSICAL, seed=5, rank=0, world_size=1)
            model, optimizer, loader = dpcompile.make_private(net, optimizer, loader, **OPTIONS)
        else:
            model, optimizer, loader = make_private(own, net, optimizer, loader, **OPTIONS, **PHYSICAL)
        for (batch,) in loader:
            loss = per_example_causal_lm(model(input_ids=batch, use_cache=False).logits, batch).mean()
            loss.backward() if own is None else own.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return net

    expected = {name: p.detach() for name, p in run(None).named_parameters()}
    net = run(accelerator(transformer_cls_names_to_wrap=None))
    assert len([m for m in net.modules() if isinstance(m, FSDPModule)]) == 3
    assert_same(net, expected)


def refused() -> None:
    for options, message in (
        ({"fsdp_version": 1}, "shards by FSDP1"),
        ({"cpu_ram_efficient_loading": True}, "the weights of all ranks but the first"),
    ):
        with pytest.raises(dpcompile.DPCompileError, match=message):
            make_private(accelerator(**options), *parts(), **OPTIONS, **PHYSICAL)
    own = accelerator()
    net, optimizer, loader = parts()
    F.cross_entropy(net(torch.randn(2, 6)), torch.zeros(2).long()).backward()
    optimizer.step()
    with pytest.raises(dpcompile.PrivacyError, match="took steps already"):
        make_private(own, net, optimizer, loader, **OPTIONS, **PHYSICAL)
    net, optimizer, loader = parts()
    with pytest.raises(dpcompile.PrivacyError, match="parameters that are not the model's"):
        make_private(own, copy.deepcopy(net), optimizer, loader, **OPTIONS, **PHYSICAL)
    net, optimizer, loader = parts()
    net, optimizer = own.prepare(net, optimizer)  # the norm and the head in one unit
    with pytest.raises(dpcompile.DPCompileError) as refusal:
        model, optimizer, loader = make_private(own, net, optimizer, loader, **OPTIONS, **PHYSICAL)
        train(model, optimizer, loader, own, 1)
    assert "fully_shard" in str(refusal.value), refusal.value


CHECKS = {"weights": weights, "states": states, "transformers": transformers, "refused": refused}

if __name__ == "__main__":
    run_checks(CHECKS, sys.argv[1:])
