"""A rewritten graph run as it stands, operation by operation: what its compiled code is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile._torch.aot import plain_graph
from dpcompile._torch.inductor_random import drawn_by_inductor
from dpcompile.runtime.random_state import RandomState

__all__ = ["Reference"]

_EXACT = {"where", "clone", "full", "full_like", "zeros_like", "ones_like", "copy", "constant_pad_nd", "cat", "relu"}


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

    @property
    def outputs(self) -> list[Any]:
        """The nodes that it returns, in order; None where there is none."""
        return list(self.graph.output_node().args[0])  # type: ignore[arg-type]

    def run(
        self, values: Mapping[str, Any], random: RandomState | None, noise: torch.Generator | None = None
    ) -> tuple[list[Any], dict[str, list[Tensor]]]:
        """What the graph returns, and, by the name of the node, what it hands out.

        Args:
            values: of the placeholders; those of the others are not read. None of them is written to.
            random: where the random numbers start.
            noise: if given, every computed value is moved by up to an epsilon of its dtype: how much of a difference
                rounding alone can make.
        """
        runner = _Runner(self.module, noise, self._computed)
        own = {n: v.clone() if n in self.written and isinstance(v, Tensor) else v for n, v in values.items()}
        arguments = [own.pop(n.name, None) for n in self.graph.find_nodes(op="placeholder")]
        with torch.no_grad(), nullcontext() if random is None else random.replayed():
            return list(runner.run(*arguments)), runner.handed


class _Runner(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, noise: torch.Generator | None, computed: set[fx.Node]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.handed: dict[str, list[Tensor]] = {}
        self._noise, self._moved = noise, computed

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.dpcompile.hand_out.default:
            total, self.handed[n.name] = self.fetch_args_kwargs_from_env(n)[0]
            return total
        drawn = drawn_by_inductor(n.target)
        if drawn is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return drawn(*args, **kwargs)
        value = super().run_node(n)
        if self._noise is not None and n in self._moved:
            return _moved(value, self._noise) if isinstance(value, Tensor) else value
        return value


def _moved(value: Tensor, noise: torch.Generator) -> Tensor:
    if not value.is_floating_point() or not value.numel():
        return value
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    factor = torch.rand(value.shape, generator=noise, dtype=wide).mul_(2).sub_(1).mul_(torch.finfo(value.dtype).eps)
    return (value.to(wide) * factor.add_(1).to(value.device)).to(value.dtype)


def _computed(graph: fx.Graph) -> set[fx.Node]:
    """The values that come out of an inexact operation on what the graph is given."""
    given: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in given for n in node.all_input_nodes):
            given.add(node)
            schema = getattr(node.target, "_schema", None)
            if node.op == "call_function" and schema is not None and not schema.is_mutable:
                views = any(r.alias_info is not None for r in schema.returns)
                if not views and schema.name.partition("::")[2] not in _EXACT:
                    found.add(node)
    return found


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
