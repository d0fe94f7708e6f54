"""Every private torch symbol that dpcompile uses, a file per subsystem of torch. Known for torch 2.11 to 2.14."""

from torch._ops import OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree

__all__ = ["OpOverload", "OpOverloadPacket", "pytree"]
