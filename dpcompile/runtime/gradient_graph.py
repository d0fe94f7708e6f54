"""A rewritten joint graph as one function: losses, norms and clipped sums of a batch, without autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile._torch.aot import PlainAOTOutput, flat_graph
from dpcompile._torch.compile import compile_whole
from dpcompile._torch.tensors import memory_of
from dpcompile.capture.inputs import extend
from dpcompile.capture.roles import Roles
from dpcompile.graph.compile import compile_joint
from dpcompile.lowering.cache_key import cache_key
from dpcompile.options import Options
from dpcompile.pipeline import Transformed, privatize
from dpcompile.runtime.bound import bounds_of
from dpcompile.runtime.verify import Verifier

__all__ = ["GradientGraph", "Gradients", "gradient_graph"]


@dataclass(slots=True)
class Gradients:
    """What one run of a compiled graph gave.

    Attributes:
        losses: ``[B]``, one for every row.
        counts: bool ``[B]``, False for rows that are padding.
        mask: float32 ``[B]``, 1 for an example and 0 for padding; of users ``[U]``.
        norms: ``[B]``, before clipping.
        by_group: of several clip groups, the same of each.
        sums: parameter name -> its clipped sum, float32 or wider.
        transformed: plan, certificate and graph.
    """

    losses: Tensor
    counts: Tensor
    mask: Tensor
    norms: Tensor
    by_group: dict[str, Tensor]
    sums: dict[str, Tensor]
    transformed: Transformed


@dataclass(slots=True)
class GradientGraph:
    """A rewritten joint graph as a function of the captured graph's inputs and of the mask.

    Attributes:
        run: the graph, compiled.
        sources: for every input of it its position among the captured graph's; None for the losses' cotangent.
        mask: the position of the mask among the captured graph's inputs; behind the next one are the bounds of several
            clip groups, and the rest only receives gradients.
        returned: where the captured graph's outputs stand among its outputs.
        slots: parameter name -> the position of its clipped sum; missing if that is zero.
        transformed: plan, certificate and graph.
        examples_per_user: rows for each entry of the mask.
    """

    run: Callable[..., Sequence[Any]]
    sources: list[int | None]
    mask: int
    returned: list[int]
    slots: dict[str, int]
    transformed: Transformed
    examples_per_user: int = 1

    @torch.no_grad()
    def __call__(
        self, values: Sequence[Any], mask: Tensor, bounds: Mapping[str, float], rows: Tensor | None = None
    ) -> tuple[list[Any], Gradients]:
        """The captured graph's outputs, and the gradients.

        Args:
            values: the captured graph's inputs.
            mask: float32 ``[B]``, or of users ``[U]``.
            bounds: of several clip groups, those that have a gradient.
            rows: bool, of all rows, if some are left out of the losses of users; else None.
        """
        every = dict(enumerate(values)) | {self.mask: mask}
        groups, slot = self.transformed.groups, self.transformed.group_slot
        if slot is not None:
            every[self.mask + 2] = bounds_of(bounds, groups, mask)
        counts = (mask > 0).repeat_interleave(self.examples_per_user)
        losses = torch.ones_like(counts, dtype=mask.dtype)  # the cotangent of every row's own loss
        if rows is not None:
            counts &= rows.to(counts.device)
            losses = counts.to(mask.dtype)
        outputs = self.run(*(losses if s is None else every.get(s) for s in self.sources))
        returned = [outputs[i] for i in self.returned]
        sums = {name: _wide(outputs[slot]) for name, slot in self.slots.items()}
        norms = outputs[self.transformed.norm_slot]
        by_group = {} if slot is None else dict(zip(groups, outputs[slot].unbind(), strict=True))
        return returned, Gradients(returned[0], counts, mask, norms, by_group, _apart(sums), self.transformed)


def gradient_graph(gm: fx.GraphModule, inputs: Sequence[Any], roles: Roles, options: Options) -> GradientGraph:
    """Proved and rewritten; the graph of Dynamo returns one loss per example, and more that needs no gradient."""
    extended, extra = extend(gm, roles)
    result: list[Transformed] = []
    compile_joint(
        extended,
        [*inputs, *extra],
        backend="eager",
        transform=lambda joint: result.append(privatize(joint, roles, options, 1)),
        key="",
    )
    (transformed,) = result
    graph, sources = flat_graph(transformed.graph)
    described = enumerate(transformed.graph.graph.output_node().meta["desc"])
    places = {d.idx: i for i, d in described if isinstance(d, PlainAOTOutput)}
    run: Callable[..., Any] = graph
    if options.backend != "eager":
        run = compile_whole(graph, key=cache_key(options, roles, 1))
        if options.verify:
            verifier = Verifier("compile_step's graph")
            verifier.describe(transformed)
            run = verifier.whole(run, graph)
    return GradientGraph(
        run=run,
        sources=sources,
        mask=roles.inputs,
        returned=[places[i] for i in range(len(places))],
        slots={n: s for n, s in transformed.sum_slots.items() if n in transformed.plan.rules()},
        transformed=transformed,
        examples_per_user=options.examples_per_user,
    )


def _apart(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums that share no memory with one another: they are added to in place."""
    taken: set[int] = set()
    for name, total in sums.items():
        if memory_of(total) in taken:
            sums[name] = total.clone()
        taken.add(memory_of(total))
    return sums


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
