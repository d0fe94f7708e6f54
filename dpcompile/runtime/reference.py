"""A rewritten graph run as it stands, operation by operation: what its compiled code is compared with."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile._torch.aot import plain_graph
from dpcompile._torch.inductor_random import drawn_by_inductor
from dpcompile.graph.operations import operation_name
from dpcompile.runtime.random_state import RandomState

__all__ = ["Noise", "Reference"]

_FURTHER = 32.0  # epsilons of its row: what a value is moved by that something is decided by
_EXACT = {"where", "clone", "full", "full_like", "zeros_like", "ones_like", "copy", "constant_pad_nd", "cat", "relu"}
# What is no comparison by its dtype, and jumps all the same.
_JUMPS = {"relu", "abs", "sign", "sgn", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "amax", "amin", "max",
    "min", "sort", "topk", "kthvalue", "median", "floor", "ceil", "round", "trunc", "frac", "fmod", "remainder",
    "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "elu", "threshold", "threshold_backward",
    "cummax", "cummin"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Noise:
    """What rounding may do to every computed value: up to an epsilon of its dtype, either way.

    Attributes:
        seed: of the noise.
        sign: 1, or -1 for the same noise the other way.
        decisions: whether those values are moved by more, by which something is decided: the sign of what a ReLU is
            given, which value of a window is the largest. A sum near zero is not off by an epsilon of itself, but of
            its terms, so it is moved by :data:`_FURTHER` epsilons of its row's root mean square.
    """

    seed: int
    sign: float = 1.0
    decisions: bool = False

    def on(self, value: Tensor, generator: torch.Generator, decides: bool) -> Tensor:
        """A value, moved; ``decides``: whether something is decided by it."""
        if not value.is_floating_point() or not value.numel():
            return value
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        part = torch.rand(value.shape, generator=generator, dtype=wide).mul_(2).sub_(1).mul_(self.sign).to(value.device)
        own = value.to(wide)
        moved = own * (1 + torch.finfo(value.dtype).eps * part)
        if self.decisions and decides:
            row = own.square().nan_to_num(posinf=0.0).mean(-1, keepdim=True).sqrt() if own.ndim else own.abs()
            moved = moved + _FURTHER * torch.finfo(wide).eps * row * part
        return moved.to(value.dtype)


class Reference:
    """A copy of a graph, to be run on values by the names of its placeholders.

    Values that nothing reads any more are dropped as it goes, so that it holds what one eager step holds. What Inductor
    draws at random it draws from the same seeds (:func:`dpcompile._torch.inductor_random.drawn_by_inductor`).

    Args:
        module: a joint graph, or a forward.

    Attributes:
        graph: the copy.
        draws: whether it draws random numbers.
        written: names of the placeholders that it writes to.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = plain_graph(module)
        self.graph = self.module.graph
        calls = [n for n in self.graph.nodes if n.op == "call_function"]
        self.draws = any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in calls)
        self.written = {p.name for n in calls for p in _written(n) if p.op == "placeholder"}
        self._computed = _computed(self.graph)
        self._deciding = _deciding(self.graph, self._computed)

    @property
    def outputs(self) -> list[Any]:
        """The nodes that it returns, in order; None where there is none."""
        return list(self.graph.output_node().args[0])  # type: ignore[arg-type]

    def run(
        self,
        values: Mapping[str, Any],
        random: RandomState | None,
        noise: Noise | None = None,
    ) -> tuple[list[Any], dict[str, list[Tensor]]]:
        """What the graph returns, and, by the name of the node, what it hands out.

        Args:
            values: of the placeholders; those of the others are not read. None of them is written to.
            random: where the random numbers start.
            noise: if given, every computed value is moved by it: how much of a difference rounding alone can make.
        """
        runner = _Runner(self.module, noise, self._computed, self._deciding)
        own = {n: v.clone() if n in self.written and isinstance(v, Tensor) else v for n, v in values.items()}
        arguments = [own.pop(n.name, None) for n in self.graph.find_nodes(op="placeholder")]
        with torch.no_grad(), nullcontext() if random is None else random.replayed():
            return list(runner.run(*arguments)), runner.handed


class _Runner(fx.Interpreter):
    def __init__(
        self, module: fx.GraphModule, noise: Noise | None, computed: set[fx.Node], deciding: set[fx.Node]
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.handed: dict[str, list[Tensor]] = {}
        self._noise, self._computed, self._deciding = noise, computed, deciding
        self._generator = torch.Generator().manual_seed(0 if noise is None else noise.seed)

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.dpcompile.hand_out.default:
            total, self.handed[n.name] = self.fetch_args_kwargs_from_env(n)[0]
            return total
        drawn = drawn_by_inductor(n.target)
        if drawn is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return drawn(*args, **kwargs)
        value = super().run_node(n)
        if self._noise is not None and n in self._computed and isinstance(value, Tensor):
            return self._noise.on(value, self._generator, n in self._deciding)
        return value


def _computed(graph: fx.Graph) -> set[fx.Node]:
    """The values that come out of an inexact operation on what the graph is given."""
    given: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in given for n in node.all_input_nodes):
            given.add(node)
            operation = node.args[0] if node.target is operator.getitem else node  # of several results: each
            schema = getattr(getattr(operation, "target", None), "_schema", None)
            if node.op == "call_function" and schema is not None and not schema.is_mutable:
                views = any(r.alias_info is not None for r in schema.returns)
                if not views and schema.name.partition("::")[2] not in _EXACT:
                    found.add(node)
    return found


def _deciding(graph: fx.Graph, computed: set[fx.Node]) -> set[fx.Node]:
    """The computed values by which an operation decides, also through copies and views of them."""
    found: set[fx.Node] = set()
    asked: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        decides = node.op == "call_function" and _decides(node)
        for operand in node.all_input_nodes:
            if decides or (node in asked and node not in computed):
                (found if operand in computed else asked).add(operand)
    return found


def _decides(node: fx.Node) -> bool:
    """Whether an operation's result, or its derivative, jumps as its operands pass each other or some number."""
    name = operation_name(node.target)
    value = node.meta.get("val")
    discrete = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
    return discrete or name in _JUMPS or "pool" in name


def _written(node: fx.Node) -> list[fx.Node]:
    """The operands that an operation writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    named = {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    found: list[fx.Node] = []
    fx.map_arg([v for k, v in named.items() if k in written], found.append)
    return found
