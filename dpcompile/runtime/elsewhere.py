"""A model on a machine that need not be there: captured without content, and planned for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dpcompile._torch.hollow import autocast_of_gpus, without_content
from dpcompile.errors import DPCompileError
from dpcompile.kernels.data_sheets import machine_of
from dpcompile.options import Options
from dpcompile.planning.elsewhere import Planned
from dpcompile.planning.plan import Plan

__all__ = ["plan_elsewhere"]


def plan_elsewhere(
    trace: Callable[[nn.Module, Options, tuple[Any, ...], dict[str, Any]], None],
    module: nn.Module,
    options: Options,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    name: str,
) -> Plan:
    """The plan of a call of the module, were it on the machine of this name.

    Model and arguments may be on any device, the meta device too: none of their values is read, and nothing is computed
    or compiled. They are captured as they would be on a GPU if they lie on one that is there, else as on a CPU, and the
    graph is planned as if it were on the GPU.

    Args:
        trace: traces a call of a module; it stops with :class:`dpcompile.planning.elsewhere.Planned`.
        module: the user's.
        options: of the user.
        call: arguments, checked.
        name: of :data:`dpcompile.kernels.data_sheets.MACHINES`.

    Raises:
        DPCompileError: there is no such machine; nothing of the model is trained; or the model is refused.
    """
    machine_of(name)
    on_gpu = torch.cuda.is_available() and any(p.is_cuda for p in module.parameters())
    device = torch.device("cuda" if on_gpu else "cpu")
    module, (args, kwargs) = without_content((module, call), device)
    options = replace(options, backend="eager", check=False, machine=name)
    try:
        with autocast_of_gpus(device):
            trace(module, options, args, kwargs)
    except Planned as found:
        return found.plan
    raise DPCompileError(
        "nothing of the model is trained on these inputs, so there is no plan",
        remedy="let parameters that the call uses need gradients (requires_grad_())",
    )
