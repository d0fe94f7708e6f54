"""What stands in ``p.grad``, and whether the optimizer may use it.

The clipped backward does not hand its sums to autograd's accumulation: it writes them into ``p.grad`` itself and notes
the tensor and its content. Whatever else reaches ``p.grad`` (a call of the undecorated model, a regulariser in the
loss, ``clip_grad_norm_``) changes one of the two, and the step is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from dpcompile._torch.tensors import base_of
from dpcompile.distributed.shards import as_gradient, local_part, zeros_for
from dpcompile.errors import PrivacyError, running_line
from dpcompile.kernels.content import Content, different, fingerprints
from dpcompile.runtime.ledger_faults import Change, foreign, second_step, taken, without_backward, zeroed
from dpcompile.runtime.loss_scale import scales_of

__all__ = ["GradientLedger"]


@dataclass(slots=True)
class _Entry:
    grad: Tensor
    total: Tensor  # float32 or wider; the same memory as ``grad`` unless the parameter is narrower
    content: Content | None = None  # of ``grad``


class GradientLedger:
    """Clipped sums between the backward that made them and the step that uses them.

    **Guarantee.** :meth:`verify` returns only if every gradient of ``named_parameters`` is absent, or is exactly the
    sum of what :meth:`deliver` was given since the last :meth:`clear` or :meth:`spend`, each delivery coming from a
    backward of its own.

    ===============================================  =============================================
    edge case                                        outcome
    ===============================================  =============================================
    ``p.grad`` None or zeroed before a backward      accepted: the sum starts anew
    None within a logical step (:meth:`keep`)        the sums of its earlier batches are kept
    zeroed in place within a logical step            refused: its earlier batches would be lost
    None or zeroed between backward and step         refused
    another backward added to ``p.grad``             refused (tensor or content differs)
    written by ``.data``, NumPy, ``torch._foreach``  refused (content differs)
    ``clip_grad_norm_`` that leaves all as it is     accepted (content is the same)
    ``GradScaler.unscale_``                          undone: the sums are those of the unscaled loss
    a step without a backward since the last one     refused
    gradients of the last step left in place         the next clipped backward is refused
    two model calls in one backward                  refused: one example could count twice
    sums held back that were never handed on         refused
    ===============================================  =============================================

    Attributes:
        scales: loss scales of the backwards since the last step or :meth:`clear`, where there were any.
        votes: what :meth:`vote` was given of the examples whose sums stand in ``p.grad``, added up; None: nothing.
        owned: a DPOptimizer was made for these parameters.
        applied: a DPOptimizer is applying the sums, with their noise.
        cleared: how often :meth:`clear` was called.
        holds: sums are held back until a step asks for them (:meth:`hand_over`): schedules of pipelines divide what
            stands in ``p.grad``.
    """

    def __init__(self, named_parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(named_parameters)
        self._entries: dict[str, _Entry] = {}
        self._spent: dict[str, weakref.ref[Tensor]] = {}
        self._deliveries = 0
        self._graph_task: int | None = None
        self._call: object = None
        self._fault: PrivacyError | None = None
        self._held: dict[str, Tensor] = {}
        self._kept = False
        self.scales: list[Tensor] = []
        self.votes: Tensor | None = None
        self._coming: Tensor | None = None
        self.owned, self.applied, self.cleared, self.holds = False, False, 0, False

    def waiting(self, among: Collection[int]) -> str | None:
        """The name of a parameter, its ``id`` among these, in whose ``p.grad`` a sum stands that no step has used."""
        own = ((n, self._parameters[n], entry.grad) for n, entry in self._entries.items())
        return next((n for n, p, grad in own if id(p) in among and p.grad is grad), None)

    @property
    def deliveries(self) -> int:
        """Clipped backwards since the last step or :meth:`clear`."""
        return self._deliveries

    def deliver(self, sums: Iterable[tuple[str, Tensor]], *, graph_task: int, call: object = None) -> None:
        """Add one backward's clipped sums into ``p.grad``.

        Args:
            sums: ``(parameter name, clipped sum)``; the sum has the parameter's shape (of a sharded one: that of its
                local part, and is the sum over all ranks) and float32 or a wider dtype.
            graph_task: identifies the running ``backward()``.
            call: identifies the call of the model that the sums come from, where it delivers in parts.

        Raises:
            PrivacyError: two clipped graphs in one backward, or a ``p.grad`` that holds something else.
        """
        same_call = call is not None and call is self._call
        if graph_task == self._graph_task and self._deliveries and not same_call:
            self._fail(
                "the compiled model was called twice before one backward: an example in both calls would count twice",
                remedy="call the model once per backward (put both passes in one forward: return self.net(real), "
                "self.net(fake)), or run one backward per micro-batch",
            )
        if not (same_call and graph_task == self._graph_task):
            self._deliveries += 1
            self.scales += scales_of(graph_task)
        self._graph_task, self._call = graph_task, call
        self.add(sums)

    def vote(self, votes: Tensor) -> None:
        """A number ``[]`` that belongs to the sums that are about to come, and is dropped when those are.

        **Guarantee.** :attr:`votes` is the sum of these numbers over backwards of which a sum stands in ``p.grad``: who
        begins anew there begins anew here.
        """
        self._coming = votes if self._coming is None else self._coming + votes

    def hold(self, sums: Iterable[tuple[str, Tensor]]) -> None:
        """Keep one backward's sums back, to be added up over replicas: :meth:`take_held` hands them on."""
        for name, clipped in sums:
            self._held[name] = self._held[name] + clipped if name in self._held else clipped

    def take_held(self) -> dict[str, Tensor]:
        """What was held back, by parameter."""
        held, self._held = self._held, {}
        return held

    def hand_over(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Put what was held back into ``p.grad``, for a step; zeros for the parameters that no backward reached."""
        if self.holds and self._held:
            zeros = {n: zeros_for(p) for n, p in trained.items() if n not in self._held and p.grad is None}
            self.add({**self.take_held(), **zeros}.items())

    @torch.no_grad()
    def goes_on(self) -> bool:
        """Whether a sum stands there to which the next one would be added."""
        changed = self._changed()
        return any(self._lasts(name, changed) for name in self._entries)

    @torch.no_grad()
    def add(self, sums: Iterable[tuple[str, Tensor]]) -> None:
        """Add what was held back, now summed over replicas, into ``p.grad``."""
        sums = list(sums)
        if not sums:
            return
        changed = self._changed()
        if not any(self._lasts(name, changed) for name in self._entries):
            self.votes = None
        if self._coming is not None:
            self.votes = self._coming if self.votes is None else self.votes + self._coming
            self._coming = None
        for name, clipped in sums:
            self._add(name, self._parameters[name], clipped, changed)
        for entry, content in zip(self._entries.values(), self._contents(self._entries), strict=True):
            entry.content = content

    def keep(self) -> None:
        """The sums so far belong to a logical step that is not whole: clearing ``p.grad`` does not end it."""
        self._kept = bool(self._entries)

    @torch.no_grad()
    def verify(self, trainable: Iterable[str]) -> None:
        """Raise PrivacyError unless the gradients of ``trainable`` are what :meth:`deliver` left."""
        if self._fault is not None:
            raise self._fault
        if self._held:
            raise PrivacyError(
                "clipped sums of this rank were not added to those of the others: every backward since the last "
                "reduction ran under no_sync()",
                remedy="run the last micro-batch before optimizer.step() outside no_sync()",
            )
        changed = self._changed()
        for name in trainable:
            parameter, entry = self._parameters[name], self._entries.get(name)
            if self._stands(name, changed) or (entry is None and parameter.grad is None):
                continue
            if self._is_spent(name, parameter):
                raise second_step(name)
            if parameter.grad is not None and local_part(parameter.grad).any():
                raise self._foreign(name)
            if entry is not None:
                raise zeroed(name) if self._kept else taken(name)
        if not self._deliveries:
            raise without_backward()

    def total(self, name: str) -> Tensor | None:
        """The clipped sum of ``name`` in float32 or wider, or None if no backward reached it; after :meth:`verify`."""
        entry = self._entries.get(name)
        return entry.total if entry is not None and self._parameters[name].grad is entry.grad else None

    def spend(self) -> None:
        """After a step: what stands in ``p.grad`` now must not be stepped on, nor added to, again."""
        self._entries.clear()
        self._spent = {n: weakref.ref(p.grad) for n, p in self._parameters.items() if p.grad is not None}
        self._forget()

    def clear(self) -> None:
        """After ``zero_grad``: forget the sums and any fault."""
        self.cleared += 1
        self._entries.clear()
        self._spent.clear()
        self._held.clear()
        self._fault = None
        self._forget()

    def _forget(self) -> None:
        self._deliveries, self._graph_task, self._call, self._kept = 0, None, None, False
        self.scales, self.votes, self._coming = [], None, None

    def _add(self, name: str, parameter: nn.Parameter, clipped: Tensor, changed: Collection[str]) -> None:
        entry, grad = self._entries.get(name), parameter.grad
        if entry is not None and self._lasts(name, changed):
            total = entry.total.add_(clipped)
        elif grad is None or not local_part(grad).any():
            if entry is not None and self._kept:
                self._fault = zeroed(name)
                raise self._fault
            total = clipped.clone() if base_of(clipped) is not None else clipped
        elif self._is_spent(name, parameter):
            self._fail(
                f"the gradient of the last step is still in parameter '{name}'",
                remedy="call optimizer.zero_grad() after optimizer.step()",
            )
        else:
            self._fault = self._foreign(name)
            raise self._fault
        grad = as_gradient(parameter, total.to(parameter.dtype))
        parameter.grad = grad
        self._entries[name] = _Entry(grad, total)

    def _stands(self, name: str, changed: Collection[str]) -> bool:
        entry = self._entries.get(name)
        return entry is not None and self._parameters[name].grad is entry.grad and name not in changed

    def _lasts(self, name: str, changed: Collection[str]) -> bool:
        """Whether the next sum is added to that of the entry."""
        cleared = self._kept and self._parameters[name].grad is None and name not in changed
        return self._stands(name, changed) or cleared

    def _contents(self, names: Iterable[str]) -> list[Content]:
        return fingerprints([local_part(self._entries[name].grad) for name in names])

    def _changed(self) -> set[str]:
        """The entries that may count and no longer hold what was put there. What ``unscale_`` did is undone first."""
        noted = {n: e.content for n, e in self._entries.items() if e.content is not None and self._counts(n, e)}
        if not noted:
            return set()
        names, before = list(noted), list(noted.values())
        changed = {names[i] for i in different(before, self._contents(names))}
        if changed and self.scales:
            for name in changed:
                grad = local_part(self._entries[name].grad)
                grad.mul_(self.scales[-1].to(grad.device))
            changed = {names[i] for i in different(before, self._contents(names))}
        return changed

    def _counts(self, name: str, entry: _Entry) -> bool:
        """Whether the parameter still has the entry's tensor, or was cleared within a logical step."""
        grad = self._parameters[name].grad
        return grad is entry.grad or (grad is None and self._kept)

    def _is_spent(self, name: str, parameter: nn.Parameter) -> bool:
        spent = self._spent.get(name)
        return spent is not None and spent() is not None and spent() is parameter.grad

    def _foreign(self, name: str) -> PrivacyError:
        entry, grad = self._entries.get(name), self._parameters[name].grad
        change: Change = "elsewhere" if entry is None else "in place" if grad is entry.grad else "replaced"
        return foreign(name, change, scaled=bool(self.scales))

    def _fail(self, what: str, *, remedy: str) -> NoReturn:  # the fault stays until clear()
        self._fault = PrivacyError(what, where=running_line(), remedy=remedy)
        raise self._fault
