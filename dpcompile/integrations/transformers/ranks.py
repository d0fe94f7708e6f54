"""A Trainer on several ranks: its model is a replica on each, or sharded by FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from dpcompile.errors import PrivacyError
from dpcompile.integrations.accelerate_fsdp import refuse_plugin, shard, take_private_optimizers, tell_of_shards
from dpcompile.regions.units import is_sharded

__all__ = ["OnRanks"]

_FSDP = "ACCELERATE_USE_FSDP"

# For the type checker alone: the mixin stands before a Trainer.
_Base = Trainer if TYPE_CHECKING else object


class OnRanks(_Base):
    """What of a Trainer is about ranks: not Accelerate but this shards its model, in units that can be made private.

    **Guarantee.** :attr:`model` is the ordinary model, whatever the Trainer puts in its place.
    """

    _ordinary: Any = None

    @property
    def model(self) -> Any:  # type: ignore[override]
        """The ordinary model, under FSDP too, where the Trainer would put the wrapped one here."""
        return self._ordinary

    @model.setter
    def model(self, value: Any) -> None:
        made: Any = getattr(self, "_private", None)
        if made is None or value is not made.model:
            self._ordinary = value

    def create_accelerator_and_postprocess(self) -> None:
        """As in the Trainer; on CPUs FSDP is not left out.

        Raises:
            PrivacyError: what of FSDP cannot be had.
            UnsupportedGraphError: likewise.
        """
        before = os.environ.get(_FSDP)
        super().create_accelerator_and_postprocess()
        accelerator: Any = self.accelerator
        on_cpus = accelerator.distributed_type.value == "MULTI_CPU"
        if before is None and on_cpus:  # Accelerate sets it, for every Trainer that comes after
            os.environ.pop(_FSDP, None)
        if on_cpus and (self.args.fsdp or (before or "").lower() == "true"):
            given: Any = self.args.fsdp_plugin_args if self.args.fsdp else {}
            tell_of_shards(accelerator, FullyShardedDataParallelPlugin(**given))
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            refuse_plugin(accelerator)
            take_private_optimizers(accelerator)
        elif accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            raise PrivacyError(
                f"the Trainer's accelerator distributes by {accelerator.distributed_type.value}",
                remedy="DistributedDataParallel and FSDP2 work: fsdp=True, fsdp_config={'version': 2}",
            )

    @property
    def replicated(self) -> Callable[[Any], nn.Module] | None:
        """What puts a replica of a private model on every rank; None: there is one rank, or it is sharded."""
        accelerator: Any = self.accelerator
        if accelerator.distributed_type.value not in ("MULTI_CPU", "MULTI_GPU"):
            return None
        options = {} if accelerator.ddp_handler is None else accelerator.ddp_handler.to_kwargs()
        place = [accelerator.device] if accelerator.device.type == "cuda" else None
        return partial(DistributedDataParallel, device_ids=place, **options)

    def sharded(self) -> Any:
        """The ordinary model, sharded by now if it is to be: before its optimizer is made, or it is evaluated."""
        if self.is_fsdp_enabled:
            before = is_sharded(self.model)
            _forward_of_class(self.model)
            shard(self.accelerator, self.model, [])
            if not before and hasattr(self.model, "generate"):
                register_fsdp_forward_method(self.model, "generate")
        if not self.is_fsdp_enabled and any(is_sharded(m) for m in self.model.modules()):
            raise PrivacyError(
                "the model is sharded, and the Trainer does not know of it: it would put a copy on every rank",
                remedy="give fsdp=True, fsdp_config={'version': 2}, with the model as it is or sharded by fully_shard",
            )
        return self.model


def _forward_of_class(model: nn.Module) -> None:
    """A forward that was put on the object (TRL does so) becomes that of a class: FSDP's hooks are around that."""
    forward, kind = vars(model).get("forward"), type(model)
    if isinstance(forward, MethodType) and forward.__self__ is model:
        del vars(model)["forward"]
        own = {"forward": forward.__func__, "__module__": kind.__module__, "__doc__": kind.__doc__}
        model.__class__ = type(kind.__name__, (kind,), own)
