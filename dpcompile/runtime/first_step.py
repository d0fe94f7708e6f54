"""``check=True``: the first step against ``torch.func.vmap(grad)``, an independent way to the same numbers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpcompile._torch import pytree
from dpcompile.clipping.groups import Bounds, clip_groups
from dpcompile.clipping.weights import clip_weights, unscaled
from dpcompile.errors import DPCompileError, PrivacyError
from dpcompile.graph.labels import Examples, Label, Summed
from dpcompile.graph.slices import accumulation_dtype, in_front
from dpcompile.options import Options

__all__ = ["FirstStep"]

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


class FirstStep:
    """Records one call and the cotangents of its outputs, then recomputes the clipped sums.

    Args:
        module: the undecorated model.
        options: of the private one.
        call: the positional and keyword arguments.
        dims: ``(name, tensor, example dimension)`` of the call's tensors.
        parts: of how many equal parts of the batch the call is one.
    """

    def __init__(
        self,
        module: nn.Module,
        options: Options,
        call: tuple[tuple[Any, ...], dict[str, Any]],
        dims: Sequence[tuple[str, Tensor, int | None]],
        parts: int = 1,
    ) -> None:
        self._parts = parts
        self._module, self._options, self._call = module, options, call
        self._dims = {id(t): dim for _, t, dim in dims}
        self._cotangents: dict[int, Tensor] = {}
        self._outputs: list[Tensor] = []
        self._labels: dict[int, Label] = {}

    def label(self, outputs: Sequence[Any], labels: Sequence[Label]) -> None:
        """Note how the outputs of the compiled graph lie."""
        self._labels = {id(x): y for x, y in zip(outputs, labels, strict=False)}

    def watch(self, result: Any) -> None:
        """Note the cotangents that reach the outputs of the call, in the order of their leaves."""
        self._outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        for position, output in enumerate(self._outputs):
            if output.requires_grad:
                output.register_hook(lambda g, position=position: self._cotangents.__setitem__(position, g.detach()))

    def compare(self, norms: Tensor, mask: Tensor, sums: Sequence[tuple[str, Tensor]], bounds: Bounds) -> None:
        """Raise PrivacyError if the norms or the clipped sums, clipped to C, differ from what vmap gives."""
        each = self._per_example(len(mask))
        squared = {n: g.to(accumulation_dtype(g.dtype)).square().reshape(len(mask), -1).sum(1) for n, g in each.items()}
        scale = unscaled(mask)
        expected = torch.stack(list(squared.values())).sum(0).sqrt() * scale
        _same("the gradient norms", norms, expected.to(norms.dtype))
        groups = clip_groups(squared, self._options.clipping)
        actual = dict(sums)
        for group, bound in bounds.of(groups).items():
            members = groups[group]
            total = torch.stack([squared[n] for n in members]).sum(0)
            weights = clip_weights(total, mask, clipping=self._options.clipping, bound=bound, scale=scale)
            for name in members:
                wanted = torch.einsum("b,b...->...", weights, torch.nan_to_num(each[name]).to(weights.dtype))
                found = actual.get(name, torch.zeros_like(wanted, dtype=each[name].dtype))
                _same(f"the clipped gradient of parameter '{name}'", found, wanted.to(found.dtype))

    def _per_example(self, batch: int) -> dict[str, Tensor]:
        """Every example's gradient ``[B, *shape]`` by parameter, of its own loss."""
        leaves, structure = pytree.tree_flatten(self._call)
        mapped = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and self._dims.get(id(x)) is not None]
        parameters = {n: p.detach() for n, p in self._module.named_parameters() if p.requires_grad}
        rest = {n: p.detach() for n, p in self._module.named_parameters() if not p.requires_grad}
        rest.update(self._module.named_buffers())
        positions = sorted(self._cotangents)
        labels = [self._labels[id(self._outputs[k])] for k in positions]
        of_user = self._options.examples_per_user
        inside = of_user if self._options.loss_reduction == "mean" else 1
        fronts = []
        for k, label in zip(positions, labels, strict=True):
            cotangent = self._cotangents[k] * inside
            if isinstance(label, Examples):
                scale = batch * self._parts if self._options.loss_reduction == "mean" else 1
                fronts.append(in_front(cotangent * scale, label, batch))
            elif isinstance(label, Summed):
                fronts.append(cotangent.expand(batch, *cotangent.shape))
            else:  # a batch of one: the whole cotangent is its own
                fronts.append(cotangent.unsqueeze(0))

        def one(slices: list[Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
            values = list(leaves)
            for i, part in zip(mapped, slices, strict=True):
                values[i] = part
            args, kwargs = pytree.tree_unflatten(values, structure)

            def outputs(trainable: dict[str, Tensor]) -> list[Tensor]:
                result = torch.func.functional_call(self._module, {**rest, **trainable}, args, kwargs)
                tensors = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
                return [tensors[k] for k in positions]

            found, pull, *_ = torch.func.vjp(outputs, parameters)
            return pull([c.reshape(o.shape) for c, o in zip(cotangents, found, strict=True)])[0]

        along = [self._dims[id(leaves[i])] % leaves[i].ndim for i in mapped]  # type: ignore[operator]
        slices = [leaves[i].detach().unflatten(dim, (batch, of_user)) for i, dim in zip(mapped, along, strict=True)]
        in_dims = (along, [0] * len(fronts))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # operations that vmap runs one example at a time
                return torch.func.vmap(one, in_dims=in_dims)(slices, fronts)
        except RuntimeError as error:
            raise DPCompileError(
                f"check=True could not run the model under torch.func.vmap: {str(error).splitlines()[0]}",
                remedy="a model that draws random numbers, or calls operators that torch.vmap cannot run, cannot be "
                "compared: check it with .eval(), or without check",
            ) from error


def _same(what: str, found: Tensor, wanted: Tensor) -> None:
    finite = torch.isfinite(wanted)
    scale = wanted[finite].abs().max().clamp_min(1e-12) if finite.any() else torch.ones(())
    error = ((found - wanted)[finite].abs().max() / scale).item() if finite.any() else 0.0
    if error > _TOLERANCE.get(wanted.dtype, 1e-3) or not torch.equal(finite, torch.isfinite(found)):
        raise PrivacyError(
            f"check=True: {what} differ from torch.func.vmap(grad) by {error:.2g} (relative to the largest)",
            remedy="do not train with this model; please report it",
        )
