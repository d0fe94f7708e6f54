"""Differentially private training as a compiler pass.

Names are imported when they are first used: the compiler underneath takes seconds, and an accountant needs none of it.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpcompile import losses, schedules
    from dpcompile.accounting.accountant import PrivacyAccountant
    from dpcompile.accounting.calibration import calibrate_noise
    from dpcompile.accounting.plan import plan_privacy
    from dpcompile.accounting.solving import solve
    from dpcompile.advising.advise import advise
    from dpcompile.api import dp_compile
    from dpcompile.auditing.audit import audit
    from dpcompile.batchnorm import replace_batchnorm
    from dpcompile.data.loader import PoissonLoader
    from dpcompile.errors import DPCompileError, ExampleMixingError, PrivacyError, PrivacyWarning, UnsupportedGraphError
    from dpcompile.extending import register_axis_rule, register_site
    from dpcompile.module import PrivateModule, set_mask
    from dpcompile.noise.adaptive import AdaptiveClip
    from dpcompile.optim.optimizer import DPOptimizer
    from dpcompile.per_example import per_example_gradients
    from dpcompile.private import make_private
    from dpcompile.step import compile_step
    from dpcompile.validating import validate

__version__ = "0.1.0"

__all__ = [
    "AdaptiveClip",
    "DPCompileError",
    "DPOptimizer",
    "ExampleMixingError",
    "PoissonLoader",
    "PrivacyAccountant",
    "PrivacyError",
    "PrivacyWarning",
    "PrivateModule",
    "UnsupportedGraphError",
    "advise",
    "audit",
    "calibrate_noise",
    "compile_step",
    "dp_compile",
    "losses",
    "make_private",
    "per_example_gradients",
    "plan_privacy",
    "register_axis_rule",
    "register_site",
    "replace_batchnorm",
    "schedules",
    "set_mask",
    "solve",
    "validate",
]

# Module -> the names that are found there.
_PLACES = {
    "accounting.accountant": ("PrivacyAccountant",),
    "accounting.calibration": ("calibrate_noise",),
    "accounting.plan": ("plan_privacy",),
    "accounting.solving": ("solve",),
    "advising.advise": ("advise",),
    "api": ("dp_compile",),
    "auditing.audit": ("audit",),
    "batchnorm": ("replace_batchnorm",),
    "data.loader": ("PoissonLoader",),
    "errors": ("DPCompileError", "ExampleMixingError", "PrivacyError", "PrivacyWarning", "UnsupportedGraphError"),
    "extending": ("register_axis_rule", "register_site"),
    "module": ("PrivateModule", "set_mask"),
    "noise.adaptive": ("AdaptiveClip",),
    "optim.optimizer": ("DPOptimizer",),
    "per_example": ("per_example_gradients",),
    "private": ("make_private",),
    "step": ("compile_step",),
    "validating": ("validate",),
}


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package, imported now."""
    for place, names in _PLACES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"{__name__}.{place}"), name)
            return value
    if not name.startswith("__") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
