"""Which package the program uses: ``lightning`` and ``pytorch_lightning`` hold the same classes twice."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__all__ = ["pl"]


def _lightning() -> Any:
    older = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    return import_module("pytorch_lightning" if older or find_spec("lightning") is None else "lightning.pytorch")


pl: Any = _lightning()
