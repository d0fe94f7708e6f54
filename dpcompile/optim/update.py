"""The update of one logical step: sums from the ledger, released by the mechanism, handed to the inner optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.optim import Optimizer

from dpcompile.distributed.shards import as_gradient, local_part, local_runs
from dpcompile.module import Engine
from dpcompile.noise.mechanism import Mechanism, Release
from dpcompile.optim import fused_adam, fused_sgd

__all__ = ["update_"]


def update_(optimizer: Optimizer, engine: Engine, mechanism: Mechanism, names: Sequence[str], step: int) -> None:
    """Put the private mean gradient of each trainable parameter into ``p.grad``, and step on it.

    Args:
        optimizer: the inner one.
        engine: of the model, whose ledger holds the clipped sums.
        mechanism: what releases them.
        names: of all trainable parameters.
        step: the logical step, whose noise has been used for nothing else.

    **Guarantee.** Every parameter's gradient is what the mechanism released: of the ledger's sum, or of zeros where no
    backward came. None is left as it was.
    """
    parameters = engine.parameters()
    first = 0 if engine.stage is None else engine.stage.first_parameter
    index = {name: first + i for i, name in enumerate(parameters)}
    totals = []
    for name in names:
        total, p = engine.ledger.total(name), parameters[name]
        if total is None:
            here = local_part(p.detach())
            total = torch.zeros_like(here, dtype=torch.promote_types(p.dtype, torch.float32))
        totals.append(total)
    release = Release(totals, [index[name] for name in names], step)
    weights = [parameters[name] for name in names]
    whole = not engine.distributed  # the fused step starts every parameter at its element 0
    if whole and any(f.update_(optimizer, weights, release, mechanism) for f in (fused_adam, fused_sgd)):
        return
    runs = [local_runs(w) for w in weights]
    totals = [t if len(r) == 1 else t.contiguous() for t, r in zip(totals, runs, strict=True)]
    mechanism.release(replace(release, totals=totals, runs=runs))
    for p, total in zip(weights, totals, strict=True):
        p.grad = as_gradient(p, total.to(p.dtype))
    optimizer.step()
