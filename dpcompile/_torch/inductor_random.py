"""The random numbers that Inductor's code draws, drawn by a graph that runs uncompiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
import torch._decomp.decompositions
import torch._dynamo
from torch import fx
from torch._inductor import inductor_prims

from dpcompile._torch.aot import plain_graph
from dpcompile._torch.later import Later
from dpcompile._torch.tensors import fake_mode_of

__all__ = ["drawing_as_inductor", "drawn_by_inductor"]


_compile_fx, _virtualized = Later("torch._inductor.compile_fx"), Later("torch._inductor.virtualized")
_replace_random = Later("torch._inductor.fx_passes.replace_random")


def drawing_as_inductor(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that draws its random numbers as Inductor makes it do, behind its own passes."""
    copied = plain_graph(module)
    values = [n.meta.get("val") for n in copied.graph.nodes]
    with _virtualized.V.set_fake_mode(fake_mode_of([v for v in values if isinstance(v, torch.Tensor)])):
        _replace_random.replace_random_passes(copied)
    return copied


def drawn_by_inductor(target: Any) -> Callable[..., torch.Tensor] | None:
    """What gives the random numbers that compiled code has for one of Inductor's own operations; None for others.

    Inductor draws seeds from torch's generator and the numbers from a generator of its own, a function of seed and
    position. Run uncompiled, its operations would draw from torch's generator instead.
    """
    return _DRAWN.get(target)


def _seeds(count: int, device: Any) -> torch.Tensor:
    limits = torch.iinfo(torch.int64)
    return torch.randint(limits.min, limits.max, [count], device=device)


def _numbers(size: Sequence[int], seed: torch.Tensor, mode: str, **options: Any) -> torch.Tensor:
    return _by_position(inductor_prims.random, size, seed, mode, **options)


def _integers(low: int, high: int, size: Sequence[int], seed: torch.Tensor) -> torch.Tensor:
    return _by_position(inductor_prims.randint, size, seed, low, high)


def _by_position(prim: Any, size: Sequence[int], seed: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    """A number depends on its seed and on its position alone: those of a longer row begin with those of a shorter."""
    count = 1
    for n in size:
        count *= int(n)
    length = max(2 ** (count - 1).bit_length(), 1024) if count else 0
    found = _row_of_numbers(prim, length, seed.device, rest, tuple(sorted(options.items())))([seed])[0]
    return found[:count].reshape(tuple(size)).clone()


@lru_cache(maxsize=256)
def _row_of_numbers(
    prim: Any, length: int, device: torch.device, rest: tuple[Any, ...], options: tuple[tuple[str, Any], ...]
) -> Callable[[list[Any]], Sequence[Any]]:
    graph = fx.Graph()
    seed = graph.placeholder("seed")
    bounds = rest if prim is inductor_prims.randint else ()
    given = (*bounds, [length], seed, *(() if bounds else rest))
    graph.output((graph.call_function(prim, given, dict(options)),))
    example = torch.zeros((), dtype=torch.int64, device=device)
    with ThreadPoolExecutor(1) as own:  # of whatever mode the running backward is in, tracing must know nothing
        compiled = own.submit(_compile_fx.compile_fx, fx.GraphModule({}, graph), [example]).result()
    return lambda arguments: compiled(*arguments)


_DRAWN: dict[Any, Callable[..., torch.Tensor]] = {
    inductor_prims.seeds: _seeds,
    inductor_prims.random: _numbers,
    inductor_prims.randint: _integers,
}
