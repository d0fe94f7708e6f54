"""Inductor's own operations, which are there once its module of them was imported."""

import torch._inductor.inductor_prims  # noqa: F401
