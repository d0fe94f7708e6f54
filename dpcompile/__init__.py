"""Differentially private training as a compiler pass."""

from dpcompile import losses
from dpcompile.api import dp_compile
from dpcompile.data import PoissonLoader
from dpcompile.errors import DPCompileError, ExampleMixingError, PrivacyError, PrivacyWarning, UnsupportedGraphError
from dpcompile.extending import register_axis_rule, register_site
from dpcompile.optim import DPOptimizer
from dpcompile.privacy import PrivacyAccountant, calibrate_noise
from dpcompile.private import make_private
from dpcompile.runtime import set_mask
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
