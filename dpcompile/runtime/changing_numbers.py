"""Python numbers that change from call to call: inputs of the graph where that can be, constants where not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from dpcompile._torch.dynamo import NumbersAreConstants, fix_numbers
from dpcompile.planning.parts import asked_parts

__all__ = ["constants_where_needed"]

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def constants_where_needed(backend: Backend) -> Backend:
    """A backend that is asked again, with the numbers' values of the moment, where it fails on a graph that has them.

    A Python float that was seen to change is an input of Dynamo's graph, and the same for all examples. Not every
    operation can be traced with such an input. With the value as a constant, under a guard, the graph is what it would
    be without the change; so is, then, the error, if there is one.
    """

    def attempt(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            return backend(gm, inputs)
        except NumbersAreConstants:
            raise
        except Exception as error:
            if asked_parts(error) is None and fix_numbers(gm):
                raise NumbersAreConstants from error
            raise

    return attempt
