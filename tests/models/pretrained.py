"""Models of Hugging Face Transformers: random weights, tiny configurations, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from models.case import Call, register

__all__ = ["FIVE", "build", "case"]

Inputs = Callable[[int], Call]
FIVE = int(transformers.__version__.partition(".")[0]) >= 5

logging.set_verbosity_error()


def build(architecture: str, *, train: bool = True, dropout: float = 0.0, **config: Any) -> nn.Module:
    """A model by the name of its class, with noise on all parameters: no layer starts as the identity.

    Args:
        architecture: a class of ``transformers``.
        train: training mode, else evaluation mode.
        dropout: every rate of the configuration that has to do with dropping something out.
        config: of the configuration class that belongs to the architecture.
    """
    kind: Any = getattr(transformers, architecture)
    configuration = kind.config_class(**config)
    set_dropout(configuration, dropout)
    model: nn.Module = kind._from_config(configuration)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.train(train)


def set_dropout(configuration: Any, rate: float) -> None:
    """Set the dropout rates of a configuration and of those in it; no layer is dropped, that would be a branch."""
    for name, value in vars(configuration).items():
        if isinstance(value, transformers.PretrainedConfig):
            set_dropout(value, rate)
        elif ("drop" in name or "pdrop" in name) and isinstance(value, float):
            setattr(configuration, name, 0.0 if "layerdrop" in name else rate)


def case(family: str, architecture: str, inputs: Inputs, name: str | None = None, /, **options: Any) -> None:
    """Register a model with what :func:`build` takes, with the fields of a case, and with

    ``called``: whether the model is called once before (it installs hooks then), and ``quick``: whether CI runs it
    under every rule.
    """
    fields = {k: options.pop(k) for k in ("in_dims", "refused", "reason", "tolerance", "rare") if k in options}
    called, quick = options.pop("called", False), options.pop("quick", False)

    def make() -> nn.Module:
        model = build(architecture, **options)
        if called:
            args, kwargs = inputs(2)
            with torch.no_grad():
                model(*args, **kwargs)
        return model

    make.__module__ = family
    register(inputs, name or architecture, slow=not quick, **fields)(make)
