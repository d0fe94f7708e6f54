"""One model: its calls, its mask, its ledger."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """What models that were pickled by earlier versions, and earlier programs, name here."""
    if name in ("PrivateModule", "engine_of", "private_class", "private_view", "set_mask"):
        return getattr(importlib.import_module("dpcompile.module"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
