"""Accelerate: ``make_private(accelerator, model, optimizer, loader, ...)`` in the place of ``accelerator.prepare``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import send_to_device
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpcompile.data.loader import PoissonLoader
from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.integrations.accelerate_fsdp import refuse_plugin, shard
from dpcompile.integrations.replicated import private_replicas
from dpcompile.private import make_private as _make_private

__all__ = ["PlacedLoader", "make_private"]


def make_private(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, loader: Any, **options: Any
) -> tuple[Any, Any, PlacedLoader]:
    """Make model, optimizer and loader private, and prepare them.

    The loop stays as it is with Accelerate: ``accelerator.backward(loss)``, ``with accelerator.accumulate(model)``,
    ``save_state`` and ``load_state``, which go on exactly. A state holds the seed: keep it as secret as the data.

    Args:
        accelerator: without gradient accumulation, on one device or several with DistributedDataParallel or FSDP2.
        model: an ordinary one. What was prepared already, is taken back first: so are the others. Under FSDP2 not
            prepared: it is sharded here, by the plugin's policy.
        optimizer: of torch.
        loader: a DataLoader, whose batch size is that of all processes together, or a PoissonLoader.
        **options: of :func:`dpcompile.make_private`.

    Returns:
        ``(model, optimizer, loader)``, prepared. Learning-rate schedulers and other loaders go through
        ``accelerator.prepare`` as ever.

    Raises:
        PrivacyError: gradient accumulation, or whatever :func:`dpcompile.make_private` refuses.
        UnsupportedGraphError: other ways to distribute a model.

    **Guarantee.** As of :func:`dpcompile.make_private`.
    """
    _refuse_settings(accelerator)
    model, optimizer, loader = _unprepared(accelerator, model, optimizer, loader)
    if accelerator.distributed_type.value == "FSDP":
        shard(accelerator, model, optimizer if isinstance(optimizer, (list, tuple)) else [optimizer])
        return _placed(accelerator, *_make_private(model, optimizer, loader, **options))
    return _placed(accelerator, *private_replicas(accelerator.prepare_model, model, optimizer, loader, **options))


def _placed(accelerator: Any, private: Any, optimizer: Any, draws: PoissonLoader) -> tuple[Any, Any, PlacedLoader]:
    """Known to the accelerator, which saves and loads them."""
    if not any(known is private for known in accelerator._models):
        accelerator._models.append(private)
    placed = PlacedLoader(draws, accelerator)
    accelerator.register_for_checkpointing(placed)
    return private, accelerator.prepare_optimizer(optimizer), placed


class PlacedLoader:
    """A loader whose batches come on the accelerator's device.

    Attributes:
        loader: the PoissonLoader.
    """

    def __init__(self, loader: PoissonLoader, accelerator: Accelerator) -> None:
        self.loader, self._accelerator = loader, accelerator

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield send_to_device(batch, self._accelerator.device)

    @property
    def dataset(self) -> Any:
        """Of the loader."""
        return self.loader.dataset

    def state_dict(self) -> dict[str, Any]:
        """Of the loader."""
        return self.loader.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Of the loader; ``accelerator.load_state`` loads the optimizer before."""
        self.loader.load_state_dict(state_dict)


def _refuse_settings(accelerator: Any) -> None:
    steps = accelerator.gradient_accumulation_steps
    if steps != 1:
        raise PrivacyError(
            f"gradient_accumulation_steps is {steps}: a step is one draw, not several",
            remedy="leave it out, and give the DataLoader the batch size of a whole step; with physical_batch_size= a "
            "draw runs in parts that fit into memory",
        )
    compiler = accelerator.state.dynamo_plugin.backend.value
    if compiler != "NO":
        raise PrivacyError(
            f"the accelerator compiles with {compiler}: a graph around the private model could not be rewritten",
            remedy="leave dynamo_backend and dynamo_plugin out: the private model compiles itself (backend=)",
        )
    kind = accelerator.distributed_type.value
    if kind == "FSDP":
        refuse_plugin(accelerator)
    elif kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise UnsupportedGraphError(
            f"the accelerator distributes by {kind}",
            remedy="DistributedDataParallel and FSDP2 work through Accelerate",
        )


def _unprepared(accelerator: Any, model: Any, optimizer: Any, loader: Any) -> tuple[Any, Any, Any]:
    """What ``accelerator.prepare`` made of them, taken back, and out of the accelerator's lists."""
    for known, object in ((accelerator._models, model), (accelerator._optimizers, optimizer)):
        known[:] = [x for x in known if x is not object]
    accelerator._dataloaders[:] = [x for x in accelerator._dataloaders if x is not loader]
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(model).pop("_is_accelerate_prepared", None)
    if isinstance(optimizer, Optimizer) and type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return model, optimizer, _plain_loader(loader)


def _plain_loader(loader: Any) -> Any:
    base = getattr(loader, "base_dataloader", None)
    if base is None:
        return loader
    batches = getattr(base.batch_sampler, "batch_sampler", base.batch_sampler)  # of one process, if there are more
    sampler = batches.sampler
    whole = type(sampler) is SeedableRandomSampler and not sampler.replacement and len(sampler) == len(base.dataset)
    names = ("collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
             "prefetch_factor", "persistent_workers")  # fmt: skip
    options = {name: getattr(base, name) for name in names}
    return DataLoader(base.dataset, batches.batch_size, sampler=None if whole else sampler, **options)
