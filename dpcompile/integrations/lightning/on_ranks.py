"""Lightning on several ranks: replicas (DistributedDataParallel), or shards (FSDP2, by ``configure_model``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dpcompile._torch.parallel import share_fsdp_state
from dpcompile.errors import PrivacyError
from dpcompile.integrations.lightning.fitting import FitsPrivately
from dpcompile.integrations.lightning.package import pl
from dpcompile.integrations.replicated import private_replicas
from dpcompile.regions.units import is_sharded

__all__ = ["DPDDPStrategy", "DPModelParallelStrategy"]

_OF_DDP = ("process_group_backend", "timeout", "start_method", "find_unused_parameters", "bucket_cap_mb",
           "gradient_as_bucket_view", "broadcast_buffers")  # fmt: skip


class DPDDPStrategy(FitsPrivately, pl.strategies.DDPStrategy):
    """Private training by replicas: ``Trainer(devices=2, strategy=DPDDPStrategy(target_epsilon=3.0, ...))``.

    All of :class:`DPStrategy` holds. Each rank takes its part of every draw, the ranks add their clipped sums up, and
    the weights are those of one process. As ever in Lightning the DataLoader's batch size is that of a rank: a draw has
    as many times more examples as there are ranks. A PoissonLoader is dealt out by ``rank=`` and ``world_size=``.

    Args:
        delta: as in :class:`DPStrategy`.
        submodule: likewise.
        **options: of :func:`dpcompile.make_private`; and of DistributedDataParallel and its strategy
            ``process_group_backend``, ``timeout``, ``start_method``, ``find_unused_parameters``, ``bucket_cap_mb``,
            ``gradient_as_bucket_view``, ``broadcast_buffers``.

    **Guarantee.** As of :func:`dpcompile.make_private`.
    """

    strategy_name = "dpcompile_ddp"

    def __init__(self, *, delta: float | None = None, submodule: str | None = None, **options: Any) -> None:
        private = {name: value for name, value in options.items() if name not in _OF_DDP}
        super().__init__(delta, submodule, private, **{n: v for n, v in options.items() if n in _OF_DDP})

    def _ranks(self) -> tuple[int, int]:
        return self.global_rank, self.world_size

    def configure_ddp(self) -> None:
        """What is private is replicated, and no more; what lies beside it starts as on the first rank."""
        for tensor in (*self.lightning_module.parameters(), *self.lightning_module.buffers()):
            dist.broadcast(tensor.detach(), 0)

    def _private(self, module: nn.Module, optimizers: Any, loader: Any, options: Mapping[str, Any]) -> Any:
        def replicate(private: Any) -> nn.Module:
            return DistributedDataParallel(private, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)

        return private_replicas(replicate, module, optimizers, loader, **options)


class DPModelParallelStrategy(FitsPrivately, pl.strategies.ModelParallelStrategy):
    """Private training of a model that ``configure_model`` shards, by ``fully_shard`` over ``self.device_mesh``.

    All of :class:`DPStrategy` holds. What is private is a unit of FSDP2: the one child that holds all trainable
    parameters, or the LightningModule itself. The batch size is that of a rank, as in :class:`DPDDPStrategy`.

    Args:
        delta: as in :class:`DPStrategy`.
        submodule: likewise.
        data_parallel_size: ranks that examples are dealt out to; "auto": all.
        tensor_parallel_size: ranks that share each layer, by ``parallelize_module``.
        save_distributed_checkpoint: as in Lightning's.
        process_group_backend: likewise.
        **options: of :func:`dpcompile.make_private`.

    **Guarantee.** As of :func:`dpcompile.make_private`.
    """

    strategy_name = "dpcompile_model_parallel"

    def __init__(
        self,
        *,
        delta: float | None = None,
        submodule: str | None = None,
        data_parallel_size: int | str = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            delta,
            submodule,
            options,
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """As in Lightning's; "auto" means all ranks."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.world_size // self._tensor_parallel_size
        super().setup_environment()

    def _ranks(self) -> tuple[int, int]:
        of_data = self.distributed_sampler_kwargs
        return of_data["rank"], of_data["num_replicas"]

    def _private(self, module: nn.Module, optimizers: Any, loader: Any, options: Mapping[str, Any]) -> Any:
        assert self._routed is not None
        if len(optimizers) > 1:
            raise PrivacyError(
                f"{len(optimizers)} optimizers in a DPModelParallelStrategy: torch saves the state of each by itself, "
                "and they take one private step together",
                remedy="return one optimizer from configure_optimizers, with a parameter group for each part",
            )
        if is_sharded(self._routed.module):
            share_fsdp_state(module, self._routed.module)
        return super()._private(module, optimizers, loader, options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """With the draws, once the optimizer's state is there."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if self._draws is not None:
            self.load_draws(checkpoint)
        return checkpoint
