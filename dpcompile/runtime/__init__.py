"""One model: its calls, its mask, its ledger."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """What models that were pickled by earlier versions name here."""
    if name in ("PrivateModule", "private_view"):
        return getattr(importlib.import_module("dpcompile.module"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
