"""The optimizer that adds the noise: once per logical step, to every trainable parameter.

Source: Abadi et al., "Deep Learning with Differential Privacy" (CCS 2016), algorithm 1, with the constant expected
batch size as the divisor (the drawn size is private).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.accounting.planned_steps import OnExceed, PlannedSteps
from dpcompile.batches.feed import Feed
from dpcompile.distributed.ranks import digest, from_first, refuse_disagreement
from dpcompile.distributed.shards import as_gradient, local_part, local_runs
from dpcompile.errors import PrivacyError
from dpcompile.module import engine_of
from dpcompile.noise.counter import check_seed, fresh_seed
from dpcompile.noise.mechanism import GaussianMechanism, Mechanism, Release
from dpcompile.optim import carried_state, checks, fused_adam
from dpcompile.optim.chained import as_one, parts_of
from dpcompile.runtime.loss_scale import check_scaler, notice_scalers
from dpcompile.runtime.optimizer_hooks import HookedOptimizer

__all__ = ["DPOptimizer"]


class DPOptimizer(HookedOptimizer):
    """Any torch optimizer, fed with noised clipped sums of the compiled model instead of plain gradients.

    Args:
        optimizer: the optimizer that updates the parameters. Its groups, state and defaults are this one's too (the
            same objects), so learning-rate schedulers work on either. Several in a list, each over a part of the
            parameters, are stepped one after the other on the one private gradient.
        model: the dpcompile model.
        noise_multiplier: sigma; the noise has standard deviation ``sigma * max_grad_norm`` before the division. 0 is
            allowed: no noise, epsilon infinite.
        expected_batch_size: sample rate times size of the dataset: the constant that divides the sums.
        seed: of the noise, a secret; None draws one (rank 0 does, for all ranks of a sharded or replicated model). See
            :func:`dpcompile.noise.fresh_seed`.
        secure: cryptographic noise (ChaCha20).
        accountant: stepped once per logical step.

    Attributes:
        optimizer: the inner optimizer.
        mechanism: what releases the sums: sigma, C, the expected batch size and the seed are its own.
        logical_step: how many draws of noise have been used up. It only grows.
        accumulating: the sums so far are not a whole logical step: :meth:`step` waits.
        accountant: one that takes its place must count the same steps, at the same rate.

    Raises:
        PrivacyError: see the table, and at construction a noise multiplier or batch size that makes no sense, an
            optimizer that needs a closure, or one whose parameters are not the model's trainable ones.

    **Guarantee.** Each :meth:`step` that reaches the inner optimizer hands it, for every trainable parameter, the
    ledger's clipped sum (zero where no backward came) plus noise that no other step, parameter or element of this
    seed has, divided by a constant; and nothing else has a gradient.

    ==================================================  =====================================================
    edge case                                           outcome
    ==================================================  =====================================================
    a trainable parameter without gradient              noise alone
    :meth:`step` while ``accumulating``                 nothing; the sums are kept, also by :meth:`zero_grad`
    :meth:`step` on zero gradients, rate 0, no state    makes the inner state; no noise is used, no step counted
    :meth:`zero_grad` before or after the backward      both orders work, with several physical batches too
    ``zero_grad()`` of the model within a logical step  the sums are kept; refused if zeroed in place
    gradients changed or not from the clipped backward  refused by the ledger
    ``GradScaler.scale(loss)``, ``.step``, ``.update``  exact, and no step is skipped
    a step on draws of another optimizer's loader       refused
    a group of other parameters in the inner optimizer  refused
    an accountant that forgot steps, or counts others   refused
    a frozen parameter with a gradient                  refused: it would be applied as it is
    a parameter unfrozen that this optimizer lacks      refused
    the inner step raises                               the noise counts as used and the step as spent
    ``load_state_dict`` behind, same seed               refused: noise would be used twice
    ... of another run, after steps that were counted   refused: the accountant would forget them
    ... without that of the loader, of the same seed    refused: draws would be used twice
    two optimizers of one seed                          the same noise: a warning
    an old checkpoint, two runs from it both published  not seen: give one of them another seed
    a scheduler stepped in the loop                     right if stepped only when not ``accumulating``
    copied or pickled                                   refused: two objects would draw the same noise
    ranks with other seeds, sigma, C or steps           refused at the first step
    ==================================================  =====================================================
    """

    _step_supports_amp_scaling = True  # GradScaler leaves p.grad as it is, and skips no step

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        model: nn.Module,
        *,
        noise_multiplier: float,
        expected_batch_size: float,
        seed: int | None = None,
        secure: bool = False,
        accountant: PrivacyAccountant | None = None,
    ) -> None:
        if isinstance(optimizer, DPOptimizer):
            raise PrivacyError("the optimizer is a DPOptimizer already", remedy="wrap the plain torch optimizer once")
        inner = as_one(optimizer)
        self.engine = engine_of(model)
        checks.refuse_bad_numbers(noise_multiplier, expected_batch_size)
        checks.refuse_other_accountant(noise_multiplier, accountant)
        for part in parts_of(inner):
            checks.refuse_closure_only(part)
        drawn: int = fresh_seed(secure=secure)
        if self.engine.distributed:  # also where a seed is given: ranks that wait for one that others do not send hang
            drawn = from_first(drawn)
        seed = drawn if seed is None else seed
        check_seed(seed, secure=secure)
        self.mechanism: Mechanism = GaussianMechanism(
            noise_multiplier, self.engine.max_grad_norm, expected_batch_size, seed, secure
        )
        self._inner, self._accountant = inner, accountant
        self._logical_step = 0
        self._planned = PlannedSteps(None, "raise")
        self._counted = [] if accountant is None else accountant.history  # as far as is known here
        self._accumulating = False
        self._stepping = False
        self._agreed = False  # whether all ranks are known to mean the same
        self._held = False  # sums of earlier physical batches of an unfinished logical step stand in p.grad
        self._used_draws: dict[str, Any] | None = None  # before the state that was loaded
        checks.refuse_foreign(self.engine, inner)
        checks.refuse_missing(self.engine, inner, self.engine.trainable())
        checks.refuse_complex(self.engine, self.engine.trainable())
        for part in parts_of(inner):
            part.register_step_pre_hook(_only_from(weakref.ref(self)))
        carried_state.mark_groups(inner.param_groups)
        self.engine.steps = self.engine.steps or 0
        self.engine.ledger.owned = True
        notice_scalers()
        # Not __init__, which would build groups and state of its own: this sets up the step hooks and no more.
        super().__setstate__({})

    @property
    def optimizer(self) -> Optimizer:
        """The inner optimizer; of several, what steps them."""
        return self._inner

    @property
    def noise_multiplier(self) -> float:
        """Sigma, of the mechanism."""
        return self.mechanism.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self.mechanism.noise_multiplier = value

    @property
    def expected_batch_size(self) -> float:
        """The constant that divides the sums, of the mechanism."""
        return self.mechanism.expected_batch_size

    @expected_batch_size.setter
    def expected_batch_size(self, value: float) -> None:
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
    def logical_step(self) -> int:
        """How many draws of noise have been used up."""
        return self._logical_step

    @property
    def accumulating(self) -> bool:
        """The sums so far, and those of the batch at hand, are not a whole logical step: :meth:`step` waits.

        An attached `PoissonLoader` knows it; a loop with batches of its own sets it.
        """
        feed = self.engine.feed
        return self._accumulating if feed is None else feed.draws.accumulating

    @accumulating.setter
    def accumulating(self, value: bool) -> None:
        if self.engine.feed is not None:
            raise PrivacyError(
                "accumulating was set on an optimizer that is attached to a loader: it knows which batches are a draw",
                remedy="leave it to the loader, or iterate over loader.batches() without attaching it",
            )
        if self._under_way():  # what came until now is part of a step, whatever comes next
            self.engine.ledger.keep()
        self._accumulating = value

    @property
    def accountant(self) -> PrivacyAccountant | None:
        """What counts the logical steps."""
        return self._accountant

    @accountant.setter
    def accountant(self, value: PrivacyAccountant | None) -> None:
        checks.refuse_replaced(self._accountant, value, self._logical_step)
        self._accountant, self._counted = value, [] if value is None else value.history

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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Noise, divide, update; or, while ``accumulating``, wait.

        Args:
            closure: run once, with gradients enabled, before anything else.

        Returns:
            What the closure returned, or None.

        Raises:
            PrivacyError: see the class.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_scaler(self, self.engine.ledger.scales)
        feed = self.engine.feed
        if feed is not None:
            feed.check_optimizer(self)
            feed.draws.check_step()
        if self._accumulating if feed is None else feed.draws.waits:
            self._held = True
            self.engine.ledger.keep()
            return loss
        if not self.engine.ledger.deliveries and carried_state.asks_for_state(self.optimizer):
            self.fill_state()
            return loss
        names = self.checked_parameters()
        self.engine.ledger.verify(names)
        self._agree()
        with self._applying():
            self._update(names, self.use_noise())
        self.finish()
        return loss

    @contextmanager
    def _applying(self) -> Iterator[None]:
        """Let the inner optimizer step."""
        self._stepping = self.engine.ledger.applied = True
        try:
            yield
        finally:
            self._stepping = self.engine.ledger.applied = False

    def _agree(self) -> None:
        """Before the first step, and the first after a checkpoint, compare with the other ranks."""
        if self.engine.distributed and not self._agreed:
            options = self.engine.options
            refuse_disagreement(
                {
                    "logical_step": self.logical_step,
                    **self.mechanism.state_dict(),
                    "seed": digest(self.seed),
                    "max_grad_norm": self.engine.max_grad_norm,
                    "clipping": options.clipping if isinstance(options.clipping, str) else "a function",
                    "loss_reduction": options.loss_reduction,
                    "trainable parameters": self.engine.trainable(),
                }
            )
            self._agreed = True

    def checked_parameters(self) -> list[str]:
        """Names of the parameters that a step updates, after the checks that do not look at gradients."""
        self._planned.check(self.logical_step)
        names, feed = self.engine.trainable(), self.engine.feed
        checks.refuse_bad_numbers(self.noise_multiplier, self.expected_batch_size)
        checks.refuse_foreign(self.engine, self.optimizer)
        checks.refuse_missing(self.engine, self.optimizer, names)
        checks.refuse_stray(self.engine, self.optimizer, names)
        checks.refuse_complex(self.engine, names)
        checks.refuse_other_accountant(self.noise_multiplier, self.accountant)
        checks.refuse_forgetful(self.accountant, self._counted)
        if feed is not None:
            feed.check_optimizer(self)
            feed.check_resumed(self._used_draws)
            checks.refuse_other_rate(self.accountant, feed.sample_rate)
        return names

    def plan(self, steps: int | None, on_exceed: OnExceed = "raise") -> None:
        """Say for how many logical steps the noise was calibrated (None: for any number), and what comes beyond."""
        self._planned = PlannedSteps(steps, on_exceed)

    def fed_by(self, loader: Any) -> None:
        """Step on the draws of a loader; no other optimizer of the model does from now on."""
        self.engine.feed = Feed(loader, self)

    def use_noise(self) -> int:
        """Use up one draw of noise and account for it; returns the logical step to draw it for.

        Counted before it is drawn: if the update fails half-way, this noise must not be drawn again.
        """
        used = self.logical_step
        if self.noise_multiplier > 0:
            checks.warn_of_used_noise(self, digest(self.seed), secure=self.secure, step=used)
        self._logical_step += 1
        self.engine.steps = (self.engine.steps or 0) + 1
        if self.accountant is not None:
            self.accountant.step(event=self.mechanism.event(self.accountant.sample_rate))
            self._counted = self.accountant.history
        return used

    def finish(self) -> None:
        """The step is done: its gradients are spent."""
        self.engine.ledger.spend()
        self._end_step()
        self._opt_called = True  # what learning-rate schedulers look at to see that a step came before theirs

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, unless a logical step is under way: then they are needed and stay."""
        if self._under_way():
            self.engine.ledger.keep()
            return
        self.optimizer.zero_grad(set_to_none)
        self.engine.ledger.clear()
        self._end_step()

    def _end_step(self) -> None:
        self._held = False
        if self.engine.feed is not None:
            self.engine.feed.draws.end_step()

    def discard(self) -> None:
        """Give up the logical step under way: drop its clipped sums. Nothing of them has been released.

        A batch of an attached loader that is at hand, and with which the model was not called, is given up too.
        """
        self._held = False
        self.engine.ledger.clear()
        self.zero_grad()
        if self.engine.feed is not None:
            self.engine.feed.draws.give_up()

    def _under_way(self) -> bool:
        feed = self.engine.feed
        waits = self._accumulating if feed is None else feed.draws.waits
        return self._held or (waits and self.engine.ledger.deliveries > 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; its parameters must be the model's."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        checks.refuse_foreign_parameters(self.engine, (p[1] if isinstance(p, tuple) else p for p in params))
        self.optimizer.add_param_group({**param_group, "params": params})
        carried_state.mark_groups(self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """The inner state dict plus the key ``"dpcompile"``, also in every group, for torch's functions on states.

        It holds the seed: keep it as secret as the data.
        """
        return carried_state.with_carried(self.optimizer.state_dict(), self.private_state())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: inner state, seed, logical step and accountant, so that no noise is drawn twice.

        Raises:
            PrivacyError: no ``"dpcompile"`` entry, or one that is not whole; a step behind this one's with the same
                seed; other noise or batch size than this optimizer was made with; steps that the attached accountant
                would not know of, or forget.
        """
        own, rest = carried_state.carried(state_dict)
        checks.refuse_state(own, self.private_state())
        self._load(rest)
        if self.accountant is not None and own["accountant"] is not None:
            self.accountant.load_state_dict(own["accountant"])
            self._counted = self.accountant.history
        self.mechanism.seed, self._logical_step = own["seed"], own["logical_step"]
        self._used_draws = own.get("draws")
        self._agreed = False
        self.discard()

    def _load(self, inner: dict[str, Any]) -> None:
        try:
            self.optimizer.load_state_dict(inner)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise PrivacyError(
                f"{type(self.optimizer).__name__} cannot load its part of the state: {type(error).__name__}: {error}",
                remedy="load what DPOptimizer.state_dict() returned, unchanged",
            ) from error
        carried_state.mark_groups(self.optimizer.param_groups)

    def fill_state(self) -> None:
        """Let the inner optimizer make its state, to load a checkpoint into; no parameter changes.

        It steps once on zero gradients with learning rate 0, if it has no state yet.
        """
        inner = self.optimizer
        if inner.state:
            return
        self.discard()
        rates = [group["lr"] for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
        try:
            with self._applying():
                inner.step()
        finally:
            for group, rate in zip(inner.param_groups, rates, strict=True):
                group["lr"] = rate
            self.discard()

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

    def private_state(self) -> dict[str, Any]:
        """What :meth:`state_dict` adds to the inner optimizer's: plain numbers, the seed among them."""
        feed = self.engine.feed
        return {
            **self.mechanism.state_dict(),
            "logical_step": self.logical_step,
            "accountant": None if self.accountant is None else self.accountant.state_dict(),
            "draws": self._used_draws if feed is None else feed.state() or self._used_draws,
        }

    def _update(self, names: Sequence[str], step: int) -> None:
        """Put the private mean gradient of each trainable parameter into ``p.grad``, and step on it."""
        parameters = self.engine.parameters()
        index = {name: i for i, name in enumerate(parameters)}
        totals = []
        for name in names:
            total, p = self.engine.ledger.total(name), parameters[name]
            if total is None:
                here = local_part(p.detach())
                total = torch.zeros_like(here, dtype=torch.promote_types(p.dtype, torch.float32))
            totals.append(total)
        release = Release(totals, [index[name] for name in names], step)
        weights = [parameters[name] for name in names]
        whole = not self.engine.distributed  # the fused step starts every parameter at its element 0
        if whole and fused_adam.update_(self.optimizer, weights, release, self.mechanism):
            return
        runs = [local_runs(w) for w in weights]
        totals = [t if len(r) == 1 else t.contiguous() for t, r in zip(totals, runs, strict=True)]
        self.mechanism.release(replace(release, totals=totals, runs=runs))
        for p, total in zip(weights, totals, strict=True):
            p.grad = as_gradient(p, total.to(p.dtype))
        self.optimizer.step()


def _only_from(owner: weakref.ref[DPOptimizer]) -> Callable[..., None]:
    """A hook of the inner optimizer: stepped by itself it would apply the clipped sums without noise."""

    def refuse(*_: Any) -> None:
        private = owner()
        if private is not None and not private._stepping:
            raise PrivacyError(
                "the wrapped optimizer was stepped directly: its update would have no noise",
                remedy="call step() of the DPOptimizer",
            )

    return refuse
