"""What stages of a pipeline must have in common, and options that they cannot have."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from dpcompile.batches.draws import Draws
from dpcompile.clipping.groups import SEVERAL
from dpcompile.distributed.shards import local_part
from dpcompile.errors import PrivacyError, UnsupportedGraphError, running_line
from dpcompile.kernels.content import fingerprints
from dpcompile.options import Options
from dpcompile.planning.modes import MODES
from dpcompile.runtime.ledger import GradientLedger
from dpcompile.runtime.masks import Masks
from dpcompile.runtime.micro_batch import MicroBatch

__all__ = ["StagedEngine", "check_pipeline", "facts_of", "fault_of", "layout_of"]


class StagedEngine(Protocol):
    """The engine of a stage's model (:class:`dpcompile.runtime.base.Engine`), as far as it is used here."""

    module: nn.Module
    options: Options
    ledger: GradientLedger
    masks: Masks

    @property
    def draws(self) -> Draws | None:  # noqa: D102
        ...

    @property
    def claims(self) -> bool:  # noqa: D102
        ...

    @property
    def max_grad_norm(self) -> float:  # noqa: D102
        ...

    def parameters(self) -> dict[str, nn.Parameter]:  # noqa: D102
        ...

    def trainable(self) -> list[str]:  # noqa: D102
        ...

    def place(self) -> tuple[int, ...]:  # noqa: D102
        ...

    def example_dims(self, call: Any) -> list[tuple[str, Tensor, int | None]]:  # noqa: D102
        ...

    def call(self, args: Any, kwargs: Any) -> Any:  # noqa: D102
        ...


class Pending(Protocol):
    """A stage, as far as it is looked at here."""

    @property
    def engine(self) -> StagedEngine:
        """Of the model."""
        ...

    @property
    def waiting(self) -> Mapping[int, MicroBatch]:
        """Micro-batches on their way, by number."""
        ...

    @property
    def whole(self) -> bool:
        """Whether these are all of the batch."""
        ...


def fault_of(stages: Sequence[Pending]) -> PrivacyError | None:
    """What is wrong with the batch in the stages of this rank; None if nothing is."""
    refused = [w.fault for s in stages for w in s.waiting.values() if w.fault is not None]
    if refused:
        return refused[0]
    if all(s.whole and all(w.done for w in s.waiting.values()) for s in stages):
        return None
    return PrivacyError(
        "the optimizer was stepped in the middle of the pipeline's schedule, or a micro-batch had no backward",
        where=running_line(),
        remedy="call optimizer.step() after schedule.step(...), whose last stage needs a loss_fn; after an error call "
        "optimizer.discard() on every rank",
    )


def layout_of(stages: Sequence[Pending]) -> int:
    """A number that differs, but for one case in 2**56, where rows or padding of micro-batches do."""
    found = hashlib.sha256()
    for index in sorted(stages[0].waiting):
        found.update(str(index).encode())
        for mask in {_bytes(s.waiting[index].mask): None for s in stages}:  # alike in all stages: once
            found.update(mask)
    return int.from_bytes(found.digest()[:7], "big")


def _bytes(mask: Tensor) -> bytes:
    return len(mask).to_bytes(8, "big") + mask.detach().cpu().numpy().tobytes()


def facts_of(engine: StagedEngine, count: int) -> dict[str, Any]:
    """What :func:`dpcompile.distributed.pipeline.agreed` is to know of a stage, one of so many."""
    options = engine.options
    return {
        "parameters": [(n, tuple(p.shape), p.requires_grad) for n, p in engine.parameters().items()],
        "values": {} if options.untied else _values({n: engine.parameters()[n] for n in engine.trainable()}),
        "num_stages": count,
        "max_grad_norm": engine.max_grad_norm,
        "clipping": options.clipping if isinstance(options.clipping, str) else "a function",
        "loss_reduction": options.loss_reduction,
        "examples_per_user": options.examples_per_user,
    }


def _values(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[Any, ...]]:
    """What tells copies of parameters: shape, type and content of what lies here. Not of constants, such as ones."""
    local = {n: local_part(p.detach()).contiguous() for n, p in parameters.items()}
    local = {n: t for n, t in local.items() if t.numel() > 1 and bool((t != t.flatten()[0]).any())}
    contents = fingerprints(list(local.values()))
    return {n: (tuple(t.shape), str(t.dtype), int(c)) for (n, t), c in zip(local.items(), contents, strict=True)}


def check_pipeline(options: Options) -> None:
    """Raise UnsupportedGraphError for options that a stage of a pipeline cannot have, or that only a stage has."""
    if options.pipeline is None and options.untied:
        raise UnsupportedGraphError(
            "untied=True for a model that is no stage of a pipeline: it says of equal parameters of several stages "
            "that they are several",
            remedy="leave it out; within one model a tied parameter is one, and its norm that of the sum",
        )
    if options.pipeline is None:
        return
    refused: dict[str, tuple[bool, str]] = {
        f"clipping={options.clipping!r}": (
            options.clipping in SEVERAL,
            "its groups lie within stages, and how many there are in all is not known in one; use clipping='flat'",
        ),
        "memory_budget": (
            options.memory_budget is not None,
            "its first forward compares ranks, which wait for each other's activations; choose norm= and leave it out",
        ),
        f"norm={options.norm!r}": (
            MODES[options.norm].second_backward,
            "it has two backward passes, and a schedule runs one; use norm='auto'",
        ),
        "check=True": (
            options.check,
            "norms of a stage are not those of the model; check the whole model in one process",
        ),
        "regions='breaks'": (options.regions == "breaks", "use regions='blocks', or leave it out"),
    }
    for what, (given, why) in refused.items():
        if given:
            raise UnsupportedGraphError(f"{what} for a stage of a pipeline", remedy=why)
