"""``make_private`` of a model of which every rank holds a replica: compiled first, then wrapped, then the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from dpcompile.api import dp_compile
from dpcompile.noise.adaptive import AdaptiveClip
from dpcompile.private import make_private

__all__ = ["private_replicas"]

_COMPILED = set(inspect.signature(dp_compile).parameters) - {"model"}


def private_replicas(
    replicate: Callable[[Any], nn.Module], model: nn.Module, optimizer: Any, loader: Any, **options: Any
) -> tuple[Any, Any, Any]:
    """Model, optimizer and loader, private on every rank.

    Args:
        replicate: a private model to what trains it, as DistributedDataParallel does; on one rank it may be the model.
        model: an ordinary one.
        optimizer: as of :func:`dpcompile.make_private`.
        loader: likewise.
        **options: likewise.

    Raises:
        PrivacyError: what :func:`dpcompile.make_private` refuses.
    """
    compiled = {name: value for name, value in options.items() if name in _COMPILED}
    rest = {name: value for name, value in options.items() if name not in _COMPILED or name == "examples_per_user"}
    bound = compiled.get("max_grad_norm")
    if isinstance(bound, AdaptiveClip):
        rest["max_grad_norm"] = bound
        compiled["max_grad_norm"] = 1.0 if bound.initial is None else bound.initial
    elif bound is None:
        compiled.pop("max_grad_norm", None)
    return make_private(replicate(dp_compile(model, **compiled)), optimizer, loader, **rest)
