"""Loaders over the small data, and models and optimizers for them, made by themselves."""

from __future__ import annotations

from typing import Any

from remedies import Right, data, plain, sgd, trains

from dpcompile import DPOptimizer, PoissonLoader, dp_compile

__all__ = ["SIZE", "attached", "parts", "poisson"]

SIZE: dict[str, Any] = {"expected_batch_size": 8}


def poisson(size: int = 24, **options: Any) -> PoissonLoader:
    return PoissonLoader(data(size).dataset, **{**SIZE, **options})


def parts(**options: Any) -> tuple[Any, Any]:
    """Model and optimizer without ``make_private``."""
    everything: Any = {"backend": "eager", **options}
    model = dp_compile(plain(), **everything)
    return model, DPOptimizer(sgd(model), model, noise_multiplier=1.0, expected_batch_size=8)


def attached(loader: PoissonLoader) -> Right:
    model, optimizer = parts()
    return trains(model, optimizer, loader.attach(model, optimizer))
