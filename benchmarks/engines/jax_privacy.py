"""JAX-Privacy: ``jit(clipped_grad(loss))`` on the same model, written down for JAX layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.engines.base import Engine
from benchmarks.problem import Problem

__all__ = ["JaxPrivacy"]

Weights = dict[str, Any]


class JaxPrivacy(Engine):
    """Clipped sums by JAX-Privacy 2, compiled by XLA; layers without a counterpart here are refused.

    Weights and batch are handed over before the step is timed, and the sums stay JAX arrays. XLA has its own threads.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        import jax  # type: ignore[import-not-found]
        from jax_privacy import clipping  # type: ignore[import-not-found]

        model, language = problem.model, problem.targets.ndim > 1
        _translate(model)
        if len(self.parameters) < len(list(model.parameters())):
            raise NotImplementedError("frozen parameters are not written for JAX")

        def loss(trained: Weights, x: Any, y: Any) -> Any:
            outputs = _run(model, "", trained, x)
            picked = jax.numpy.take_along_axis(jax.nn.log_softmax(outputs), y[..., None], -1)
            return -picked.mean() if language else -picked.sum()

        clipped = clipping.clipped_grad(loss, l2_clip_norm=problem.max_grad_norm, batch_argnums=(1, 2))
        self.weights = {n: _array(p) for n, p in self.parameters.items()}
        self.batch = (_array(problem.inputs), _array(problem.targets))
        self.calls = jax.jit(clipped).lower(self.weights, *self.batch).compile()
        self.sums: Weights = {}

    def forward(self) -> None:
        """Nothing by itself: :meth:`backward` is the whole step."""

    def backward(self, loss: Any) -> None:
        """The whole step, until the arrays are there."""
        import jax  # type: ignore[import-not-found]

        self.sums = jax.block_until_ready(self.calls(self.weights, *self.batch))

    def gradients(self) -> dict[str, Tensor]:
        """As tensors."""
        import numpy

        return {n: torch.from_numpy(numpy.array(g)) for n, g in self.sums.items()}

    def peak(self) -> int:
        """What XLA says that a step needs: temporary buffers and outputs, in bytes."""
        needs = self.calls.memory_analysis()
        return needs.temp_size_in_bytes + needs.output_size_in_bytes


def _array(tensor: Tensor) -> Any:
    import jax  # type: ignore[import-not-found]

    return jax.numpy.asarray(tensor.detach().cpu().numpy())


def _translate(model: nn.Module) -> None:
    """Refuse layers that have no counterpart.

    Raises:
        NotImplementedError: the layer.
    """
    for layer in model.modules():
        if type(layer) not in _LAYERS:
            raise NotImplementedError(f"no counterpart of {type(layer).__name__} is written for JAX")


def _run(layer: nn.Module, name: str, w: Weights, x: Any) -> Any:
    """The layer called ``name`` in the weights."""
    return _LAYERS[type(layer)](layer, f"{name}." if name else "", w, x)


def _linear(layer: Any, at: str, w: Weights, x: Any) -> Any:
    y = x @ w[f"{at}weight"].T
    return y + w[f"{at}bias"] if f"{at}bias" in w else y


def _conv(layer: Any, at: str, w: Weights, x: Any) -> Any:
    import jax  # type: ignore[import-not-found]

    padding = [(p, p) for p in layer.padding]
    y = jax.lax.conv_general_dilated(x, w[f"{at}weight"], layer.stride, padding)
    return y + w[f"{at}bias"][:, None, None] if f"{at}bias" in w else y


def _normal(x: Any, axes: tuple[int, ...], eps: float) -> Any:
    return (x - x.mean(axes, keepdims=True)) / (x.var(axes, keepdims=True) + eps) ** 0.5


def _group_norm(layer: Any, at: str, w: Weights, x: Any) -> Any:
    grouped = x.reshape(len(x), layer.num_groups, -1, *x.shape[2:])
    y = _normal(grouped, (2, 3, 4), layer.eps).reshape(x.shape)
    return y * w[f"{at}weight"][:, None, None] + w[f"{at}bias"][:, None, None]


