"""Private draws as Lightning's loops know a loader, made of the DataLoader that ``fit`` was given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from dpcompile.data.loader import PoissonLoader
from dpcompile.data.making import private_loader_of
from dpcompile.errors import PrivacyError

__all__ = ["DrawnEpochs", "private_draws"]

# What `make_private` hands on to the loader.
_OF_LOADER = ("physical_batch_size", "max_batch_size", "bands", "examples_per_user")
_KEPT = ("collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
         "prefetch_factor", "persistent_workers")  # fmt: skip


class DrawnEpochs:
    """What the Trainer iterates over: an epoch is ``len(loader)`` draws, wherever in a pass it begins.

    Args:
        loader: of the draws.
    """

    def __init__(self, loader: PoissonLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        left = len(self.loader)
        while left:
            for batch in self.loader:
                left -= 1
                yield batch
                if not left:
                    break

    def state_dict(self) -> dict[str, Any]:
        """Of the loader."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of the loader."""
        self.loader.load_state_dict(state)


def private_draws(
    dataloader: Any, options: Mapping[str, Any], seed: int, secure: bool, ranks: tuple[int, int]
) -> DrawnEpochs:
    """Private draws from what ``fit`` was given.

    Args:
        dataloader: a DataLoader, whose batch size is that of a rank, or a PoissonLoader.
        options: of :func:`dpcompile.make_private`.
        seed: of the draws.
        secure: likewise.
        ranks: which one this is, and how many there are, that examples are dealt out to.

    Raises:
        PrivacyError: it is neither, or what the loader refuses.
    """
    if options.get("max_batch_size") == "auto":
        raise PrivacyError("max_batch_size is 'auto' in a DPStrategy", remedy="give it a number")
    if not isinstance(dataloader, (DataLoader, PoissonLoader)):
        raise PrivacyError(
            f"fit was given a {type(dataloader).__name__} to train on",
            remedy="give it a DataLoader over the examples, or a PoissonLoader",
        )
    numbers = {name: options.get(name) for name in _OF_LOADER}
    numbers |= {"in_turn": options.get("in_turn") is not None or None}
    if ranks[1] > 1 and isinstance(dataloader, DataLoader):
        dataloader = _of_all_ranks(dataloader, ranks[1])
        numbers |= {"rank": ranks[0], "world_size": ranks[1]}
    given = (options.get(name) for name in ("groups", "padding_example", "batch_size_schedule"))
    return DrawnEpochs(private_loader_of(dataloader, *given, seed, secure, None, numbers))  # type: ignore[arg-type]


def _of_all_ranks(loader: DataLoader[Any], ranks: int) -> DataLoader[Any]:
    """As it is for a rank, in one piece: Lightning has put a sampler in that takes every rank's part."""
    if loader.batch_size is None:
        return loader
    sampler: Any = loader.sampler
    whole = type(sampler) is DistributedSampler and sampler.dataset is loader.dataset and sampler.num_replicas == ranks
    options = {name: getattr(loader, name) for name in _KEPT}
    return DataLoader(loader.dataset, loader.batch_size * ranks, sampler=None if whole else sampler, **options)
