"""One model: its calls, its mask, its ledger."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """What models that were pickled by earlier versions name here."""
    from dpcompile import module

    if name in ("PrivateModule", "private_view"):
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
