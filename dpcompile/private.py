"""``make_private``: model, optimizer and loader made private together, so that they cannot disagree."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.accounting.arguments import Method, Relation, check_bands, check_delta, check_plan, refuse_large_delta
from dpcompile.accounting.by_step import ByStep
from dpcompile.accounting.planned_steps import OnExceed
from dpcompile.accounting.protocol import Accountant, check_accountant
from dpcompile.accounting.truncation import check_truncated
from dpcompile.api import dp_compile
from dpcompile.batchnorm import refuse_batchnorm
from dpcompile.data.calibrated import calibrated_cap, calibrated_noise
from dpcompile.data.checks import refuse_cap_by_step
from dpcompile.data.loader import PoissonLoader
from dpcompile.data.making import private_loader_of
from dpcompile.distributed.ranks import from_first
from dpcompile.errors import PrivacyError
from dpcompile.module import Engine, PrivateModule, engine_of
from dpcompile.noise.adaptive import AdaptiveClip
from dpcompile.noise.counter import fresh_seed
from dpcompile.optim.checks import refuse_other_rate, refuse_rate_from_size
from dpcompile.optim.common import banded_mechanism, exact_mechanism, mechanism_in_turn
from dpcompile.optim.optimizer import DPOptimizer
from dpcompile.optim.step_numbers import refuse_rows
from dpcompile.options import PassedOptions
from dpcompile.runtime.replicas import inner_module

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["make_private"]

Model = TypeVar("Model", bound=nn.Module)


def make_private(
    model: Model,
    optimizer: Optimizer | Sequence[Optimizer],
    loader: DataLoader[Any] | PoissonLoader,
    *,
    noise_multiplier: float | None = None,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    max_grad_norm: float | AdaptiveClip | None = None,
    accountant: Method | Accountant = "pld",
    relation: Relation = "zero_out",
    bands: int | None = None,
    in_turn: Literal["tree", "buffers"] | None = None,
    noise_schedule: Callable[[int], float] | None = None,
    batch_size_schedule: Callable[[int], float] | None = None,
    groups: Any = None,
    examples_per_user: int | None = None,
    physical_batch_size: int | None = None,
    max_batch_size: int | Literal["auto"] | None = None,
    padding_example: Any = None,
    on_exceed: OnExceed = "raise",
    seed: int | None = None,
    secure: bool = False,
    exact: bool = False,
    **dp_compile_options: Unpack[PassedOptions],
) -> tuple[Model, DPOptimizer, PoissonLoader]:
    """Make an ordinary training loop private.

    The loop stays as it is; ``optimizer.accountant.epsilon(delta)`` tells what it has cost so far.

    Args:
        model: an ordinary model, also one under ``fully_shard``; one that :func:`dpcompile.dp_compile` returned; or
            such a one inside DistributedDataParallel.
        optimizer: a torch optimizer over its trainable parameters, or several in a list, each over a part of them.
        loader: a DataLoader with torch's own sampler (its batch size becomes the expected one, of all ranks together),
            or a PoissonLoader.
        noise_multiplier: sigma. Either this or a target.
        target_epsilon: the epsilon that all ``epochs`` or ``steps`` together may cost. A warning tells if it could be
            had with far less noise in as much compute, or in far less compute, by another batch size
            (:func:`dpcompile.accounting.batch_sizes.better_batch_size`).
        target_delta: with ``target_epsilon``; well below 1 / size of the dataset, where more is refused.
        epochs: passes over the loader that are planned; needed with a target, unless ``steps`` is given.
        steps: logical steps that are planned.
        max_grad_norm: C; None: 1.0, or what a model compiled already has. :class:`dpcompile.AdaptiveClip`: it follows a
            quantile of the gradients' norms, or those of layers or blocks each their own, at the same epsilon.
        accountant: "pld" or "rdp"; or, with ``noise_multiplier``, one that is made already: a PrivacyAccountant that
            counts other releases too, or one of your own (:class:`dpcompile.accounting.protocol.Accountant`).
        relation: which datasets are neighbours, see :class:`dpcompile.PrivacyAccountant`. "add_remove" needs a
            PoissonLoader whose rate does not come from the dataset's size.
        bands: noise that is correlated over so many steps (:class:`dpcompile.noise.banded.BandedMechanism`), with
            coefficients that are best for the planned steps, and draws from as many parts of the dataset by turns
            (:class:`dpcompile.PoissonLoader`). None: a PoissonLoader's own, else 1: independent noise. What is best
            depends on the run: more bands need a larger sigma for a target, of which less adds up in the weights
            (``python -m benchmarks.mechanisms``).
        in_turn: no sampling: each example once in a pass, always in the same step of it, and noise that is correlated
            over the pass: by "buffers" (:class:`dpcompile.noise.buffered.BufferedMechanism`), each as large as the
            model, or by a binary "tree" (DP-FTRL, :class:`dpcompile.noise.tree.TreeMechanism`), which adds more noise
            and holds nothing. Noise multipliers are those of a pass.
        noise_schedule: what sigma is multiplied by at logical step t, counted from 0 (:mod:`dpcompile.schedules` has
            some): ``noise_multiplier``, or what is calibrated so that all planned steps together meet the target, is
            its scale. The optimizer goes along it by itself. With a batch size by the step t is the number of the draw.
        batch_size_schedule: what the DataLoader's batch size is multiplied by, likewise, in draw t
            (:class:`dpcompile.PoissonLoader`, whose ``expected_batch_size`` may be such a function itself).
        groups: whose each example is, so that epsilon is for all that a user has: see
            :class:`dpcompile.PoissonLoader`. The loader's batch size then counts users.
        examples_per_user: with ``groups``, how many rows of a batch are each user's.
        physical_batch_size: see :class:`dpcompile.PoissonLoader`.
        max_batch_size: a cap on draws, so that every step has as many physical batches, see there; what it costs is
            counted, and calibrated. "auto": the smallest multiple of ``physical_batch_size`` times the ranks (of 8
            times the ranks, if that is not given) with which epsilon is at most 0.1 % above that of whole draws, at
            ``target_delta`` (else a tenth of 1 / size of the dataset) after the planned steps (else one pass).
        padding_example: see there.
        on_exceed: with a target, what a step beyond the planned ones does: "raise" (and a pass that begins when all are
            taken is warned of), "warn" (once) or "ignore".
        seed: one secret for noise and draws, which take different streams of it (a PoissonLoader keeps its own for the
            draws). None draws one.
        secure: ChaCha20, likewise.
        exact: integers in the place of floating-point numbers, from the clipped sums on: their sums over ranks, and the
            noise (:class:`dpcompile.noise.exact.ExactMechanism`), at the same epsilon. It implies ``secure``.
        **dp_compile_options: the rest of :func:`dpcompile.dp_compile`'s.

    Returns:
        ``(model, optimizer, loader)`` for the loop.

    Raises:
        ExampleMixingError: a BatchNorm layer in training mode.
        PrivacyError: not exactly one of ``noise_multiplier`` and ``target_epsilon``, an incomplete target, options for
            a model, a loader or an accountant that is made already and has others, or whatever the parts refuse.

    **Guarantee.** The returned loader samples at the rate that the accountant counts, the optimizer adds the noise that
    it counts, to the sums that the model clips, and once per draw of the loader.
    """
    _check_arguments(dp_compile_options, noise_multiplier, target_epsilon, target_delta, epochs, steps)
    secure = secure or exact
    relation = _relation(accountant, relation, target_epsilon)
    _refuse_private(optimizer)
    of_user = examples_per_user if examples_per_user is not None else getattr(loader, "examples_per_user", 1)
    private_model = _private_model(model, max_grad_norm, of_user, cast(Any, dp_compile_options))
    engine = engine_of(private_model)
    seed = _seed(engine, seed, secure)
    options = {"physical_batch_size": physical_batch_size, "bands": bands, "in_turn": in_turn is not None or None}
    options["examples_per_user"] = examples_per_user
    make_loader = partial(private_loader_of, loader, groups, padding_example, batch_size_schedule, seed, secure, engine)
    private_loader = make_loader({**options, "max_batch_size": None if max_batch_size == "auto" else max_batch_size})
    _check_data(private_loader, relation, target_delta)
    counted = _counted(private_loader, accountant, relation)
    length = steps if steps is not None else (epochs or 0) * len(private_loader) or None
    target = {"target_epsilon": target_epsilon, "target_delta": target_delta, "steps": length}
    if max_batch_size == "auto":
        refuse_cap_by_step(noise_schedule, private_loader.schedule)
        cap = calibrated_cap(private_loader, accountant, noise_multiplier, physical_batch_size, counted, target)
        private_loader = make_loader({**options, "max_batch_size": cap})
    noise = None if noise_schedule is None else ByStep(noise_schedule, "noise_schedule")
    _check_steps(private_loader, counted, noise)
    planned = length if noise_multiplier is None else None
    if noise_multiplier is None:
        noise_multiplier = calibrated_noise(private_loader, engine, noise, counted, target)
    numbers: dict[str, Any] = {"noise_multiplier": noise_multiplier, "seed": seed, "secure": secure}
    counts = _accountant(accountant, noise_multiplier, private_loader, relation)
    mechanism = _mechanism(engine, numbers, max_grad_norm, private_loader, length, exact, in_turn)
    private_optimizer = DPOptimizer(optimizer, private_model, accountant=counts, **mechanism)
    private_optimizer.plan(planned, on_exceed, noise)
    return private_model, private_optimizer, private_loader.attach(private_model, private_optimizer)


def _check_arguments(options: Mapping[str, Any], *plan: Any) -> None:
    own, passed = inspect.signature(make_private).parameters, inspect.signature(dp_compile).parameters
    known = sorted({*own, *passed} - {"dp_compile_options"})
    for name in options:
        if name not in passed:
            close = [k for k in known if k.endswith(f"_{name}") or name.endswith(f"_{k}")]
            close += difflib.get_close_matches(name, known, n=1)
            raise TypeError(
                f"make_private() got an unexpected keyword argument {name!r}"
                + (f"; did you mean {close[0]!r}?" if close else "")
            )
    check_plan(*plan)


def _check_data(loader: PoissonLoader, relation: Relation, target_delta: float | None) -> None:
    refuse_rate_from_size(relation, loader)
    if target_delta is not None:
        check_delta(target_delta)
        refuse_large_delta(target_delta, loader.dataset_size)


def _check_in_turn(in_turn: Any) -> None:
    if in_turn not in (None, "tree", "buffers"):
        raise PrivacyError(f"in_turn is {in_turn!r}", remedy="give 'buffers' or 'tree', or leave it out: sampling")


def _refuse_private(optimizer: Any) -> None:
    if isinstance(optimizer, DPOptimizer):
        raise PrivacyError("the optimizer is a DPOptimizer already", remedy="pass the plain torch optimizer")
    for one in optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]:
        if isinstance(one, Optimizer) and isinstance(getattr(one, "optimizer", None), Optimizer):
            raise PrivacyError(
                f"the optimizer is a {type(one).__name__} around another one: a framework has prepared it already",
                remedy="make the loop private first, and prepare what comes of it; or, with Accelerate, call "
                "dpcompile.integrations.accelerate.make_private(accelerator, model, optimizer, loader, ...)",
            )


def _seed(engine: Engine, seed: int | None, secure: bool) -> int:
    drawn: int = fresh_seed(secure=secure)
    if engine.distributed:  # on every rank, whether it is given a seed or not
        drawn = from_first(drawn)
    return drawn if seed is None else seed


def _relation(accountant: Method | Accountant, relation: Relation, target_epsilon: float | None) -> Relation:
    """The relation that the accountant counts for, once it is known to be one."""
    if isinstance(accountant, str):
        return relation
    check_accountant(accountant)
    if target_epsilon is not None:
        raise PrivacyError(
            "target_epsilon, and an accountant that is made already: it has a noise multiplier",
            remedy="give noise_multiplier=accountant.noise_multiplier in place of the target; dpcompile.solve and "
            "calibrate_noise find the one of a target",
        )
    if relation not in ("zero_out", accountant.relation):
        raise PrivacyError(
            f"the accountant counts for relation {accountant.relation!r}, not {relation!r}",
            remedy="leave relation out, or make the accountant with it",
        )
    return accountant.relation


def _accountant(
    accountant: Method | Accountant, noise_multiplier: float, loader: PoissonLoader, relation: Relation
) -> Accountant:
    if not isinstance(accountant, str):
        refuse_other_rate(accountant, loader)
        return accountant
    return PrivacyAccountant(
        noise_multiplier=noise_multiplier, method=accountant, relation=relation, truncation=loader.truncation,
        sample_rate=loader.sample_rate if loader.schedule is None else loader.schedule.sample_rate(0),
    )  # fmt: skip


def _counted(loader: PoissonLoader, accountant: Method | Accountant, relation: Relation) -> dict[str, Any]:
    """Rate, method and relation of the steps, as `calibrate_noise` takes them."""
    method = accountant if isinstance(accountant, str) else getattr(accountant, "method", "pld")
    rate = loader.sample_rate if loader.schedule is None else loader.schedule.sample_rate
    return {"sample_rate": rate, "method": method, "relation": relation}


def _check_steps(loader: PoissonLoader, counted: Mapping[str, Any], noise: ByStep | None) -> None:
    """A bound is known for such steps."""
    refuse_rows(1 if noise is None else loader.bands)
    check_bands(loader.bands, counted["relation"])
    check_truncated(loader.truncation, counted["method"], counted["relation"])


def _mechanism(
    engine: Engine,
    numbers: dict[str, Any],
    max_grad_norm: float | AdaptiveClip | None,
    loader: PoissonLoader,
    steps: int | None,
    exact: bool,
    in_turn: str | None,
) -> dict[str, Any]:
    """What DPOptimizer is given to release sums by."""
    clip = max_grad_norm if isinstance(max_grad_norm, AdaptiveClip) else None
    _check_in_turn(in_turn)
    bands, by_step = loader.bands, loader.schedule
    first = loader.expected_batch_size if by_step is None else by_step.expected_batch_size(0)
    numbers = {**numbers, "expected_batch_size": first}
    if exact and clip is None and by_step is not None:
        largest = max(map(by_step.expected_batch_size, range(steps or len(loader))))
        return {"mechanism": exact_mechanism(engine, **numbers, largest=largest)}
    if bands == 1:
        return {**numbers, "adaptive_clip": clip, "exact": exact}
    if exact:
        raise PrivacyError(
            f"exact noise that is correlated over {bands} steps: rows of the latter are floating-point combinations of "
            "earlier ones",
            remedy="leave exact=True or bands out",
        )
    if clip is not None:
        raise PrivacyError(
            f"C that follows a quantile, and noise that is correlated over {bands} steps: no bound is known for rows "
            "of several sizes",
            remedy="give max_grad_norm a number, or leave bands out",
        )
    if in_turn is not None:
        return {"mechanism": mechanism_in_turn(engine, in_turn, **numbers, steps=bands)}
    return {"mechanism": banded_mechanism(engine, **numbers, bands=bands, steps=steps)}


def _private_model(
    model: nn.Module, max_grad_norm: float | AdaptiveClip | None, examples_per_user: int, options: dict[str, Any]
) -> Any:
    if not isinstance(model, nn.Module):
        raise PrivacyError(
            f"the model is a {type(model).__name__}",
            remedy="give the nn.Module first, then the optimizer: make_private(model, optimizer, loader, ...)",
        )
    refuse_batchnorm(inner_module(model))
    moves = isinstance(max_grad_norm, AdaptiveClip)
    if not isinstance(inner_module(model), PrivateModule):
        bound = max_grad_norm.initial if isinstance(max_grad_norm, AdaptiveClip) else max_grad_norm
        of_users = {} if examples_per_user == 1 else {"examples_per_user": examples_per_user}
        return dp_compile(model, max_grad_norm=1.0 if bound is None else bound, **of_users, **options)
    has = engine_of(model).max_grad_norm
    if max_grad_norm is not None and not moves and max_grad_norm != has:
        raise PrivacyError(
            f"the model is compiled already with max_grad_norm={has}, not {max_grad_norm}",
            remedy="pass the ordinary model, or leave max_grad_norm out",
        )
    if options:
        raise PrivacyError(
            "the model is compiled already, and these options come too late: " + ", ".join(sorted(options)),
            remedy="pass the ordinary model, or give the options to dp_compile",
        )
    return model
