"""The run that is audited: the ordinary loop on a copy of the user's model, optimizer and loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from dpcompile.auditing.attacks import Attack
from dpcompile.auditing.canaries import sign
from dpcompile.data.loader import PoissonLoader
from dpcompile.errors import PrivacyError
from dpcompile.module import engine_of
from dpcompile.optim.chained import parts_of
from dpcompile.optim.optimizer import DPOptimizer

__all__ = ["Loss", "Run", "one_each", "shows_gradients"]

Loss = Callable[[Any, Any], Tensor]
_PLAIN = {"momentum": 0, "weight_decay": 0, "maximize": False}


@dataclass(frozen=True, slots=True)
class Run:
    """One private run.

    Attributes:
        model: private, also one inside DistributedDataParallel.
        optimizer: of the model.
        loader: attached to both; its batches are those of `AuditedData`.
        loss: of the user.
        audited: the module that has a loss of canaries, which the model is then; None: the model is the user's.
    """

    model: Any
    optimizer: DPOptimizer
    loader: PoissonLoader
    loss: Loss
    audited: Any = None

    def watched_by(self, attack: Attack) -> None:
        """One pass over the loader, every step of which the attack sees."""
        module = engine_of(self.model).module
        for step, (batch, places, weights) in enumerate(self.loader):
            attack.before(module)
            if self.audited is not None:
                self.audited.sign.fill_(sign(step))
            self._total(batch, places, weights).backward()
            held = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
            self.optimizer.step()
            attack.after(step, self._released(module, held, self._divisor(step)))
            self.optimizer.zero_grad()

    def _total(self, batch: Any, places: Tensor, weights: Tensor) -> Tensor:
        if self.audited is None:
            values = one_each(self.loss(self.model, batch), len(weights))
            rows = torch.where(weights[:, 0].to(values.device) > 0, values, 0.0)
        else:
            call = _Call(self.model, self.audited, places)
            values = one_each(self.loss(call, batch), len(weights))
            if call.found is None:
                raise PrivacyError("the loss did not call the model", remedy="call the model that the loss is given")
            weights = weights.to(call.found.device)
            rows = torch.where(weights[:, 0] > 0, values, 0.0) + torch.where(weights[:, 1] > 0, call.found, 0.0)
        return rows.mean() if engine_of(self.model).options.loss_reduction == "mean" else rows.sum()

    def _divisor(self, step: int) -> float:
        by_step = self.loader.schedule
        return self.optimizer.expected_batch_size if by_step is None else by_step.at(step).expected_batch_size

    def _released(self, module: nn.Module, held: Mapping[str, Tensor], size: float) -> dict[str, Tensor]:
        """What the step gave away of every parameter: of the weights where they move by the private mean alone.

        ``size`` is what the sums were divided by.
        """
        parameters = dict(module.named_parameters())
        if shows_gradients(self.optimizer.optimizer):
            return {name: _gradient(parameters[name]) * size for name in held}
        rates = {id(p): float(g["lr"]) for g in self.optimizer.param_groups for p in g["params"]}
        return {
            name: (before.double() - parameters[name].detach().double()) * (size / rates[id(parameters[name])])
            for name, before in held.items()
        }


def _gradient(p: nn.Parameter) -> Tensor:
    assert p.grad is not None, "every parameter of a step has a private gradient"
    return p.grad.detach()


def shows_gradients(optimizer: Optimizer) -> bool:
    """Whether the attack is to look at private gradients: not all of them can be told from the weights' way."""
    parts = [part for part in parts_of(optimizer) if not hasattr(part, "parts")]
    plain = all(type(part) is SGD for part in parts)
    return not (
        plain and all(g[name] == value for p in parts for g in p.param_groups for name, value in _PLAIN.items())
    )


def one_each(losses: Any, count: int) -> Tensor:
    """The losses, one for each example.

    Raises:
        PrivacyError: they are of another shape.
    """
    if not isinstance(losses, Tensor) or losses.shape != (count,):
        shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise PrivacyError(
            f"the loss gives {shape} for {count} examples",
            remedy="give loss(model, batch) that returns one value per example (reduction='none')",
        )
    return losses


class _Call:
    """The model as the user's loss sees it: called with the user's arguments, it is given the places as well."""

    def __init__(self, model: Any, audited: Any, places: Tensor) -> None:
        self._model, self._audited = model, audited
        self._places = places.to(audited.sign.device)
        self.found: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs, self.found = self._model(self._places, *args, **kwargs)
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._audited.model, name)
