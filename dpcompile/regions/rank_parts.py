"""What the inputs of a region's graphs are on the other ranks that share a batch, or that hold other experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, fx, nn

from dpcompile._torch.parallel import inner_tensor
from dpcompile.capture.localise import Localised, StandIns, localise
from dpcompile.capture.roles import Roles
from dpcompile.distributed.borders import Border
from dpcompile.distributed.expert_parallel import ExpertParallel
from dpcompile.distributed.ranks import rank
from dpcompile.distributed.shards import is_distributed
from dpcompile.distributed.tensor_parallel import Compared, TensorParallel, check_copies
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.joint import OfExperts, OverAxis, OverRanks
from dpcompile.graph.labels import Examples, Label, Shared, Whole
from dpcompile.graph.sizes import is_one
from dpcompile.regions.region import CompiledRegion, Scope

__all__ = ["RankParts", "memory_holder", "plain_inputs", "refuse_outputs_of_ranks", "wrapped_outputs"]


class RankParts:
    """Lets graphs have plain tensors for inputs, and says of which of them other ranks hold another part.

    Args:
        parallel: the ranks; None without tensor parallelism.
        experts: those of expert parallelism; None without it.
    """

    def __init__(self, parallel: TensorParallel | None, experts: ExpertParallel | None = None) -> None:
        self.parallel, self.experts = parallel, experts
        self._compared = None if parallel is None else Compared(parallel)
        self._copies_checked = False

    def check_copies(self, module: nn.Module) -> None:
        """Once: parameters that every rank holds are the same on all of them."""
        if self.parallel is not None and not self._copies_checked:
            check_copies(module, self.parallel)
            self._copies_checked = True

    def places_of(self, border: Border) -> Border:
        """What the next stage of a pipeline is told: of labels of dimensions, the ranks along them, seen from this one.

        A stage may lie along other dimensions than the next, or name them otherwise; a regular mesh looks alike from
        all of its ranks.
        """
        places = self._places()
        return tuple(tuple(places[label] for label in axes) for axes in border)

    def labels_of(self, border: Border) -> Border:
        """The labels that the dimensions have here, of what the stage before tells.

        **Guarantee.** What is another value on each rank there is taken for one along the same ranks here, or this
        raises.

        Raises:
            UnsupportedGraphError: this stage does not lie along them.
        """
        labels = {place: label for label, place in self._places().items()}
        if not labels.keys() >= {place for axes in border for place in axes}:
            raise UnsupportedGraphError(
                "the stage before hands on tensors of which each rank has its own part, and no parameter of this stage "
                "lies along those ranks",
                remedy="hand on whole values there (output_layouts=Replicate() on the last layer of the stage before), "
                "or parallelize_module every stage along the same dimension of one mesh",
            )
        return tuple(tuple(labels[place] for place in axes) for axes in border)

    def _places(self) -> dict[str, str]:
        axes = () if self.parallel is None else self.parallel.axes
        return {a.label: ",".join(str(r - rank()) for r in dist.get_process_group_ranks(a.group)) for a in axes}

    def localise(self, gm: fx.GraphModule, live: Sequence[Any]) -> Localised:
        """The graph with plain tensors for inputs."""
        return localise(gm, live, self.parallel or self.experts)

    def on_ranks(self, live: Sequence[Any], stand_ins: StandIns, scope: Scope, roles: Roles) -> Roles:
        """Roles of a graph's inputs, with what these, or what stands in for them now, are on the other ranks."""
        if self.experts is not None:
            own = {p: n for p, n in roles.parameters.items() if stand_ins.is_cut(live[p], self.experts.name)}
            self._check_experts(own.values(), roles.parameters.values())
            return replace(roles, experts=OfExperts(self.experts.name, frozenset(own.values())))
        if self.parallel is None:
            return roles
        assert self._compared is not None
        compared = {p: self._compared.same(live[p]) for p in roles.others if isinstance(live[p], Tensor)}
        axes = []
        for axis in self.parallel.axes:
            copied = frozenset(p for p, same in compared.items() if axis.label in same)
            parts = (
                p for p, x in enumerate(live) if stand_ins.is_cut(x, axis.name) or scope.is_ranks_own(x, axis.label)
            )
            cut = frozenset(parts) | compared.keys() - copied
            axes.append(OverAxis(axis.group, axis.name, axis.label, cut, copied))
        return replace(roles, ranks=OverRanks(tuple(axes), self.parallel.everyone))

    def check_copy(self, roles: Roles, position: int, name: str, value: Tensor) -> None:
        """An equal block may read another tensor than the one that the proof took for the same on all ranks."""
        if self._compared is not None and roles.ranks is not None:
            copied = {axis.label for axis in roles.ranks.axes if position in axis.copied}
            if copied and not copied <= self._compared.same(value):
                raise UnsupportedGraphError(
                    f"the model reads {name}, which is not the same on all ranks of tensor parallelism",
                    remedy="make it on all of them alike, or a DTensor",
                )

    def check_cut(self, region: CompiledRegion, names: Sequence[str]) -> None:
        """What the proof took for parts of parameters are those that norms are added up for."""
        assert region.roles is not None
        if region.roles.experts is not None:
            first = region.roles.parameters
            known = [n for p, n in zip(region.trained, names, strict=True) if first[p] in region.roles.experts.cut]
            self._check_experts(known, names)
        proved = () if region.roles.ranks is None else region.roles.ranks.axes
        axes = () if self.parallel is None else self.parallel.axes
        for axis, other in zip(proved, axes, strict=True):
            cut = {n for p, n in zip(region.trained, names, strict=True) if p in axis.cut}
            assert axis.name == other.name and cut == other.cut & set(names), (cut, names)

    def _check_experts(self, found: Iterable[str], names: Iterable[str]) -> None:
        """What a graph has of the experts is all of it that lies on several ranks."""
        assert self.experts is not None
        found, wanted = set(found), self.experts.cut & set(names)
        if found != wanted:
            raise UnsupportedGraphError(
                f"FSDP did not gather parameter '{min(found ^ wanted)}', or it is not cut as the experts are",
                remedy="fully_shard(experts, mesh=mesh['edp']) for each module that cut_experts was called on, without "
                "ignored_params",
            )

    def gathered(self, parameter: Any) -> bool:
        """Whether FSDP gathered a parameter: it is plain, or lies on the ranks of tensor parallelism alone."""
        if not is_distributed(parameter):
            return True
        parallel = self.parallel or self.experts
        return parallel is not None and parallel.along(parameter.device_mesh) is not None


