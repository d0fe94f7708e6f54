"""What the engines of all private modules share: parameters, masks, draws, and what a backward delivers."""

from __future__ import annotations

import itertools
import struct
import types
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpcompile._torch.autograd import current_backward
from dpcompile._torch.dynamo import disable
from dpcompile._torch.pipelining import running_stage
from dpcompile.batches.draws import Draws, Given
from dpcompile.batches.feed import Feed
from dpcompile.capture.arguments import example_dims, signature_of
from dpcompile.capture.surroundings import BY_ITSELF, refuse_tracers
from dpcompile.capture.tensor_kinds import check_model
from dpcompile.clipping.groups import Bounds
from dpcompile.distributed.ranks import refuse_other_place, world_size
from dpcompile.errors import DPCompileError, PrivacyError
from dpcompile.graph.labels import Examples, Label
from dpcompile.kernels.handed import handed
from dpcompile.kernels.workspace import kept_gradients
from dpcompile.options import Options
from dpcompile.pipeline import Transformed
from dpcompile.runtime.bound import ClipBound, votes_within
from dpcompile.runtime.bystanders import refuse_hooks, watch
from dpcompile.runtime.example_memory import ExampleMemory
from dpcompile.runtime.first_step import FirstStep
from dpcompile.runtime.forward import AwaitedBackward, Forward
from dpcompile.runtime.ledger import GradientLedger
from dpcompile.runtime.masks import Masks
from dpcompile.runtime.replicas import Replicas
from dpcompile.runtime.stages import Stage, call_in_stage
from dpcompile.runtime.sums import Delivered, LocalSums, Sums, to_ledger
from dpcompile.runtime.turns import Ran, in_turns
from dpcompile.runtime.users import check_rows, leave_out, rows_left_out, users_among
from dpcompile.runtime.watched_loss import watched

__all__ = ["Engine", "with_own_code"]

_NUMBERS = itertools.count()


