"""Poisson draws: the loader, and what it rests on."""

from dpcompile.data.loader import PoissonLoader

__all__ = ["PoissonLoader"]
