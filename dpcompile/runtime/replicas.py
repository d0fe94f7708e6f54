"""Models under DistributedDataParallel: what is refused, and the clipped sums added up over the replicas.

DistributedDataParallel averages what autograd accumulates. Clipped sums do not go through autograd, so its own
reduction stays idle, and they are added up here: a sum, in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dpcompile._torch.autograd import after_backward
from dpcompile._torch.parallel import active_replica, ddp_options
from dpcompile.distributed.ranks import refuse_other_place, refuse_some
from dpcompile.distributed.shards import is_distributed, zeros_for
from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.noise.exact import ExactMechanism
from dpcompile.runtime.ledger import GradientLedger
from dpcompile.runtime.reductions import add_up, add_up_exactly

__all__ = ["Replicas", "inner_module", "refuse_wrapped"]

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")


def inner_module(model: Any) -> Any:
    """The module inside a DistributedDataParallel; another model as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def refuse_wrapped(model: nn.Module) -> None:
    """Raise UnsupportedGraphError if a model to be compiled is parallel by a wrapper of its own."""
    for module in model.modules():
        kind = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _WRAPPERS), None)
        if kind is not None and type(module).__module__.startswith("torch."):
            raise UnsupportedGraphError(
                f"the model to compile is, or holds, a {kind}",
                remedy="compile what is inside, then wrap it: DistributedDataParallel(dp_compile(model)); to shard, "
                "call torch.distributed.fsdp.fully_shard on the model before dp_compile",
            )


class Replicas:
    """Between the backward and the ledger, of a model inside DistributedDataParallel: sums over the replicas.

    Args:
        ledger: of the model.
        trainable: the trainable parameters by name, in the order of the model.
        place: where training stands, small numbers that are the same on all ranks: steps taken, draw.

    Attributes:
        rounding: an exact mechanism, on whose grid sums are added up as integers; None: they are added up as they are.

    **Guarantee.** Once a model was seen inside DistributedDataParallel, what the ledger has in ``p.grad`` is the same
    on all replicas: for every backward outside ``no_sync()``, the sum over all ranks of what came since the one before.

    =================================================  ================================================
    edge case                                          outcome
    =================================================  ================================================
    backwards under ``no_sync()``                      held back, and added up with the next outside it
    a step while sums are held back                    refused by the ledger
    a rank whose backward reaches fewer parameters     zeros for the others
    a call that runs in parts                          added up once, at the end of the backward
    the inner model called with gradients              refused
    a rank that skipped a batch or a step              refused on all ranks, at the next reduction
    exact noise, and two reductions in a step          refused: sums would be rounded twice
    =================================================  ================================================
    """

    def __init__(
        self,
        ledger: GradientLedger,
        trainable: Callable[[], Mapping[str, nn.Parameter]],
        place: Callable[[], tuple[int, ...]],
    ) -> None:
        self._ledger, self._trainable, self._place = ledger, trainable, place
        self._ddp: Any = None
        self.rounding: ExactMechanism | None = None
        self._due: int | None = None  # the backward at whose end the sums are added up

    @property
    def known(self) -> bool:
        """Whether the model is inside DistributedDataParallel, as far as was seen."""
        return self._ddp is not None

    @property
    def reduces(self) -> bool:
        """Whether the forward that is being run is outside ``no_sync()``."""
        return self.known and self._ddp.require_backward_grad_sync

    def join(self, ddp: Any) -> None:
        """The model is inside this DistributedDataParallel.

        Raises:
            UnsupportedGraphError: with options that would be passed over, over some of the ranks, or around parameters
                that FSDP shards.
        """
        _check_options(ddp)
        refuse_some("DistributedDataParallel", dist.get_world_size(ddp.process_group))
        if any(map(is_distributed, self._trainable().values())):
            raise UnsupportedGraphError(
                "DistributedDataParallel around a model that FSDP shards",
                remedy="call fully_shard with a mesh of two dimensions, of which the first replicates",
            )
        self._ddp = ddp

    def notice(self, *, tracing: bool) -> None:
        """Before a call of the model: look for the DistributedDataParallel around it.

        Raises:
            PrivacyError: there was one, and it was passed by.
        """
        ddp = active_replica()
        if ddp is not None:
            self.join(ddp)
        elif self.known and torch.is_grad_enabled() and self._trainable() and not tracing:
            raise PrivacyError(
                "the model was called without the DistributedDataParallel around it",
                remedy="call the DistributedDataParallel module; for a look at outputs, under torch.no_grad()",
            )

    def apart(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """The parameters as autograd may see them: of a replicated model as leaves of their own.

        DistributedDataParallel counts the parameters that a backward reaches, and writes averages of its own to their
        gradients.
        """
        return [p.detach().requires_grad_() for p in parameters] if self.known else parameters

    def hold(self, sums: Sequence[tuple[str, Tensor]], *, graph_task: int, call: object, reduces: bool) -> None:
        """Hold the sums of a backward back; with ``reduces``, until it is over and they are added up over the replicas.

        Args:
            sums: see :meth:`GradientLedger.deliver`, as for the rest.
            graph_task: the identity of the backward.
            call: the call of the model.
            reduces: as it was in the forward.
        """
        self._ledger.deliver([], graph_task=graph_task, call=call)
        self._ledger.hold(sums)
        if reduces and self._due != graph_task:
            self._due = graph_task
            after_backward(self._add_up)

    @torch.no_grad()
    def _add_up(self) -> None:
        if self.rounding is not None and self._ledger.goes_on():
            raise PrivacyError(
                "sums over replicas a second time within a logical step, with exact noise: each time they are rounded",
                remedy="run all backwards of a step but the last one under no_sync(), forward and backward",
            )
        held, parameters = self._ledger.take_held(), self._trainable()
        device = next(iter(parameters.values())).device
        refuse_other_place(self._place(), device, self._ddp.process_group)
        sums = [held[n] if n in held else zeros_for(p) for n, p in parameters.items()]
        self._ledger.add(zip(parameters, self._over_ranks(sums), strict=True))

    def _over_ranks(self, sums: Sequence[Tensor]) -> list[Tensor]:
        if self.rounding is None:
            return add_up(sums, self._ddp.process_group)
        return add_up_exactly(sums, self._ddp.process_group, self.rounding.grid)


def _check_options(ddp: Any) -> None:
    for option, given in ddp_options(ddp).items():
        if given:
            raise UnsupportedGraphError(
                f"DistributedDataParallel with {option}: its own reduction of gradients does not run, as clipped sums "
                "do not go through autograd",
                remedy="leave the option out; PoissonLoader gives all ranks equally many batches",
            )
