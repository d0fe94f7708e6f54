"""BatchNorm: told before anything is compiled, and replaced by GroupNorm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from dpcompile._torch.autograd import has_call_hooks
from dpcompile.errors import ExampleMixingError, UnsupportedGraphError

__all__ = ["batch_normalised", "has_statistics", "refuse_batchnorm", "replace_batchnorm"]

_BatchNorm = nn.modules.batchnorm._BatchNorm
_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_normalised(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorm layers by name that, as they are now, normalise by the batch: not those frozen by ``.eval()``."""
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm))
    return {name: m for name, m in layers if m.training or m.running_mean is None}


def has_statistics(layers: Iterable[Any]) -> bool:
    """Whether ``.eval()`` would make all of these layers normalise by statistics that they hold."""
    return all(layer.running_mean is not None for layer in layers)


def refuse_batchnorm(model: nn.Module) -> None:
    """Raise ExampleMixingError, which names the layers, if a layer of the model normalises by the batch."""
    found = batch_normalised(model)
    if found:
        some = ", ".join(list(found)[:4]) + (", ..." if len(found) > 4 else "")
        frozen = (
            "; or call .eval() on these layers, to freeze their statistics" if has_statistics(found.values()) else ""
        )
        raise ExampleMixingError(
            f"the model has {len(found)} BatchNorm layer{'s' * (len(found) > 1)} in training mode, which normalise "
            f"every example by the statistics of the whole batch ({some or 'the model itself'})",
            remedy="call model = dpcompile.replace_batchnorm(model), which puts GroupNorm there" + frozen,
        )


def replace_batchnorm(model: nn.Module, *, channels_per_group: int = 16) -> Any:
    """Replace every BatchNorm of a model by GroupNorm, which normalises each example by itself.

    In place, as ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` does. Scale and shift are the very parameters of the
    layer, so an optimizer that holds them stays right; eps, training mode, device and dtype stay too. Running
    statistics are dropped, for GroupNorm has none: a pretrained model computes something else, and is to be fine-tuned.

    Args:
        model: an ordinary one; layers that are used in several places stay shared.
        channels_per_group: at least so many channels, of each example, are normalised together; as few as make equal
            groups, and all where there are fewer. At most 32 groups.

    Returns:
        The model; where that is a BatchNorm layer itself, what takes its place.

    Raises:
        UnsupportedGraphError: a layer without a size yet, of a class of its own, with hooks or parametrizations: what
            it computes besides would be lost.

    Source: Wu and He, "Group Normalization" (ECCV 2018), section 4.1: 16 channels in a group do as well as 32 groups.
    """
    if isinstance(channels_per_group, bool) or not isinstance(channels_per_group, int) or channels_per_group < 1:
        raise UnsupportedGraphError(
            f"channels_per_group is {channels_per_group!r}", remedy="give an integer, 1 or more"
        )
    places = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)]
    for name, layer in places:
        _check(name, layer)
    made: dict[int, nn.Module] = {}
    for name, layer in places:
        new = made.setdefault(id(layer), _group_norm(layer, channels_per_group))
        if not name:
            return new
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
    return model


def _check(name: str, layer: Any) -> None:
    kind = type(layer)
    if any(is_lazy(t) for t in (*layer.parameters(), *layer.buffers())) or not layer.num_features:
        why, remedy = "has no size yet", "call the model once, under torch.no_grad(), before its layers are replaced"
    elif parametrize.is_parametrized(layer):
        why, remedy = "has parametrizations", "torch.nn.utils.parametrize.remove_parametrizations first"
    elif kind not in _KINDS:
        why = "is of a class of its own, and what that computes besides would be lost"
        remedy = (
            "replace it by a module of yours that normalises each example, or make the model with another norm_layer"
        )
    elif has_call_hooks(layer):
        why, remedy = "has hooks", "remove them, replace the layers, then register them anew"
    else:
        return
    raise UnsupportedGraphError(f"{kind.__name__} '{name}' cannot be replaced: it {why}", remedy=remedy)


def _group_norm(layer: Any, channels_per_group: int) -> nn.GroupNorm:
    channels = layer.num_features
    most = max(1, min(32, channels // channels_per_group))
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    new = nn.GroupNorm(groups, channels, eps=layer.eps, affine=False)
    new.affine, new.weight, new.bias = layer.affine, layer.weight, layer.bias
    return new.train(layer.training)
