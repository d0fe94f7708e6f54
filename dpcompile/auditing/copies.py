"""Model, optimizer, accountant and loader of an audit: like the user's, and sharing nothing with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.api import dp_compile
from dpcompile.auditing.canaries import AuditedData, Collation
from dpcompile.data.loader import PoissonLoader
from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.module import Engine, PrivateModule, engine_of
from dpcompile.noise.mechanism import GaussianMechanism
from dpcompile.optim.chained import parts_of
from dpcompile.optim.optimizer import DPOptimizer
from dpcompile.optim.quantiles import for_groups_of

__all__ = ["accountant_like", "compiled_like", "copied_model", "loader_like", "optimizer_like", "refuse_uncopied"]


def refuse_uncopied(engine: Engine, optimizer: DPOptimizer, *, more_arguments: bool) -> None:
    """Refuse what has no copy that would be the same run.

    Args:
        engine: of the model.
        optimizer: of the model.
        more_arguments: whether the copy is called with one argument more.

    Raises:
        UnsupportedGraphError: a sharded model.
        PrivacyError: a mechanism that goes on from its earlier steps, or example dimensions that cannot be told for one
            argument more.
    """
    if engine.sharded:
        raise UnsupportedGraphError(
            "the model is sharded, and an audit trains a copy of it",
            remedy="audit a model of a few blocks with the same options, on one rank or under DistributedDataParallel",
        )
    if not isinstance(optimizer.mechanism, GaussianMechanism) and optimizer.logical_step:
        raise PrivacyError(
            f"the mechanism, a {type(optimizer.mechanism).__name__}, has released {optimizer.logical_step} steps, and "
            "an audit's run begins with the first",
            remedy="audit before training",
        )
    dims = engine.options.in_dims
    if more_arguments and not isinstance(dims, (list, tuple)) and dims != 0:
        raise PrivacyError(
            f"in_dims is {dims!r}, and these canaries come in as one argument more",
            remedy="give in_dims with one entry per positional argument, or take kind='data'",
        )


def copied_model(engine: Engine) -> nn.Module:
    """The user's module, weights as they are, without gradients."""
    module = copy.deepcopy(engine.module)
    module.zero_grad()
    return module


def compiled_like(outer: Any, module: nn.Module, *, more_arguments: bool) -> Any:
    """A module compiled with the options of another model, and replicated if that one is."""
    engine = engine_of(outer)
    options = replace(engine.options, max_grad_norm=engine.max_grad_norm)
    if more_arguments and isinstance(options.in_dims, (list, tuple)):
        options = replace(options, in_dims=(0, *options.in_dims))
    private: Any
    if isinstance(module, PrivateModule):  # without its calls: of a decorated class, which brings its options
        kind: Any = type(module).__mro__[1]
        private = kind.__new__(kind)
        object.__setattr__(private, "__dict__", module.__dict__)
        engine_of(private).move_bounds(engine.clip.now)
    else:
        names = (f.name for f in fields(options) if f.name != "machine")  # that is no option of a model that runs
        private = dp_compile(module, **{name: getattr(options, name) for name in names})
    return DistributedDataParallel(private) if isinstance(outer, DistributedDataParallel) else private


def optimizer_like(
    optimizer: DPOptimizer,
    model: Any,
    counterparts: Mapping[int, nn.Parameter],
    more: Sequence[nn.Parameter],
    seed: int,
    accountant: PrivacyAccountant | None,
) -> DPOptimizer:
    """An optimizer of the same kind, options and mechanism, from its first step and with other noise.

    Args:
        optimizer: of the user.
        model: the copy, private.
        counterparts: its parameters, by the ``id`` of the user's.
        more: parameters that the user's model lacks; they go where the user's last ones are.
        seed: of the noise.
        accountant: a new one.
    """
    parts = [_part_like(part, counterparts) for part in parts_of(optimizer.optimizer) if not hasattr(part, "parts")]
    if more:
        parts[-1].param_groups[-1]["params"].extend(more)
    mechanism = for_groups_of(engine_of(model), copy.deepcopy(optimizer.mechanism))
    mechanism.seed = seed
    private = DPOptimizer(parts, model, mechanism=mechanism, accountant=accountant)
    private.plan(None, noise_schedule=optimizer.noise_schedule)
    return private


def _part_like(part: Optimizer, counterparts: Mapping[int, nn.Parameter]) -> Optimizer:
    groups = [
        {k: v for k, v in group.items() if k in part.defaults}
        | {"params": [counterparts[id(p)] for p in group["params"]]}
        for group in part.param_groups
    ]
    return type(part)(groups)  # type: ignore[call-arg]


def accountant_like(optimizer: DPOptimizer, loader: PoissonLoader) -> PrivacyAccountant | None:
    """One that has counted nothing yet, for draws of this loader."""
    given = optimizer.accountant
    if given is None:
        return None
    return PrivacyAccountant(
        noise_multiplier=given.noise_multiplier,
        sample_rate=given.sample_rate,
        method=getattr(given, "method", "pld"),
        relation=given.relation,
        truncation=loader.truncation,
    )


def loader_like(loader: PoissonLoader, data: AuditedData, steps: int, padding: Any, seed: int) -> PoissonLoader:
    """A loader of other rows, of the same rate, divisor and physical size, also where these go by the step.

    A cap on draws is the same part of all rows, or users.
    """
    by_step, cap = loader.schedule, loader.max_batch_size
    if cap is not None:
        cap = max(round(cap * len(data.owners.unique()) / loader.dataset_size), 1)
    return PoissonLoader(
        data,
        expected_batch_size=loader.expected_batch_size if by_step is None else by_step.expected_batch_size,
        sample_rate=loader.sample_rate if by_step is None else by_step.sample_rate,
        groups=None if loader.users is None else data.owners,
        examples_per_user=None if loader.users is None else loader.users.examples_per_user,
        bands=loader.bands,
        max_batch_size=cap,
        physical_batch_size=loader.physical_batch_size,
        steps=steps,
        seed=seed,
        secure=loader.secure,
        collate_fn=Collation(loader.collate_fn),
        padding_example=padding,
        rank=loader.rank,
        world_size=loader.world_size,
    )
