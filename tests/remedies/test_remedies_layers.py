"""Layers, before anything is compiled: what their messages say to do, tried."""

from __future__ import annotations

from typing import Any

import torch
from private_steps import X, over, steps
from remedies import Right, private, refused, right, trains
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dpcompile import AdaptiveClip, DPOptimizer, dp_compile, replace_batchnorm, validate
from dpcompile.noise.adaptive import AdaptiveGaussianMechanism

ROWS = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(4))


def normalised(**options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, **options), nn.Linear(4, 3))


def no_problem(model: nn.Module, *args: Any, **options: Any) -> Right:
    """Nothing is found, and then the model is right."""
    for problem in validate(model, *args, **options):
        raise problem
    return right(dp_compile(model, backend="eager"), *args)


# --- BatchNorm ------------------------------------------------------------------------------------------------------


@refused(
    "call model = dpcompile.replace_batchnorm(model), which puts GroupNorm there; or call .eval() on these layers, to "
    "freeze their statistics",
    ways=2,
    slow=True,
)
def test_batchnorm(told: int) -> Right:
    model = normalised()
    if told == 1:
        model = replace_batchnorm(model)
    elif told == 2:
        model[1].eval()
    return trains(*private(model=model))


@refused("call model = dpcompile.replace_batchnorm(model), which puts GroupNorm there")
def test_batchnorm_without_statistics(told: int) -> Right:
    model = normalised(track_running_stats=False)
    return trains(*private(model=replace_batchnorm(model) if told else model.eval()))


@refused("give an integer, 1 or more")
def test_no_channels_per_group(told: int) -> Right:
    return right(dp_compile(replace_batchnorm(normalised(), channels_per_group=4 * told), backend="eager"), X)


@refused("call the model once, under torch.no_grad(), before its layers are replaced")
def test_batchnorm_without_a_size(told: int) -> Right:
    model = nn.Sequential(nn.Linear(5, 4), nn.LazyBatchNorm1d(), nn.Linear(4, 3))
    if told:
        with torch.no_grad():
            model(X)
    return right(dp_compile(replace_batchnorm(model), backend="eager"), X)


@refused("torch.nn.utils.parametrize.remove_parametrizations first")
def test_batchnorm_that_is_parametrized(told: int) -> Right:
    model = normalised()
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    if told:
        parametrize.remove_parametrizations(model[1], "weight")
    return right(dp_compile(replace_batchnorm(model), backend="eager"), X)


@refused(
    "replace it by a module of yours that normalises each example, or make the model with another norm_layer", ways=2
)
def test_batchnorm_of_a_class_of_its_own(told: int) -> Right:
    class WithReLU(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input).relu()

    class Each(nn.GroupNorm):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input).relu()

    def made(norm_layer: Any = WithReLU) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 4), norm_layer(4), nn.Linear(4, 3))

    model: Any = made(nn.LayerNorm) if told == 2 else made()
    if told == 1:
        model[1] = Each(2, 4)
    return right(dp_compile(replace_batchnorm(model), backend="eager"), X)


@refused("remove them, replace the layers, then register them anew")
def test_batchnorm_with_hooks(told: int) -> Right:
    def doubled(module: Any, args: Any, result: Tensor) -> Tensor:
        return 2 * result

    model = normalised()
    hook = model[1].register_forward_hook(doubled)
    if told:
        hook.remove()
    model = replace_batchnorm(model)
    if told:
        model[1].register_forward_hook(doubled)
    return right(dp_compile(model, backend="eager"), X)


# --- what validate sees in layers -----------------------------------------------------------------------------------


@refused("call the model once, under torch.no_grad()")
def test_parameters_without_a_size(told: int) -> Right:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    if told:
        with torch.no_grad():
            model(X)
    return no_problem(model, X)


@refused("unfreeze what is to be trained")
def test_nothing_to_train(told: int) -> Right:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).requires_grad_(False)
    if told:
        model[1].requires_grad_(True)
    return no_problem(model, X)


@refused("dpcompile.replace_batchnorm(model), or call .eval() on it", ways=2)
def test_validated_batchnorm(told: int) -> Right:
    model = normalised()
    if told == 2:
        model[1].eval()
    return no_problem(replace_batchnorm(model) if told == 1 else model, X)


@refused("dpcompile.replace_batchnorm(model)")
def test_validated_batchnorm_without_statistics(told: int) -> Right:
    model = normalised(track_running_stats=False).eval()
    return no_problem(replace_batchnorm(model) if told else model, X)


@refused("make it with track_running_stats=False, or call .eval() on it", ways=2)
def test_instances_with_statistics(told: int) -> Right:
    model = nn.Sequential(nn.Conv1d(8, 4, 2), nn.InstanceNorm1d(4, track_running_stats=told != 1), nn.Flatten())
    if told == 2:
        model[1].eval()
    return no_problem(model.double(), ROWS.double())


class Waves(nn.Module):
    def __init__(self, real: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        w = torch.randn(5, 3, dtype=torch.complex64)
        self.real, self.w = real, nn.Parameter(torch.view_as_real(w).clone() if real else w)

    def forward(self, x: Tensor) -> Tensor:
        w = torch.view_as_complex(self.w) if self.real else self.w
        return torch.view_as_real(x.to(torch.complex64) @ w).flatten(1)


@refused("hold it as a real one, with torch.view_as_real")
def test_a_complex_parameter_validated(told: int) -> Right:
    return no_problem(Waves(bool(told)), X)


@refused("keep it as a real parameter [..., 2], and use torch.view_as_complex(it) in forward")
def test_a_complex_parameter_compiled(told: int) -> Right:
    return right(dp_compile(Waves(bool(told)), backend="eager"), X)


# --- clip groups ----------------------------------------------------------------------------------------------------


@refused(
    "make the DPOptimizer when everything that is to be trained has requires_grad=True, and a new one after "
    "unfreezing a layer or a block",
    ways=2,
)
def test_a_layer_unfrozen_under_quantiles(told: int) -> Right:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model: Any = dp_compile(module, clipping="per_layer", backend="eager")
    module[0].requires_grad_(told == 1)
    optimizer = over(model, adaptive_clip=AdaptiveClip(count_noise=4.0))
    module[0].requires_grad_(True)
    if told == 2:
        optimizer = over(model, adaptive_clip=AdaptiveClip(count_noise=4.0))
    return steps(model, optimizer)


@refused(
    "for one group leave them out, for several give DPOptimizer adaptive_clip=AdaptiveClip(...), which begins with "
    "equal parts; load a state as DPOptimizer.state_dict() returned it",
    ways=3,
)
def test_parts_of_c_that_are_too_large(told: int) -> Right:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model: Any = dp_compile(module, clipping="flat" if told == 1 else "per_layer", backend="eager")
    if told == 1:
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        return steps(model, DPOptimizer(inner, model, mechanism=AdaptiveGaussianMechanism(1.0, 1.0, 8, 0)))
    if told == 0:
        AdaptiveGaussianMechanism(1.0, 1.0, 8, 0, shares={"0": 0.9, "2": 0.9})
    optimizer = over(model, adaptive_clip=AdaptiveClip(count_noise=4.0))
    if told == 3:
        optimizer.load_state_dict(optimizer.state_dict())
    return steps(model, optimizer)
