"""Differentially private training as a compiler pass."""

from dpcompile.api import dp_compile
from dpcompile.errors import DPCompileError, ExampleMixingError, PrivacyError, UnsupportedGraphError

__all__ = ["DPCompileError", "ExampleMixingError", "PrivacyError", "UnsupportedGraphError", "dp_compile"]
