"""Between the compiled graph and ``p.grad``: what a backward delivers, and that it delivers once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpcompile._torch.autograd import asks_for, current_backward
from dpcompile._torch.dynamo import disable
from dpcompile.errors import PrivacyError, running_line
from dpcompile.runtime.sums import Delivered

__all__ = ["Delivery", "refuse_asked_for", "through_delivery", "warn_of_lost_examples"]


def through_delivery(
    delivery: Delivery, parameters: Sequence[Tensor], narrow: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Stand-ins for the parameters, for the norms and for float32 sums that a compiled graph may take.

    What the graph's backward returns for them goes to ``delivery`` and nowhere else.

    Args:
        delivery: its names are those of ``parameters``, then of ``narrow``.
        parameters: trainable ones.
        narrow: those among them whose sum is wider than they are.

    Returns:
        The input whose gradient is the norms, ``[B]``, and the bounds of the clip groups, if there are several; an
        alias of every parameter; for every narrow one an input of its shape, without memory of its own, whose gradient
        is its sum.
    """
    norms, bounds, *rest = _Deliver.apply(delivery, len(narrow), *parameters, *narrow)  # type: ignore[misc]
    given = [norms] if delivery.bounds is None else [norms, bounds]
    return given, list(rest[: len(parameters)]), list(rest[len(parameters) :])


@dataclass(slots=True)
class Delivery:
    """The one backward that a forward may have.

    Attributes:
        names: of the parameters, in the order of the graph's gradients.
        mask: float32 ``[B]``, 0 for padding, and for an example 1, or 1 over the scale of the loss.
        keep: takes what the backward came to.
        bounds: of several clip groups, ``[groups, B]``, float64, with their names; None of one.
        refused: why this forward may have no backward at all, or None.
        filters: what stands in for some of the parameters, by name; for the others they themselves.
        done: it had it.
    """

    names: list[str]
    mask: Tensor
    keep: Callable[[Delivered], None]
    refused: PrivacyError | None = None
    filters: Mapping[str, Tensor] = field(default_factory=dict)
    bounds: tuple[tuple[str, ...], Tensor] | None = None
    done: bool = False

    @disable
    def receive(self, norms: Tensor | None, of_groups: Tensor | None, sums: Sequence[Tensor | None]) -> None:
        """Hand on what the backward returned; raise PrivacyError the second time."""
        if self.refused is not None:
            raise self.refused
        if self.done:
            raise PrivacyError(
                "a second backward through the same forward: every example would count twice",
                remedy="run the forward again, or add the losses before one backward",
            )
        self.done = True
        named = [(n, s) for n, s in zip(self.names, sums, strict=True) if s is not None]
        groups = () if self.bounds is None or of_groups is None else self.bounds[0]
        by_group = dict(zip(groups, () if of_groups is None else of_groups.unbind(), strict=True))
        self.keep(Delivered(norms, self.mask, current_backward(), named, by_group))
        if norms is not None:
            warn_of_lost_examples(norms, self.mask)


def warn_of_lost_examples(norms: Tensor, mask: Tensor) -> None:
    """Warn if an example's gradient was not finite, so that it got weight 0."""
    if math.isfinite(norms.sum().item()):  # then every one of them is
        return
    lost = int((~torch.isfinite(norms) & (mask > 0)).sum())
    if lost:  # not where padding alone is, or a sum of large norms
        scaled = float(mask.max()) < 1
        warnings.warn(
            f"{lost} of {int((mask > 0).sum())} examples had a gradient that is NaN or infinite; their weight is 0"
            + ("; give the gradient scaler a smaller init_scale, and a large growth_interval" if scaled else ""),
            RuntimeWarning,
            stacklevel=2,
        )


def refuse_asked_for(leaves: Sequence[tuple[Any, int]]) -> None:
    """Raise PrivacyError if the running backward is a ``torch.autograd.grad`` that asks for what goes to a ledger.

    Args:
        leaves: where in autograd's graph the parameters are that a compiled graph reads: ``ctx.next_functions``.
    """
    if any(asks_for(node) for node, _ in leaves if node is not None):
        raise PrivacyError(
            "torch.autograd.grad was asked for gradients of the private model's parameters, and they leave no such "
            "way: what is clipped is written to p.grad",
            where=running_line(),
            remedy="call loss.backward() and read p.grad; torch.autograd.grad is for gradients of inputs",
        )


class _Deliver(torch.autograd.Function):
    """Stands between the parameters and the compiled graph; its backward gets all clipped sums and the norms at once.

    It returns no gradient to autograd: the ledger writes ``p.grad``. So whatever autograd accumulates into ``p.grad``
    has not been clipped.
    """

    @staticmethod
    def forward(ctx: Any, delivery: Delivery, narrow: int, *parameters: Tensor) -> Any:  # noqa: D102
        ctx.delivery = delivery
        ctx.set_materialize_grads(False)
        own = len(parameters) - narrow
        stands = (delivery.filters.get(n, p) for n, p in zip(delivery.names[:own], parameters[:own], strict=True))
        aliases = (p.detach() for p in stands)
        sums = (torch.zeros((), device=p.device, dtype=torch.float32).expand(p.shape) for p in parameters[own:])
        norms = torch.zeros_like(delivery.mask)
        bounds = norms.new_zeros(()) if delivery.bounds is None else delivery.bounds[1]
        return (norms, bounds, *aliases, *sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, norms: Tensor | None, of_groups: Tensor | None, *sums: Tensor | None) -> Any:  # noqa: D102
        refuse_asked_for(ctx.next_functions)
        ctx.delivery.receive(norms, of_groups, sums)
        return (None, None, *(None for _ in sums))
