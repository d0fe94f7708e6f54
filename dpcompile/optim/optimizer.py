"""The optimizer that adds the noise: once per logical step, to every trainable parameter.

Source: Abadi et al., "Deep Learning with Differential Privacy" (CCS 2016), algorithm 1, with the constant expected
batch size as the divisor (the drawn size is private).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dpcompile.accounting.events import rounds
from dpcompile.accounting.planned_steps import PlannedSteps
from dpcompile.accounting.protocol import Accountant, count_steps, counted
from dpcompile.batches.feed import Feed
from dpcompile.errors import PrivacyError
from dpcompile.module import engine_of
from dpcompile.noise.adaptive import AdaptiveClip
from dpcompile.noise.mechanism import Mechanism
from dpcompile.optim import carried_state, checks, correlated
from dpcompile.optim.chained import as_one, parts_of
from dpcompile.optim.common import chosen_mechanism
from dpcompile.optim.earlier_steps import note_step
from dpcompile.optim.exactness import check_rounding, let_round
from dpcompile.optim.quantiles import refuse_other_groups
from dpcompile.optim.staged import complete_batch, stream_of, verify_sums
from dpcompile.optim.step_numbers import numbers_of_step, refuse_other_schedule
from dpcompile.optim.update import update_
from dpcompile.optim.wrapping import WrappingOptimizer
from dpcompile.runtime.loss_scale import notice_scalers

__all__ = ["DPOptimizer"]


class DPOptimizer(WrappingOptimizer):
    """Any torch optimizer, fed with noised clipped sums of the compiled model instead of plain gradients.

    Args:
        optimizer: the optimizer that updates the parameters. Its groups, state and defaults are this one's too (the
            same objects), so learning-rate schedulers work on either. Several in a list, each over a part of the
            parameters, are stepped one after the other on the one private gradient.
        model: the dpcompile model.
        noise_multiplier: sigma; the noise has standard deviation ``sigma * max_grad_norm`` before the division. 0 is
            allowed: no noise, epsilon infinite.
        expected_batch_size: sample rate times size of the dataset: the constant that divides the sums.
        seed: of the noise, a secret (:func:`dpcompile.noise.fresh_seed`); None: rank 0 draws one, for all ranks.
        secure: cryptographic noise (ChaCha20).
        accountant: stepped once per logical step: any :class:`dpcompile.accounting.protocol.Accountant`.
        mechanism: what releases the sums instead of the Gaussian mechanism, for the model's C and with numbers and seed
            of its own. One whose steps the accountant cannot count is stepped without an accountant.
        adaptive_clip: C, or that of each layer or block, follows a quantile of the gradients' norms, at the same cost.
        exact: sums are rounded to a grid, added up over ranks as integers, and get discrete Gaussian noise from
            ChaCha20 (:class:`dpcompile.noise.exact.ExactMechanism`), at the same cost.

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
    steps before by another, and a new accountant       a warning: its epsilon is that of the new steps alone
    an old checkpoint, two runs from it both published  not seen: give one of them another seed
    a scheduler stepped in the loop                     right if stepped only when not ``accumulating``
    copied or pickled                                   refused: two objects would draw the same noise
    ranks with other seeds, sigma, C or steps           refused at the first step
    a loader with a batch size for every draw           each is divided by its own, and counted at its rate
    ``exact`` and FSDP2, tensor parallelism             refused: their sums over ranks are floating-point
    ==================================================  =====================================================
    """

    _step_supports_amp_scaling = True  # GradScaler leaves p.grad as it is, and skips no step

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        model: nn.Module,
        *,
        noise_multiplier: float | None = None,
        expected_batch_size: float | None = None,
        seed: int | None = None,
        secure: bool = False,
        accountant: Accountant | None = None,
        mechanism: Mechanism | None = None,
        adaptive_clip: AdaptiveClip | None = None,
        exact: bool = False,
    ) -> None:
        if isinstance(optimizer, DPOptimizer):
            raise PrivacyError("the optimizer is a DPOptimizer already", remedy="wrap the plain torch optimizer once")
        inner = as_one(optimizer)
        engine = engine_of(model)
        for part in parts_of(inner):
            checks.refuse_closure_only(part)
        numbers = (noise_multiplier, expected_batch_size, seed, adaptive_clip)
        mechanism = chosen_mechanism(engine, mechanism, *numbers, secure=secure, exact=exact)
        checks.refuse_other_mechanism(mechanism, engine)
        checks.refuse_bad_accountant(mechanism.noise_multiplier, accountant)
        self.mechanism, self._accountant = mechanism, accountant
        self._logical_step = 0
        self._planned = PlannedSteps(None, "raise")
        self._counted = counted(accountant)  # as far as is known here
        self._accumulating = False
        self._held = False  # sums of earlier physical batches of an unfinished logical step stand in p.grad
        self._used_draws: dict[str, Any] | None = None  # before the state that was loaded
        self._last_draws: dict[str, Any] | None = None  # by steps since, of correlated noise or rates by the draw
        checks.refuse_foreign(engine, inner)
        checks.refuse_missing(engine, inner, engine.trainable())
        checks.refuse_complex(engine, engine.trainable())
        super().__init__(inner, engine)
        self.watch_quantile()
        carried_state.mark_groups(inner.param_groups)
        let_round(mechanism, engine)
        engine.steps = engine.steps or 0
        engine.ledger.owned = True
        notice_scalers()

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
    def accountant(self) -> Accountant | None:
        """What counts the logical steps."""
        return self._accountant

    @accountant.setter
    def accountant(self, value: Accountant | None) -> None:
        checks.refuse_replaced(self._accountant, value, self._logical_step)
        self._accountant, self._counted = value, counted(value)

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
        complete_batch(self)
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
        verify_sums(self.engine, names)
        self._agree()
        before = self._last_draws or self._used_draws
        with numbers_of_step(self.mechanism, feed, self._planned, self.logical_step, before) as rate:
            votes, step = self.engine.ledger.votes, self.use_noise(rate)
            with self.applying():
                update_(self.optimizer, self.engine, self.mechanism, names, step)
            self.finish()
            self.adapt(votes, step)
        return loss

    def checked_parameters(self) -> list[str]:
        """Names of the parameters that a step updates, after the checks that do not look at gradients."""
        self._planned.check(self.logical_step)
        names, feed = self.engine.trainable(), self.engine.feed
        checks.refuse_other_mechanism(self.mechanism, self.engine)
        refuse_other_groups(self.mechanism, self.engine)
        check_rounding(self.mechanism, self.engine)
        checks.refuse_foreign(self.engine, self.optimizer)
        checks.refuse_missing(self.engine, self.optimizer, names)
        checks.refuse_stray(self.engine, self.optimizer, names)
        checks.refuse_complex(self.engine, names)
        checks.refuse_other_accountant(self.noise_multiplier, self.accountant)
        checks.refuse_forgetful(self.accountant, self._counted)
        correlated.check_step(self.mechanism, feed, self.accountant, self._last_draws or self._used_draws)
        if feed is not None:
            feed.check_optimizer(self)
            feed.check_resumed(self._used_draws)
            checks.refuse_other_rate(self.accountant, feed)
        return names

    def fed_by(self, loader: Any) -> None:
        """Step on the draws of a loader; no other optimizer of the model does from now on."""
        correlated.refuse_other_loader(self.mechanism, self.engine.feed, self.logical_step, loader)
        self.engine.feed = Feed(loader, self)
        self.watch_step()

    def use_noise(self, rate: float | None = None) -> int:
        """Use up one draw of noise and account for it; returns the logical step to draw it for.

        ``rate`` is the draw's, where each has its own. Counted before it is drawn: if the update fails half-way, this
        noise must not be drawn again. With correlated noise, so are the rows of draws that were left out
        (:func:`dpcompile.optim.correlated.next_row`).
        """
        bands, before, feed = self.mechanism.bands, self.logical_step, self.engine.feed
        used = correlated.next_row(self.mechanism, feed, before)
        if self.noise_multiplier > 0:
            stream = stream_of(self.seed, self.engine)
            checks.refuse_used_noise(self, stream, secure=self.secure, step=used, correlated=bands > 1)
        note_step(self, self.engine.module, self.accountant)
        self._logical_step = used + 1
        self.engine.steps = (self.engine.steps or 0) + 1
        if feed is not None and (bands > 1 or rate is not None):
            self._last_draws = feed.state() or self._last_draws
        if self.accountant is not None:
            event = self.mechanism.event(self.accountant.sample_rate if rate is None else rate)
            told = None if rate is None and self._planned.noise is None else self._counted
            n = rounds(used + 1, bands) - rounds(before, bands)
            self._counted = count_steps(self.accountant, event, n, before_them=told)
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
        checks.refuse_state(own, self.private_state(), self.accountant)
        refuse_other_schedule(self._planned.noise, own)
        self.load_inner(rest)
        carried_state.mark_groups(self.optimizer.param_groups)
        if self.accountant is not None and own["accountant"] is not None:
            self.accountant.load_state_dict(own["accountant"])
            self._counted = counted(self.accountant)
        self.mechanism.load_state_dict(own)
        self._logical_step = own["logical_step"]
        self._used_draws, self._last_draws = own.get("draws"), None
        self._agreed = False
        self.discard()
        self.follow_mechanism()

    def private_state(self) -> dict[str, Any]:
        """What :meth:`state_dict` adds to the inner optimizer's: plain numbers, the seed among them."""
        feed, used = self.engine.feed, self._last_draws or self._used_draws
        return {
            **self.mechanism.state_dict(),
            "logical_step": self.logical_step,
            "accountant": None if self.accountant is None else self.accountant.state_dict(),
            "draws": used if feed is None else feed.state() or used,
            **self.saved_schedule(),
        }
