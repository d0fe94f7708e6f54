"""Which module of a larger one is made private, and what stays outside of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dpcompile.batchnorm import batch_normalised
from dpcompile.errors import ExampleMixingError, PrivacyError

__all__ = [
    "Routed",
    "private_part",
    "refuse_batchnorm_beside",
    "refuse_parameters_beside",
    "without_frozen",
]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def private_part(module: nn.Module) -> str:
    """Name of the one child that holds all trainable parameters; "" where several do, or the module has its own."""
    own = any(p.requires_grad for p in module.parameters(recurse=False))
    trained = [(n, c) for n, c in module.named_children() if any(p.requires_grad for p in c.parameters())]
    if own or len(trained) != 1 or isinstance(trained[0][1], _CONTAINERS):
        return ""
    return trained[0][0]


def refuse_parameters_beside(module: nn.Module, name: str) -> None:
    """Raise PrivacyError if parameters are trained outside of the submodule of this name."""
    inside = {id(p) for p in module.get_submodule(name).parameters()}
    outside = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in inside]
    if outside:
        raise PrivacyError(
            f"what is to be private, '{name}', does not hold all that is trained: {', '.join(outside[:4])}"
            + (" ..." if len(outside) > 4 else ""),
            remedy="leave submodule out, or freeze them: parameter.requires_grad_(False)",
        )


def refuse_batchnorm_beside(module: nn.Module, part: nn.Module) -> None:
    """Raise ExampleMixingError if a BatchNorm outside of what is private, which no proof sees, is in training mode."""
    inside = {id(m) for m in part.modules()}
    found = next((name for name, m in batch_normalised(module).items() if id(m) not in inside), None)
    if found is not None:
        raise ExampleMixingError(
            f"BatchNorm '{found}' is outside of what is private, and normalises by the batch: examples meet in it",
            remedy=f"call self.{found}.eval() in on_train_epoch_start, or dpcompile.replace_batchnorm on the module",
        )


def without_frozen(optimizers: Iterable[Optimizer], part: nn.Module) -> Iterator[Optimizer]:
    """The optimizers, without parameters that are frozen and outside of what is private: they had nothing to do."""
    inside = {id(p) for p in part.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.requires_grad or id(p) in inside]
        yield optimizer


class Routed:
    """A module whose calls go to a private one of the same state: others hold the object itself, and call it.

    Until :meth:`undo` its class is a subclass of its own, as under ``fully_shard``.

    Args:
        module: of the user.

    Attributes:
        plain: the module once more, on the same state, whose calls stay its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.plain: Any = object.__new__(self.kind)
        object.__setattr__(self.plain, "__dict__", module.__dict__)

    def to(self, private: Any) -> None:
        """From now on calls go there. A copy of the module has calls of its own."""
        module, kind = self.module, self.kind

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return private(*args, **kwargs) if self is module else kind.__call__(self, *args, **kwargs)

        names = {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__}
        module.__class__ = type(kind.__name__, (kind,), names)

    def undo(self) -> None:
        """Calls are the module's own again."""
        self.module.__class__ = self.kind
