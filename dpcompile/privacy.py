"""The accountant under the name that earlier pickles and programs have for it."""

from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.accounting.calibration import calibrate_noise
from dpcompile.accounting.plan import plan_privacy
from dpcompile.accounting.solving import solve

__all__ = ["PrivacyAccountant", "calibrate_noise", "plan_privacy", "solve"]
