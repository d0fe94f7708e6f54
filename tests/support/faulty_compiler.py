"""A code generator that does harm to what compiled graphs return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import fx

from dpcompile._torch import compile as torch_compile
from dpcompile.runtime.reference import Reference

__all__ = ["Fault", "doing_harm"]

Fault = Callable[[list[Any], bool], None]


def doing_harm(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], None]:
    """In place of Inductor's code generator: it runs what is to be compiled as it stands, and then does harm."""

    def use(fault: Fault) -> None:
        def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
            graph = Reference(gm)
            names = [n.name for n in graph.graph.find_nodes(op="placeholder")]

            def run(arguments: list[Any]) -> list[Any]:
                given = dict(zip(names, arguments, strict=True))
                arguments.clear()
                results, _ = graph.run(given, None)
                fault(results, bool(options.get("is_backward")))
                return results

            return torch_compile.make_boxed(run)

        monkeypatch.setattr(torch_compile._compile_fx, "compile_fx_inner", compile_graph)

    return use
