"""DPOptimizer, and what it rests on."""

from dpcompile.optim.optimizer import DPOptimizer

__all__ = ["DPOptimizer"]