def plain_inputs(local: Localised, live: Sequence[Any], stand_ins: StandIns, scope: Scope) -> list[Any]:
    """The plain tensors that a graph takes, which have the names of what they stand in for."""
    values = local.inputs(live, stand_ins)
    for value in values:
        name = scope.parameters.get(id(stand_ins.original(value)))
        if name is not None:
            scope.parameters[id(value)] = name
    return values


def wrapped_outputs(local: Localised, values: Sequence[Any], scope: Scope, *, turns: bool) -> list[Any]:
    """What a captured graph returns, with ``DTensor`` where it has them, which lie like what they are made of.

    Every rank computes with its own part of such a value, and may have another cotangent for it: the proof has them so.

    Raises:
        UnsupportedGraphError: the examples do not have a dimension of their own, or the model runs in several turns.
    """
    found = list(values)
    for position, (wrap, axes) in local.wrapped.items():
        value = values[position]
        label = scope.label(value)
        found[position] = wrap(value)
        if label is None or isinstance(label, Shared):
            continue
        own = isinstance(label, Examples) and value.shape[label.dim] == found[position].shape[label.dim]
        if turns or not own or not (is_one(label.outer) and is_one(label.inner)):  # type: ignore[union-attr]
            raise UnsupportedGraphError(
                f"output {position} is a DTensor"
                + (", and the draw is larger than the physical batch" if turns else f", and it is {label}"),
                remedy="return a batch with a dimension of its own that is not cut, and train on loader.parts(); or "
                "compute the loss in the model",
            )
        kept = tuple(o for o in label.own if o[0] not in axes)  # type: ignore[union-attr]
        scope.note(found[position], f"output {position}", replace(label, own=kept))
    return found


def refuse_outputs_of_ranks(labels: Sequence[Label]) -> None:
    """What the model returns must be the same on all ranks: a loss of it is computed where nothing is known of ranks.

    Raises:
        UnsupportedGraphError: naming the output.
    """
    for position, label in enumerate(labels):
        if isinstance(label, (Shared, Examples, Whole)) and label.own:
            axis, why = label.own[0]
            raise UnsupportedGraphError(
                f"output {position} of the model is another one on each rank of tensor parallelism"
                + f", along {axis}" * bool(axis)
                + f" ({why}), and what is computed from it would not be known",
                remedy="return whole values: ColwiseParallel(output_layouts=Replicate()) on the last layer, or its "
                "input_layouts=Shard(1) where the sequence is cut; or compute the loss in the model",
            )


def memory_holder(parameter: Tensor) -> Tensor:
    """The plain tensor whose memory a parameter has on this rank."""
    return inner_tensor(parameter) if is_distributed(parameter) else parameter
