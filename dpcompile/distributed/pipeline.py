"""Pipeline parallelism: what the ranks that hold the stages of one model tell each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dpcompile.distributed.ranks import gathered, world_size
from dpcompile.errors import DPCompileError, PrivacyError

__all__ = ["agreed", "group_of", "same_on_all"]


def group_of(pipeline: Any) -> Any:
    """The process group that ``dp_compile(pipeline=...)`` names.

    Args:
        pipeline: True: all ranks; a process group; or a ``DeviceMesh`` of one dimension.

    Raises:
        DPCompileError: it is something else, or there is no ``torch.distributed``.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise DPCompileError(
            "pipeline= without torch.distributed", remedy="call torch.distributed.init_process_group first"
        )
    if pipeline is True:
        return dist.group.WORLD
    if isinstance(pipeline, dist.ProcessGroup):
        return pipeline
    if type(pipeline).__name__ == "DeviceMesh" and pipeline.ndim == 1:
        return pipeline.get_group()
    raise DPCompileError(
        f"pipeline is {pipeline!r}",
        remedy="give the process group of the PipelineStage or a mesh of one dimension (mesh['pp']); True: all ranks",
    )


def same_on_all(numbers: Sequence[int], device: torch.device, group: Any) -> list[bool]:
    """Whether each of these numbers is the same on all ranks of a group; every rank must call this with as many.

    Args:
        numbers: below 2**63 in absolute value.
        device: where collectives work.
        group: of ``torch.distributed``.
    """
    ends = torch.tensor([*numbers, *(-n for n in numbers)], dtype=torch.int64, device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = ends.reshape(2, -1).tolist()
    return [a == -b for a, b in zip(largest, smallest, strict=True)]


def agreed(own: Mapping[int, Mapping[str, Any]], stages: int, ranks: int) -> dict[int, int]:
    """How many parameters lie before each stage; every rank must call this, and all raise alike.

    Args:
        own: number of each stage of this rank -> what is known of it: ``"parameters"``, their names and shapes;
            ``"values"``, what tells equal ones, of those that may be copies; and what must be the same for all stages.
        stages: how many the pipeline has.
        ranks: how many ranks a pipeline has.

    Raises:
        PrivacyError: a stage is not private, or there twice; ranks hold unequally many; options differ; a parameter
            is a copy of another stage's.
    """
    everywhere = gathered({index: dict(facts) for index, facts in own.items()})
    count = {index: sum(index in e for e in everywhere) for index in range(stages)}
    expected = world_size() // ranks
    wrong = [index for index, n in count.items() if n != expected]
    if wrong or any(index not in count for e in everywhere for index in e):
        raise PrivacyError(
            f"of stage {wrong[0] if wrong else 'numbers beyond the last'} of the pipeline there are "
            f"{count[wrong[0]] if wrong else 'some'} private modules where {expected} should be: norms of its "
            "gradients would be missing, or count twice",
            remedy="dp_compile the module of every stage, on every rank, with the same pipeline=, and number them from "
            "0",
        )
    if len({len(e) for e in everywhere}) > 1:
        raise PrivacyError(
            "the ranks of the pipeline hold unequally many stages",
            remedy="give every rank as many: each has a DPOptimizer, whose steps come in turn",
        )
    for index in range(stages):
        copies = [e[index]["parameters"] for e in everywhere if index in e]
        if any(c != copies[0] for c in copies):
            raise PrivacyError(
                f"stage {index} has other parameters on other ranks", remedy="build it alike in every pipeline"
            )
    facts = [f for e in everywhere for f in e.values()]
    different = [n for n in facts[0] if n not in ("parameters", "values") and len({repr(f[n]) for f in facts}) > 1]
    if different:
        told = ", ".join(f"{n} ({', '.join(sorted({repr(f[n]) for f in facts}))})" for n in different)
        raise PrivacyError(
            f"the stages of the pipeline disagree about {told}",
            remedy="call dp_compile with the same options for every stage",
        )
    _refuse_copies([(index, f["values"]) for e in everywhere for index, f in sorted(e.items())])
    sizes: dict[int, int] = {index: len(f["parameters"]) for e in everywhere for index, f in e.items()}
    return {index: sum(sizes[i] for i in range(index)) for index in range(stages)}


def _refuse_copies(values: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    owners: dict[Any, tuple[int, str]] = {}
    for index, of_stage in values:
        for name, value in of_stage.items():
            other, twin = owners.setdefault(value, (index, name))
            if other != index:
                raise PrivacyError(
                    f"parameter '{name}' of stage {index} and '{twin}' of stage {other} are equal bit by bit: if they "
                    "are copies of one (a head tied to an embedding), the norm of the sum of their gradients is wanted "
                    "and each stage would take its own; if they are two, they were initialised from one seed",
                    remedy="if they are one: put both uses into one stage, freeze both, or train two. If they are two: "
                    "dp_compile(part, ..., untied=True) for one of the stages; each is clipped and noised as a "
                    "parameter of its own",
                )
