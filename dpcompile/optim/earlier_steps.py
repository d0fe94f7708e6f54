"""Private steps that a model took with another optimizer, of which a new accountant knows nothing."""

from __future__ import annotations

import warnings
import weakref
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from dpcompile.accounting.protocol import Accountant
from dpcompile.errors import PrivacyWarning

__all__ = ["note_step"]

_STEPPED: WeakKeyDictionary[nn.Module, tuple[int, weakref.ref[Any]]] = WeakKeyDictionary()


def note_step(optimizer: Any, module: nn.Module, accountant: Accountant | None) -> None:
    """Before a step is counted: warn if it is the first that the accountant counts, and not the model's first.

    Args:
        optimizer: that steps.
        module: the undecorated model.
        accountant: of the optimizer.

    Not seen: steps of another process, or of another module whose weights were loaded into this one.
    """
    steps, last = _STEPPED.get(module, (0, None))
    if steps and accountant is not None and accountant.steps == 0 and last is not None and last() is not optimizer:
        warnings.warn(
            f"the model took {steps} private step(s) before, with another DPOptimizer, and this one's accountant does "
            "not count them: its epsilon is that of the new steps alone. Right where the weights were set back, or the "
            "steps before were on other data; else go on with make_private(..., accountant=before.accountant, "
            "noise_multiplier=before.noise_multiplier)",
            PrivacyWarning,
            stacklevel=4,
        )
    _STEPPED[module] = steps + 1, weakref.ref(optimizer)
