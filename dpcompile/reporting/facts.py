"""What a report says of a run, read off its model, mechanism, accountant and loader.

Nothing that epsilon does not cover is read: no loss, no norm, no weight, no seed, and no size of a dataset that the
relation protects.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.accounting.arguments import check_delta
from dpcompile.accounting.protocol import Accountant
from dpcompile.accounting.truncation import plain_rate
from dpcompile.distributed.ranks import world_size
from dpcompile.errors import PrivacyError
from dpcompile.module import Engine
from dpcompile.noise.adaptive import AdaptiveGaussianMechanism
from dpcompile.noise.buffered import BufferedMechanism
from dpcompile.noise.exact import EXCESS, ExactMechanism
from dpcompile.noise.mechanism import GaussianMechanism, Mechanism
from dpcompile.noise.tree import TreeMechanism
from dpcompile.reporting.report import Report

__all__ = ["report_of"]

_DELTAS = tuple(10.0**-k for k in range(2, 13))
_MOST_KINDS = 8  # of steps that are listed
_RELATIONS = {
    "zero_out": "zero-out: one example counts or does not, in a dataset whose size is public",
    "add_remove": "add/remove: one example is there or is not; the size of the dataset is protected",
    "replace_one": "replace-one: one example is another one, in a dataset whose size is public",
}
_NOT_COVERED = (
    "Other releases from the same data: earlier runs, other models, statistics, the choice of hyper-parameters by "
    "their results on it. Compose them with this epsilon.",
    "Losses, gradient norms and accuracies on training examples that were printed, plotted or logged: they are "
    "computed without noise.",
    "Checkpoints that hold the optimizer's or the loader's state: they hold the seeds, with which the noise can be "
    "subtracted. Weights alone may be published.",
    "Pre-trained weights and public data that the run began with, and preprocessing with numbers computed from the "
    "data.",
)
_FLOATS = (
    "Arithmetic: the noise is floating-point, and its low bits can tell what it was added to (Mironov 2012); running "
    "times are not hidden."
)
_INTEGERS = (
    "Arithmetic before the grid: clipped sums are floating-point until they are rounded to it, and may differ by more "
    "than C between neighbours by as much as such sums are off (Casacuberta et al. 2022); running times are not hidden."
)


def report_of(
    engine: Engine,
    mechanism: Mechanism,
    accountant: Accountant | None,
    *,
    delta: float,
    steps: int,
    optimizer: str,
    audit: Any = None,
    noise_by_step: bool = False,
) -> Report:
    """A run as it stands.

    Args:
        engine: of the model.
        mechanism: that releases its sums.
        accountant: that counted them.
        delta: of the summary.
        steps: logical steps of the optimizer.
        optimizer: the name of the inner one.
        audit: what was measured beside; its ``str`` is printed.
        noise_by_step: sigma of the mechanism is the scale of a schedule.

    Raises:
        PrivacyError: no accountant, whose epsilon the report is about, or a delta outside (0, 1).
    """
    check_delta(delta)
    if accountant is None:
        raise PrivacyError(
            "a report on an optimizer without an accountant: nobody counted its steps",
            remedy="make the optimizer with accountant=PrivacyAccountant(...), as make_private does",
        )
    epsilon = accountant.epsilon(delta)
    sections = {
        "Privacy": {
            **dict(_privacy(accountant, mechanism, delta, epsilon, _unit(engine))),
            **({"noise by the step": "a public function of it"} if noise_by_step else {}),
            **dict(_exactness(engine, mechanism, " times the schedule" if noise_by_step else "")),
        },
        "Data": dict(_data(engine, accountant)),
        "Model": dict(_model(engine, optimizer, steps)),
        "Versions": dict(_versions()),
    }
    if audit is not None:
        sections["Audit"] = {"a lower bound, measured": str(audit)}
    deltas = sorted({*_DELTAS, delta}, reverse=True)
    name = type(engine.module).__name__
    summary = (
        f"The weights of this {name} are ({epsilon:.4g}, {delta:g})-differentially private for one "
        f"{_unit(engine)}, after {steps} steps."
        if math.isfinite(epsilon)
        else f"The weights of this {name} are not differentially private: steps were taken without noise."
    )
    return Report(
        title=f"Privacy of {name}",
        summary=summary,
        sections=sections,
        curve=[(d, accountant.epsilon(d)) for d in deltas],
        certificate=_certificate(engine),
        not_covered=[
            *_NOT_COVERED,
            _INTEGERS if isinstance(mechanism, ExactMechanism) else _FLOATS,
            *_own_gaps(engine, accountant, delta),
        ],
    )


def _unit(engine: Engine) -> str:
    return "example" if engine.options.examples_per_user == 1 else "user"


def _privacy(
    accountant: Accountant, mechanism: Mechanism, delta: float, epsilon: float, unit: str
) -> Iterator[tuple[str, str]]:
    yield "ε", f"{epsilon:.4f} at δ = {delta:g}, an upper bound"
    yield "neighbouring datasets", _RELATIONS[accountant.relation].replace("example", unit)
    method = getattr(accountant, "method", None)
    yield "accounting", f"by {type(accountant).__name__}" if method is None else f"{method.upper()}, by dp-accounting"
    yield from _steps(accountant, "steps" if mechanism.bands == 1 else f"times, each for up to {mechanism.bands} steps")
    for event, count in getattr(accountant, "releases", ()):
        yield f"released beside: {event!r}", f"{count} times"
    if isinstance(accountant, PrivacyAccountant):
        yield "attacks", f"true less false positives, at most {accountant.attack_advantage():.4f}"
        mu, regret = accountant.gaussian_bound()
        yield "Gaussian DP", f"μ = {mu:.4f}, regret {regret:.4f}"
    if isinstance(mechanism, TreeMechanism):
        over = f"in a tree over each {mechanism.steps} steps, of which each {unit} is in {mechanism.height} nodes"
        yield "noise", f"{over}; the noise multiplier is that of all of them together"
    elif isinstance(mechanism, BufferedMechanism):
        over = f"correlated over each {mechanism.steps} steps by {len(mechanism.powers.weights)} buffers"
        yield "noise", f"{over}; the noise multiplier is that of all of them together"
    elif mechanism.bands > 1:
        yield "noise", f"correlated over {mechanism.bands} steps, of which each counts once, begun or whole"
    kinds = {
        GaussianMechanism: "Gaussian",
        AdaptiveGaussianMechanism: "Gaussian, with the count of examples within C",
        ExactMechanism: "discrete Gaussian on integers, sums over ranks among them",
    }
    several = len(mechanism.shares) if isinstance(mechanism, AdaptiveGaussianMechanism) else 1
    kind = kinds.get(type(mechanism), type(mechanism).__name__)
    yield "mechanism", kind if several == 1 else f"{kind}, one count for each of {several} clip groups"
    if isinstance(mechanism, AdaptiveGaussianMechanism):
        follows = f"follows the {mechanism.clip.quantile:g} quantile of the gradients' norms"
        yield "C", follows if several == 1 else f"that of each clip group {follows} there"
    yield "generator of the noise", "ChaCha20, cryptographic" if mechanism.secure else "Philox, not cryptographic"


def _exactness(engine: Engine, mechanism: Mechanism, times: str) -> Iterator[tuple[str, str]]:
    if not isinstance(mechanism, ExactMechanism):
        return
    s = mechanism.units(sum(p.numel() for p in engine.parameters().values() if p.requires_grad))
    yield (
        "grid of the sums",
        f"2^{math.log2(mechanism.grid):g}, C in {mechanism.bits} bits; noise of {s} units{times} a step",
    )
    if s:
        yield "discrete for Gaussian noise", f"adds less than {EXCESS:g} to ε, and that part of δ to δ"


def _steps(accountant: Accountant, unit: str) -> Iterator[tuple[str, str]]:
    kinds: Counter[str] = Counter()
    for sigma, rate, n in accountant.history:
        kinds[f"noise multiplier {sigma:g}, sample rate {rate:g}"] += n  # of truncated steps with size and cap
    if len(kinds) <= _MOST_KINDS:
        yield from ((kind, f"{n} {unit}") for kind, n in kinds.items())
        return
    sigmas, rates = [run[0] for run in accountant.history], [plain_rate(run[1]) for run in accountant.history]
    numbers = f"noise multipliers from {min(sigmas):g} to {max(sigmas):g}, sample rates to {max(rates):g}"
    yield numbers, f"{accountant.steps} {unit}, of {len(kinds)} kinds"


def _data(engine: Engine, accountant: Accountant) -> Iterator[tuple[str, str]]:
    unit, rows = _unit(engine), engine.options.examples_per_user
    if unit == "user":
        yield "unit", f"one user: all items of the dataset that groups gives it, up to {rows} of them in a step"
    else:
        yield "unit", "one example: one item of the dataset"
    feed = engine.feed
    if feed is None:
        yield "sampling", "by the loop; epsilon takes it to be Poisson sampling"
        return
    turns = "every step" if feed.bands == 1 else f"the steps of its part, one of {feed.bands} by turns"
    if feed.schedule is None:
        yield "sampling", f"Poisson, each {unit} with probability {feed.sample_rate:g} in {turns}"
    else:
        rates = [plain_rate(rate) for _, rate, _ in accountant.history] or [feed.sample_rate]
        span = f"{min(rates):g} to {max(rates):g}, a public function of the step"
        yield "sampling", f"Poisson, each {unit} with a probability of {span}; each step is divided by its own size"
    if feed.truncation is not None:
        yield "truncation", f"of a larger draw {feed.truncation[1]} {unit}s are kept, chosen at random"
    size = feed.dataset_size
    if size is not None and accountant.relation != "add_remove":
        yield f"{unit}s", str(size)


def _model(engine: Engine, optimizer: str, steps: int) -> Iterator[tuple[str, str]]:
    options, parameters = engine.options, engine.parameters()
    trained = [p for p in parameters.values() if p.requires_grad]
    yield "trained", f"{sum(p.numel() for p in trained)} numbers in {len(trained)} parameters"
    frozen = [p for p in parameters.values() if not p.requires_grad]
    if frozen:
        yield "frozen", f"{sum(p.numel() for p in frozen)} numbers in {len(frozen)} parameters"
    yield "optimizer", f"{optimizer}, {steps} logical steps"
    yield "clipping", options.clipping if isinstance(options.clipping, str) else "a function of the user"
    yield "C", f"{engine.max_grad_norm:g}"
    bounds = engine.clip.now.of(tuple(engine.clip.now.shares)).values()
    if len(bounds) > 1:
        yield "C of the clip groups", f"{min(bounds):g} to {max(bounds):g}"
    yield "ranks", str(world_size() if engine.distributed else 1)
    if engine.transformed is not None:
        rules = Counter(engine.transformed.plan.rules().values())
        yield "rules of the last graph", ", ".join(f"{rule} {n}" for rule, n in sorted(rules.items()))
        yield "certificate of the last graph", "SHA-256 " + hashlib.sha256(_certificate(engine).encode()).hexdigest()
    yield "compiled code", f"{options.backend}, " + ("compared with its graph" if options.verify else "not compared")


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("dpcompile", "torch", "dp-accounting"):
        try:
            yield name, metadata.version(name) if name != "torch" else torch.__version__
        except metadata.PackageNotFoundError:
            yield name, "not known"
    yield "Python", platform.python_version()


def _certificate(engine: Engine) -> str:
    return "" if engine.transformed is None else str(engine.transformed.certificate)


def _own_gaps(engine: Engine, accountant: Accountant, delta: float) -> Iterator[str]:
    if _unit(engine) == "example":
        yield "More than one example of one person: the unit is the example."
    else:
        yield "People who are several users, or whose data others hold: the unit is the user, as groups has it."
    if engine.feed is None:
        yield "How batches were drawn: no PoissonLoader is attached, and epsilon takes them to be Poisson samples."
    size = None if engine.feed is None else engine.feed.dataset_size
    if size is not None and accountant.relation != "add_remove" and delta >= 1 / size:
        yield f"δ = {delta:g} is not below 1 / {size}: publishing one {_unit(engine)}, at random, would satisfy it too."
