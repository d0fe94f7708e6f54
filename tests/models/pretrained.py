"""Models of Hugging Face Transformers: random weights, tiny configurations, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from models.case import Call, register

__all__ = ["build", "case"]

Inputs = Callable[[int], Call]


def build(architecture: str, *, train: bool = True, dropout: float = 0.0, spread: float = 0.1, **config: Any) -> nn.Module:
    """A model by the name of its class.

    Args:
        architecture: a class of ``transformers``.
        train: training mode, else evaluation mode.
        dropout: every rate of the configuration that has to do with dropping something out.
        spread: noise on all parameters, so that no layer starts as the identity and no bias at zero.
        config: of the configuration class that belongs to the architecture.
    """
    kind: Any = getattr(transformers, architecture)
    configuration = kind.config_class(**config)
    silence(configuration, dropout)
    model: nn.Module = kind._from_config(configuration)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=spread)
    return model.train(train)


def silence(configuration: Any, dropout: float) -> None:
    """Set the dropout rates of a configuration and of those in it."""
    for name, value in vars(configuration).items():
        if isinstance(value, transformers.PretrainedConfig):
            silence(value, dropout)
        elif ("drop" in name or "pdrop" in name) and isinstance(value, float):
            setattr(configuration, name, dropout)


def case(family: str, architecture: str, inputs: Inputs, name: str | None = None, /, **options: Any) -> None:
    """Register a model with what :func:`build` takes and with the fields of a case."""
    fields = {k: options.pop(k) for k in ("in_dims", "refused", "reason", "slow", "tolerance") if k in options}

    def make() -> nn.Module:
        return build(architecture, **options)

    make.__module__ = family
    register(inputs, name or architecture, **fields)(make)
