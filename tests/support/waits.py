"""A device that is not there, and everything that would wait for it.

Torch lets a backend be written in Python (PrivateUse1). Here is one without kernels: its tensors are fake ones, with
shapes and no values, and since they are of no CPU, the code of GPUs runs on them. What would read them is written down
and gets a value that nobody computed. To be used in a process of its own.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "hollow"
_setup_privateuseone_for_python_backend(DEVICE)
_FAKES = FakeTensorMode()  # one for the process: constants are kept
_READ_ONE = ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero")
_READ_MANY = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive")


class Waits(TorchDispatchMode):
    """Within it tensors may be on the device, and what waits for it is counted.

    Attributes:
        found: (operation, place) -> how often. A place is the innermost function of the package.
    """

    def __init__(self, package: str = "dpcompile") -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self.fakes = _FAKES
        self._package = package

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Dynamo compiles under modes that say so."""
        return True

    def __enter__(self) -> Any:
        super().__enter__()
        self.fakes.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self.fakes.__exit__(*details)
        super().__exit__(*details)

    def like(self, tensor: Tensor) -> Tensor:
        """One of its shape, on the device."""
        with self.fakes:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)

    def move(self, model: nn.Module) -> nn.Module:
        """Let the parameters and buffers of a model be on the device."""
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(self.like(p), p.requires_grad)
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = self.like(b)
        return model

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D105
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(t.device.type == DEVICE for t in tensors)
        if there and name in _READ_ONE:
            self._note(name)
            if name in ("aten::equal", "aten::is_nonzero"):
                return True
            return 0.0 if args[0].dtype.is_floating_point else args[0].dtype != torch.bool and 0
        if there and name in _READ_MANY:
            self._note(name)
            shape = (0, args[0].ndim) if name == "aten::nonzero" else (0,)
            return torch.empty(shape, dtype=torch.int64, device=DEVICE)
        if there and name == "aten::index" and any(t.dtype == torch.bool for t in tensors[1:]):
            self._note(name)
            return args[0].new_empty((0,))
        if name == "aten::_to_copy" and tensors:
            return self._copied(func, args, kwargs)
        if name == "aten::copy_" and args[0].device != args[1].device and not (args[2:] or kwargs.get("non_blocking")):
            self._note(name)
        inside = OPDEFS[name]._init_fn if name in OPDEFS else getattr(func, "in_python", None)
        if there and inside is not None:
            return self._inside(inside, args, kwargs)
        return func(*args, **kwargs)

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        source = args[0].device
        target = torch.device(kwargs.get("device") or source)
        if source.type != target.type:
            if not kwargs.get("non_blocking") or target.type == "cpu":
                self._note("aten::_to_copy")
            if target.type == "cpu":
                with unset_fake_temporarily():
                    return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)

    def _inside(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What an operation of ours runs where it has no kernel for the device."""
        with self:
            return function(*args, **kwargs)

    def _note(self, operation: str) -> None:
        frames = [f for f in traceback.extract_stack() if self._package in Path(f.filename).parts]
        place = f"{Path(frames[-1].filename).name}, {frames[-1].name}" if frames else "elsewhere"
        self.found[operation.removeprefix("aten::"), place] += 1
