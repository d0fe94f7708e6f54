"""What a message says to do, tried: a program that is refused as it is written, and that runs right as it was told."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from oracle import PseudoLoss, assert_right, batch_size, clip, per_example_gradients
from remedy_sites import LISTED, came_from, listed, noted, sites
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import DPCompileError, make_private
from dpcompile.module import engine_of

__all__ = ["Right", "about", "data", "equals", "plain", "private", "refused", "right", "sgd", "trains"]


@dataclasses.dataclass(frozen=True)
class Right:
    """That something ran and was compared; only functions of this file make one."""

    how: str


HITS: dict[str, set[str]] = {}  # of this process: which sites each test came to


def refused(remedy: str, *, ways: int = 1, warns: bool = False, slow: bool = False) -> Callable[[Any], Any]:
    """A test of a program ``program(told)``, which is run with 0, as written, and then with each way to mend it.

    With 0 it must be refused with what to do, word by word, at the sites that ``remedies/listed.txt`` has for it; with
    1 to ``ways`` it must come to a comparison that holds. So both are one program but for what ``told`` changes.

    Args:
        remedy: what the message says to do, whole.
        ways: in how many ways the message says that it can be mended.
        warns: it is a warning, whose text ``remedy`` is the end of.
        slow: marked so.
    """

    def decorate(program: Callable[..., Right]) -> Any:
        name = program.__name__

        @functools.wraps(program)
        def test(**fixtures: Any) -> None:
            with noted() as made, pytest.raises(Warning if warns else DPCompileError) as caught:
                program(0, **fixtures)
            error: Any = caught.value
            said = str(error) if warns else error.remedy
            assert said is not None and (said.endswith(remedy) if warns else said == remedy), f"{error}"
            hit = HITS[name] = came_from(error, made)
            if "DPCOMPILE_LIST_REMEDIES" not in os.environ:
                meant = {key for key, tests in listed().items() if name in tests}
                assert hit == meant, f"came to {sorted(hit)}; run tests/remedies/test_every_remedy.py by itself"
            for way in range(1, ways + 1):
                torch._dynamo.reset()
                torch.manual_seed(0)
                done = program(way, **fixtures)
                assert isinstance(done, Right), "nothing was compared"

        signature = inspect.signature(program)
        test.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
        del test.__wrapped__
        return pytest.mark.slow(test) if slow else test

    return decorate


def write_list() -> None:
    """Write down which tests came to which sites, and keep the reasons of the others."""
    before, tests = listed(), {}
    for name, keys in [(n, k) for n, k in HITS.items() if n.startswith("test_")]:
        for key in keys:
            tests.setdefault(key, set()).add(name)
    for key, names in before.items():  # tests that did not run now, such as slow ones
        tests.setdefault(key, set()).update(n for n in names if n.startswith("test_") and n not in HITS)
    lines = [line for line in LISTED.read_text().splitlines() if line.startswith("#")] if LISTED.exists() else []
    for site in sites():
        names = sorted(tests.get(site.key, ()))
        why = before.get(site.key, ("- ",))[0]
        lines.append(f"{site.key}: {', '.join(names) if names else why if why.startswith('- ') else '- '}")
    LISTED.write_text("\n".join(lines) + "\n")


# --- comparisons ----------------------------------------------------------------------------------------------------


def right(
    model: Any,
    *args: Any,
    in_dims: Any = 0,
    out_dim: int = 0,
    loss: Any = None,
    mask: Tensor | None = None,
    groups: Mapping[str, str] | None = None,
    tolerance: float = 1e-5,
    **kwargs: Any,
) -> Right:
    """One forward and backward of the private model, norms and sums compared with one backward per example."""
    engine = engine_of(model)
    options = engine.options
    each = loss or PseudoLoss(batch_size(args, kwargs, in_dims), out_dim)
    ordinary = copy.deepcopy(engine.module)
    model.zero_grad()
    value = each(model(*args, **kwargs), slice(None))
    (value.mean() if options.loss_reduction == "mean" else value.sum()).backward()
    one_by_one = per_example_gradients(ordinary, args, kwargs, each, in_dims=in_dims)
    clipping = options.clipping if groups is None else "flat"  # within each group
    assert_right(model, clip(one_by_one, engine.max_grad_norm, clipping=clipping, mask=mask, groups=groups), tolerance)
    return Right("one backward per example")


def trains(model: Any, optimizer: Any, loader: Any, *, passes: int = 1, loss: Any = None) -> Right:
    """Passes over the loader in the ordinary loop: every draw is a step, the weights move, and epsilon is counted."""
    before, begun = [p.detach().clone() for p in model.parameters() if p.requires_grad], optimizer.logical_step
    for _ in range(passes):
        for batch in loader:
            x, y = batch[0], batch[-1]
            (torch.nn.functional.cross_entropy(model(x), y) if loss is None else loss(model, batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return stepped(model, optimizer, before, begun + passes * len(loader))


def stepped(model: Any, optimizer: Any, before: Sequence[Tensor], steps: int) -> Right:
    assert optimizer.logical_step == steps > 0, (optimizer.logical_step, steps)
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    assert all(torch.isfinite(p).all() and not torch.equal(p, q) for p, q in zip(after, before, strict=True))
    if optimizer.accountant is not None:
        assert optimizer.accountant.steps == -(-steps // optimizer.mechanism.bands)  # of correlated noise, by rows
    return Right("training steps")


def equals(value: Any, wanted: Any) -> Right:
    assert value == wanted, (value, wanted)
    return Right("equal")


def about(value: float, wanted: float | None = None, rel: float = 1e-6) -> Right:
    """A finite number above 0, the wanted one where that is known by another way."""
    assert math.isfinite(value) and value > 0, value
    assert wanted is None or value == pytest.approx(wanted, rel=rel), (value, wanted)
    return Right("number")


# --- what programs begin with ---------------------------------------------------------------------------------------


def plain() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(5, 3)


def data(size: int = 24, **options: Any) -> DataLoader[Any]:
    torch.manual_seed(2)
    return DataLoader(TensorDataset(torch.randn(size, 5), torch.randint(0, 3, (size,))), **{"batch_size": 8, **options})


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def private(loader: Any = None, model: nn.Module | None = None, **options: Any) -> tuple[Any, Any, Any]:
    """``make_private`` of the small classifier, uncompiled; RDP, which counts fast."""
    model = plain() if model is None else model
    options = {"noise_multiplier": 1.0, "backend": "eager", "accountant": "rdp", **options}
    options = {k: v for k, v in options.items() if v is not None or k == "padding_example"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="batches of .* meet epsilon")
        return make_private(model, sgd(model), data() if loader is None else loader, **options)
