"""Float32 as IEEE says, where torch is allowed to take less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["full_precision"]


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products and convolutions as IEEE says, whatever is allowed outside."""
    backends: list[Any] = [
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
        torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    ]
    before = [b.fp32_precision for b in backends]
    changed = [(b, p) for b, p in zip(backends, before, strict=True) if p in ("tf32", "bf16")]
    for backend, _ in changed:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in changed:
            backend.fp32_precision = precision
