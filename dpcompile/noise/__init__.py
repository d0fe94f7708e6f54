"""Noise as a function of seed, step, parameter and element."""

from dpcompile.noise.counter import Span, Stream, check_seed, fresh_seed
from dpcompile.noise.normal import add_gaussian_, gaussian, gaussians, uniform

__all__ = ["Span", "Stream", "add_gaussian_", "check_seed", "fresh_seed", "gaussian", "gaussians", "uniform"]
