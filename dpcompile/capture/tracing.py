"""How a call is traced: Dynamo's settings, and what stands in for packed sequences and recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from dpcompile._torch import dynamo
from dpcompile._torch.mended_dynamo import StandIns
from dpcompile.capture import packed, recurrent

__all__ = ["one_graph", "tracing_config"]

_STAND_INS = StandIns(tuple(packed.REPLACED.items()), recurrent.layers)


def tracing_config(*, regions: bool = False, dynamic: bool | None = None) -> AbstractContextManager[None]:
    """Settings of a private compilation; see :func:`dpcompile._torch.dynamo.tracing_config`."""
    return dynamo.tracing_config(stand_ins=_STAND_INS, regions=regions, dynamic=dynamic)


def one_graph(function: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    """A function compiled as one graph under :func:`tracing_config`: :func:`dpcompile._torch.dynamo.compiled_with`."""
    config = partial(tracing_config, dynamic=dynamic)
    return dynamo.compiled_with(config, function, stand_ins=_STAND_INS, backend=backend, dynamic=dynamic)
