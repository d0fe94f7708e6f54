"""The loader of ``make_private``: made of a DataLoader, or the user's own, if it fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import DataLoader

from dpcompile.data.checks import taken_over
from dpcompile.data.loader import PoissonLoader
from dpcompile.distributed.ranks import rank, world_size
from dpcompile.errors import PrivacyError
from dpcompile.module import Engine

__all__ = ["private_loader_of"]


def private_loader_of(
    loader: Any,
    groups: Any,
    padding_example: Any,
    batch_size_schedule: Callable[[int], float] | None,
    seed: int,
    secure: bool,
    engine: Engine | None,
    numbers: Mapping[str, Any],
) -> PoissonLoader:
    """The user's own PoissonLoader, which must be as it was asked for, or one of the DataLoader's dataset.

    Args:
        loader: of the user.
        groups: as for the rest, see :func:`dpcompile.make_private`.
        padding_example: "
        batch_size_schedule: "
        seed: "
        secure: "
        engine: of the model, which knows the ranks; None: there is one.
        numbers: options of a PoissonLoader, by name; None: not asked for.

    Raises:
        PrivacyError: a PoissonLoader with other numbers, or ranks that are not known to share batches out.
    """
    if not isinstance(loader, (DataLoader, PoissonLoader)):
        raise PrivacyError(
            f"the loader is a {type(loader).__name__}",
            remedy="give a torch.utils.data.DataLoader or a PoissonLoader: make_private(model, optimizer, loader, ...)",
        )
    sizes = _sizes(loader, batch_size_schedule)
    if not isinstance(loader, PoissonLoader):
        options: dict[str, Any] = {**numbers, "seed": seed, "secure": secure, "padding_example": padding_example}
        options |= {} if sizes is None else {"expected_batch_size": sizes}
        options |= {"bands": 1 if numbers["bands"] is None else numbers["bands"], "groups": groups}
        if engine is not None and engine.distributed:
            if engine.data_ranks != world_size():
                raise PrivacyError(
                    f"{world_size()} ranks are {engine.data_ranks} groups of tensor parallelism, and the one that this "
                    "rank is in is not known",
                    remedy="make the loader: PoissonLoader(dataset, ..., rank=mesh.get_local_rank('dp'), "
                    "world_size=mesh['dp'].size())",
                )
            options |= {"rank": rank(), "world_size": world_size()}
        return PoissonLoader.from_dataloader(loader, **options)
    if groups is not None:
        raise PrivacyError(
            "groups, and a PoissonLoader that is made already",
            remedy="leave groups out, or make the PoissonLoader with them",
        )
    for name, value in numbers.items():
        if value not in (None, getattr(loader, name)):
            raise PrivacyError(
                f"{name} is {value}, and the PoissonLoader has {getattr(loader, name)}",
                remedy="leave it out, or make the PoissonLoader with it",
            )
    return loader


def _sizes(loader: Any, schedule: Callable[[int], float] | None) -> Callable[[int], float] | None:
    """The batch size of every draw; None: a constant."""
    if schedule is None:
        return None
    if isinstance(loader, PoissonLoader):
        raise PrivacyError(
            "batch_size_schedule, and a PoissonLoader that is made already",
            remedy="leave it out, and make the PoissonLoader with a function of the step as expected_batch_size",
        )
    first = taken_over(loader)["expected_batch_size"]
    return lambda step: first * schedule(step)