def _layer_norm(layer: Any, at: str, w: Weights, x: Any) -> Any:
    return _normal(x, (-1,), layer.eps) * w[f"{at}weight"] + w[f"{at}bias"]


def _pool(start: float, what: str) -> Callable[..., Any]:
    def run(layer: Any, at: str, w: Weights, x: Any) -> Any:
        import jax  # type: ignore[import-not-found]

        size, stride, pad = layer.kernel_size, layer.stride, layer.padding
        y = jax.lax.reduce_window(
            x, start, getattr(jax.lax, what), (1, 1, size, size), (1, 1, stride, stride),
            [(0, 0), (0, 0), (pad, pad), (pad, pad)],
        )  # fmt: skip
        return y / size**2 if what == "add" else y

    return run


def _sequence(layer: Any, at: str, w: Weights, x: Any) -> Any:
    for name, inner in layer.named_children():
        x = _run(inner, f"{at}{name}", w, x)
    return x


def _attention(layer: Any, at: str, w: Weights, x: Any) -> Any:
    import jax  # type: ignore[import-not-found]

    q, k, v = (_linear(None, f"{at}{n}.", w, x).reshape(*x.shape[:2], layer.heads, -1) for n in "qkv")
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=layer.causal)
    return _linear(None, f"{at}out.", w, mixed.reshape(x.shape))


def _block(layer: Any, at: str, w: Weights, x: Any) -> Any:
    x = x + _run(layer.attention, f"{at}attention", w, _run(layer.norm1, f"{at}norm1", w, x))
    return x + _run(layer.mlp, f"{at}mlp", w, _run(layer.norm2, f"{at}norm2", w, x))


def _basic_block(layer: Any, at: str, w: Weights, x: Any) -> Any:
    import jax  # type: ignore[import-not-found]

    y = jax.nn.relu(_run(layer.norm1, f"{at}norm1", w, _run(layer.conv1, f"{at}conv1", w, x)))
    y = _run(layer.norm2, f"{at}norm2", w, _run(layer.conv2, f"{at}conv2", w, y))
    return jax.nn.relu(y + _run(layer.shortcut, f"{at}shortcut", w, x))


def _vit(layer: Any, at: str, w: Weights, x: Any) -> Any:
    import jax  # type: ignore[import-not-found]

    x = _run(layer.patches, "patches", w, x)
    x = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)
    token = jax.numpy.broadcast_to(w["token"], (len(x), 1, x.shape[2]))
    x = jax.numpy.concatenate([token, x], 1) + w["positions"]
    x = _run(layer.norm, "norm", w, _run(layer.blocks, "blocks", w, x))
    return _run(layer.head, "head", w, x[:, 0])


def _gpt(layer: Any, at: str, w: Weights, x: Any) -> Any:
    x = w["tokens.weight"][x] + w["positions.weight"][: x.shape[1]]  # looked up once or for every example: the same
    return _run(layer.head, "head", w, _run(layer.norm, "norm", w, _run(layer.blocks, "blocks", w, x)))


def _relu(layer: Any, at: str, w: Weights, x: Any) -> Any:
    import jax  # type: ignore[import-not-found]

    return jax.nn.relu(x)


def _gelu(layer: Any, at: str, w: Weights, x: Any) -> Any:
    import jax  # type: ignore[import-not-found]

    return jax.nn.gelu(x, approximate=False)


_LAYERS: dict[type, Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.ReLU: _relu,
    nn.GELU: _gelu,
    nn.Identity: lambda layer, at, w, x: x,
    nn.Embedding: lambda layer, at, w, x: w[f"{at}weight"][x],
    nn.MaxPool2d: _pool(-float("inf"), "max"),
    nn.AvgPool2d: _pool(0.0, "add"),
    nn.AdaptiveAvgPool2d: lambda layer, at, w, x: x.mean((2, 3), keepdims=True),
    nn.Flatten: lambda layer, at, w, x: x.reshape(len(x), -1),
    nn.Sequential: _sequence,
    models.CNN: lambda layer, at, w, x: _sequence(layer.features, "features.", w, x).mean((2, 3)),
    models.BasicBlock: _basic_block,
    models.Attention: _attention,
    models.Block: _block,
    models.ViT: _vit,
    models.GPT: _gpt,
}
