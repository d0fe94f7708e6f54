"""Float32 as IEEE says, where torch is allowed to take less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

__all__ = ["full_precision"]

_BACKENDS: tuple[Any, ...] = (
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
)
_AS_IT_IS = contextlib.nullcontext()


def full_precision() -> contextlib.AbstractContextManager[None]:
    """Float32 products and convolutions as IEEE says within, whatever is allowed outside at the time of this call."""
    allowed = [(b, precision) for b in _BACKENDS if (precision := b.fp32_precision) in ("tf32", "bf16")]
    return _changed(allowed) if allowed else _AS_IT_IS


@contextlib.contextmanager
def _changed(allowed: Sequence[tuple[Any, str]]) -> Iterator[None]:
    for backend, _ in allowed:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in allowed:
            backend.fp32_precision = precision
