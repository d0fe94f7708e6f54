"""Differentially private training as a compiler pass."""

from dpcompile import losses
from dpcompile.accounting.accountant import PrivacyAccountant, calibrate_noise
from dpcompile.api import dp_compile
from dpcompile.data.loader import PoissonLoader
from dpcompile.errors import DPCompileError, ExampleMixingError, PrivacyError, PrivacyWarning, UnsupportedGraphError
from dpcompile.extending import register_axis_rule, register_site
from dpcompile.module import set_mask
from dpcompile.optim.optimizer import DPOptimizer
from dpcompile.private import make_private
from dpcompile.step import compile_step

__all__ = [
    "DPCompileError",
    "DPOptimizer",
    "ExampleMixingError",
    "PoissonLoader",
    "PrivacyAccountant",
    "PrivacyError",
    "PrivacyWarning",
    "UnsupportedGraphError",
    "calibrate_noise",
    "compile_step",
    "dp_compile",
    "losses",
    "make_private",
    "register_axis_rule",
    "register_site",
    "set_mask",
]