def with_own_code(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    """A copy of a function that Dynamo takes for another one.

    Dynamo keeps compiled graphs per code object, and what it learned of changing sizes per name: copies keep models
    apart.
    """
    assert isinstance(function, types.FunctionType)
    name = f"{function.__name__}_{label}_{next(_NUMBERS)}"
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


class Engine(ABC):
    """Compiles the calls of one module, and keeps what its backward delivers.

    What belongs to one call is in its :class:`dpcompile.runtime.forward.Forward`.

    Attributes:
        module: the user's module, undecorated.
        options: what the user asked for.
        ledger: the clipped sums in ``p.grad``.
        replicas: the DistributedDataParallel around the model.
        transformed: of the graph that ran last, or was compiled since.
        feed: the loader that is attached; None without one.
        steps: logical steps that optimizers took with this model, in this process; None before there is one.
        numbers: a digest of C and sigma, which all ranks must have alike; 0 until one of them is moved.
        kept: memory that holds examples.
        clip: C of the forwards to come, and what each clip group has of it.
        stage: of a pipeline; None: the model is whole.
        votes: whether each example says if its gradient is within C, or each group's part of it within its own.
    """

    def __init__(self, module: nn.Module, options: Options) -> None:
        self.module, self.options = module, options
        self._parameters = dict(module.named_parameters())
        self.ledger = GradientLedger(self._parameters)
        watch(self.ledger)
        self.replicas = Replicas(self.ledger, self.trained, self.place)
        self.transformed: Transformed | None = None
        self.feed: Feed | None = None
        self.steps: int | None = None
        self.numbers, self.votes = 0, False
        self.stage: Stage | None = None
        self.of_step: Callable[[], Callable[[], tuple[float, float, float]] | None] | None = None
        self.kept = ExampleMemory(module, breaks=options.regions == "breaks")
        self._unchecked = options.check
        self.clip = ClipBound(options.clipping, options.max_grad_norm)
        self._norms: list[tuple[Tensor, Tensor]] = []  # with their masks, of the last backward
        self.masks = Masks(options.examples_per_user)
        weakref.finalize(self, kept_gradients.release)

    # --- what is known of the model ----------------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        """Whether the parameters are FSDP2's."""
        return False

    @property
    def distributed(self) -> bool:
        """Whether clipped sums are added up over ranks."""
        return self.sharded or self.replicas.known

    @property
    def data_ranks(self) -> int:
        """How many ranks, or groups of ranks, have examples of their own."""
        return world_size() if self.distributed else 1

    @property
    def max_grad_norm(self) -> float:
        """C, the sensitivity of the clipped sum to one example, of the forwards to come."""
        return self.clip.now.total

    def move_bounds(self, bounds: Bounds) -> None:
        """Take another C from the next forward on: :meth:`dpcompile.runtime.bound.ClipBound.move`."""
        self.clip.move(bounds, under_way=self.ledger.deliveries > 0)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name, tied ones once."""
        return dict(self._parameters)

    def trainable(self) -> list[str]:
        """Names of the parameters that require a gradient now."""
        return [name for name, p in self._parameters.items() if p.requires_grad]

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that require a gradient now."""
        return {name: self._parameters[name] for name in self.trainable()}

    def place(self) -> tuple[int, ...]:
        """Where training stands: logical steps taken, the draw of the loader (-1: none), and :attr:`numbers`.

        Of numbers that go by the step those of the step at hand are among them.

        ``()`` without an optimizer. Public numbers.
        """
        if self.steps is None:
            return ()
        draw = None if self.feed is None else self.feed.draw
        moving = None if self.of_step is None else self.of_step()
        numbers = self.numbers if moving is None else zlib.crc32(struct.pack("<3d", *moving()), self.numbers)
        return self.steps, -1 if draw is None else draw, numbers

    def check_parameters(self, named: Iterable[tuple[str, Tensor]], *, gathered: bool = False) -> None:
        """Raise PrivacyError if a parameter is not the object that the optimizer knows, or has hooks that never run.

        Args:
            named: parameters as a graph reads them.
            gathered: FSDP gathered them from those that the optimizer knows.
        """
        named = list(named)
        refuse_hooks(named)
        if gathered:
            refuse_hooks([(name, self._parameters[name]) for name, _ in named])
        for name, parameter in named:
            if not gathered and parameter is not self._parameters[name]:
                raise PrivacyError(
                    f"parameter '{name}' was replaced after dp_compile: the optimizer and the ledger hold the old one",
                    remedy="call dp_compile again after changing the model, and make the optimizer from the result",
                )

    # --- norms -------------------------------------------------------------------------------------------------------

    @property
    def grad_norms(self) -> Tensor | None:
        """Float32 norms of the last backward, before clipping, of its examples without padding; None before one."""
        return torch.cat([norms[mask > 0] for norms, mask in self._norms]) if self._norms else None

    @property
    def row_norms(self) -> Tensor:
        """The same of all rows, padding included: ``[B]``."""
        return torch.cat([norms for norms, _ in self._norms])

    def note_norms(self, norms: Tensor, mask: Tensor, *, more: bool = False) -> None:
        """The norms ``[B]`` of a backward and the mask of its rows; with ``more`` of part of one."""
        self._norms = [*(self._norms if more else []), (norms.detach(), mask)]

    # --- masks -------------------------------------------------------------------------------------------------------

    @property
    def draws(self) -> Draws | None:
        """The batches of the loader that is attached; None without one."""
        return None if self.feed is None else self.feed.draws

    @property
    def claims(self) -> bool:
        """Whether forwards with gradients are on batches of an attached loader."""
        return self.draws is not None and not self.masks.said

    def set_mask(self, mask: Tensor | None) -> None:
        """Say which rows of the next batch are examples (True) and which are padding (False): bool ``[B]``.

        From then on every forward with gradients needs a mask of its own; None ends that.
        """
        self.masks.set(mask)

    # --- forward -----------------------------------------------------------------------------------------------------

    @partial(disable, reason=BY_ITSELF)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, compiled; on a batch of the loader with its mask, in as many forwards as it takes.

        Within a function that the user compiles this is a graph break: traced into, it would lose its backward.
        """
        refuse_tracers()
        call = running_stage()
        if call is not None or self.stage is not None:
            return call_in_stage(self, self.stage, call, args, kwargs)
        return self.call(args, kwargs)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that is in no stage of a pipeline, or without gradients."""
        draws = self.draws
        if draws is None or not (self.claims and torch.is_grad_enabled() and self.trainable()):
            return watched(self._run, Forward(args, kwargs))
        dims = self.example_dims((args, kwargs))
        claim = draws.claim([(t, dim % t.ndim) for _, t, dim in dims if dim is not None])
        batch, mask = claim.batch, claim.mask
        if batch is None or mask is None:
            return watched(self._run, Forward(args, kwargs, Given(refused=claim.refused)))
        begin, end = partial(draws.begin, batch), partial(draws.delivered, batch)
        if batch.turns == 1:
            return watched(self._run, Forward(args, kwargs, Given(mask, begin=begin, end=end)))
        self.replicas.notice(tracing=False)
        reduces, masks, last = self.replicas.reduces, mask.chunk(batch.turns), batch.turns - 1

        def forward(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], again: bool) -> Ran:
            given = Given(masks[index], reduces=reduces and index == last, more=index > 0)
            one = Forward(args, kwargs, given, compared=None if again else False)
            return Ran(self._run(one), one.labels)

        mean = self.options.loss_reduction == "mean"
        return in_turns(forward, self.module, (args, kwargs), dims, batch.turns, mean=mean, begin=begin, end=end)

    @abstractmethod
    def trace(self, *args: Any, **kwargs: Any) -> None:
        """Compile for these arguments; nothing else comes of it."""

    @abstractmethod
    def _run(self, forward: Forward) -> Any:
        """One call of the compiled module: what it returns."""

    def example_dims(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[tuple[str, Tensor, int | None]]:
        """``(name, tensor, example dimension)`` of the tensors of a call.

        Raises:
            TypeError: the plain one of a plain call.
            DPCompileError: arguments, or a model, that cannot be.
        """
        signature_of(self.module.forward).bind(*call[0], **call[1])
        check_model(self.module, sharded=self.distributed)
        dims = example_dims(self.module.forward, *call, self.options.in_dims)
        check_rows(dims, self.options.examples_per_user)
        return dims

    def lies(self, tensor: Tensor, dim: int | None) -> Examples | None:
        """How the examples, or users, lie in an argument of the call."""
        return None if dim is None else Examples(dim % tensor.ndim, inner=self.options.examples_per_user)

    def leaves(self, dims: Sequence[tuple[str, Tensor, int | None]]) -> dict[int, tuple[str, int | Examples | None]]:
        """By identity, the tensors of a call: name, and the dimension of the examples, or how users lie."""
        plain = self.options.examples_per_user == 1
        return {id(t): (name, dim if plain else self.lies(t, dim)) for name, t, dim in dims}

    def note_given(self, forward: Forward, tensors: Sequence[Any]) -> None:
        """Arguments of a call without gradients hold examples, but for those that ``in_dims`` says are shared."""
        try:
            dims = self.example_dims(forward.call)
        except (DPCompileError, TypeError):  # a cache of another batch size: the call is evaluation
            dims = []
        shared = {id(t) for _, t, dim in dims if dim is None} | {id(p) for p in self._parameters.values()}
        self.kept.note_arguments((t for t in tensors if id(t) not in shared), trained=False)

    def _record(self, forward: Forward) -> None:
        """Under ``check=True`` record a forward, if it is the first with gradients, or a part of that."""
        if forward.compared is None:
            forward.compared = self._unchecked and not forward.tracing and torch.is_grad_enabled()
            self._unchecked &= not forward.compared
        if forward.compared:
            dims = self.example_dims(forward.call)
            forward.first_step = FirstStep(self.module, self.options, forward.call, dims, forward.batch.parts)

    # --- backward ----------------------------------------------------------------------------------------------------

    def await_backward(
        self, forward: Forward, rows: int, device: torch.device, sums: Sums | None = None
    ) -> AwaitedBackward:
        """A forward with gradients runs on so many rows; their mask is taken once for all parts of its batch."""
        batch, of_user = forward.batch, self.options.examples_per_user
        size = rows // of_user
        if batch.mask is None:
            batch.refused, batch.bound = self.masks.refused(forward), self.clip.now
            given = self.masks.take(forward, rows * batch.parts)
            batch.rows = rows_left_out(given, of_user)
            mask = torch.ones(size * batch.parts, device=device) if given is None else users_among(given, of_user)
            batch.mask = self.clip.into(handed(mask.float(), device))
        running = current_backward() if forward.given.reduces is None else -1  # turns are told apart by their draw
        return AwaitedBackward(
            forward.part,
            forward.part.rows(size),
            forward.given,
            reduces=self.replicas.reduces if forward.given.reduces is None else forward.given.reduces,
            within=None if running == -1 else running,
            first_step=forward.first_step,
            sums=LocalSums() if sums is None else sums,
        )

    def returns(self, forward: Forward, outputs: Sequence[Any], labels: Sequence[Label]) -> None:
        """A forward returns these outputs, which lie like this."""
        if self.options.examples_per_user > 1:
            leave_out(outputs, labels, forward.part.left_out, self.options.examples_per_user)
        forward.note(outputs, labels)

    def deliver(self, awaited: AwaitedBackward, found: Delivered) -> None:
        """The backward of a forward is over.

        **Guarantee.** What a backward came to reaches ``p.grad`` through here alone: after the draw, if there is one,
        has agreed that its batch is next, and together with its norms.
        """
        batch, given = awaited.part.whole, awaited.given
        found = self.clip.out_of(found, batch.bound)
        batch.delivered += 1
        if batch.delivered == 1:
            given.begin()
        if self.distributed and not self.replicas.known and self.stage is None:
            refuse_other_place(self.place(), found.mask.device)
        if self.votes and found.norms is not None:
            self.ledger.vote(votes_within(found.by_group or {"": found.norms}, found.mask, batch.bound))
        task = found.graph_task if awaited.within is None else awaited.within
        to_ledger(
            self.ledger, self.replicas, self.trained(), found.sums, graph_task=task, call=batch, reduces=awaited.reduces
        )
        if found.norms is not None:
            assert batch.mask is not None
            self.note_norms(batch.with_norms(found.norms.detach(), awaited.rows), batch.mask, more=given.more)
            if awaited.first_step is not None:
                awaited.first_step.compare(found.norms, found.mask, found.sums, batch.bound)
        if batch.delivered == batch.parts:
            given.end()
