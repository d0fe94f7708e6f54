"""Norms as Triton kernels."""
