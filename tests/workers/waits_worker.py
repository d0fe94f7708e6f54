"""What tests/runtime/test_waits.py runs in a process of its own: training on a device that is not there."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from waits import Waits

from dpcompile import DPOptimizer, dp_compile
from dpcompile.module import set_mask

Step = Callable[[Waits, Any, Any, Tensor], None]


class Net(nn.Module):
    """A table, linear layers on several positions and on one, a norm, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.norm = nn.Embedding(11, 4), nn.Linear(4, 8), nn.LayerNorm(8)
        self.filters, self.head = nn.Conv1d(8, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, 3]``."""
        x = self.norm(self.up(self.table(ids)).relu())
        return self.head(self.filters(x.mT).mean(-1))


def step(waits: Waits, model: Any, optimizer: Any, ids: Tensor) -> None:
    """An ordinary one."""
    model(ids).square().mean(1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def masked(waits: Waits, model: Any, optimizer: Any, ids: Tensor) -> None:
    """With padding, of which the host tells."""
    set_mask(model, torch.tensor([True] * 3 + [False] * 2))
    step(waits, model, optimizer, ids)


def accumulated(waits: Waits, model: Any, optimizer: Any, ids: Tensor) -> None:
    """Two backwards for one step."""
    model(ids).square().mean(1).mean().backward()
    step(waits, model, optimizer, ids)


def reading(how: Callable[[Tensor], object], waits: Waits, model: Any, optimizer: Any, ids: Tensor) -> None:
    """With something that waits in the loop."""
    losses = model(ids).square().mean(1)
    how(losses.detach())
    losses.mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def found(take: Step, norm: str = "auto", kind: Any = torch.optim.AdamW, **options: Any) -> dict[str, int]:
    """What waits in the third step, when everything is compiled and made."""
    torch._dynamo.reset()
    waits = Waits()
    model: Any = waits.move(Net())
    ids = waits.like(torch.zeros(5, 7, dtype=torch.int64))
    private: Any = dp_compile(model, backend="eager", dynamic=False, norm=norm, **options)
    optimizer = DPOptimizer(
        kind(private.parameters(), lr=0.1), private, noise_multiplier=1.0, expected_batch_size=5, seed=1
    )
    with waits:
        for _ in range(3):
            waits.found.clear()
            take(waits, private, optimizer, ids)
    return {f"{operation} in {place}": n for (operation, place), n in sorted(waits.found.items())}


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.isfinite().all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x + 1),
    "blocking": lambda x: torch.ones(5).to(x.device),
    "nothing": lambda x: torch.ones(5).to(x.device, non_blocking=True),
}


def read(how: Callable[[Tensor], object]) -> dict[str, int]:
    """What waits in a function of values on the device."""
    waits = Waits()
    values = waits.like(torch.ones(5))
    with waits:
        how(values)
    return {operation: n for (operation, _), n in sorted(waits.found.items())}


def main() -> None:
    """Print what is found, as JSON."""
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    told: dict[str, Any] = {f"reads, {name}": read(how) for name, how in READS.items()}
    told["inserted"] = found(partial(reading, READS["item"]), "instantiate")
    told["instantiate"] = found(step, "instantiate")
    told["ghost"] = found(masked, "ghost", partial(torch.optim.SGD, momentum=0.9))
    if "all" in sys.argv:
        told |= {norm: found(step, norm) for norm in ("auto", "redo", "direct")}
        told["accumulated"] = found(accumulated, "instantiate")
        told["per_layer"] = found(step, "instantiate", clipping="per_layer")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
