"""An optimizer around another: its groups, state and defaults are the inner one's, which steps only from here."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpcompile.accounting.by_step import ByStep
from dpcompile.accounting.planned_steps import OnExceed, PlannedSteps
from dpcompile.accounting.protocol import Accountant
from dpcompile.errors import PrivacyError, running_line
from dpcompile.module import Engine
from dpcompile.noise.mechanism import GaussianMechanism, Mechanism
from dpcompile.optim.carried_state import mark_groups
from dpcompile.optim.chained import parts_of
from dpcompile.optim.checks import refuse_bad_numbers, refuse_foreign_parameters
from dpcompile.optim.common import refuse_other_ranks
from dpcompile.optim.correlated import refuse_move
from dpcompile.optim.moving_bounds import MovesBounds
from dpcompile.optim.step_numbers import numbers_at, refuse_moved_size, refuse_rows, saved_schedule
from dpcompile.reporting.facts import report_of
from dpcompile.reporting.report import Report
from dpcompile.runtime.optimizer_hooks import HookedOptimizer

__all__ = ["WrappingOptimizer"]


class WrappingOptimizer(MovesBounds, HookedOptimizer):
    """What :class:`dpcompile.DPOptimizer` shows of the optimizer and the mechanism that it is made of.

    Args:
        inner: what updates the parameters.
        engine: of the model.

    Attributes:
        engine: of the model.
        mechanism: what releases the sums: sigma, C, the expected batch size and the seed are its own.
        logical_step: how many draws of noise have been used up.

    **Guarantee.** A step of the inner optimizer that does not come from here is refused: it would apply the clipped
    sums without noise.
    """

    mechanism: Mechanism
    _accountant: Accountant | None
    _planned: PlannedSteps
    _agreed: bool = False  # whether all ranks are known to mean the same
    engine: Engine
    logical_step: int

    def __init__(self, inner: Optimizer, engine: Engine) -> None:
        self._inner, self.engine, self._stepping = inner, engine, False
        for part in parts_of(inner):
            part.register_step_pre_hook(_only_from(weakref.ref(self)))
        # Not __init__, which would build groups and state of its own: this sets up the step hooks and no more.
        super().__setstate__({})

    @property
    def optimizer(self) -> Optimizer:  # type: ignore[override]
        """The inner optimizer; of several, what steps them."""
        return self._inner

    @property
    def noise_multiplier(self) -> float:
        """Sigma, of the mechanism. Assigned to, it no longer is what the accountant counts, and the step is refused."""
        return self.mechanism.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self.mechanism.noise_multiplier = value

    def move_noise_multiplier(self, value: float) -> None:
        """Take another sigma for the steps to come, which the accountant counts as such.

        Raises:
            PrivacyError: no sigma, or less than what a target was calibrated to.
        """
        refuse_bad_numbers(value, self.expected_batch_size)
        if isinstance(self.mechanism, GaussianMechanism):
            replace(self.mechanism, noise_multiplier=value)  # raises where the kind of mechanism cannot have it
        refuse_move(self.mechanism, self.logical_step, "noise_multiplier", self.noise_multiplier, value)
        self._planned.refuse_less_noise(self.noise_multiplier, value)
        if self._accountant is not None:
            self._accountant.move_noise_multiplier(value)
        self.mechanism.noise_multiplier = value
        self.note_numbers()

    def plan(
        self, steps: int | None, on_exceed: OnExceed = "raise", noise_schedule: Callable[[int], float] | None = None
    ) -> None:
        """Say for how many logical steps the noise was calibrated, and how it goes by the step.

        Args:
            steps: None: for any number.
            on_exceed: what a step beyond does: "raise", "warn" (once) or "ignore".
            noise_schedule: what :attr:`noise_multiplier` is multiplied by, from now on by itself: at logical step t by
                that of t, or with a batch size by the step at draw t of the loader. None: 1.

        Raises:
            PrivacyError: a schedule of noise that is correlated over steps.
        """
        if noise_schedule is not None:
            refuse_rows(self.mechanism.bands)
        noise = noise_schedule
        if noise is not None and not isinstance(noise, ByStep):
            noise = ByStep(noise, "noise_schedule")
        self._planned = PlannedSteps(steps, on_exceed, noise)
        self.watch_step()

    @property
    def noise_schedule(self) -> Callable[[int], float] | None:
        """What :attr:`noise_multiplier` is multiplied by at each step; None: 1."""
        return self._planned.noise

    def begin_pass(self) -> None:
        """A pass over the attached loader begins: warn if no planned step is left for it."""
        self._planned.begin_pass(self.logical_step)

    def watch_step(self) -> None:
        """Let every backward compare the numbers of its step with those of the other ranks, if they go by the step."""
        feed, engine = self.engine.feed, self.engine
        moves = self._planned.noise is not None or (feed is not None and feed.schedule is not None)
        engine.of_step = weakref.WeakMethod(self._numbers_of_step) if moves else None

    def _numbers_of_step(self) -> tuple[float, float, float]:
        return numbers_at(self.mechanism, self.engine.feed, self._planned, self.logical_step)

    def _agree(self) -> None:
        """Before the first step, and the first after a checkpoint, compare with the other ranks."""
        if self.engine.distributed and not self._agreed:
            refuse_other_ranks(self.engine, self.mechanism, self.logical_step, self.saved_schedule())
            self._agreed = True

    def saved_schedule(self) -> Mapping[str, Any]:
        """What tells the noise schedule, in a state and for the comparison with other ranks."""
        return saved_schedule(self._planned.noise, self._planned.steps, self.logical_step)

    @property
    def expected_batch_size(self) -> float:
        """What divides the sums, of the mechanism; the loader's own, where it has one for every step."""
        return self.mechanism.expected_batch_size

    @expected_batch_size.setter
    def expected_batch_size(self, value: float) -> None:
        refuse_moved_size(self.engine.feed)
        self.mechanism.expected_batch_size = value

    @property
    def seed(self) -> int:
        """Of the noise: a secret."""
        return self.mechanism.seed

    @property
    def secure(self) -> bool:
        """Whether the noise is cryptographic."""
        return self.mechanism.secure

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's parameter groups, live."""
        return self._inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state, live."""
        return self._inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults, live."""
        return self._inner.defaults

    @contextmanager
    def applying(self) -> Iterator[None]:
        """Let the inner optimizer step."""
        self._stepping = self.engine.ledger.applied = True
        try:
            yield
        finally:
            self._stepping = self.engine.ledger.applied = False

    def step_on_nothing(self) -> None:
        """Let the inner optimizer make its state: a step on zero gradients with learning rate 0."""
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
        try:
            with self.applying():
                self.optimizer.step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def discard(self) -> None:
        """Give up the logical step under way."""
        raise NotImplementedError

    def fill_state(self) -> None:
        """Let the inner optimizer make its state, to load a checkpoint into; no parameter changes.

        It steps once on zero gradients with learning rate 0, if it has no state yet.
        """
        if self.optimizer.state:
            return
        self.discard()
        try:
            self.step_on_nothing()
        finally:
            self.discard()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; its parameters must be the model's."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        refuse_foreign_parameters(self.engine, (p[1] if isinstance(p, tuple) else p for p in params))
        self.optimizer.add_param_group({**param_group, "params": params})
        mark_groups(self.optimizer.param_groups)

    def load_inner(self, state: dict[str, Any]) -> None:
        """Load the inner optimizer's part of a state.

        Raises:
            PrivacyError: it cannot.
        """
        try:
            self.optimizer.load_state_dict(state)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise PrivacyError(
                f"{type(self.optimizer).__name__} cannot load its part of the state: {type(error).__name__}: {error}",
                remedy="load what DPOptimizer.state_dict() returned, unchanged",
            ) from error

    def epsilon(self, delta: float) -> float:
        """What the steps so far cost at ``delta``: the accountant's; a PrivacyError without one."""
        if self._accountant is None:
            raise PrivacyError(
                "the DPOptimizer has no accountant: nobody counted its steps",
                remedy="make it with accountant=PrivacyAccountant(noise_multiplier=.., sample_rate=..), or by "
                "make_private",
            )
        return self._accountant.epsilon(delta)

    def report(self, delta: float, *, audit: Any = None) -> Report:
        """A page for the person who must sign: what was trained, how, what it cost at ``delta``, what is not covered.

        ``print`` it, or ``.save("report.html")`` (.md, .json). ``audit``: what was measured beside, to be printed.

        Raises:
            PrivacyError: no accountant, or a delta outside (0, 1).
        """
        inner = getattr(self._inner, "parts", (self._inner,))
        names = " and ".join(type(part).__name__ for part in inner)
        return report_of(
            self.engine,
            self.mechanism,
            self._accountant,
            delta=delta,
            steps=self.logical_step,
            optimizer=names,
            audit=audit,
            noise_by_step=self._planned.noise is not None,
        )

    def __repr__(self) -> str:
        return (
            f"DPOptimizer(noise_multiplier={self.noise_multiplier}, max_grad_norm={self.engine.max_grad_norm}, "
            f"expected_batch_size={self.expected_batch_size}, logical_step={self.logical_step}, "
            f"optimizer={self.optimizer!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        raise PrivacyError(
            "a DPOptimizer cannot be copied or pickled: the copy would draw the same noise again",
            remedy="save state_dict(), or make a second DPOptimizer with its own seed",
        )


def _only_from(owner: weakref.ref[WrappingOptimizer]) -> Callable[..., None]:
    """A hook of the inner optimizer."""

    def refuse(*_: Any) -> None:
        private = owner()
        if private is not None and not private._stepping:
            raise PrivacyError(
                "the wrapped optimizer was stepped directly: its update would have no noise",
                where=running_line(),
                remedy="call step() of the DPOptimizer; a second DPOptimizer takes a torch optimizer of its own",
            )

    return refuse
